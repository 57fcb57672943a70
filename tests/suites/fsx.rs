//! fsx, in Rust: a file and a copy of it in memory, changed in all ways at random.

use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;
use std::process::Command;

use crate::branch::Branch;
use crate::{Case, run, setting};

/// Every kind of operation that Linux has.
const SETTINGS: &str = r#"
[weights]
close_open = 1
invalidate = 1
truncate = 1
fsync = 1
fdatasync = 1
punch_hole = 1
sendfile = 1
posix_fallocate = 1
posix_fadvise = 1
copy_file_range = 1
"#;

/// So many files are changed.
const FILES: u64 = 4;

pub(crate) fn cases() -> Vec<Case> {
    (0..FILES)
        .map(|number| Case {
            name: format!("fsx_{number}"),
            left_out: None,
            run: Box::new(move |branch, programs| case(branch, programs, number)),
        })
        .collect()
}

fn case(branch: &Branch, programs: &Path, number: u64) -> Result<(), String> {
    let io = |error: std::io::Error| error.to_string();
    let seed = setting("FSNAP_SUITES_SEED", RandomState::new().hash_one(number) >> 32) + number;
    let settings = branch.beside("fsx.toml");
    // One in two works with large pieces of a large file.
    let large = if number.is_multiple_of(2) { "flen = 262144\n" } else { "flen = 4194304\n[opsize]\nmax = 262144\n" };
    fs::write(&settings, format!("{large}{SETTINGS}")).map_err(io)?;
    let steps = setting("FSNAP_SUITES_STEPS", 4000);
    let mut command = Command::new(programs.join("fsx"));
    command.arg("-f").arg(settings).arg("-N").arg(steps.to_string()).arg("-S").arg(seed.to_string());
    command.arg("-P").arg(branch.beside(".")).arg(branch.dir().join("file"));
    let (done, said) = run(&mut command)?;
    if done { Ok(()) } else { Err(format!("FSNAP_SUITES_SEED={}\n{said}", seed - number)) }
}
