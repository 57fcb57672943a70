//! Measurements in a machine: what a backend adds to the bare calls of its kernel.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::machine::{Kind, Machine, run_quietly};
use crate::{Result, run};

/// What is measured, as examples of packages: each backend against bare calls, and the backends against each other.
const EXAMPLES: &[(&str, &str)] =
    &[("fsnap-dm-thin", "dm-thin-bench"), ("fsnap-nilfs2", "nilfs2-bench"), ("vm-tests", "side-by-side")];

/// Enough for what is dirty, several times over.
const MEMORY_MIB: u32 = 3072;

/// How long one may take.
const DEADLINE: Duration = Duration::from_secs(900);

/// Builds the measurements, and runs one after the other.
pub(crate) fn run() -> Result<ExitCode> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let target = run::target_dir()?;
    let mut ended = ExitCode::SUCCESS;
    for (package, example) in EXAMPLES {
        let mut build = Command::new("cargo");
        build.args(["build", "--release", "--locked", "--example", example, "--package", package]);
        run_quietly(build.current_dir(top))?;
        let program = target.join("release/examples").join(example).to_string_lossy().into_owned();
        let machine = Machine { memory_mib: MEMORY_MIB, deadline: Some(DEADLINE), ..Machine::new(Kind::Uml) };
        let code = run::program(&machine, vec![program])?;
        if code != ExitCode::SUCCESS {
            ended = code;
        }
    }
    Ok(ended)
}
