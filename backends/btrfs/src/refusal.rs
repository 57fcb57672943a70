//! The kernel's refusals, in words that say what to do.

use std::io;

use rustix::io::Errno;
use rustix::thread::CapabilitySet;

/// Adds what is missing to an answer that means missing privileges.
pub(crate) fn explained(error: io::Error) -> io::Error {
    let refused = matches!(error.raw_os_error().map(Errno::from_raw_os_error), Some(Errno::PERM | Errno::ACCESS));
    if refused && !is_admin() {
        let text = format!("{error}; btrfs asks for CAP_SYS_ADMIN here: run as root, or choose the rsync backend");
        return io::Error::new(io::ErrorKind::PermissionDenied, text);
    }
    error
}

/// Whether this thread may do what root may do to a file system.
pub(crate) fn is_admin() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}
