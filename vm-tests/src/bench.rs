//! Measurements in a machine: what a backend adds to the bare calls of its kernel.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::ValueEnum as _;

use crate::machine::{Kind, Machine, run_quietly};
use crate::{Result, run};

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// dm-thin against suspend, message and resume.
    DmThin,
    /// NILFS2 against its ioctls.
    Nilfs2,
    /// Both against btrfs.
    SideBySide,
}

impl Part {
    /// The package, and its example that measures it.
    fn example(self) -> (&'static str, &'static str) {
        match self {
            Self::DmThin => ("fsnap-dm-thin", "dm-thin-bench"),
            Self::Nilfs2 => ("fsnap-nilfs2", "nilfs2-bench"),
            Self::SideBySide => ("vm-tests", "side-by-side"),
        }
    }
}

/// Enough for what is dirty, several times over.
const MEMORY_MIB: u32 = 3072;

/// How long one may take, where each instruction is played.
const DEADLINE: Duration = Duration::from_secs(1800);

/// Builds the measurements, and runs one after the other in a machine of that kind; all of them, if none is named.
pub(crate) fn run(parts: &[Part], kind: Kind) -> Result<ExitCode> {
    let parts = if parts.is_empty() { Part::value_variants() } else { parts };
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let target = run::target_dir()?;
    let mut ended = ExitCode::SUCCESS;
    for part in parts {
        let (package, example) = part.example();
        let mut build = Command::new("cargo");
        build.args(["build", "--release", "--locked", "--example", example, "--package", package]);
        run_quietly(build.current_dir(top))?;
        let program = target.join("release/examples").join(example).to_string_lossy().into_owned();
        let machine = Machine { memory_mib: MEMORY_MIB, deadline: Some(DEADLINE), ..Machine::new(kind) };
        let code = run::program(&machine, vec![program])?;
        if code != ExitCode::SUCCESS {
            ended = code;
        }
    }
    Ok(ended)
}
