//! `fsnap criu-args`

use fsnap::processes::Tree;
use fsnap::run::UNLINKED;

use super::{Context, Outcome, Output, hook};

/// Print what CRIU is to be told when it dumps a process: one argument a line
///
/// Files that are open or mapped and have no name any more are in no snapshot. Those of the volumes are kept with the
/// checkpoint, whatever their size, and `fsnap restore` gives them back: CRIU is told to leave them out. Others it
/// saves itself, and has to be told to whatever their size.
///
/// Ask right before the dump: criu dump -t PID --action-script HOOK $(fsnap criu-args PID). HOOK is a link to fsnap named
/// `fsnap-criu-hook`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The process, with all its descendants
    pid: i32,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = context.read()?;
    let tree = Tree::of_pid(args.pid)?;
    let external = hook::external_files(&context, &coordinator, &tree)?;
    let out = Output::new();
    for argument in UNLINKED {
        out.line(argument)?;
    }
    external.iter().try_for_each(|key| out.line(format_args!("--external\n{key}")))
}
