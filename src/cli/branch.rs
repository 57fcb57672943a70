//! `fsnap branch`

mod copy;

use std::ffi::OsString;
use std::sync::Arc;

use fsnap::Error;
use fsnap::checkpoint::{Checkpoint, CheckpointId};
use fsnap::coordinator::Coordinator;
use fsnap::name::Name;
use fsnap::reference;
use fsnap::run::Restores;
use fsnap_backend::{Backend, ErrorKind};
use jiff::tz::TimeZone;

use super::output::say;
use super::{Context, Failure, Outcome, Output, json};

/// Make a writable branch from a checkpoint, and print where its files are
///
/// The branch starts equal to the checkpoint and is written independently of it, of the volume, and of other branches.
/// It prints one directory per volume of the checkpoint. On a file system that keeps past states by itself, such as NILFS2,
/// `VOLUME@TIME` and `VOLUME@cp:N` make a checkpoint of one that nobody asked for, and grow from that.
///
/// With --run, a run that the checkpoint saved (`fsnap checkpoint RUN`) goes on from there on the branch, beside the original and
/// other copies.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint to grow from: an id, a prefix of one, a tag, @latest, or X~N; or VOLUME@TIME, or VOLUME@cp:N
    #[arg(value_name = "CKPT")]
    checkpoint: String,
    /// The branch's name; one is made up, if not given
    name: Option<Name>,
    /// Restore the run that was saved onto it, as a run of the branch's name; prints the name
    #[arg(long)]
    run: bool,
    /// So many branches and runs, named NAME-1 and so on
    #[arg(long, value_name = "N", default_value_t = 1, requires = "run", value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// Give the copy this terminal, and stay until it ends, with its exit code
    #[arg(long, requires = "run", conflicts_with = "count")]
    tty: bool,
    /// Print a JSON object; with --run, an array of them
    #[arg(long)]
    json: bool,
    /// Further arguments for the engine's restore, after --
    #[arg(last = true, requires = "run", value_name = "ENGINE ARGS")]
    args: Vec<OsString>,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = context.write()?;
    let (checkpoint, fresh) = match reference::past(&args.checkpoint, TimeZone::system)? {
        Some((volume, past)) => {
            let pinned = coordinator.pin(volume, &past)?;
            (pinned.checkpoint, pinned.fresh)
        }
        None => (reference::resolve(coordinator.catalog(), &args.checkpoint)?, false),
    };
    if args.run {
        let wanted =
            copy::Wanted { name: args.name, count: args.count, tty: args.tty, json: args.json, args: args.args };
        return copy::run(&context, &coordinator, &checkpoint, &wanted);
    }
    let name = match args.name {
        Some(name) => name,
        None => free_name(&coordinator, &checkpoint.id)?,
    };
    let branch = match coordinator.branch(&checkpoint, &name) {
        // What was pinned for it alone goes with it.
        Err(error) if fresh => return Err(error.and_undo(coordinator.remove_checkpoint(&checkpoint.id)).into()),
        Err(error) if is_no_space(&error) && are_copied(&coordinator, &checkpoint) => {
            Failure::from(error).report();
            say(
                "hint",
                "a branch made in a mount copies nothing: `fsnap mount DIR`, then `mkdir DIR/branches/NAME@CKPT`",
            );
            return Err(Failure::Reported);
        }
        branch => branch?,
    };
    let (out, shown) = (Output::new(), coordinator.shown());
    if args.json {
        return out.json(&json::branch(&shown, &branch));
    }
    branch.members.iter().try_for_each(|member| match shown.files_of(&branch, member) {
        Some(files) => out.line(fsnap::printable(files.as_os_str())),
        None => out.line("(not mounted: `fsnap mount DIR` shows it)"),
    })
}

fn is_no_space(error: &Error) -> bool {
    error.backend().is_some_and(|error| error.kind() == ErrorKind::NoSpace)
}

/// Whether the store copies files to make a branch.
fn are_copied(coordinator: &Coordinator, checkpoint: &Checkpoint) -> bool {
    let copied = |store: Arc<dyn Backend>| !store.store().capabilities.constant_time_clones;
    checkpoint.members.iter().any(|member| coordinator.store_of(member).is_ok_and(copied))
}

/// A name that tells where the branch came from and that no branch has.
pub(crate) fn free_name(coordinator: &Coordinator, id: &CheckpointId) -> fsnap::Result<Name> {
    let (taken, restores) = (coordinator.catalog().branches()?, Restores::of(coordinator.catalog().state()));
    let mut number = 1;
    loop {
        let name: Name = format!("{}-{number}", id.short()).parse()?;
        if taken.iter().all(|branch| branch.name != name) && !restores.is_taken(&name) {
            return Ok(name);
        }
        number += 1;
    }
}
