//! The socket at which a process stands by for an intent: it has all open that is needed to take the snapshots.
//!
//! The file `N.attendant.X` beside the lock of the intent `N` is the socket of the process that holds that lock. `X` is made from the name
//! of the engine's image directory, so that its hook finds it among many, and reads nothing for that; whether it is the right one, the
//! process itself says. Both ends talk to processes of the same user only; the directory is closed to others anyway. A file at which
//! nobody listens is left by a process that has ended, and says nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::lock::{io_error, unless_missing};
use super::{IntentLock, Result};
use crate::checkpoint::EngineImages;
use crate::processes::{Cgroup, ProcessId};

/// So many callers may wait: there is one at a time.
const BACKLOG: i32 = 16;

/// The end of it where the process listens.
#[derive(Debug)]
pub struct Attending(UnixListener);

impl Attending {
    /// Makes this process the one that the socket names to its callers: the one before has opened it, and ends.
    pub fn take_over(&self) -> io::Result<()> {
        Ok(rustix::net::listen(&self.0, BACKLOG)?)
    }

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
    pub fn attend(&self, images: &EngineImages) -> Result<Attending> {
        let path = self.attendant(&mark(images));
        let bind = || {
            unless_missing(std::fs::remove_file(&path))?;
            let place = Place::of(&path)?;
            UnixListener::bind(place.path())
        };
        bind().map(Attending).map_err(io_error("listen at", &path))
    }
}

/// Calls the processes that may stand by for what was begun for the engine's images; looks at no database.
pub fn attendants(state: &Path, images: &EngineImages) -> impl Iterator<Item = UnixStream> {
    let end = format!(".attendant.{}", mark(images));
    let files = std::fs::read_dir(state.join("intents")).into_iter().flatten().flatten().map(|entry| entry.path());
    let sockets = files.filter(move |path| path.as_os_str().as_bytes().ends_with(end.as_bytes()));
    // Where nobody listens any more, there is nobody to call.
    let called = sockets.filter_map(|path| UnixStream::connect(Place::of(&path).ok()?.path()).ok());
    called.filter(|stream| is_ours(stream).is_ok_and(|ours| ours))
}

/// Ends the process that was called if somebody has stopped or frozen it: it would answer whenever it is set going again, and nobody can wait for that.
///
/// Returns when it is gone, or if it is not stopped.
pub fn end_if_stopped(attendant: &UnixStream) -> io::Result<()> {
    let pid = getsockopt(attendant, sockopt::PeerCredentials)?.pid();
    let named = ProcessId::of(pid).map_err(io::Error::other)?;
    let process = named.open()?;
    // As long as the connection is open, so is the socket: the process is there, and its pid nobody else's. One that is not this program
    // has not taken over yet.
    let is_it = || -> io::Result<bool> {
        let program = |process: &str| rustix::fs::stat(format!("/proc/{process}/exe")).map(|it| (it.st_dev, it.st_ino));
        Ok(!is_hung_up(attendant)? && program(&pid.to_string())? == program("self")?)
    };
    let stands = || -> io::Result<bool> {
        // In a control group that is frozen, its threads look as if they slept.
        Ok(named.thread_states()?.all_stopped() || Cgroup::of_process(pid).is_some_and(|group| group.is_frozen()))
    };
    if stands()? && is_it()? {
        rustix::process::pidfd_send_signal(&process, Signal::KILL)?;
        poll(&mut [PollFd::new(&process, PollFlags::IN)], None)?;
    }
    Ok(())
}

fn is_hung_up(stream: &UnixStream) -> io::Result<bool> {
    let mut events = [PollFd::new(stream, PollFlags::empty())];
    poll(&mut events, Some(&Timespec::default()))?;
    Ok(events[0].revents().contains(PollFlags::HUP))
}

/// Eight small letters that other images hardly have (FNV-1a).
fn mark(images: &EngineImages) -> String {
    let bytes = images.images.as_path().as_os_str().as_bytes();
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    hash.to_be_bytes().iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| char::from(b'a' + digit)).collect()
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Duration;

    use super::super::{Access, Catalog, IntentId};
    use super::*;
    use crate::checkpoint::PathText;

    #[test]
    fn it_is_found_by_its_images_as_long_as_it_listens() {
        let temp = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let state = temp.path().join("d".repeat(200));
        let catalog = Catalog::open(&state, Access::Create, Duration::ZERO).unwrap();
        let lock = catalog.lock_intent(IntentId(88)).unwrap().unwrap();
        let images = |path: &str| EngineImages { name: "criu".into(), images: PathText(path.into()) };
        let attending = lock.attend(&images("/a")).unwrap();
        let mut caller = attendants(&state, &images("/a")).next().unwrap();
        caller.write_all(b"x").unwrap();
        let mut heard = [0];
        attending.accept().unwrap().unwrap().read_exact(&mut heard).unwrap();
        assert_eq!(heard, *b"x");
        assert_eq!(attendants(&state, &images("/b")).count(), 0);
        drop(attending);
        assert_eq!(attendants(&state, &images("/a")).count(), 0);
        // Its file is one of the intent's.
        lock.finish();
        assert_eq!(std::fs::read_dir(state.join("intents")).unwrap().count(), 0);
    }
}
