//! The one device-mapper call that the `devicemapper` crate cannot make as needed, the child that makes it when this process
//! cannot, and two calls for files.
//!
//! The crate's resume waits until udev has dealt with the event that the kernel sends. The origin of a snapshot is
//! resumed while processes stand frozen, perhaps udev's own among them: nothing may be waited for.
#![allow(unsafe_code)]

use std::ffi::c_char;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicUsize, Ordering};

use devicemapper_sys as raw;
use nix::errno::Errno;
use nix::libc;
use nix::unistd::{ForkResult, Pid};

mod call {
    use devicemapper_sys as raw;

    nix::ioctl_readwrite!(dev_suspend, raw::DM_IOCTL, raw::DM_DEV_SUSPEND_CMD, raw::dm_ioctl);
}

/// Resumes the device that is called `name`, and tells nobody to wait.
///
/// Succeeds if the device was not suspended.
pub(crate) fn resume(control: impl AsFd, name: &str) -> io::Result<()> {
    if name.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    resume_by(control.as_fd().as_raw_fd(), name.bytes())
}

/// Does nothing but arithmetic and one system call, so that a signal handler may call it.
fn resume_by(control: RawFd, name: impl ExactSizeIterator<Item = u8>) -> io::Result<()> {
    let mut header = raw::dm_ioctl {
        // The first version that has this call as it is today.
        version: [4, 0, 0],
        data_size: size_of::<raw::dm_ioctl>() as u32,
        data_start: size_of::<raw::dm_ioctl>() as u32,
        ..Default::default()
    };
    // The last byte stays the zero that ends the name.
    let room = header.name.len() - 1;
    if name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in header.name.iter_mut().zip(name) {
        *to = from as c_char;
    }
    // SAFETY: the structure is the one that this call reads and writes, it says its own size, and it lives throughout.
    unsafe { call::dev_suspend(control, &mut header) }?;
    Ok(())
}

/// What a guard is told: how long the name of the device is that is about to be suspended, and the name.
pub(crate) type Order = [u8; 128];

/// Nothing is suspended any more.
pub(crate) const NOTHING: Order = [0; 128];
/// There is nothing more to guard.
pub(crate) const END: Order = [u8::MAX; 128];

/// The order to watch that device.
pub(crate) fn order(device: &str) -> io::Result<Order> {
    let mut order = NOTHING;
    let room = order.get_mut(1..=device.len()).filter(|room| !room.is_empty());
    room.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(device.as_bytes());
    order[0] = device.len() as u8;
    Ok(order)
}

/// Starts a guard that takes its orders from a pipe, by the control device; returns its pid.
///
/// The child makes no call that a signal handler could not make: other threads of this process may hold any lock.
pub(crate) fn fork_guard(control: impl AsFd, orders: impl AsFd) -> io::Result<Pid> {
    let (control, orders) = (control.as_fd().as_raw_fd(), orders.as_fd().as_raw_fd());
    // SAFETY: the child calls nothing but `guard`, which does system calls and arithmetic, and never returns.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => guard(control, orders),
    }
}

/// Runs as the guard.
fn guard(control: RawFd, orders: RawFd) -> ! {
    // SAFETY: these calls have no preconditions but valid pointers, which the literal is; what owns the files that are closed
    // is never used in this process.
    unsafe {
        libc::setsid();
        libc::chdir(c"/".as_ptr());
        let (low, high) = (control.min(orders).cast_unsigned(), control.max(orders).cast_unsigned());
        for (first, end) in [(0, low), (low + 1, high), (high + 1, u32::MAX)] {
            if first < end {
                libc::syscall(libc::SYS_close_range, first, end - 1, 0);
            }
        }
    }
    let (mut last, mut next) = (NOTHING, NOTHING);
    loop {
        // SAFETY: the array is valid for as many bytes.
        let got = unsafe { libc::read(orders, next.as_mut_ptr().cast(), next.len()) };
        match got.cast_unsigned() {
            ORDER_LENGTH if next == END => break,
            ORDER_LENGTH => last = next,
            _ if got < 0 && Errno::last_raw() == libc::EINTR => {}
            _ => {
                let name = &last[1..][..usize::from(last[0])];
                // There is nobody to tell; the note stays, and the next command tries again.
                let _ = (!name.is_empty()).then(|| resume_by(control, name.iter().copied()));
                break;
            }
        }
    }
    // SAFETY: it has no preconditions.
    unsafe { libc::_exit(0) }
}

const ORDER_LENGTH: usize = size_of::<Order>();

/// What a process that has to end at once must not leave suspended: plain memory, for a signal handler can take no lock.
static STANDING: [Standing; 16] = [const { Standing::free() }; 16];

/// One device that this process suspends.
#[derive(Debug)]
struct Standing {
    /// `FREE`, `TAKEN`, or how long the name is.
    state: AtomicUsize,
    control: AtomicI32,
    name: [AtomicU8; 128],
}

/// Nobody uses the place.
const FREE: usize = 0;
/// It is being filled.
const TAKEN: usize = usize::MAX;

impl Standing {
    const fn free() -> Self {
        Self { state: AtomicUsize::new(FREE), control: AtomicI32::new(-1), name: [const { AtomicU8::new(0) }; 128] }
    }
}

/// A device that [`resume_at_once`] resumes; no more once this is dropped.
#[derive(Debug)]
pub(crate) struct Remembered<'a> {
    place: Option<&'static Standing>,
    _control: PhantomData<BorrowedFd<'a>>,
}

impl<'a> Remembered<'a> {
    /// Remembers the device before it is suspended; with sixteen at once, further ones are not.
    pub(crate) fn new(control: BorrowedFd<'a>, name: &str) -> Self {
        let take = |place: &&Standing| {
            name.len() < place.name.len()
                && place.state.compare_exchange(FREE, TAKEN, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        let place = STANDING.iter().find(take);
        if let Some(place) = place {
            place.control.store(control.as_raw_fd(), Ordering::SeqCst);
            place.name.iter().zip(name.bytes()).for_each(|(to, from)| to.store(from, Ordering::SeqCst));
            place.state.store(name.len(), Ordering::SeqCst);
        }
        Self { place, _control: PhantomData }
    }
}

impl Drop for Remembered<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            place.state.store(FREE, Ordering::SeqCst);
        }
    }
}

/// Resumes whatever this process has suspended, or is suspending: for a signal handler, right before the process ends.
///
/// Waits for a suspension that another thread is in the middle of, as the kernel lets one call follow the other.
pub fn resume_at_once() {
    for place in &STANDING {
        let length = place.state.load(Ordering::SeqCst);
        if length == FREE || length > place.name.len() {
            continue;
        }
        let name = place.name[..length].iter().map(|byte| byte.load(Ordering::SeqCst));
        // There is nobody to tell; the note stays, and the next command tries again.
        let _ = resume_by(place.control.load(Ordering::SeqCst), name);
    }
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
