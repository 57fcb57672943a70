//! System calls that never leave a tree: the one way in which backends touch a volume's files.
//!
//! A volume may belong to a hostile process that renames directories and plants symbolic links while fsnap runs as
//! root. Therefore every call here takes a directory's descriptor and *one* name, and no call follows a symbolic link
//! in that name ([openat2(2)], `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS`, and the `*at` calls with
//! `AT_SYMLINK_NOFOLLOW`). What was opened is checked by `fstat`, not by its name. `std::fs` by path is not used on
//! volumes anywhere.
//!
//! [openat2(2)]: https://man7.org/linux/man-pages/man2/openat2.2.html

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags, Timespec,
    Timestamps, Uid,
};
use rustix::io::Errno;

use crate::{Error, FileKind, FileMeta, IoContext, Result, Timestamp, Xattrs};

/// Opens the directory that `path` names; its last component may not be a symbolic link.
///
/// This, [`open_volume`] and [`leads_to`] are the only calls here that take a whole path: for roots that the user named.
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens the directory that a user names as a volume of a backend, and refuses what no backend takes.
///
/// [`ErrorKind::NotAVolume`](crate::ErrorKind::NotAVolume) for a relative path, a symbolic link, and anything that is no directory;
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is nothing.
pub fn open_volume(dir: &Path, kind: &'static str) -> Result<OwnedFd> {
    let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind, reason: reason.to_owned() };
    if !dir.is_absolute() {
        return Err(refused("its path is not absolute"));
    }
    // Put together anew, so that a slash at the end does not make the kernel follow a link there.
    open_root(&dir.components().collect::<PathBuf>()).or_else(|error| {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT) => Err(Error::NotFound { what: dir.display().to_string() }),
            // With both O_DIRECTORY and O_NOFOLLOW the kernel says of a symbolic link that it is no directory.
            Some(Errno::LOOP | Errno::NOTDIR) => {
                Err(refused("it is a symbolic link or no directory; name the directory itself"))
            }
            _ => Err(error).context("open", dir),
        }
    })
}

/// Whether the path of a volume still leads to the directory that was opened by it, without opening it again.
///
/// `false` for whatever else the path leads to, a symbolic link to the directory included, and where it cannot be followed.
pub fn leads_to(dir: &Path, opened: impl AsFd) -> io::Result<bool> {
    // Put together anew for the same reason as when it was opened.
    let dir = dir.components().collect::<PathBuf>();
    let wanted = StatxFlags::TYPE | StatxFlags::INO;
    let Ok(now) = rustix::fs::statx(rustix::fs::CWD, &dir, AtFlags::SYMLINK_NOFOLLOW, wanted) else { return Ok(false) };
    let then = rustix::fs::statx(opened, "", AtFlags::EMPTY_PATH, wanted)?;
    let place = |found: &Statx| (found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
    Ok(place(&now) == place(&then))
}

/// Opens the directory `name` in `dir`, without crossing onto another mount (`EXDEV` then).
pub fn open_dir(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    open(dir, name, OFlags::RDONLY | OFlags::DIRECTORY, ResolveFlags::NO_XDEV)
}

/// Opens the regular file `name` in `dir` for reading.
///
/// Never blocks on a fifo and never touches a device: anything but a regular file is `EINVAL`.
pub fn open_file(dir: impl AsFd, name: &OsStr) -> io::Result<File> {
    open_known_file(dir, name).map(|(file, _)| file)
}

/// The same, with what was read of it on the way.
pub fn open_known_file(dir: impl AsFd, name: &OsStr) -> io::Result<(File, FileMeta)> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    // O_NOATIME keeps reading from changing the volume; only the owner may ask for it.
    let descriptor = match open(dir.as_fd(), name, flags | OFlags::NOATIME, ResolveFlags::NO_XDEV) {
        Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
            open(dir, name, flags, ResolveFlags::NO_XDEV)?
        }
        opened => opened?,
    };
    let meta = stat_fd(&descriptor)?;
    match meta.kind {
        FileKind::File => Ok((File::from(descriptor), meta)),
        _ => Err(Errno::INVAL.into()),
    }
}

/// Opens `name` in `dir` whatever it is, as a handle that reads and writes nothing (`O_PATH`).
pub fn open_handle(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    open(dir, name, OFlags::PATH | OFlags::NOFOLLOW, ResolveFlags::empty())
}

/// Makes the regular file `name` in `dir`, which must not exist, and opens it for reading and writing.
pub fn create_file(dir: impl AsFd, name: &OsStr, mode: u32) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    check_name(name)?;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(mode))?))
}

fn open(dir: impl AsFd, name: &OsStr, flags: OFlags, more: ResolveFlags) -> io::Result<OwnedFd> {
    check_name(name)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | more;
    // O_PATH with O_NOFOLLOW opens the link itself; RESOLVE_NO_SYMLINKS would refuse it.
    let resolve = if flags.contains(OFlags::PATH) { resolve - ResolveFlags::NO_SYMLINKS } else { resolve };
    loop {
        match rustix::fs::openat2(&dir, name, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // EAGAIN: a rename raced with the kernel's own check of RESOLVE_BENEATH; EINTR: a signal.
            Err(Errno::AGAIN | Errno::INTR) => {}
            opened => return Ok(opened?),
        }
    }
}

/// Refuses what is not one name: a caller that lets a path through has a bug, and it must not become a hole.
fn check_name(name: &OsStr) -> io::Result<()> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno::INVAL.into());
    }
    Ok(())
}

const STATX_WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// The attributes of `name` in `dir`, a symbolic link's own included.
pub fn stat(dir: impl AsFd, name: &OsStr) -> io::Result<FileMeta> {
    check_name(name)?;
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    meta_of(&rustix::fs::statx(dir, name, flags, STATX_WANTED)?)
}

/// The attributes of an open file.
pub fn stat_fd(file: impl AsFd) -> io::Result<FileMeta> {
    meta_of(&rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, STATX_WANTED)?)
}

/// What a walk needs to know of a file besides its attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Its attributes.
    pub meta: FileMeta,
    /// The device number of its file system; a btrfs subvolume has its own.
    pub device: u64,
    /// Another file system is mounted here, or another file.
    pub mount_root: bool,
    /// `chattr +i` or `+a` protects it.
    pub immutable: bool,
}

/// The attributes of `name` in `dir`, a symbolic link's own included, and where it lies: one system call.
pub fn look(dir: impl AsFd, name: &OsStr) -> io::Result<Found> {
    check_name(name)?;
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    found_of(&rustix::fs::statx(dir, name, flags, STATX_WANTED)?)
}

/// The attributes of an open file, and where it lies.
pub fn look_fd(file: impl AsFd) -> io::Result<Found> {
    found_of(&rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, STATX_WANTED)?)
}

fn found_of(found: &Statx) -> io::Result<Found> {
    let attributes = found.stx_attributes;
    Ok(Found {
        meta: meta_of(found)?,
        device: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
        mount_root: attributes.contains(StatxAttributes::MOUNT_ROOT),
        immutable: attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND),
    })
}

/// Whether another file system is mounted on `name` in `dir`.
pub fn is_mount_root(dir: impl AsFd, name: &OsStr) -> io::Result<bool> {
    check_name(name)?;
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let found = rustix::fs::statx(dir, name, flags, StatxFlags::TYPE)?;
    Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn meta_of(found: &Statx) -> io::Result<FileMeta> {
    let mode = u32::from(found.stx_mode);
    let kind = FileKind::of_mode(mode).ok_or(Errno::INVAL)?;
    let device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
    let rdev = if device { rustix::fs::makedev(found.stx_rdev_major, found.stx_rdev_minor) } else { 0 };
    let time = |t: &rustix::fs::StatxTimestamp| Timestamp { seconds: t.tv_sec, nanoseconds: t.tv_nsec };
    let born = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    Ok(FileMeta {
        kind,
        ino: found.stx_ino,
        nlink: found.stx_nlink,
        mode: mode & 0o7777,
        uid: found.stx_uid,
        gid: found.stx_gid,
        rdev,
        size: found.stx_size,
        atime: time(&found.stx_atime),
        mtime: time(&found.stx_mtime),
        ctime: time(&found.stx_ctime),
        btime: born.then(|| time(&found.stx_btime)),
    })
}

/// The names in an open directory, unsorted, without `.` and `..`.
pub fn names(dir: impl AsFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    Ok(names)
}

/// The target of the symbolic link `name` in `dir`.
pub fn read_link(dir: impl AsFd, name: &OsStr) -> io::Result<OsString> {
    check_name(name)?;
    let target: CString = rustix::fs::readlinkat(dir, name, Vec::new())?;
    Ok(OsString::from_vec(target.into_bytes()))
}

/// The extended attributes of `name` in `dir`, a symbolic link's own included, sorted by name.
pub fn xattrs(dir: impl AsFd, name: &OsStr) -> io::Result<Xattrs> {
    check_name(name)?;
    // The l*xattr calls take a path only. This one leads through a magic link to `dir` itself, and then by one name
    // that is not followed: it cannot leave the directory.
    let path = path_through(dir.as_fd(), name);
    read_xattrs(|buffer| rustix::fs::llistxattr(&path, buffer), |key, buffer| rustix::fs::lgetxattr(&path, key, buffer))
}

/// The extended attributes of an open file, sorted by name.
pub fn xattrs_fd(file: impl AsFd) -> io::Result<Xattrs> {
    let file = file.as_fd();
    read_xattrs(|buffer| rustix::fs::flistxattr(file, buffer), |key, buffer| rustix::fs::fgetxattr(file, key, buffer))
}

/// Sets one extended attribute of `name` in `dir`, a symbolic link's own included.
pub fn set_xattr(dir: impl AsFd, name: &OsStr, key: &OsStr, value: &[u8]) -> io::Result<()> {
    check_name(name)?;
    let path = path_through(dir.as_fd(), name);
    Ok(rustix::fs::lsetxattr(path, key, value, rustix::fs::XattrFlags::empty())?)
}

/// Makes the directory `name` in `dir`, open to its owner alone, and opens it.
pub fn make_dir(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    check_name(name)?;
    rustix::fs::mkdirat(&dir, name, Mode::RWXU)?;
    open_dir(dir, name)
}

/// Makes the symbolic link `name` in `dir`.
pub fn make_symlink(dir: impl AsFd, name: &OsStr, target: &OsStr) -> io::Result<()> {
    check_name(name)?;
    Ok(rustix::fs::symlinkat(target, dir, name)?)
}

/// Makes the fifo, socket's or device's node `name` in `dir`, open to its owner alone.
pub fn make_node(dir: impl AsFd, name: &OsStr, kind: FileKind, rdev: u64) -> io::Result<()> {
    check_name(name)?;
    let file_type = match kind {
        FileKind::Fifo => FileType::Fifo,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharacterDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::File | FileKind::Dir | FileKind::Symlink => return Err(Errno::INVAL.into()),
    };
    Ok(rustix::fs::mknodat(dir, name, file_type, Mode::RUSR | Mode::WUSR, rdev)?)
}

/// Gives the file `old` in `old_dir` a second name: `new` in `new_dir`.
pub fn link(old_dir: impl AsFd, old: &OsStr, new_dir: impl AsFd, new: &OsStr) -> io::Result<()> {
    check_name(old)?;
    check_name(new)?;
    Ok(rustix::fs::linkat(old_dir, old, new_dir, new, AtFlags::empty())?)
}

/// Changes the owner of `name` in `dir`, a symbolic link's own included.
pub fn chown(dir: impl AsFd, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
    check_name(name)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Changes the permissions of `name` in `dir`, which is no symbolic link.
pub fn chmod(dir: impl AsFd, name: &OsStr, mode: u32) -> io::Result<()> {
    // fchmodat(2) follows links, and fchmod(2) wants more than an O_PATH handle: the handle's magic link leads to
    // exactly the file that was opened. A symbolic link itself answers EOPNOTSUPP.
    let handle = open_handle(dir, name)?;
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    Ok(rustix::fs::chmod(path, Mode::from_raw_mode(mode))?)
}

/// Sets the times of last access and change of `name` in `dir`, a symbolic link's own included.
pub fn set_times(dir: impl AsFd, name: &OsStr, atime: Timestamp, mtime: Timestamp) -> io::Result<()> {
    check_name(name)?;
    Ok(rustix::fs::utimensat(dir, name, &timestamps(atime, mtime), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Sets the times of last access and change of an open file.
pub fn set_times_fd(file: impl AsFd, atime: Timestamp, mtime: Timestamp) -> io::Result<()> {
    Ok(rustix::fs::futimens(file, &timestamps(atime, mtime))?)
}

fn timestamps(atime: Timestamp, mtime: Timestamp) -> Timestamps {
    let spec = |t: Timestamp| Timespec { tv_sec: t.seconds, tv_nsec: t.nanoseconds.into() };
    Timestamps { last_access: spec(atime), last_modification: spec(mtime) }
}

fn path_through(dir: BorrowedFd<'_>, name: &OsStr) -> OsString {
    let mut path = OsString::from(format!("/proc/self/fd/{}/", dir.as_raw_fd()));
    path.push(name);
    path
}

fn read_xattrs(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&OsStr, &mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<Xattrs> {
    let keys = match read_growing(list) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        keys => keys?,
    };
    let mut found = Vec::new();
    for key in keys.split(|&byte| byte == 0).filter(|key| !key.is_empty()) {
        let key = OsStr::from_bytes(key);
        match read_growing(|buffer| get(key, buffer)) {
            // Removed between the two calls.
            Err(Errno::NODATA) => {}
            value => found.push((key.to_owned(), value?)),
        }
    }
    found.sort();
    Ok(found)
}

/// Calls `read` with a buffer that is large enough; most attributes fit the first.
fn read_growing(read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    // The kernel's limits are 64 KiB for a list (XATTR_LIST_MAX) and for a value (XATTR_SIZE_MAX).
    for size in [256, 65_536] {
        let mut buffer = vec![0; size];
        match read(&mut buffer) {
            Err(Errno::RANGE) => {}
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(error) => return Err(error),
        }
    }
    Err(Errno::RANGE)
}

/// Removes `name` in `dir` and everything below it; succeeds if it is not there.
///
/// Holds a bounded number of descriptors however deep the tree is: what is deeper than that is first moved up.
/// Requires that nobody but fsnap writes to the tree.
pub fn remove_tree(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    check_name(name)?;
    match rustix::fs::unlinkat(&dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // A file system that may not be written refuses before it looks.
        Err(Errno::ROFS) if stat(&dir, name).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) => {
            return Ok(());
        }
        Err(Errno::ISDIR) => {}
        // Some file systems answer EPERM, as POSIX has it, for a directory.
        Err(Errno::PERM) if stat(&dir, name).is_ok_and(|meta| meta.kind == FileKind::Dir) => {}
        Err(error) => return Err(error.into()),
    }
    let top = open_dir(&dir, name)?;
    let mut moved_up = 0_u64;
    empty_dir(&top, &top, 0, &mut moved_up)?;
    Ok(rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR)?)
}

/// Deeper levels than this are moved to the top of the tree before they are emptied.
const REMOVE_DEPTH: usize = 64;

fn empty_dir(dir: &OwnedFd, top: &OwnedFd, depth: usize, moved_up: &mut u64) -> io::Result<()> {
    // A directory's own mode may forbid what its owner may do; root and the owner may still change it.
    let mode = stat_fd(dir)?.mode;
    if mode & 0o700 != 0o700 {
        rustix::fs::fchmod(dir, Mode::from_raw_mode(mode | 0o700))?;
    }
    loop {
        let names = names(dir)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR | Errno::PERM) => {}
                Err(error) => return Err(error.into()),
            }
            if depth == REMOVE_DEPTH {
                *moved_up += 1;
                let fresh = OsString::from(format!("fsnap-removing-{moved_up}"));
                match rustix::fs::renameat_with(dir, &name, top, &fresh, RenameFlags::NOREPLACE) {
                    // A name left by an earlier removal that was cut short: the next number is tried.
                    Ok(()) | Err(Errno::EXIST) => continue,
                    Err(error) => return Err(error.into()),
                }
            }
            let child = open_dir(dir, &name)?;
            empty_dir(&child, top, depth + 1, moved_up)?;
            rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn a_volume_is_a_directory_by_an_absolute_path() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        std::fs::create_dir(path("dir")).unwrap();
        std::fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink("dir", path("link")).unwrap();
        for (name, kind) in [
            ("link", ErrorKind::NotAVolume),
            ("link/", ErrorKind::NotAVolume),
            ("file", ErrorKind::NotAVolume),
            ("absent", ErrorKind::NotFound),
        ] {
            assert_eq!(open_volume(&path(name), "kind").unwrap_err().kind(), kind, "{name}");
        }
        assert_eq!(open_volume(Path::new("dir"), "kind").unwrap_err().kind(), ErrorKind::NotAVolume);
        assert!(open_volume(&path("dir/"), "kind").is_ok());
    }

    #[test]
    fn a_path_leads_to_one_directory_and_to_no_other() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        let leads_to = |name: &str, opened: &OwnedFd| leads_to(&path(name), opened).unwrap();
        std::fs::create_dir(path("dir")).unwrap();
        std::fs::create_dir(path("other")).unwrap();
        std::os::unix::fs::symlink("dir", path("link")).unwrap();
        let opened = open_volume(&path("dir"), "kind").unwrap();
        assert!(leads_to("dir", &opened) && leads_to("dir/", &opened));
        for name in ["link", "link/", "other", "absent", "dir/absent"] {
            assert!(!leads_to(name, &opened), "{name}");
        }
        std::fs::rename(path("dir"), path("moved")).unwrap();
        std::fs::create_dir(path("dir")).unwrap();
        assert!(leads_to("moved", &opened) && !leads_to("dir", &opened));
    }

    #[test]
    fn nothing_leads_out_of_the_directory() {
        let temp = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", temp.path().join("link")).unwrap();
        let dir = open_root(temp.path()).unwrap();
        for name in ["..", ".", "", "/etc", "link/passwd", "link"] {
            assert!(open_dir(&dir, OsStr::new(name)).is_err(), "{name:?} was opened");
            assert!(open_file(&dir, OsStr::new(name)).is_err(), "{name:?} was opened");
        }
        assert_eq!(stat(&dir, OsStr::new("link")).unwrap().kind, FileKind::Symlink);
        assert!(open_handle(&dir, OsStr::new("link")).is_ok());
    }

    #[test]
    fn a_fifo_neither_blocks_nor_opens() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open_root(temp.path()).unwrap();
        rustix::fs::mkfifoat(&dir, "fifo", Mode::from_raw_mode(0o600)).unwrap();
        let error = open_file(&dir, OsStr::new("fifo")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
    }

    #[test]
    fn what_is_made_has_the_attributes_it_was_given() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open_root(temp.path()).unwrap();
        let (fifo, link) = (OsStr::new("fifo"), OsStr::new("link"));
        let before_1970 = Timestamp { seconds: -1_000, nanoseconds: 999_999_999 };
        let after_2038 = Timestamp { seconds: 1 << 33, nanoseconds: 1 };
        make_node(&dir, fifo, FileKind::Fifo, 0).unwrap();
        chmod(&dir, fifo, 0o1751).unwrap();
        set_times(&dir, fifo, before_1970, after_2038).unwrap();
        let meta = stat(&dir, fifo).unwrap();
        assert_eq!((meta.kind, meta.mode), (FileKind::Fifo, 0o1751));
        assert_eq!((meta.atime, meta.mtime), (before_1970, after_2038));

        make_symlink(&dir, link, OsStr::new("fifo")).unwrap();
        assert!(chmod(&dir, link, 0o777).is_err(), "a link was followed");
        set_times(&dir, link, after_2038, before_1970).unwrap();
        assert_eq!(stat(&dir, link).unwrap().mtime, before_1970);
        assert_eq!(look(&dir, fifo).unwrap().meta.mtime, after_2038, "a link was followed");

        let below = make_dir(&dir, OsStr::new("below")).unwrap();
        self::link(&dir, fifo, &below, OsStr::new("second")).unwrap();
        assert_eq!(stat_fd(&below).unwrap().mode, 0o700);
        assert_eq!(stat(&below, OsStr::new("second")).unwrap().nlink, 2);
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let root = open_root(temp.path()).unwrap();
        rustix::fs::mkdirat(&root, "deep", Mode::RWXU).unwrap();
        let mut at = open_dir(&root, OsStr::new("deep")).unwrap();
        for _ in 0..4096 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = open_dir(&at, OsStr::new("d")).unwrap();
        }
        rustix::fs::mkdirat(&at, "closed", Mode::empty()).unwrap();
        remove_tree(&root, OsStr::new("deep")).unwrap();
        assert_eq!(names(&root).unwrap(), Vec::<OsString>::new());
        remove_tree(&root, OsStr::new("deep")).expect("absent is removed");
    }
}
