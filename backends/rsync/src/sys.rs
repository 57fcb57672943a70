//! The one system call that has no safe wrapper.

#![allow(unsafe_code)]

use std::os::fd::AsFd;

use rustix::ioctl::{Getter, ioctl, opcode};

/// `struct fsuuid2` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct FsUuid {
    len: u8,
    uuid: [u8; 16],
}

/// The UUID of the file system of an open file (`FS_IOC_GETFSUUID`, Linux 6.9), if it tells.
pub(crate) fn file_system_uuid(file: impl AsFd) -> Option<Vec<u8>> {
    // SAFETY: the opcode is `_IOR(0x15, 0, struct fsuuid2)`, which writes at most that structure.
    let getter = unsafe { Getter::<{ opcode::read::<FsUuid>(0x15, 0) }, FsUuid>::new() };
    // SAFETY: the descriptor is open, and the getter owns the memory that is written.
    let found = unsafe { ioctl(file, getter) }.ok()?;
    found.uuid.get(..usize::from(found.len)).filter(|uuid| !uuid.is_empty()).map(<[u8]>::to_vec)
}
