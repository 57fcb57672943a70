//! Whose turn it is to freeze processes.
//!
//! Two that freeze the same processes at once would set them running for each other. Whoever is going to freeze a process locks the byte
//! at the offset of its pid in the file `freezing` of the state directory. Nobody waits for other processes than its own, and the
//! kernel releases the locks when whoever holds them dies.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::lock::{io_error, options, within};
use super::{Catalog, Error, Result};
use crate::processes::Tree;

/// The file whose bytes are locked; nothing is written to it.
const FILE: &str = "freezing";

/// As long as this is there, no other fsnap of this state directory freezes the processes for which it was made.
#[derive(Debug)]
pub struct FreezeTurn(File);

impl FreezeTurn {
    /// A descriptor for programs that work on these processes: if this one is killed, it is nobody's turn before they have ended, too.
    ///
    /// Every program that is started inherits it, until it is dropped.
    pub fn keep(&self) -> Result<OwnedFd> {
        rustix::io::dup(&self.0).map_err(|error| io_error("keep locked", Path::new(FILE))(error.into()))
    }
}

impl Catalog {
    /// Waits until nobody else freezes one of these processes: [`Error::Freezing`] after `patience`.
    pub fn turn_to_freeze(&self, tree: &Tree, patience: Duration) -> Result<FreezeTurn> {
        let path = self.state.join(FILE);
        let pids: BTreeSet<i32> = tree.members().map(|member| member.id.pid).collect();
        let turn = within(patience, || lock_all(&path, &pids), || true)?;
        turn.ok_or(Error::Freezing { path })
    }
}

/// Locks all of them, or none. In the order of their pids: of those who want a common one, the first to get the lowest gets on.
fn lock_all(path: &Path, pids: &BTreeSet<i32>) -> Result<Option<FreezeTurn>> {
    let opened = options().create(true).read(true).write(true).mode(0o600).open(path);
    let file = opened.map_err(io_error("open", path))?;
    for &pid in pids {
        let byte = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: pid.into(),
            l_len: 1,
            l_pid: 0,
        };
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&byte)) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
            Err(error) => return Err(io_error("lock", path)(error.into())),
        }
    }
    Ok(Some(FreezeTurn(file)))
}
