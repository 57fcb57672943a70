//! The socket at which a process stands by for an intent: it has all open that is needed to take the snapshots.
//!
//! The file `N.attendant` beside the lock of the intent `N` is the socket of the process that holds that lock. Both ends talk to
//! processes of the same user only; the directory is closed to others anyway. A file at which nobody listens is left by a process that
//! has ended, and says nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt};

use super::lock::{attended, io_error, unless_missing};
use super::{IntentLock, PendingCheckpoint, Result};

/// The end of it where the process listens.
#[derive(Debug)]
pub struct Attending(UnixListener);

impl Attending {
    /// Waits for the next caller; `None` if it is another user's, to which there is nothing to say.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        let (caller, _) = self.0.accept()?;
        Ok(is_ours(&caller)?.then_some(caller))
    }
}

impl AsFd for Attending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl IntentLock {
    /// Opens the socket.
    pub fn attend(&self) -> Result<Attending> {
        let path = self.attendant();
        let bind = || {
            unless_missing(std::fs::remove_file(&path))?;
            let place = Place::of(&path)?;
            UnixListener::bind(place.path())
        };
        bind().map(Attending).map_err(io_error("listen at", &path))
    }
}

/// Calls the process that stands by for a planned checkpoint that is `wanted`; `None` if none does. Looks at no database.
pub fn attendant(state: &Path, wanted: impl Fn(&PendingCheckpoint) -> bool) -> Result<Option<UnixStream>> {
    let Some(path) = attended(state, wanted)? else { return Ok(None) };
    let called = Place::of(&path).and_then(|place| UnixStream::connect(place.path()));
    // Nobody listens any more.
    let Ok(stream) = called else { return Ok(None) };
    Ok(is_ours(&stream).is_ok_and(|ours| ours).then_some(stream))
}

/// Whether a process of the same user is at the other end.
fn is_ours(stream: &UnixStream) -> io::Result<bool> {
    Ok(getsockopt(stream, sockopt::PeerCredentials)?.uid() == rustix::process::geteuid().as_raw())
}

/// A path as sockets take it: they know 107 bytes only, and that of the state directory may be longer.
struct Place {
    dir: File,
    name: PathBuf,
}

impl Place {
    fn of(path: &Path) -> io::Result<Self> {
        let (dir, name) = path.parent().zip(path.file_name()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { dir: File::open(dir)?, name: name.into() })
    }

    /// Holds as long as this is open.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd())).join(&self.name)
    }
}
