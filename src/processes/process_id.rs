//! A process, told apart from every other that has or had its pid.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use super::proc_dir::{ProcDir, ended, is_gone};
use super::{Error, Result};

/// A process: its pid, and when it started.
///
/// A pid alone is used again once its process has ended; together with the start time it names one process for as
/// long as the machine runs, in a record on disk too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid, in the pid namespace of fsnap.
    pub pid: i32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

/// A moment in the terms of [`ProcessId::start_time`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTicks(pub(super) u64);

impl BootTicks {
    /// Now, rounded down as the kernel rounds a start time.
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let per_second = rustix::param::clock_ticks_per_second();
        let (seconds, nanoseconds) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
        Self(seconds * per_second + nanoseconds * per_second / 1_000_000_000)
    }
}

impl ProcessId {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> Result<Self> {
        let stat = ProcDir::of(pid).and_then(|dir| dir.stat());
        let stat = stat.map_err(|source| unread(pid, source))?;
        Ok(Self { pid, start_time: stat.start_time })
    }

    /// Whether the process is still there; one that has ended and was not waited for is not.
    pub fn is_alive(self) -> bool {
        self.thread_states().is_ok_and(|states| !states.all_ended())
    }

    /// Opens a descriptor of the process, if it is still there.
    ///
    /// The descriptor can be polled for the end of the process, and a signal sent through it reaches no other
    /// ([pidfd_open(2)](https://man7.org/linux/man-pages/man2/pidfd_open.2.html)).
    pub fn open(self) -> io::Result<OwnedFd> {
        let gone = || io::Error::from(rustix::io::Errno::SRCH);
        let pid = Pid::from_raw(self.pid).ok_or_else(gone)?;
        let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        // Asked after the descriptor is open: from here on it and the answer are about one process.
        if ProcDir::of(self.pid)?.stat()?.start_time != self.start_time {
            return Err(gone());
        }
        Ok(descriptor)
    }

    /// Waits until the process has ended, at most so long, or for ever; tells whether it has.
    pub fn ends_within(self, patience: Option<Duration>) -> io::Result<bool> {
        let Ok(process) = self.open() else { return Ok(true) };
        let limit = patience.map(|patience| Timespec {
            tv_sec: patience.as_secs().cast_signed(),
            tv_nsec: patience.subsec_nanos().into(),
        });
        loop {
            match poll(&mut [PollFd::new(&process, PollFlags::IN)], limit.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                polled => return Ok(polled? > 0),
            }
        }
    }

    /// The states of all threads of the process.
    pub(crate) fn thread_states(self) -> io::Result<ThreadStates> {
        let dir = ProcDir::of(self.pid)?;
        if dir.stat()?.start_time != self.start_time {
            return Err(rustix::io::Errno::SRCH.into());
        }
        let mut states = Vec::new();
        for thread in dir.numbers("task")? {
            match dir.thread_stat(thread) {
                Ok(stat) => states.push(stat.state),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(ThreadStates(states))
    }
}

impl ProcessId {
    /// How often its threads have begun to run, all together: as long as it stands, the number stays.
    ///
    /// 0 where the kernel does not count (`schedstat` needs `CONFIG_SCHEDSTATS`, or delay accounting that is switched on).
    pub(crate) fn runs(self) -> io::Result<u64> {
        let dir = ProcDir::of(self.pid)?;
        let mut runs = 0;
        for thread in dir.numbers("task")? {
            match dir.read(&format!("task/{thread}/schedstat")) {
                // Nanoseconds run, nanoseconds waited, and how often.
                Ok(counted) => runs += third_number(&counted).unwrap_or(0),
                Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(runs)
    }
}

fn third_number(line: &[u8]) -> Option<u64> {
    std::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// Why the process with this pid cannot be looked at.
pub(super) fn unread(pid: i32, source: io::Error) -> Error {
    if is_gone(&source) {
        return Error::Gone { pid };
    }
    Error::Read { object: format!("/proc/{pid}/stat").into(), source }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pid.fmt(f)
    }
}

/// The state letters of a process's threads, as `/proc/PID/task/*/stat` gives them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ThreadStates(Vec<u8>);

impl ThreadStates {
    /// Whether every thread that still lives is stopped by a signal (`T`). One that a tracer holds (`t`) may run at any moment.
    pub(crate) fn all_stopped(&self) -> bool {
        !self.all_ended() && self.0.iter().all(|state| b"TZXx".contains(state))
    }

    /// Whether some thread is stopped, by a signal or by a tracer.
    pub(crate) fn any_stopped(&self) -> bool {
        self.0.contains(&b'T') || self.any_traced()
    }

    /// Whether a tracer holds some thread.
    pub(crate) fn any_traced(&self) -> bool {
        self.0.contains(&b't')
    }

    /// Whether no thread lives: the process can neither run nor write again.
    ///
    /// The first thread may end (`Z`) long before the others, so its state alone does not tell.
    pub(crate) fn all_ended(&self) -> bool {
        self.0.iter().all(|&state| ended(state))
    }

    /// The letter of the first thread that is not stopped.
    pub(crate) fn running(&self) -> Option<char> {
        self.0.iter().find(|state| !b"TtZXx".contains(state)).map(|&state| char::from(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ended_is_no_longer_alive() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id().cast_signed()).unwrap();
        assert!(id.is_alive());
        assert!(id.open().is_ok());
        child.kill().unwrap();
        // Not waited for yet: a zombie.
        rustix::process::waitid(
            rustix::process::WaitId::Pid(Pid::from_raw(id.pid).unwrap()),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .unwrap();
        assert!(!id.is_alive());
        child.wait().unwrap();
        assert!(!id.is_alive());
        assert!(matches!(ProcessId::of(id.pid), Err(Error::Gone { .. })));
    }

    #[test]
    fn a_reused_pid_is_another_process() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        let earlier = ProcessId { start_time: me.start_time - 1, ..me };
        assert!(me.is_alive() && !earlier.is_alive());
        assert!(me.open().is_ok() && earlier.open().is_err());
    }

    #[test]
    fn a_process_runs_on_when_its_first_thread_has_ended() {
        assert!(!ThreadStates(b"ZS".to_vec()).all_ended());
        assert!(ThreadStates(b"ZT".to_vec()).all_stopped());
        assert!(!ThreadStates(b"TD".to_vec()).all_stopped());
        assert_eq!(ThreadStates(b"TD".to_vec()).running(), Some('D'));
        assert!(ThreadStates(b"ZX".to_vec()).all_ended() && !ThreadStates(b"ZX".to_vec()).all_stopped());
    }
}
