//! User-mode Linux: a kernel that is a program.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Plan;
use crate::error::Context;
use crate::{Error, Result};

/// The program and its modules, of Debian's package.
const PROGRAM: &str = "/usr/bin/linux.uml";
const MODULES: &str = "/usr/lib/uml/modules";

/// What a file system of ours or a test may need.
pub(super) const TO_LOAD: &[&str] = &[
    "overlay",
    "loop",
    "fuse",
    "dm-mod",
    "dm-thin-pool",
    "dm-flakey",
    "dm-log-writes",
    "dm-dust",
    "dm-delay",
    "dm-snapshot",
    "nilfs2",
    "unix_diag",
];

fn missing(what: &str) -> Error {
    Error::Missing { what: what.into(), package: "user-mode-linux" }
}

/// Where the modules of the installed kernel are.
pub(super) fn module_dir() -> Result<PathBuf> {
    let entries = std::fs::read_dir(MODULES).map_err(|_| missing(MODULES))?;
    let mut releases = Vec::new();
    for entry in entries {
        releases.push(entry.during("list", MODULES)?.path());
    }
    releases.sort();
    releases.pop().ok_or_else(|| missing(MODULES))
}

/// The program's part of the command that starts the machine.
pub(super) fn start(command: &mut Command, plan: &Plan<'_>, guest: &Path) -> Result<()> {
    if !Path::new(PROGRAM).exists() {
        return Err(missing(PROGRAM));
    }
    command.arg(PROGRAM);
    command.arg(format!("mem={}M", plan.memory_mib));
    command.args(["rootfstype=hostfs", "rootflags=/", "ro", "noreboot", "panic=-1"]);
    // The kernel's messages go to the standard error, the program's output to the standard output.
    command.args(["console=ttyS0", "con=null", "ssl=null", "ssl0=null,fd:2", "con0=fd:0,fd:1", "loglevel=7"]);
    command.arg(format!("ubd0={}", plan.scratch.display()));
    command.arg(format!("uml_dir={}", plan.exchange.display()));
    command.arg(format!("init={}", guest.display()));
    command.args(["--", "guest", "uml"]).arg(plan.exchange);
    Ok(())
}
