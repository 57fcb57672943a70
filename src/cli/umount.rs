//! `fsnap umount`

use std::path::PathBuf;

use fsnap::fuse::session;

use super::Outcome;

/// Unmount what fsnap serves
///
/// Refused while processes use it. What a killed server has left is taken off as well.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where it is mounted
    dir: PathBuf,
}

pub(crate) fn run(args: Args) -> Outcome {
    Ok(session::unmount(&args.dir)?)
}
