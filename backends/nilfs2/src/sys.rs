//! The NILFS2 ioctls, each behind a safe function that takes descriptors.
//!
//! Numbers and layouts are those of the kernel's header [linux/nilfs2_api.h], whose ioctls have the letter `n`. Any open
//! file of the file system will do as the descriptor. On any other file system they fail with `ENOTTY`.
//!
//! [linux/nilfs2_api.h]: https://git.kernel.org/pub/scm/linux/kernel/git/torvalds/linux.git/tree/include/uapi/linux/nilfs2_api.h
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// `struct nilfs_cpinfo`: what GET_CPINFO says of one checkpoint.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct CpInfo {
    /// Bits by `NILFS_CPINFO_*`.
    flags: u32,
    pad: u32,
    /// The checkpoint's number.
    cno: u64,
    /// When it was made, in seconds since 1970 by the clock of that moment.
    create: u64,
    /// Blocks that were written for it.
    nblk_inc: u64,
    inodes_count: u64,
    blocks_count: u64,
    /// In a list of snapshots the number of the next one; 0 at the end.
    next: u64,
}

/// `NILFS_CPINFO_SNAPSHOT`: the number of the flag's bit.
const CPINFO_SNAPSHOT: u32 = 0;
/// `NILFS_CPINFO_MINOR`: nothing but the file system's own books changed since the checkpoint before.
const CPINFO_MINOR: u32 = 3;

/// `struct nilfs_cpmode`: what CHANGE_CPMODE is told.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CpMode {
    cno: u64,
    /// `NILFS_CHECKPOINT` or `NILFS_SNAPSHOT`.
    mode: u32,
    pad: u32,
}

/// `NILFS_CHECKPOINT`, as a mode and as a kind of list.
const CHECKPOINT: u32 = 0;
/// `NILFS_SNAPSHOT`.
const SNAPSHOT: u32 = 1;

/// `struct nilfs_cpstat`: what GET_CPSTAT says of all checkpoints.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct CpStat {
    /// The number that the next checkpoint gets.
    cno: u64,
    /// How many there are.
    ncps: u64,
    /// How many of them are snapshots.
    nsss: u64,
}

/// `struct nilfs_argv`: an array that an ioctl fills.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Argv {
    /// Where the array lies.
    base: u64,
    /// How many members there is room for; afterwards, how many were filled.
    nmembs: u32,
    /// The size of one.
    size: u16,
    /// The kind of list.
    flags: u16,
    /// The number from which on members are wanted.
    index: u64,
}

mod call {
    nix::ioctl_write_ptr!(change_cpmode, b'n', 0x80, super::CpMode);
    nix::ioctl_read!(get_cpinfo, b'n', 0x82, super::Argv);
    nix::ioctl_read!(get_cpstat, b'n', 0x83, super::CpStat);
    nix::ioctl_read!(sync, b'n', 0x8a, u64);
}

/// The number of a checkpoint: it grows, and is never used again in one file system.
pub(crate) type Number = u64;

/// What the kernel says of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) number: Number,
    /// Seconds since 1970, by the clock of that moment.
    pub(crate) created: u64,
    /// The cleaner leaves it alone, and it can be mounted.
    pub(crate) is_snapshot: bool,
    /// No file differs from the checkpoint before.
    pub(crate) is_minor: bool,
}

/// Writes out everything that is dirty, and returns the number of the newest checkpoint (`NILFS_IOCTL_SYNC`).
///
/// If nothing was dirty, that is one that was there before. `EROFS` when the file system is mounted read-only.
pub(crate) fn sync(file: impl AsFd) -> io::Result<Number> {
    let mut number = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64.
    unsafe { call::sync(file.as_fd().as_raw_fd(), &mut number) }?;
    Ok(number)
}

/// Makes a checkpoint a snapshot (`NILFS_IOCTL_CHANGE_CPMODE`); it may be one already.
///
/// `ENOENT` if the cleaner has taken it. In memory only, until the next checkpoint is written.
pub(crate) fn make_snapshot(file: impl AsFd, number: Number) -> io::Result<()> {
    change_mode(file, number, SNAPSHOT)
}

/// Makes a snapshot a plain checkpoint; it may be one already.
///
/// `EBUSY` if it is mounted, and also if it is the newest checkpoint. `ENOENT` if there is none of that number.
pub(crate) fn make_checkpoint(file: impl AsFd, number: Number) -> io::Result<()> {
    change_mode(file, number, CHECKPOINT)
}

fn change_mode(file: impl AsFd, number: Number, mode: u32) -> io::Result<()> {
    let argument = CpMode { cno: number, mode, pad: 0 };
    // SAFETY: the descriptor is open for the call, and the kernel reads one such structure.
    unsafe { call::change_cpmode(file.as_fd().as_raw_fd(), &argument) }?;
    Ok(())
}

/// The number that the next checkpoint gets (`NILFS_IOCTL_GET_CPSTAT`); `ENOTTY` on other file systems.
pub(crate) fn next_number(file: impl AsFd) -> io::Result<Number> {
    let mut found = CpStat::default();
    // SAFETY: the descriptor is open for the call, and the kernel writes one such structure.
    unsafe { call::get_cpstat(file.as_fd().as_raw_fd(), &mut found) }?;
    Ok(found.cno)
}

/// What the kernel says of one checkpoint, if the cleaner has left it (`NILFS_IOCTL_GET_CPINFO`).
pub(crate) fn checkpoint(file: impl AsFd, number: Number) -> io::Result<Option<Checkpoint>> {
    let mut room = [CpInfo::default()];
    // A list begins with the first that is there at or after the number.
    let found = fill(file, CHECKPOINT, number, &mut room)?;
    Ok(found.first().map(told).filter(|checkpoint| checkpoint.number == number))
}

/// Every checkpoint that the cleaner has left, snapshots included, in the order of their numbers.
pub(crate) fn checkpoints(file: impl AsFd) -> io::Result<Vec<Checkpoint>> {
    let mut checkpoints: Vec<Checkpoint> = Vec::new();
    // Numbers begin with 1.
    let mut from = 1;
    loop {
        let mut room = [CpInfo::default(); ROOM];
        let found = fill(&file, CHECKPOINT, from, &mut room)?;
        let Some(last) = found.last() else { return Ok(checkpoints) };
        from = last.cno + 1;
        checkpoints.extend(found.iter().map(told));
    }
}

/// Every snapshot that there is, whoever made it, in the order of their numbers.
pub(crate) fn snapshots(file: impl AsFd) -> io::Result<Vec<Checkpoint>> {
    let mut snapshots = Vec::new();
    // 0 stands for the first one; the kernel keeps them as a list.
    let mut from = 0;
    loop {
        let mut room = [CpInfo::default(); ROOM];
        let found = fill(&file, SNAPSHOT, from, &mut room)?;
        let Some(last) = found.last() else {
            if from == 0 {
                return Ok(snapshots);
            }
            // The one from which to go on is no snapshot any more: the list is read anew.
            snapshots.clear();
            from = 0;
            continue;
        };
        from = last.next;
        snapshots.extend(found.iter().map(told));
        if from == 0 {
            return Ok(snapshots);
        }
    }
}

/// How many checkpoints are asked for at once.
const ROOM: usize = 128;

fn fill(file: impl AsFd, kind: u32, from: Number, room: &mut [CpInfo]) -> io::Result<&[CpInfo]> {
    let mut argument = Argv {
        base: room.as_mut_ptr() as u64,
        nmembs: room.len() as u32,
        size: size_of::<CpInfo>() as u16,
        flags: kind as u16,
        index: from,
    };
    // SAFETY: the descriptor is open for the call. The kernel reads the argument, and writes at most `nmembs` members of
    // `size` bytes at `base`, which is the room borrowed for this call, of plain integers; then it writes the argument.
    unsafe { call::get_cpinfo(file.as_fd().as_raw_fd(), &mut argument) }?;
    Ok(&room[..room.len().min(argument.nmembs as usize)])
}

fn told(info: &CpInfo) -> Checkpoint {
    let flag = |bit: u32| info.flags & (1 << bit) != 0;
    Checkpoint {
        number: info.cno,
        created: info.create,
        is_snapshot: flag(CPINFO_SNAPSHOT),
        is_minor: flag(CPINFO_MINOR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_file_systems_do_not_know_the_calls() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let refused = |error: io::Error| error.raw_os_error() == Some(nix::libc::ENOTTY);
        assert!(refused(next_number(&file).unwrap_err()));
        assert!(refused(sync(&file).unwrap_err()));
        assert!(refused(checkpoint(&file, 1).unwrap_err()));
        assert!(refused(make_snapshot(&file, 1).unwrap_err()));
    }

    #[test]
    fn the_layouts_are_those_of_the_header() {
        assert_eq!((size_of::<CpInfo>(), size_of::<CpMode>()), (56, 16));
        assert_eq!((size_of::<CpStat>(), size_of::<Argv>()), (24, 24));
    }
}
