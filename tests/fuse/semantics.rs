//! The page for users is true: its examples are run as they are written, and show what is written there.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Case;

pub(crate) const CASES: &[Case] = &[("the_examples_are_true", the_examples_are_true)];

fn the_examples_are_true() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/design/semantics.md")).unwrap();
    let examples: Vec<&str> =
        page.split("```console\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let written: String = examples.concat();
    assert!(written.lines().filter(|line| line.starts_with("$ ")).count() > 15, "there are examples");
    let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut script = String::from(
        "cd \"$BASE\"; show() { printf '$ %s\\n' \"$1\"; eval \"$1\"; local status=$?; [ $status = 0 ] || echo \"[exit $status]\"; }\n",
    );
    for command in written.lines().filter_map(|line| line.strip_prefix("$ ")) {
        script.push_str(&format!("show '{}'\n", command.replace('\'', r"'\''")));
    }
    let fsnap = Path::new(env!("CARGO_BIN_EXE_fsnap")).parent().unwrap();
    let mut command = Command::new("bash");
    command.args(["-c", &script]).env("BASE", base.path()).env("FSNAP_STATE", base.path().join("state"));
    command.env("PATH", format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", fsnap.display())).stdin(Stdio::null());
    let output = command.output().unwrap();
    let shown = String::from_utf8(output.stdout).unwrap().replace(base.path().to_str().unwrap(), "/srv");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(written == shown, "the page shows:\n{written}\nbut it is:\n{shown}\n{said}");
}
