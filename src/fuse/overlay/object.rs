//! One file of the upper or the lower, found by a directory's descriptor and a name.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::Result;

/// Flags with which everything in a tree is opened.
pub(super) const SAFE: OFlags = OFlags::CLOEXEC.union(OFlags::NOFOLLOW);

/// The times of last access and change that a file has.
pub(super) fn times_of(stat: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec { tv_sec: seconds, tv_nsec: nanoseconds.cast_signed() };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

pub(super) fn kind_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub(super) fn mode_of(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

/// Opens the directory `name` in `dir` as a handle.
pub(super) fn open_dir(dir: &OwnedFd, name: &OsStr) -> Result<OwnedFd> {
    rustix::fs::openat(dir, name, OFlags::PATH | OFlags::DIRECTORY | SAFE, Mode::empty())
}

pub(super) fn stat_at(dir: &OwnedFd, name: &OsStr) -> Result<Stat> {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// [`stat_at`], with an absent name as `None`.
pub(super) fn find_at(dir: &OwnedFd, name: &OsStr) -> Result<Option<Stat>> {
    match stat_at(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where a file is: a name in a directory, or the descriptor of the file itself.
///
/// Nobody but this server writes to the upper, and nobody writes to the lower, so that a name keeps leading to the file it
/// was found for as long as the tree is locked.
#[derive(Debug, Clone)]
pub(super) struct Object {
    dir: Arc<OwnedFd>,
    name: Option<OsString>,
}

impl Object {
    pub(super) fn at(dir: Arc<OwnedFd>, name: impl Into<OsString>) -> Self {
        Self { dir, name: Some(name.into()) }
    }

    /// The file that a handle (`O_PATH`) stands for.
    pub(super) fn of(handle: Arc<OwnedFd>) -> Self {
        Self { dir: handle, name: None }
    }

    /// The directory and the name; for a handle the name is empty.
    pub(super) fn place(&self) -> (&Arc<OwnedFd>, &OsStr) {
        (&self.dir, self.name.as_deref().unwrap_or_default())
    }

    pub(super) fn stat(&self) -> Result<Stat> {
        match &self.name {
            Some(name) => stat_at(&self.dir, name),
            None => rustix::fs::fstat(&self.dir),
        }
    }

    /// A handle of the file, whatever it is.
    pub(super) fn handle(&self) -> Result<Arc<OwnedFd>> {
        match &self.name {
            Some(name) => Ok(Arc::new(rustix::fs::openat(&self.dir, name, OFlags::PATH | SAFE, Mode::empty())?)),
            None => Ok(self.dir.clone()),
        }
    }

    /// Opens the regular file or directory.
    pub(super) fn open(&self, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        match &self.name {
            Some(name) => rustix::fs::openat(&self.dir, name, flags | OFlags::NOFOLLOW, Mode::empty()),
            // The magic link leads to exactly this file.
            None => rustix::fs::openat(CWD, magic(&self.dir), flags, Mode::empty()),
        }
    }

    pub(super) fn read_link(&self) -> Result<OsString> {
        use std::os::unix::ffi::OsStringExt;
        let target = match &self.name {
            Some(name) => rustix::fs::readlinkat(&self.dir, name, Vec::new())?,
            None => rustix::fs::readlinkat(&self.dir, "", Vec::new())?,
        };
        Ok(OsString::from_vec(target.into_bytes()))
    }

    pub(super) fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        let (uid, gid) = (uid.map(rustix::fs::Uid::from_raw), gid.map(rustix::fs::Gid::from_raw));
        match &self.name {
            Some(name) => rustix::fs::chownat(&self.dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
            None => rustix::fs::chownat(&self.dir, "", uid, gid, AtFlags::EMPTY_PATH),
        }
    }

    /// Requires that the file is no symbolic link.
    pub(super) fn chmod(&self, mode: Mode) -> Result<()> {
        let handle = self.handle()?;
        rustix::fs::chmod(magic(&handle), mode)
    }

    pub(super) fn set_times(&self, times: &Timestamps) -> Result<()> {
        match &self.name {
            Some(name) => rustix::fs::utimensat(&self.dir, name, times, AtFlags::SYMLINK_NOFOLLOW),
            None => rustix::fs::utimensat(CWD, magic(&self.dir), times, AtFlags::empty()),
        }
    }

    /// Gives the file a further name.
    pub(super) fn link(&self, dir: &OwnedFd, name: &OsStr) -> Result<()> {
        match &self.name {
            Some(own) => rustix::fs::linkat(&self.dir, own, dir, name, AtFlags::empty()),
            None => rustix::fs::linkat(CWD, magic(&self.dir), dir, name, AtFlags::SYMLINK_FOLLOW),
        }
    }

    /// A path for those calls that take nothing else. It leads to this file, and is never followed further.
    fn path(&self) -> PathBuf {
        let base = magic(&self.dir);
        self.name.as_ref().map_or(base.clone(), |name| base.join(name))
    }

    pub(super) fn xattr(&self, key: impl AsRef<OsStr>) -> Result<Option<Vec<u8>>> {
        let (path, key) = (self.path(), key.as_ref());
        let read = |buffer: &mut [u8]| match self.name {
            Some(_) => rustix::fs::lgetxattr(&path, key, buffer),
            None => rustix::fs::getxattr(&path, key, buffer),
        };
        match growing(read) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            value => value.map(Some),
        }
    }

    pub(super) fn xattr_names(&self) -> Result<Vec<OsString>> {
        use std::os::unix::ffi::OsStrExt;
        let path = self.path();
        let read = |buffer: &mut [u8]| match self.name {
            Some(_) => rustix::fs::llistxattr(&path, buffer),
            None => rustix::fs::listxattr(&path, buffer),
        };
        let names = match growing(read) {
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            names => names?,
        };
        let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
        Ok(names.map(|name| OsStr::from_bytes(name).to_owned()).collect())
    }

    pub(super) fn set_xattr(&self, key: impl AsRef<OsStr>, value: &[u8], flags: XattrFlags) -> Result<()> {
        match self.name {
            Some(_) => rustix::fs::lsetxattr(self.path(), key.as_ref(), value, flags),
            None => rustix::fs::setxattr(self.path(), key.as_ref(), value, flags),
        }
    }

    pub(super) fn remove_xattr(&self, key: impl AsRef<OsStr>) -> Result<()> {
        match self.name {
            Some(_) => rustix::fs::lremovexattr(self.path(), key.as_ref()),
            None => rustix::fs::removexattr(self.path(), key.as_ref()),
        }
    }
}

fn magic(descriptor: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

/// Calls `read` with a buffer that is large enough: 64 KiB is the kernel's limit for names and for values.
fn growing(read: impl Fn(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    let mut small = [0; 256];
    match read(&mut small) {
        Ok(length) => return Ok(small[..length].to_vec()),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error),
    }
    let mut buffer = vec![0; 65_536];
    let length = read(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// The names in a directory with what the file system says of their kinds, without `.` and `..`.
pub(super) fn names(dir: BorrowedFd<'_>) -> Result<Vec<(OsString, FileType)>> {
    use std::os::unix::ffi::OsStringExt;
    let reader = rustix::fs::openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::new(reader)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            found.push((OsString::from_vec(name.to_vec()), entry.file_type()));
        }
    }
    Ok(found)
}
