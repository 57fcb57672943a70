//! What only the kernel knows of an open file: the only `unsafe` of the file system.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::libc::{self, c_int};

/// As `asm-generic/fcntl.h` has it.
const F_SETSIG: c_int = 10;

/// Whether anybody but `file`, which is open for writing, has the same file open or mapped. `true` where that cannot be told.
///
/// Only then the kernel refuses a lease; one that is given is given back at once.
pub(super) fn is_shared(file: &File) -> bool {
    let call = |command: c_int, argument: c_int| {
        // SAFETY: the descriptor is open for as long as `file` is, and these commands take a number and no address.
        unsafe { libc::fcntl(file.as_raw_fd(), command, argument) }
    };
    // Who opens the file just then has us told by a signal, which would end this process if it were not one that does nothing.
    if call(F_SETSIG, libc::SIGURG) != 0 || call(libc::F_SETLEASE, libc::F_WRLCK) != 0 {
        return true;
    }
    call(libc::F_SETLEASE, libc::F_UNLCK);
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_openings_are_seen() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // A program that another test starts has our descriptors for a moment.
        let alone = || std::iter::repeat_with(|| is_shared(file.as_file())).take(1_000_000).any(|shared| !shared);
        assert!(alone());
        for options in [File::options().read(true), File::options().write(true)] {
            let other = options.open(file.path()).unwrap();
            assert!(is_shared(file.as_file()));
            drop(other);
            assert!(alone());
        }
    }
}
