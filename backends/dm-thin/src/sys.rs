//! The one device-mapper call that the `devicemapper` crate cannot make as needed, and two calls for files.
//!
//! The crate's resume waits until udev has dealt with the event that the kernel sends. The origin of a snapshot is
//! resumed while processes stand frozen, perhaps udev's own among them: nothing may be waited for.
#![allow(unsafe_code)]

use std::ffi::c_char;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

use devicemapper_sys as raw;

mod call {
    use devicemapper_sys as raw;

    nix::ioctl_readwrite!(dev_suspend, raw::DM_IOCTL, raw::DM_DEV_SUSPEND_CMD, raw::dm_ioctl);
}

/// Resumes the device that is called `name`, and tells nobody to wait.
///
/// Succeeds if the device was not suspended.
pub(crate) fn resume(control: impl AsFd, name: &str) -> io::Result<()> {
    let mut header = raw::dm_ioctl {
        // The first version that has this call as it is today.
        version: [4, 0, 0],
        data_size: size_of::<raw::dm_ioctl>() as u32,
        data_start: size_of::<raw::dm_ioctl>() as u32,
        ..Default::default()
    };
    // The last byte stays the zero that ends the name.
    let room = header.name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in header.name.iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    // SAFETY: the structure is the one that this call reads and writes, it says its own size, and it lives throughout.
    unsafe { call::dev_suspend(control.as_fd().as_raw_fd(), &mut header) }?;
    Ok(())
}

/// A run of bytes of a file, and where they lie on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) logical: u64,
    pub(crate) physical: u64,
    pub(crate) length: u64,
    pub(crate) kind: ExtentKind,
}

/// What is known of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExtentKind {
    /// The bytes of the device are those of the file.
    Written,
    /// The blocks are the file's, and read as zeros.
    Unwritten,
    /// Anything else: not allocated yet, packed, encrypted.
    Other,
}

/// `struct fiemap_extent` of [linux/fiemap.h].
///
/// [linux/fiemap.h]: https://git.kernel.org/pub/scm/linux/kernel/git/torvalds/linux.git/tree/include/uapi/linux/fiemap.h
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    /// Bits by `FIEMAP_EXTENT_*`.
    flags: u32,
    reserved: [u32; 3],
}

/// How many extents are asked for at once.
const ROOM: usize = 256;

/// `struct fiemap`, with room for extents behind it.
#[repr(C)]
#[derive(Debug)]
struct Fiemap {
    start: u64,
    length: u64,
    /// Bits by `FIEMAP_FLAG_*`.
    flags: u32,
    /// How many extents were filled in.
    mapped: u32,
    /// How many there is room for.
    count: u32,
    reserved: u32,
    extents: [RawExtent; ROOM],
}

/// The size of `struct fiemap` itself, which the call's number holds.
const FIEMAP_HEAD: usize = 32;
/// `FIEMAP_FLAG_SYNC`: write out the file first.
const FIEMAP_SYNC: u32 = 1;
/// `FIEMAP_EXTENT_LAST`.
const EXTENT_LAST: u32 = 1;
/// `FIEMAP_EXTENT_UNWRITTEN`.
const EXTENT_UNWRITTEN: u32 = 0x800;
/// `FIEMAP_EXTENT_MERGED` and `FIEMAP_EXTENT_SHARED`: nothing that matters here.
const EXTENT_HARMLESS: u32 = 0x1000 | 0x2000;

/// `FS_JOURNAL_DATA_FL` of linux/fs.h: contents go through the journal.
const JOURNALS_CONTENTS: nix::libc::c_long = 0x4000;

mod of_files {
    nix::ioctl_readwrite_bad!(fiemap, nix::request_code_readwrite!(b'f', 11, super::FIEMAP_HEAD), super::Fiemap);
    nix::ioctl_read!(get_flags, b'f', 1, nix::libc::c_long);
}

/// Where a file lies on its device, in order (`FS_IOC_FIEMAP`); what is not named is a hole.
pub(crate) fn extents(file: impl AsFd) -> io::Result<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut from = 0;
    loop {
        let mut room = Fiemap {
            start: from,
            length: u64::MAX - from,
            flags: FIEMAP_SYNC,
            mapped: 0,
            count: ROOM as u32,
            reserved: 0,
            extents: [RawExtent::default(); ROOM],
        };
        // SAFETY: the kernel reads the head of the structure, writes at most `count` extents behind it, for which there is
        // room, and the head; the structure is of plain integers and lives throughout.
        unsafe { of_files::fiemap(file.as_fd().as_raw_fd(), &mut room) }?;
        let filled = &room.extents[..ROOM.min(room.mapped as usize)];
        let Some(last) = filled.last() else { return Ok(found) };
        found.extend(filled.iter().map(|raw| Extent {
            logical: raw.logical,
            physical: raw.physical,
            length: raw.length,
            kind: match raw.flags & !(EXTENT_LAST | EXTENT_HARMLESS) {
                0 => ExtentKind::Written,
                EXTENT_UNWRITTEN => ExtentKind::Unwritten,
                _ => ExtentKind::Other,
            },
        }));
        let next = last.logical.saturating_add(last.length);
        if last.flags & EXTENT_LAST != 0 || next <= from {
            return Ok(found);
        }
        from = next;
    }
}

/// Whether the file's contents go through the journal of its file system (`FS_IOC_GETFLAGS`).
pub(crate) fn journals_contents(file: impl AsFd) -> io::Result<bool> {
    let mut flags = 0;
    // SAFETY: the kernel writes one integer, of no more bytes than this one has.
    unsafe { of_files::get_flags(file.as_fd().as_raw_fd(), &mut flags) }?;
    Ok(flags & JOURNALS_CONTENTS != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layouts_are_those_of_the_header() {
        assert_eq!((size_of::<RawExtent>(), std::mem::offset_of!(Fiemap, extents)), (56, FIEMAP_HEAD));
    }
}
