//! The system calls that have no safe wrapper.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc::{self, c_int};
use rustix::mm::{MapFlags, ProtFlags};

/// A shared mapping of a whole file, which need not stay open.
pub(crate) struct Mapping {
    base: *mut u8,
    length: usize,
}

impl Mapping {
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len() as usize;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address, so nothing of this process is replaced; no Rust reference to the mapping is ever made.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, flags, file, 0)? };
        Ok(Self { base: base.cast(), length })
    }

    /// Changes one byte, and flushes nothing. Nobody may have shortened the file.
    pub(crate) fn store(&self, offset: usize, byte: u8) {
        assert!(offset < self.length);
        // SAFETY: the offset lies within the mapping, which is there until this is dropped.
        unsafe { self.base.add(offset).write_volatile(byte) }
    }

    pub(crate) fn load(&self, offset: usize) -> u8 {
        assert!(offset < self.length);
        // SAFETY: as above.
        unsafe { self.base.add(offset).read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped so, and nothing points to it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.length) };
    }
}

/// A lease on a file, given back at the end.
pub(crate) struct Lease(File);

impl Lease {
    /// Takes one for writing. Nobody else may have the file open.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        // As `asm-generic/fcntl.h` has it. The signal is one that does nothing.
        const F_SETSIG: c_int = 10;
        let lease = Self(file);
        lease.call(F_SETSIG, libc::SIGURG)?;
        lease.call(libc::F_SETLEASE, libc::F_WRLCK)?;
        Ok(lease)
    }

    /// Whether somebody waits for it to be given back.
    pub(crate) fn is_wanted(&self) -> io::Result<bool> {
        Ok(self.call(libc::F_GETLEASE, 0)? != libc::F_WRLCK)
    }

    fn call(&self, command: c_int, argument: c_int) -> io::Result<c_int> {
        // SAFETY: the descriptor is open for as long as this is there, and these commands take a number and no address.
        let done = unsafe { libc::fcntl(self.0.as_raw_fd(), command, argument) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
    }
}
