//! `fsnap internal`: what fsnap starts of itself; not for users.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use fsnap::engine::{StageCommand, run_dump_stage, run_program, run_stage};
use fsnap::quiesce::{GuardCommand, run_guard};
use fsnap::run::HookCommand;
use nix::sys::signal::{SaFlags, SigHandler, Signal};

use super::process::sys;
use super::{Failure, Outcome, environment, hook, say};

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
    /// Save the processes of a run from within its namespaces
    DumpStage,
    /// Become the command of a run
    Program,
}

/// Not a path: whatever takes the program's place in the file system, the same program is started.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

pub(crate) fn run(args: Args) -> Outcome {
    let (input, output) = (io::stdin().lock(), io::stdout());
    match args.part {
        Part::ThawGuard => Ok(run_guard(input, output)?),
        // It reports its failure to the one who started it.
        Part::RestoreStage => match run_stage(input, &connection()?) {
            0 => Ok(()),
            _ => Err(Failure::Reported),
        },
        Part::DumpStage => match run_dump_stage(input) {
            0 => Ok(()),
            _ => Err(Failure::Reported),
        },
        Part::Program => {
            // What is ignored stays so in the program, which did not ask for it.
            let _ = sys::handle(Signal::SIGXFSZ, SigHandler::SigDfl, SaFlags::empty());
            run_program(input);
            Err(Failure::Reported)
        }
    }
}

/// The connection to whoever started this stage, which is its standard output.
fn connection() -> Result<UnixStream, Failure> {
    let cannot = |source| fsnap::Error::Io { action: "use", object: "standard output".into(), source };
    Ok(io::stdout().as_fd().try_clone_to_owned().map_err(cannot)?.into())
}

/// Hands a call of CRIU's action script inside a run to the fsnap outside.
pub(crate) fn relay() -> Outcome {
    fsnap::engine::run_relay(environment::of_engine)
        .map_err(|error| Failure::Error(fsnap::Error::HookFailed { said: error.to_string() }))
}

/// Looks after the timers of what CRIU restores; that it cannot is no reason to end the processes.
pub(crate) fn timers() -> Outcome {
    fsnap::engine::run_for_timers(environment::of_engine).unwrap_or_else(|error| warn_of_timers(&error));
    Ok(())
}

/// To the engine's log.
pub(crate) fn warn_of_timers(error: &io::Error) {
    say("warning", &format!("a periodic timer of the processes may stand still: {error}"));
}

/// Starts the guard of a freeze.
pub(crate) fn guard_command() -> GuardCommand {
    GuardCommand { program: OWN_PROGRAM.into(), args: vec![NAME.into(), "thaw-guard".into()] }
}

/// Starts a stage of a restore.
pub(crate) fn stage_command() -> StageCommand {
    StageCommand { program: OWN_PROGRAM.into(), args: vec![NAME.into(), "restore-stage".into()] }
}

/// Starts the stage of a dump.
pub(crate) fn dump_command() -> StageCommand {
    StageCommand { program: OWN_PROGRAM.into(), args: vec![NAME.into(), "dump-stage".into()] }
}

/// Starts what becomes the command of a run.
pub(crate) fn program_command() -> StageCommand {
    StageCommand { program: OWN_PROGRAM.into(), args: vec![NAME.into(), "program".into()] }
}

/// Calls fsnap as CRIU's action script.
pub(crate) fn hook_command() -> HookCommand {
    HookCommand { program: OWN_PROGRAM.into(), name: hook::CRIU_HOOK_NAME.into() }
}
