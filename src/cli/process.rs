//! What a command does with its own process: its limits and signals, its end at a deadline, and children that go on without it.

pub(crate) mod deadline;
pub(crate) mod interrupt;
#[cfg(feature = "fuse")]
pub(crate) mod server;
pub(crate) mod sys;

use std::sync::OnceLock;

use fsnap::failpoint;
use nix::sys::signal::{SaFlags, SigHandler, Signal};

use super::environment;

/// How many files this process could open when it began.
static OPEN_FILES: OnceLock<Option<u64>> = OnceLock::new();

/// How many files a command may open that is started for the user; `None` if there is no limit.
pub(crate) fn open_files() -> Option<u64> {
    OPEN_FILES.get().copied().flatten()
}

/// Prepares the process: every command needs it, and none may do it twice.
pub(crate) fn prepare() {
    sys::open_standard();
    // Whoever reads our output may stop: that is an error of the call that writes it.
    let _ = sys::handle(Signal::SIGPIPE, SigHandler::SigIgn, SaFlags::empty());
    if let Some(spec) = environment::armed() {
        failpoint::arm(&spec);
    }
    // The walk of a deep tree holds one descriptor per level; the kernel's default limit is for select(2).
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let _ = OPEN_FILES.set(limit.current);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    // Older kernels tell it in a file only, and there may be no descriptor left for that by the time it is needed.
    let _ = rustix::param::page_size();
    // A file that may not grow is an error of the call that writes it, which is told and undone, and not a signal.
    let _ = sys::handle(Signal::SIGXFSZ, SigHandler::SigIgn, SaFlags::empty());
    let _ = sys::handle(Signal::SIGBUS, SigHandler::Handler(sys::end_without_page), SaFlags::empty());
}
