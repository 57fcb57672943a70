//! `fsnap engine`: fsnap calls the engine, where the engine cannot call fsnap.

mod checkpoint;
mod restore;
mod runtime;

use std::path::Path;

use fsnap::Error;
use fsnap::engine::RuntimeKind;

use super::{Failure, Outcome};
use runtime::Runtime;

/// Save a container from outside, or restore it as a second one on a branch
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    engine: Engine,
}

#[derive(Debug, clap::Subcommand)]
enum Engine {
    /// The container runtime runc
    Runc(Call),
    /// The container runtime crun
    Crun(Call),
}

#[derive(Debug, clap::Args)]
struct Call {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Checkpoint(checkpoint::Args),
    Restore(restore::Args),
}

pub(crate) fn run(args: Args) -> Outcome {
    let (kind, call) = match args.engine {
        Engine::Runc(call) => (RuntimeKind::Runc, call),
        Engine::Crun(call) => (RuntimeKind::Crun, call),
    };
    match call.command {
        Command::Checkpoint(args) => checkpoint::run(kind, &args),
        Command::Restore(args) => restore::run(kind, &args),
    }
}

fn failed(action: &'static str, object: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let object = fsnap::printable(object.as_os_str());
    move |source| Error::Io { action, object, source }.into()
}
