//! One file of the upper or the lower, found by a directory's descriptor and a name.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Dir, Xattrs, mounts};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::Result;
use super::below::{self, LowerContent, errno};

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

/// Where a file is: a name in a directory, or the descriptor of the file itself; or a name in a directory of a snapshot that the
/// kernel cannot mount.
///
/// Nobody but this server writes to the upper, and nobody writes to the lower, so that a name keeps leading to the file it
/// was found for as long as the tree is locked.
#[derive(Debug, Clone)]
pub(super) struct Object {
    place: Place,
    name: Option<OsString>,
}

#[derive(Debug, Clone)]
enum Place {
    Dir(Arc<OwnedFd>),
    /// With what the attributes are filled into.
    Below(Arc<dyn Dir>, Box<Stat>),
}

impl Object {
    pub(super) fn at(dir: Arc<OwnedFd>, name: impl Into<OsString>) -> Self {
        Self { place: Place::Dir(dir), name: Some(name.into()) }
    }

    /// The file that a handle (`O_PATH`) stands for.
    pub(super) fn of(handle: Arc<OwnedFd>) -> Self {
        Self { place: Place::Dir(handle), name: None }
    }

    /// A file of a snapshot, or without a name the directory itself.
    pub(super) fn below(dir: Arc<dyn Dir>, name: Option<OsString>, template: Stat) -> Self {
        Self { place: Place::Below(dir, Box::new(template)), name }
    }

    /// The directory and the name; for a handle the name is empty. What lies in a snapshot cannot be written.
    pub(super) fn place(&self) -> Result<(&Arc<OwnedFd>, &OsStr)> {
        match &self.place {
            Place::Dir(dir) => Ok((dir, self.name.as_deref().unwrap_or_default())),
            Place::Below(..) => Err(Errno::ROFS),
        }
    }

    /// The handle, of an object that is one.
    pub(super) fn as_handle(&self) -> Result<Arc<OwnedFd>> {
        match (&self.place, &self.name) {
            (Place::Dir(handle), None) => Ok(handle.clone()),
            _ => Err(Errno::STALE),
        }
    }

    pub(super) fn stat(&self) -> Result<Stat> {
        match (&self.place, &self.name) {
            (Place::Dir(dir), Some(name)) => stat_at(dir, name),
            (Place::Dir(handle), None) => rustix::fs::fstat(handle),
            (Place::Below(dir, template), Some(name)) => {
                let entry = dir.entry(name).map_err(errno)?.ok_or(Errno::NOENT)?;
                Ok(below::stat(&entry.meta, **template))
            }
            (Place::Below(dir, template), None) => Ok(below::stat(&dir.meta().map_err(errno)?, **template)),
        }
    }

    /// Whether it is read through [`Dir`].
    pub(super) fn is_below(&self) -> bool {
        matches!(self.place, Place::Below(..))
    }

    /// The file itself, whatever it is and whatever becomes of its name.
    pub(super) fn pin(&self) -> Result<Self> {
        match (&self.place, &self.name) {
            (Place::Dir(dir), Some(name)) => {
                Ok(Self::of(Arc::new(rustix::fs::openat(dir, name, OFlags::PATH | SAFE, Mode::empty())?)))
            }
            // Names in a snapshot stay.
            _ => Ok(self.clone()),
        }
    }

    /// Opens the regular file or directory.
    pub(super) fn open(&self, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        let (dir, name) = self.place()?;
        let open = |flags| match &self.name {
            // The magic link leads to exactly this file.
            None => rustix::fs::openat(CWD, magic(dir), flags, Mode::empty()),
            Some(_) => rustix::fs::openat(dir, name, flags | OFlags::NOFOLLOW, Mode::empty()),
        };
        match open(flags | OFlags::NONBLOCK) {
            // Somebody has a lease on it, and gives it back when he is told; the server itself has one for an instant.
            Err(Errno::AGAIN) => open(flags),
            opened => opened,
        }
    }

    /// Opens it for reading what never changes: its time of last access stays.
    pub(super) fn open_sealed(&self) -> Result<OwnedFd> {
        quietly(|flags| self.open(OFlags::RDONLY | flags))
    }

    /// Opens the content of the regular file for reading.
    pub(super) fn content(&self) -> Result<LowerContent> {
        if let (Place::Below(dir, _), Some(name)) = (&self.place, &self.name) {
            return Ok(LowerContent::Content(dir.open_file(name).map_err(errno)?));
        }
        let file = File::from(self.open_sealed()?);
        let meta = file.metadata().map_err(|error| below::io_errno(&error))?;
        if meta.is_file() { Ok(LowerContent::File(file, meta.len())) } else { Err(Errno::IO) }
    }

    pub(super) fn read_link(&self) -> Result<OsString> {
        use std::os::unix::ffi::OsStringExt;
        if let (Place::Below(dir, _), Some(name)) = (&self.place, &self.name) {
            return dir.read_link(name).map_err(errno);
        }
        let (dir, name) = self.place()?;
        Ok(OsString::from_vec(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes()))
    }

    pub(super) fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        let (uid, gid) = (uid.map(rustix::fs::Uid::from_raw), gid.map(rustix::fs::Gid::from_raw));
        let (dir, name) = self.place()?;
        let flags = if self.name.is_some() { AtFlags::SYMLINK_NOFOLLOW } else { AtFlags::EMPTY_PATH };
        rustix::fs::chownat(dir, name, uid, gid, flags)
    }

    /// Requires that the file is no symbolic link.
    pub(super) fn chmod(&self, mode: Mode) -> Result<()> {
        let handle = self.pin()?.as_handle()?;
        rustix::fs::chmod(magic(&handle), mode)
    }

    pub(super) fn set_times(&self, times: &Timestamps) -> Result<()> {
        match self.place()? {
            (dir, _) if self.name.is_none() => rustix::fs::utimensat(CWD, magic(dir), times, AtFlags::empty()),
            (dir, name) => rustix::fs::utimensat(dir, name, times, AtFlags::SYMLINK_NOFOLLOW),
        }
    }

    /// Gives the file a further name.
    pub(super) fn link(&self, dir: &OwnedFd, name: &OsStr) -> Result<()> {
        match self.place()? {
            (own, _) if self.name.is_none() => rustix::fs::linkat(CWD, magic(own), dir, name, AtFlags::SYMLINK_FOLLOW),
            (own_dir, own) => rustix::fs::linkat(own_dir, own, dir, name, AtFlags::empty()),
        }
    }

    /// A path for those calls that take nothing else. It leads to this file, and is never followed further.
    fn path(&self) -> Result<PathBuf> {
        let (dir, _) = self.place()?;
        let base = magic(dir);
        Ok(self.name.as_ref().map_or(base.clone(), |name| base.join(name)))
    }

    /// All attributes of a file of a snapshot; `None` for others.
    fn xattrs_below(&self) -> Result<Option<Xattrs>> {
        let Place::Below(dir, _) = &self.place else { return Ok(None) };
        #[cfg(test)]
        super::chain_tests::LOOKS.with(|looks| looks.set(looks.get() + 1));
        let read = match &self.name {
            Some(name) => dir.xattrs(name),
            None => dir.own_xattrs(),
        };
        read.map(Some).map_err(errno)
    }

    pub(super) fn xattr(&self, key: impl AsRef<OsStr>) -> Result<Option<Vec<u8>>> {
        let key = key.as_ref();
        if let Some(xattrs) = self.xattrs_below()? {
            return Ok(xattrs.into_iter().find(|(name, _)| name == key).map(|(_, value)| value));
        }
        let path = self.path()?;
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
        if let Some(xattrs) = self.xattrs_below()? {
            return Ok(xattrs.into_iter().map(|(name, _)| name).collect());
        }
        let path = self.path()?;
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

    /// All attributes, with their values.
    pub(super) fn xattrs(&self) -> Result<Xattrs> {
        if let Some(xattrs) = self.xattrs_below()? {
            return Ok(xattrs);
        }
        let mut found = Xattrs::new();
        for name in self.xattr_names()? {
            if let Some(value) = self.xattr(&name)? {
                found.push((name, value));
            }
        }
        Ok(found)
    }

    pub(super) fn set_xattr(&self, key: impl AsRef<OsStr>, value: &[u8], flags: XattrFlags) -> Result<()> {
        self.as_if_writable(|path| match self.name {
            Some(_) => rustix::fs::lsetxattr(path, key.as_ref(), value, flags),
            None => rustix::fs::setxattr(path, key.as_ref(), value, flags),
        })
    }

    pub(super) fn remove_xattr(&self, key: impl AsRef<OsStr>) -> Result<()> {
        self.as_if_writable(|path| match self.name {
            Some(_) => rustix::fs::lremovexattr(path, key.as_ref()),
            None => rustix::fs::removexattr(path, key.as_ref()),
        })
    }

    /// Changes attributes, of a file as well that its owner may not write to: without privileges, the kernel asks for that right even for what only
    /// says which file it is. The tree is locked, so that nobody sees the right given; who is killed in between leaves it.
    pub(super) fn as_if_writable(&self, change: impl Fn(&Path) -> Result<()>) -> Result<()> {
        let path = self.path()?;
        let changed = change(&path);
        if changed != Err(Errno::ACCESS) {
            return changed;
        }
        let stat = self.stat()?;
        let mode = stat.st_mode & 0o7777;
        // Who gives himself rights to a file of a group that he is not in takes its set-group-ID bit off.
        let may = stat.st_uid == rustix::process::geteuid().as_raw() && mode & 0o2200 == 0;
        if !may || kind_of(&stat) == FileType::Symlink {
            return changed;
        }
        self.chmod(Mode::from_raw_mode(mode | 0o200))?;
        let changed = change(&path);
        self.chmod(Mode::from_raw_mode(mode))?;
        changed
    }
}

/// The user whose server serves the file system that this file lies on, if it is one of ours.
pub(super) fn server_of(file: BorrowedFd<'_>) -> std::io::Result<Option<u32>> {
    let Some(mount) = mounts::of_file(file)?.filter(|mount| mount.fstype == b"fuse.fsnap") else { return Ok(None) };
    let user = mount.options().find_map(|option| option.strip_prefix(b"user_id="));
    Ok(user.and_then(|user| std::str::from_utf8(user).ok()?.parse().ok()))
}

fn magic(descriptor: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

/// An attribute of an open file.
pub(super) fn xattr_of(file: impl AsFd, key: &OsStr) -> Result<Option<Vec<u8>>> {
    match growing(|buffer: &mut [u8]| rustix::fs::fgetxattr(&file, key, buffer)) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        value => value.map(Some),
    }
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

/// Opens something that is to keep its time of last access; only the owner may ask for that.
fn quietly(open: impl Fn(OFlags) -> Result<OwnedFd>) -> Result<OwnedFd> {
    match open(OFlags::NOATIME) {
        Err(Errno::PERM) => open(OFlags::empty()),
        opened => opened,
    }
}

/// The names in a directory with what the file system says of their kinds, without `.` and `..`. Its time of last access stays.
pub(super) fn names(dir: BorrowedFd<'_>) -> Result<Vec<(OsString, FileType)>> {
    names_in(quietly(|flags| open_list(dir, flags))?)
}

/// As [`names`], on behalf of somebody who reads the directory.
pub(super) fn names_for_somebody(dir: BorrowedFd<'_>) -> Result<Vec<(OsString, FileType)>> {
    names_in(open_list(dir, OFlags::empty())?)
}

fn open_list(dir: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | flags, Mode::empty())
}

fn names_in(reader: OwnedFd) -> Result<Vec<(OsString, FileType)>> {
    use std::os::unix::ffi::OsStringExt;
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
