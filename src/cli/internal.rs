//! `fsnap internal`: what fsnap starts of itself; not for users.

use std::io;

use fsnap::engine::{StageCommand, run_stage};
use fsnap::quiesce::{GuardCommand, run_guard};

use super::{Failure, Outcome};

/// The first argument, by which fsnap knows that it was started by itself.
pub(crate) const NAME: &str = "internal";

/// A part of fsnap that it starts itself
#[derive(Debug, clap::Parser)]
#[command(name = NAME)]
pub(crate) struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, clap::Subcommand)]
enum Part {
    /// Set processes running again if the fsnap that stopped them dies
    ThawGuard,
    /// Restore processes in namespaces of their own
    RestoreStage,
}

/// Not a path: whatever takes the program's place in the file system, the same program is started.
const OWN_PROGRAM: &str = "/proc/self/exe";

pub(crate) fn run(args: Args) -> Outcome {
    let (input, output) = (io::stdin().lock(), io::stdout());
    match args.part {
        Part::ThawGuard => Ok(run_guard(input, output)?),
        // It reports its failure to the one who started it.
        Part::RestoreStage if run_stage(input, output) == 0 => Ok(()),
        Part::RestoreStage => Err(Failure::Reported),
    }
}

/// Starts the guard of a freeze.
pub(crate) fn guard_command() -> GuardCommand {
    GuardCommand { program: OWN_PROGRAM.into(), args: vec![NAME.into(), "thaw-guard".into()] }
}

/// Starts a stage of a restore.
pub(crate) fn stage_command() -> StageCommand {
    StageCommand { program: OWN_PROGRAM.into(), args: vec![NAME.into(), "restore-stage".into()] }
}
