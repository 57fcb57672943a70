//! A terminal for a run, in front of which this program stays: what is typed here goes there, and what it shows comes here.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use fsnap::Error;
use fsnap::engine::{Ended, Restored, TerminalId};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use super::super::{Failure, Outcome, say};

/// The end of a new terminal that its user sits at.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: OwnedFd,
    path: PathBuf,
    id: TerminalId,
}

impl Terminal {
    /// Makes one of the size of the terminal here, if there is one.
    pub(crate) fn open() -> Result<Self, Failure> {
        Self::make().map_err(|source| Error::Io { action: "make", object: "a terminal".into(), source }.into())
    }

    fn make() -> io::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(std::ffi::OsString::from_vec(ptsname(&master, Vec::new())?.into_bytes()));
        let found = rustix::fs::stat(&path)?;
        copy_size(&master);
        Ok(Self { master, path, id: TerminalId { rdev: found.st_rdev, dev: found.st_dev } })
    }

    /// Where the run finds it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the engine knows it by.
    pub(crate) fn id(&self) -> TerminalId {
        self.id
    }

    /// Passes on what is typed and shown, until the run has ended; fails with the exit code of its command, if that is not 0.
    pub(crate) fn relay(self, restored: Restored) -> Outcome {
        let failed = |source| Error::Io { action: "relay", object: "the terminal".into(), source };
        let _raw = Raw::set();
        let sizes = self.master.try_clone().map_err(failed)?;
        let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGWINCH]).map_err(failed)?;
        std::thread::spawn(move || signals.forever().for_each(|_| copy_size(&sizes)));
        let mut typed = File::from(self.master.try_clone().map_err(failed)?);
        // It ends with this program, for nobody can make it stop reading.
        std::thread::spawn(move || io::copy(&mut io::stdin(), &mut typed));
        let mut shown = File::from(self.master);
        let mut buffer = [0; 8192];
        loop {
            match shown.read(&mut buffer) {
                // Nobody has the other end any more.
                Ok(0) | Err(_) => break,
                Ok(length) => {
                    let mut out = io::stdout().lock();
                    out.write_all(&buffer[..length]).and_then(|()| out.flush()).map_err(Failure::Output)?;
                }
            }
        }
        match restored.wait() {
            Ended::Exited(0) => Ok(()),
            Ended::Exited(status) => Err(Failure::Ended(exit_code(status))),
            Ended::Killed(signal) => Err(Failure::Ended(exit_code(KILLED + signal))),
            Ended::Unknown => {
                say("error", "nobody knows how the command ended");
                Err(Failure::Reported)
            }
        }
    }
}

/// What shells add to the number of the signal that ended a command.
const KILLED: i32 = 128;

/// A status as the kernel passes it on to who waits: its lowest byte.
fn exit_code(status: i32) -> u8 {
    status.to_le_bytes()[0]
}

fn copy_size(terminal: impl AsFd) {
    // A terminal without a size works, too.
    if let Ok(size) = tcgetwinsize(io::stdin()) {
        let _ = tcsetwinsize(terminal, size);
    }
}

/// The terminal here passes on every key as it is; dropped, it is as before.
struct Raw(Option<Termios>);

impl Raw {
    fn set() -> Self {
        let before = tcgetattr(io::stdin()).ok().filter(|_| isatty(io::stdin()));
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        }
        Self(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
