//! Taking checkpoints away, as the cleaner does.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

mod call {
    nix::ioctl_write_ptr!(delete_checkpoint, b'n', 0x81, u64);
}

/// Removes a checkpoint that is no snapshot (`NILFS_IOCTL_DELETE_CHECKPOINT`).
pub(crate) fn delete_checkpoint(file: &File, number: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call, and the kernel reads one u64.
    unsafe { call::delete_checkpoint(file.as_raw_fd(), &number) }?;
    Ok(())
}
