//! The system calls that have no safe wrapper.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::mm::{MapFlags, ProtFlags};

/// Changes one byte of a file through a shared mapping that is given up at once, and flushes nothing.
///
/// The offset must lie within the file.
pub(crate) fn store_through_mapping(file: &File, offset: usize, byte: u8) -> io::Result<()> {
    let length = file.metadata()?.len() as usize;
    assert!(offset < length);
    // SAFETY: the kernel chooses the address, so nothing of this process is replaced; no Rust reference to the mapping is
    // ever made, it is gone when this function returns, and nobody shortens the file meanwhile.
    unsafe {
        let (protection, flags) = (ProtFlags::WRITE, MapFlags::SHARED);
        let base = rustix::mm::mmap(std::ptr::null_mut(), length, protection, flags, file, 0)?;
        base.cast::<u8>().add(offset).write(byte);
        rustix::mm::munmap(base, length)?;
    }
    Ok(())
}
