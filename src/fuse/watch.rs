//! Looking at once when the catalog has changed.
//!
//! The kernel remembers for a moment where a name leads to, and never asks about what it has found below it. So whoever serves a mount is to know when
//! a checkpoint or a branch was removed by somebody else. Where nothing tells him, because all watches are taken, the moment has to pass.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

/// One command commits several times: what comes within this time is looked at once.
const TOGETHER: Duration = Duration::from_millis(10);

/// Looks whenever something in a directory changes, until it is dropped.
pub(super) struct Watch {
    /// Closed to end it.
    end: Option<OwnedFd>,
    watching: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to look at `dir`; `look` is called in a thread of its own.
    ///
    /// # Errors
    ///
    /// The user has as many watches as he may have, or `dir` cannot be read.
    pub(super) fn start(dir: &Path, mut look: impl FnMut() + Send + 'static) -> io::Result<Self> {
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let kinds = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        inotify::add_watch(&changes, dir, kinds | WatchFlags::ONLYDIR)?;
        let (ended, end) = pipe_with(PipeFlags::CLOEXEC)?;
        let watching = std::thread::Builder::new().name("watch".into()).spawn(move || {
            while let Ok(true) = wait(&changes, &ended) {
                std::thread::sleep(TOGETHER);
                if skip(&changes).is_err() {
                    break;
                }
                look();
            }
        })?;
        Ok(Self { end: Some(end), watching: Some(watching) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end = None;
        let _ = self.watching.take().map(JoinHandle::join);
    }
}

/// Waits for a change; `false` at the end.
fn wait(changes: &OwnedFd, ended: &OwnedFd) -> rustix::io::Result<bool> {
    let mut both = [PollFd::new(ended, PollFlags::IN), PollFd::new(changes, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut both, None))?;
    Ok(both[0].revents().is_empty())
}

/// Takes what has been told so far: which file it was does not matter.
fn skip(changes: &OwnedFd) -> rustix::io::Result<()> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    loop {
        match rustix::io::read(changes, &mut buffer) {
            Ok(_) => {}
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
