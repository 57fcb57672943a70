//! `fsnap branch`

use fsnap::checkpoint::CheckpointId;
use fsnap::coordinator::Coordinator;
use fsnap::name::Name;
use fsnap::reference;
use jiff::tz::TimeZone;

use super::{Context, Outcome, Output, json};

/// Make a writable branch from a checkpoint, and print where its files are
///
/// The branch starts equal to the checkpoint and is written independently of it, of the volume, and of other branches.
/// It prints one directory per volume of the checkpoint. On a file system that keeps past states by itself, such as NILFS2,
/// `VOLUME@TIME` and `VOLUME@cp:N` make a checkpoint of one that nobody asked for, and grow from that.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint to grow from: an id, a prefix of one, a tag, @latest, or X~N; or VOLUME@TIME, or VOLUME@cp:N
    #[arg(value_name = "CKPT")]
    checkpoint: String,
    /// The branch's name; one is made up, if not given
    name: Option<Name>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.write()?;
    let (checkpoint, fresh) = match reference::past(&args.checkpoint, TimeZone::system)? {
        Some((volume, past)) => {
            let pinned = coordinator.pin(volume, &past)?;
            (pinned.checkpoint, pinned.fresh)
        }
        None => (reference::resolve(coordinator.catalog(), &args.checkpoint)?, false),
    };
    let name = match args.name {
        Some(name) => name,
        None => free_name(&coordinator, &checkpoint.id)?,
    };
    let branch = match coordinator.branch(&checkpoint, &name) {
        // What was pinned for it alone goes with it.
        Err(error) if fresh => return Err(error.and_undo(coordinator.remove_checkpoint(&checkpoint.id)).into()),
        branch => branch?,
    };
    let out = Output::new();
    if args.json {
        return out.json(&json::branch(&coordinator, &branch));
    }
    branch.members.iter().try_for_each(|member| out.line(&member.path))
}

/// A name that tells where the branch came from and that no branch has.
pub(crate) fn free_name(coordinator: &Coordinator, id: &CheckpointId) -> fsnap::Result<Name> {
    let taken = coordinator.catalog().branches()?;
    let mut number = 1;
    loop {
        let name: Name = format!("{}-{number}", id.short()).parse()?;
        if taken.iter().all(|branch| branch.name != name) {
            return Ok(name);
        }
        number += 1;
    }
}
