//! The calls that the compiler cannot check: a shared mapping, and descriptors that others left open.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::FdFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// A writable shared mapping of the beginning of a file; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the memory belongs to this value alone within the process, and is only touched by atomic operations.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`, which must be that long and stay so.
    pub(crate) fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses an address that nothing else uses.
        let start = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }

    /// Reads the word at `offset`, a multiple of 8 within the mapping.
    pub(crate) fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Stores the word at `offset`, a multiple of 8 within the mapping.
    pub(crate) fn store(&self, offset: usize, word: u64) {
        self.word(offset).store(word, Ordering::Relaxed);
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len, "no word at {offset} of {}", self.len);
        // SAFETY: within the mapping and aligned, as asserted; atomic, because the file may change under it.
        unsafe { self.start.byte_add(offset).as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no reference into it outlives `self`.
        // Failure would leave the mapping, which is harmless.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Sees to it that no descriptor but the standard ones is passed on to programs started from here.
///
/// An engine cannot dump what it does not know, such as a pipe of a terminal or of a build server.
pub(crate) fn close_on_exec() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if number > 2 {
            // SAFETY: borrowed for this one call; a descriptor that is gone by now gives EBADF.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            match rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC) {
                Ok(()) | Err(rustix::io::Errno::BADF) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}
