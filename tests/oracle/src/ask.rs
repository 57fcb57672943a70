//! Asking a running oracle.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::Verdict;

/// The file of the report directory that holds the tag of the verdict asked for.
pub(crate) const REQUEST: &str = "request";

/// Held while a verdict is asked for, because there is one `request` for all processes that report there.
const LOCK: &str = "lock";

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The process does not exist, or ended before it answered.
    #[error("process {pid} is gone and gave no verdict {tag}")]
    Gone {
        /// The process asked.
        pid: i32,
        /// The tag of the verdict.
        tag: String,
    },
    /// The process did not answer in time: it is stopped, or no oracle.
    #[error("process {pid} gave no verdict {tag} within {} s: is it an oracle, and does it run?", deadline.as_secs())]
    Silent {
        /// The process asked.
        pid: i32,
        /// The tag of the verdict.
        tag: String,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// The verdict cannot be asked for or read.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Whether `text` can name a report.
pub(crate) fn is_tag(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&text.len()) && !text.starts_with(['.', '-']) && text.bytes().all(allowed)
}

/// Asks the oracle `pid`, which reports into `reports`, for a verdict and waits for it.
///
/// `tag` is 1 to 64 of `[A-Za-z0-9._-]`, not beginning with a dot or a dash, and was not used in `reports` before.
pub fn ask(pid: i32, reports: &Path, tag: &str, deadline: Duration) -> Result<Verdict, AskError> {
    let failed = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| AskError::Io { what, path, source }
    };
    let report = reports.join(format!("{tag}.json"));
    if !is_tag(tag) {
        return Err(failed("cannot use as a tag:", &report)(io::ErrorKind::InvalidInput.into()));
    }
    if report.exists() {
        return Err(failed("already given:", &report)(io::ErrorKind::AlreadyExists.into()));
    }
    let gone = || AskError::Gone { pid, tag: tag.to_owned() };

    let lock_path = reports.join(LOCK);
    let lock = File::create(&lock_path).map_err(failed("cannot open", &lock_path))?;
    lock.lock().map_err(failed("cannot lock", &lock_path))?;

    // Both events are watched for before the signal is sent, so that none is missed.
    let process = Pid::from_raw(pid).ok_or_else(gone)?;
    let pidfd = rustix::process::pidfd_open(process, PidfdFlags::empty()).map_err(|_| gone())?;
    let watch = watch(reports).map_err(failed("cannot watch", reports))?;

    let request = reports.join(REQUEST);
    crate::process::write_whole(&request, tag.as_bytes()).map_err(failed("cannot write", &request))?;
    rustix::process::pidfd_send_signal(&pidfd, Signal::USR1).map_err(|_| gone())?;

    let end = Instant::now() + deadline;
    while !report.exists() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(AskError::Silent { pid, tag: tag.to_owned(), deadline });
        }
        let mut events = [PollFd::new(&watch, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut events, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed("cannot watch", reports)(error.into())),
        }
        if !events[1].revents().is_empty() && !report.exists() {
            return Err(gone());
        }
        drain(&watch).map_err(failed("cannot watch", reports))?;
    }
    let text = std::fs::read(&report).map_err(failed("cannot read", &report))?;
    serde_json::from_slice(&text).map_err(|error| failed("cannot parse", &report)(error.into()))
}

fn watch(dir: &Path) -> io::Result<OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, dir, inotify::WatchFlags::MOVED_TO)?;
    Ok(watch)
}

/// Takes all events that are there; which file they name is looked up in the directory.
fn drain(watch: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(watch, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
