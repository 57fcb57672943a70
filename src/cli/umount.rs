//! `fsnap umount`

use std::path::PathBuf;

use fsnap::fuse::session::{self, Server};

use super::{Outcome, say};

/// Unmount what fsnap serves
///
/// Refused while processes use it. What a killed server has left is taken off as well.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where it is mounted
    dir: PathBuf,
}

pub(crate) fn run(args: Args) -> Outcome {
    if session::unmount(&args.dir)? == Server::GoesOn {
        say(
            "note",
            "it is unmounted here, and goes on being served: another mount namespace, of a container perhaps, has it as well",
        );
    }
    Ok(())
}
