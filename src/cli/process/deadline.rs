//! Ends this process when it takes too long.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigEvent, SigHandler, SigSet, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

use super::super::Failure;
use super::sys;

/// As long as this lives, the process ends when its time is over, whatever it is doing; with exit code 1.
///
/// By a signal and not by a thread: a thread costs a tenth of a millisecond to start, while processes are frozen.
#[derive(Debug)]
pub(crate) struct Deadline(#[expect(dead_code, reason = "the timer is disarmed when it is dropped")] Timer);

impl Deadline {
    /// Lets the end of the process take `file` with it: what it says is not to be believed then.
    pub(crate) fn removes(&self, file: &Path) -> io::Result<()> {
        let path = CString::new(file.as_os_str().as_bytes())?;
        sys::NOTE.get_or_init(|| path);
        Ok(())
    }

    /// Ends the process after `time`, with `failure` as its last words. One deadline at a time.
    pub(crate) fn set(time: Duration, failure: &Failure) -> io::Result<Self> {
        sys::LAST_WORDS.get_or_init(|| failure.to_text());
        sys::handle(Signal::SIGALRM, SigHandler::Handler(sys::end), SaFlags::SA_RESTART)?;
        // Whoever started us may have blocked it.
        SigSet::from(Signal::SIGALRM).thread_unblock()?;
        let notify = SigevNotify::SigevSignal { signal: Signal::SIGALRM, si_value: 0 };
        let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify))?;
        timer.set(Expiration::OneShot(TimeSpec::from_duration(time)), TimerSetTimeFlags::empty())?;
        Ok(Self(timer))
    }
}

/// Lets signals that end a process wait, but for the deadline's, when nothing is left to do but to say that it was done.
pub(crate) fn hold_off_signals() -> io::Result<()> {
    let signals = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
    Ok(signals.into_iter().collect::<SigSet>().thread_block()?)
}
