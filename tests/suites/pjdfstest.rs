//! pjdfstest, in Rust: what POSIX says of each call, and of each error.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::branch::Branch;
use crate::{Case, run};

/// What Linux has, and two users that a Debian has.
///
/// Nothing is mounted read-only for the tests of `EROFS`: mount(8) would start a program of the file system's name for that.
const SETTINGS: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}

[settings]
naptime = 0.02

[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// Tests that may fail, and why.
const EXCLUDED: &[(&str, &str)] = &[(
    "rename::updates_link_parent",
    "the link count of a directory is 1, which says that nobody counts, as on btrfs",
)];

pub(crate) fn cases() -> Vec<Case> {
    vec![Case { name: "pjdfstest".into(), left_out: None, run: Box::new(case) }]
}

fn case(branch: &Branch, programs: &Path) -> Result<(), String> {
    let settings = branch.beside("pjdfstest.toml");
    fs::write(&settings, SETTINGS).map_err(|error| error.to_string())?;
    let mut command = Command::new(programs.join("pjdfstest"));
    let (_, said) = run(command.arg("-c").arg(settings).arg("-p").arg(branch.dir()).arg("-s").arg(branch.other()))?;
    let summary = said.lines().find(|line| line.starts_with("Summary: ")).ok_or(&said)?;
    println!("pjdfstest on {}: {summary}", branch.ground().name());
    let failed = said.lines().filter_map(|line| line.split_once(' ').filter(|(_, rest)| rest.trim() == "FAILED"));
    let failed: Vec<_> = failed.map(|(name, _)| name).collect();
    let worse: Vec<_> = failed.iter().filter(|name| !EXCLUDED.iter().any(|(known, _)| known == *name)).collect();
    let counted = summary.split_once(" failed").and_then(|(text, _)| text.rsplit(' ').next()?.parse().ok());
    if counted != Some(failed.len()) {
        return Err(format!("not understood: {summary}\n{said}"));
    }
    if worse.is_empty() { Ok(()) } else { Err(format!("{worse:?}\n{said}")) }
}
