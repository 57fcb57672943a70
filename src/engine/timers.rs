//! Timers of restored processes that CRIU leaves still.
//!
//! A periodic timer behind a descriptor (`timerfd_create(2)`) that has expired and was not read is not armed: the kernel arms it when it is read.
//! CRIU (4.1.1) takes it for one that is off, and restores what is to be read. That is read, it never expires again, and an event loop that lives by
//! it stands still. It can be told from one that is off as long as nobody has read it, before the processes run on; then it is set to expire at once.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use rustix::time::{ClockId, Itimerspec, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_settime};

use crate::processes::Tree;

/// The variable that makes this program CRIU's action script for timers, in a restore by fsnap.
pub(super) const VARIABLE: &str = "FSNAP_TIMERS";
/// What descriptors of timers are links to.
const LINK: &str = "anon_inode:[timerfd]";

/// What `/proc/PID/fdinfo` says of a timer.
#[derive(Debug, PartialEq, Eq)]
struct Timer {
    clock: i32,
    ticks: u64,
    flags: u32,
    /// Until it expires, in seconds and nanoseconds.
    left: (i64, i64),
    interval: (i64, i64),
}

impl Timer {
    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()));
        let pair = |name: &str| {
            let (seconds, nanoseconds) = value(name)?.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
            Some((seconds.parse().ok()?, nanoseconds.parse().ok()?))
        };
        Some(Self {
            clock: value("clockid")?.parse().ok()?,
            ticks: value("ticks")?.parse().ok()?,
            flags: u32::from_str_radix(value("settime flags")?, 8).ok()?,
            left: pair("it_value")?,
            interval: pair("it_interval")?,
        })
    }

    /// Whether it is periodic and has expired. One that was switched off has not.
    fn stands(&self) -> bool {
        self.left == (0, 0) && self.interval != (0, 0) && self.ticks > 0
    }

    /// Sets it to expire now, and to go on from there.
    fn arm(&self, timer: BorrowedFd<'_>) -> io::Result<()> {
        let flags = TimerfdTimerFlags::from_bits_retain(self.flags);
        let now = match flags.contains(TimerfdTimerFlags::ABSTIME) {
            true => clock_gettime(ClockId::try_from(self.clock).map_err(|_| io::ErrorKind::Unsupported)?),
            // Nothing would switch it off.
            false => Timespec { tv_sec: 0, tv_nsec: 1 },
        };
        let (tv_sec, tv_nsec) = self.interval;
        timerfd_settime(timer, flags, &Itimerspec { it_interval: Timespec { tv_sec, tv_nsec }, it_value: now })?;
        Ok(())
    }
}

/// Whether a program that was called without arguments is the action script that looks after the timers of what is restored.
pub fn is_for_timers(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    variable(VARIABLE).is_some() && variable("CRTOOLS_SCRIPT_ACTION").is_some()
}

/// Does what this call of the action script is for: nothing, before the processes are there.
pub fn run_for_timers(variable: impl Fn(&str) -> Option<OsString>) -> io::Result<()> {
    if variable("CRTOOLS_SCRIPT_ACTION").is_none_or(|action| action != "post-restore") {
        return Ok(());
    }
    let root = variable("CRTOOLS_INIT_PID").and_then(|pid| pid.to_str()?.parse().ok());
    let root = root.ok_or_else(|| io::Error::other("CRIU does not say which processes it has restored"))?;
    arm(&Tree::of_pid(root).map_err(io::Error::other)?)
}

/// Arms what stands of the timers of a tree that is restored and does not run yet.
///
/// The first failure is returned when all of its processes were looked at. Each runs as well as if nobody had looked.
pub fn arm(tree: &Tree) -> io::Result<()> {
    let mut done = Ok(());
    for member in tree.members() {
        let armed = member.id.open().and_then(|process| arm_those_of(member.id.pid, process.as_fd()));
        done = done.and(armed);
    }
    done
}

fn arm_those_of(pid: i32, process: BorrowedFd<'_>) -> io::Result<()> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        if std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() != OsStr::new(LINK)) {
            continue;
        }
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
        if let Some(timer) = Timer::parse(&info).filter(Timer::stands) {
            timer.arm(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?.as_fd())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_is_told_from_what_goes_and_what_is_off() {
        let stands = |ticks: u64, left: &str, interval: &str| {
            let text = format!(
                "pos:\t0\nflags:\t02\nclockid: 1\nticks: {ticks}\nsettime flags: 01\nit_value: {left}\nit_interval: {interval}\n"
            );
            let timer = Timer::parse(&text).unwrap();
            assert_eq!((timer.clock, timer.flags), (1, 1));
            timer.stands()
        };
        assert!(stands(1, "(0, 0)", "(0, 20000000)") && stands(7, "(0, 0)", "(3, 0)"));
        assert!(!stands(0, "(0, 0)", "(0, 20000000)"), "off");
        assert!(!stands(1, "(0, 5)", "(0, 20000000)"), "goes");
        assert!(!stands(1, "(0, 0)", "(0, 0)"), "expired for good");
        assert_eq!(Timer::parse("pos:\t0\nflags:\t02\n"), None);
    }
}
