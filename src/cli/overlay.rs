//! `fsnap overlay`

use std::path::PathBuf;

use fsnap::fuse::overlay::{Origin, Overlay, note};
use fsnap::fuse::session::{self, Options};
use fsnap::fuse::{lower, places};

use super::Outcome;
use super::process::server;

/// Write to a directory copy-on-write
///
/// DIR then shows LOWER, and takes writes; LOWER itself is never changed. STORE keeps everything that was written, and must
/// be a directory of its own: mounting with the same LOWER and STORE again shows the same files. `fsnap umount DIR` ends it.
///
/// Mounted by root, every user sees it, and the permissions of its files hold.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory to begin with
    lower: PathBuf,
    /// The directory that keeps the changes; made if it does not exist
    store: PathBuf,
    /// Where to mount
    dir: PathBuf,
    /// Serve in this process, until it is unmounted or terminated
    #[arg(long)]
    foreground: bool,
    /// Let other users see it, although it is not root who mounts
    #[arg(long)]
    allow_other: bool,
    /// Let set-id bits have an effect
    #[arg(long)]
    suid: bool,
    /// Let device nodes be opened
    #[arg(long)]
    dev: bool,
    /// Tell on standard output that it is mounted, and detach from the terminal then
    #[arg(long, hide = true)]
    detach: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    if args.foreground || args.detach {
        return serve(&args);
    }
    let options = [(args.allow_other, "--allow-other"), (args.suid, "--suid"), (args.dev, "--dev")];
    let paths = [&args.lower, &args.store, &args.dir].map(|path| server::absolute(path));
    server::start("overlay", &options, &paths.into_iter().collect::<Result<Vec<_>, _>>()?)
}

fn serve(args: &Args) -> Outcome {
    places::check_apart(&args.lower, &args.store)?;
    places::check_shown(&args.dir, [args.lower.clone(), args.store.clone()])?;
    let overlay = Overlay::open(lower::of_dir(&args.lower)?, &args.store).map_err(session::Error::from)?;
    let source = server::absolute(&args.store)?;
    let below = server::absolute(&args.lower)?;
    note(&source, &Origin::Dir(below.canonicalize().unwrap_or(below)))?;
    let options = Options {
        allow_other: args.allow_other || rustix::process::geteuid().is_root(),
        suid: args.suid,
        dev: args.dev,
        ..Options::default()
    };
    let ready = || {
        if args.detach { server::ready() } else { server::notify_ready() }
    };
    Ok(session::serve(overlay, &source, &args.dir, options, ready)?)
}
