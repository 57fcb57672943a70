//! Values as the kernel has them, and as the tree has them.

use std::ffi::OsStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, Generation, INodeNo, ReplyEmpty, ReplyXattr, Request, TimeOrNow};

use super::overlay::{Attr, Caller, SetTime};

/// No file is ever another one's successor under the same number while the kernel knows it.
pub(super) const GENERATION: Generation = Generation(0);

/// The tree's error in the kernel's words.
pub(super) fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_i32(error.raw_os_error())
}

/// A moment as fuser wants it; what it cannot say is moved to the nearest that it can.
pub(super) fn moment(seconds: i64, nanoseconds: u64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(nanoseconds);
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.and_then(|base| base.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => match time.duration_since(UNIX_EPOCH) {
            Ok(since) => SetTime::At(i64::try_from(since.as_secs()).unwrap_or(i64::MAX), since.subsec_nanos()),
            // fuser takes the nanoseconds of a moment before 1970 away where they are to be added.
            Err(before) => {
                let before = before.duration();
                SetTime::At(-i64::try_from(before.as_secs()).unwrap_or(i64::MAX), before.subsec_nanos())
            }
        },
    }
}

pub(super) fn kind(kind: rustix::fs::FileType) -> FileType {
    use rustix::fs::FileType as Kind;
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::RegularFile | Kind::Unknown => FileType::RegularFile,
    }
}

/// A device's number as FUSE packs it.
pub(super) fn pack_device(rdev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

pub(super) fn unpack_device(packed: u32) -> u64 {
    rustix::fs::makedev((packed & 0xf_ff00) >> 8, (packed & 0xff) | ((packed >> 12) & 0xf_ff00))
}

pub(super) fn to_fuse(attr: &Attr) -> FileAttr {
    let stat = &attr.stat;
    FileAttr {
        ino: INodeNo(attr.ino),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: moment(stat.st_atime, stat.st_atime_nsec),
        mtime: moment(stat.st_mtime, stat.st_mtime_nsec),
        ctime: moment(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: kind(attr.kind),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: pack_device(attr.rdev),
        blksize: 4096,
        flags: 0,
    }
}

pub(super) fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

/// Answers a request that asks for nothing.
pub(super) fn done(result: Result<(), rustix::io::Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

/// Answers with an attribute's value, or with its length where no room was given.
pub(super) fn sized(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

/// The names of extended attributes as they are listed for whoever asks: those in `trusted` are for the superuser, as on any file system.
pub(super) fn xattr_list<'a>(request: &Request, names: impl Iterator<Item = &'a OsStr>) -> Vec<u8> {
    let mut list = Vec::new();
    for name in names.map(OsStr::as_encoded_bytes).filter(|name| request.uid() == 0 || !name.starts_with(b"trusted.")) {
        list.extend_from_slice(name);
        list.push(0);
    }
    list
}

/// The attributes of a name that leads nowhere.
pub(super) fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_before_1970_survive_the_way_through_fuser() {
        assert_eq!(moment(-2, 800_000_000), UNIX_EPOCH - Duration::from_millis(1200));
        assert_eq!(moment(5, 1), UNIX_EPOCH + Duration::new(5, 1));
        let _ = (moment(i64::MIN, 0), moment(i64::MAX, 999_999_999));
        // fuser reads (-2 s, 800 ms) as 2.8 s before 1970.
        let read = TimeOrNow::SpecificTime(UNIX_EPOCH - Duration::from_millis(2800));
        assert!(matches!(set_time(read), SetTime::At(-2, 800_000_000)));
    }

    #[test]
    fn devices_are_packed_and_unpacked() {
        for (major, minor) in [(0, 0), (8, 1), (0xfff, 0xf_ffff), (10, 229)] {
            let rdev = rustix::fs::makedev(major, minor);
            assert_eq!(unpack_device(pack_device(rdev)), rdev);
        }
    }
}
