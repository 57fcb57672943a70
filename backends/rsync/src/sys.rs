//! The system calls that have no safe wrapper.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Getter, Updater, ioctl, opcode};

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

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct FsXattr {
    xflags: u32,
    others: [u32; 6],
}

/// `FS_XFLAG_REALTIME` of linux/fs.h.
const REALTIME: u32 = 1;

/// Whether a file's data lie in the realtime section of XFS (`FS_IOC_FSGETXATTR`), if the file system tells.
pub(crate) fn is_realtime(file: impl AsFd) -> Option<bool> {
    // SAFETY: the opcode is `_IOR('X', 31, struct fsxattr)`, which writes at most that structure.
    let getter = unsafe { Getter::<{ opcode::read::<FsXattr>(b'X', 31) }, FsXattr>::new() };
    // SAFETY: the descriptor is open, and the getter owns the memory that is written.
    let found = unsafe { ioctl(file, getter) }.ok()?;
    Some(found.xflags & REALTIME != 0)
}

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mapped {
    pub(crate) logical: u64,
    pub(crate) physical: u64,
    pub(crate) length: u64,
    reserved64: [u64; 2],
    pub(crate) flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` of linux/fiemap.h without its last member.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MapHead {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

const MAPPED_AT_ONCE: usize = 256;

/// `struct fiemap` with room for extents.
#[repr(C)]
struct Map {
    head: MapHead,
    extents: [Mapped; MAPPED_AT_ONCE],
}

/// Some of the pieces of a file from `from` on, in order (`FS_IOC_FIEMAP`); none if there are no more.
pub(crate) fn extents(file: impl AsFd, from: u64) -> io::Result<Vec<Mapped>> {
    let head =
        MapHead { start: from, length: u64::MAX - from, extent_count: MAPPED_AT_ONCE as u32, ..MapHead::default() };
    let mut map = Box::new(Map { head, extents: [Mapped::default(); MAPPED_AT_ONCE] });
    // SAFETY: the opcode is `_IOWR('f', 11, struct fiemap)`. Its structure is followed by `extent_count` extents, and
    // nothing is written beyond them.
    let updater = unsafe { Updater::<{ opcode::read_write::<MapHead>(b'f', 11) }, Map>::new(&mut map) };
    // SAFETY: the descriptor is open, and the updater borrows the memory that is written.
    unsafe { ioctl(file, updater) }?;
    let found = (map.head.mapped_extents as usize).min(MAPPED_AT_ONCE);
    Ok(map.extents[..found].to_vec())
}
