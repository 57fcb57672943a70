//! `fsnap mount`

use std::path::{Path, PathBuf};
use std::time::Duration;

use fsnap::checkpoint::Checkpoint;
use fsnap::coordinator::Coordinator;
use fsnap::fuse::browse::Records;
use fsnap::fuse::places;
use fsnap::fuse::session::{self, Options};
use fsnap::name::Name;

use super::process::server;
use super::{Context, Failure, Outcome, json, say};

/// Show every checkpoint and branch as files
///
/// DIR then has, read-only, ids/ID/VOLUME for each checkpoint's files, and links to these: latest, tags/TAG and
/// snapshots/TIME. In branches/NAME/VOLUME are the files of a branch, to be written; `mkdir DIR/branches/NAME@CKPT` makes one.
/// The file README in it tells more. New checkpoints show up by themselves. `fsnap umount DIR` ends it.
///
/// A snapshot is made ready when somebody first looks at its files, and let go when nobody did for a while.
///
/// With --native, who looks into a snapshot works on its own file system: as fast, and with birth times. It is a mount, and a device of its
/// own: `find -xdev` and `tar --one-file-system` stop there. One that nobody uses is taken off after a minute or two.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to mount
    dir: PathBuf,
    /// Serve in this process, until it is unmounted or terminated, and say what cannot be read and why
    #[arg(long)]
    foreground: bool,
    /// Let other users see it; the permissions of the files hold
    #[arg(long)]
    allow_other: bool,
    /// Let set-id bits have an effect, but for snapshots that are attached; for root
    #[arg(long)]
    suid: bool,
    /// Let device nodes be opened, but for snapshots that are attached; for root
    #[arg(long)]
    dev: bool,
    /// Attach snapshots of btrfs, dm-thin and NILFS2 instead of reading them through FUSE; for root
    #[arg(long)]
    native: bool,
    /// For how many seconds a snapshot stays ready after the last look at it
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..), hide = true)]
    idle: u64,
    /// Tell on standard output that it is mounted, and detach from the terminal then
    #[arg(long, hide = true)]
    detach: bool,
}

/// How long a look waits for another command that changes the catalog.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn run(args: Args) -> Outcome {
    if args.foreground || args.detach {
        return serve(&args);
    }
    let dir = server::absolute(&args.dir)?;
    let options =
        [(args.allow_other, "--allow-other"), (args.suid, "--suid"), (args.dev, "--dev"), (args.native, "--native")];
    server::start("mount", &options, &[dir])
}

fn serve(args: &Args) -> Outcome {
    let context = Context::load()?;
    // Whatever stands against reading the catalog is told now, and not by numbers later.
    places::check_shown(&args.dir, needed(&context, &context.read()?)?)?;
    let branches = context.config.branches.clone();
    let records = Records { state: context.state.clone(), patience: PATIENCE, describe, branches };
    let report = if args.foreground { |error: &fsnap::Error| say("error", &error.to_string()) } else { |_: &_| {} };
    let options = Options { allow_other: args.allow_other, suid: args.suid, dev: args.dev, native: args.native };
    let idle = Duration::from_secs(args.idle);
    let ready = || {
        if args.detach { server::ready() } else { server::notify_ready() }
    };
    Ok(session::serve_all(records, report, source(&context), &args.dir, options, idle, ready)?)
}

/// What must not be hidden by the mount.
fn needed(context: &Context, coordinator: &Coordinator) -> Result<Vec<PathBuf>, Failure> {
    let catalog = coordinator.catalog();
    let volumes = catalog.volumes()?.into_iter().map(|volume| volume.path.0);
    let stores = catalog.stores()?.into_iter().map(|store| store.place.0);
    Ok([context.state.clone()]
        .into_iter()
        .chain(context.config.branches.clone())
        .chain(stores)
        .chain(volumes)
        .collect())
}

/// What the mount is said to come from.
fn source(context: &Context) -> &Path {
    &context.state
}

/// What `fsnap show --json` prints.
fn describe(checkpoint: &Checkpoint, tags: &[Name]) -> String {
    let mut text = serde_json::to_string_pretty(&json::checkpoint(checkpoint, tags)).unwrap_or_default();
    text.push('\n');
    text
}
