//! Changes to a tree of files, and the system calls that make them.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fsnap_backend::{FileMeta, Timestamp, Xattrs, beneath};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};

use crate::sys;

/// A path below the root of a tree, of names of any bytes; empty for the root itself.
pub type TreePath = Vec<u8>;

/// One change to a tree of files.
#[derive(Debug, Clone)]
pub enum Op {
    /// Makes an empty regular file.
    Create(TreePath),
    /// Makes a directory.
    MakeDir(TreePath),
    /// Makes a symbolic link to the second.
    Symlink(TreePath, Vec<u8>),
    /// Makes a named pipe.
    Fifo(TreePath),
    /// Makes a socket's node.
    Socket(TreePath),
    /// Makes a character device's node with this major and minor number.
    CharDevice(TreePath, u32, u32),
    /// Makes a block device's node with this major and minor number.
    BlockDevice(TreePath, u32, u32),
    /// Gives the first a second name.
    Link(TreePath, TreePath),
    /// Renames the first to the second, which is replaced if it is there.
    Rename(TreePath, TreePath),
    /// Removes a name, or an empty directory.
    Remove(TreePath),
    /// Writes at an offset by `pwrite(2)`.
    Write(TreePath, u64, Vec<u8>),
    /// Stores at an offset through a shared mapping; the range lies within the file.
    Store(TreePath, u64, Vec<u8>),
    /// Sets the length.
    Truncate(TreePath, u64),
    /// Makes a hole: offset and length.
    Punch(TreePath, u64, u64),
    /// Sets the mode.
    Chmod(TreePath, u32),
    /// Sets owner and group; the mode stays.
    Chown(TreePath, u32, u32),
    /// Sets the time of the last change.
    Touch(TreePath, Timestamp),
    /// Sets an extended attribute.
    SetXattr(TreePath, OsString, Vec<u8>),
    /// Removes an extended attribute, if it is there.
    RemoveXattr(TreePath, OsString),
}

/// A live tree in which [`Op`]s are carried out.
#[derive(Debug)]
pub struct Live {
    root: OwnedFd,
}

impl Live {
    /// Opens the tree at `dir`.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Ok(Self { root: beneath::open_root(dir)? })
    }

    /// The attributes of the file at `path`.
    pub fn meta(&self, path: &[u8]) -> io::Result<FileMeta> {
        match self.parent(path)? {
            Some((dir, name)) => beneath::stat(dir, name),
            None => beneath::stat_fd(&self.root),
        }
    }

    /// The extended attributes of the file at `path`.
    pub fn xattrs(&self, path: &[u8]) -> io::Result<Xattrs> {
        match self.parent(path)? {
            Some((dir, name)) => beneath::xattrs(dir, name),
            None => beneath::xattrs_fd(&self.root),
        }
    }

    /// Opens the regular file at `path` for reading and writing.
    pub fn open_file(&self, path: &[u8]) -> io::Result<File> {
        let (dir, name) = self.within(path)?;
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?))
    }

    /// The open parent and the last name of `path`, name by name: a path may be longer than the kernel takes.
    fn parent<'a>(&self, path: &'a [u8]) -> io::Result<Option<(OwnedFd, &'a OsStr)>> {
        let mut names = path.split(|&byte| byte == b'/').map(OsStr::from_bytes);
        let Some(last) = names.next_back().filter(|name| !name.is_empty()) else { return Ok(None) };
        let mut dir = self.root.try_clone()?;
        for name in names {
            dir = beneath::open_dir(dir, name)?;
        }
        Ok(Some((dir, last)))
    }

    fn within<'a>(&self, path: &'a [u8]) -> io::Result<(OwnedFd, &'a OsStr)> {
        self.parent(path)?.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn node(&self, path: &[u8], kind: FileType, device: u64) -> io::Result<()> {
        let (dir, name) = self.within(path)?;
        Ok(rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(0o600), device)?)
    }

    /// Carries out one change.
    pub fn apply(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Create(path) => {
                let (dir, name) = self.within(path)?;
                beneath::create_file(dir, name, 0o600)?;
            }
            Op::MakeDir(path) => {
                let (dir, name) = self.within(path)?;
                rustix::fs::mkdirat(dir, name, Mode::RWXU)?;
            }
            Op::Symlink(path, target) => {
                let (dir, name) = self.within(path)?;
                rustix::fs::symlinkat(OsStr::from_bytes(target), dir, name)?;
            }
            Op::Fifo(path) => self.node(path, FileType::Fifo, 0)?,
            Op::Socket(path) => self.node(path, FileType::Socket, 0)?,
            Op::CharDevice(path, major, minor) => {
                self.node(path, FileType::CharacterDevice, rustix::fs::makedev(*major, *minor))?;
            }
            Op::BlockDevice(path, major, minor) => {
                self.node(path, FileType::BlockDevice, rustix::fs::makedev(*major, *minor))?;
            }
            Op::Link(from, to) => {
                let ((old_dir, old), (new_dir, new)) = (self.within(from)?, self.within(to)?);
                rustix::fs::linkat(old_dir, old, new_dir, new, AtFlags::empty())?;
            }
            Op::Rename(from, to) => {
                let ((old_dir, old), (new_dir, new)) = (self.within(from)?, self.within(to)?);
                rustix::fs::renameat(old_dir, old, new_dir, new)?;
            }
            Op::Remove(path) => {
                let (dir, name) = self.within(path)?;
                let is_dir = beneath::stat(&dir, name)?.kind == fsnap_backend::FileKind::Dir;
                let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                rustix::fs::unlinkat(dir, name, flags)?;
            }
            Op::Write(path, offset, data) => self.open_file(path)?.write_all_at(data, *offset)?,
            Op::Store(path, offset, data) => sys::store_through_mapping(&self.open_file(path)?, *offset, data)?,
            Op::Truncate(path, len) => self.open_file(path)?.set_len(*len)?,
            Op::Punch(path, offset, len) => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(self.open_file(path)?, flags, *offset, *len)?;
            }
            Op::Chmod(path, mode) => self.chmod(path, *mode)?,
            Op::Chown(path, uid, gid) => self.chown(path, *uid, *gid)?,
            Op::Touch(path, time) => self.touch(path, *time)?,
            Op::SetXattr(path, key, value) => match self.parent(path)? {
                Some((dir, name)) => beneath::set_xattr(dir, name, key, value)?,
                None => rustix::fs::fsetxattr(&self.root, key.as_os_str(), value, rustix::fs::XattrFlags::empty())?,
            },
            Op::RemoveXattr(path, key) => self.remove_xattr(path, key)?,
        }
        Ok(())
    }

    fn chmod(&self, path: &[u8], mode: u32) -> io::Result<()> {
        let mode = Mode::from_raw_mode(mode);
        match self.parent(path)? {
            Some((dir, name)) => rustix::fs::chmodat(dir, name, mode, AtFlags::empty())?,
            None => rustix::fs::fchmod(&self.root, mode)?,
        }
        Ok(())
    }

    fn chown(&self, path: &[u8], uid: u32, gid: u32) -> io::Result<()> {
        let before = self.meta(path)?;
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        match self.parent(path)? {
            Some((dir, name)) => rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?,
            None => rustix::fs::fchown(&self.root, uid, gid)?,
        }
        // A change of the owner takes the set-id bits away.
        if before.kind != fsnap_backend::FileKind::Symlink && self.meta(path)?.mode != before.mode {
            self.chmod(path, before.mode)?;
        }
        Ok(())
    }

    fn touch(&self, path: &[u8], time: Timestamp) -> io::Result<()> {
        let spec = Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
        let times = Timestamps { last_access: spec, last_modification: spec };
        match self.parent(path)? {
            Some((dir, name)) => rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)?,
            None => rustix::fs::futimens(&self.root, &times)?,
        }
        Ok(())
    }

    fn remove_xattr(&self, path: &[u8], key: &OsStr) -> io::Result<()> {
        let removed = match self.parent(path)? {
            // Of regular files and directories only, so that a descriptor will do.
            Some((dir, name)) => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
                rustix::fs::fremovexattr(file.as_fd(), key)
            }
            None => rustix::fs::fremovexattr(&self.root, key),
        };
        match removed {
            Err(rustix::io::Errno::NODATA) => Ok(()),
            removed => Ok(removed?),
        }
    }
}
