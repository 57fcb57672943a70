//! One mount for past states and for the branches that are written: each request goes to whom its file belongs.
//!
//! Decided by the number alone. Whatever would change a past state is refused here, in one place: there is nobody behind it
//! who could do it.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, INodeNo, IoctlFlags, KernelConfig, LockOwner,
    Notifier, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};

use super::adapter::{Adapter, prepare};
use super::branches::{Branches, slot_of};
use super::browse::{self, Browse, Natives};
use super::browse_adapter::{BrowseAdapter, to_fuse};
use super::wire::{GENERATION, errno};

/// Serves past states and branches.
#[derive(Debug)]
pub struct MountAdapter {
    browse: Arc<Browse>,
    past: BrowseAdapter,
    branches: Arc<Branches>,
}

impl MountAdapter {
    /// Serves these. The notifier is set once the session has one.
    pub fn new(
        browse: Arc<Browse>,
        branches: Arc<Branches>,
        natives: Option<Arc<Natives>>,
        notifier: Arc<OnceLock<Notifier>>,
    ) -> Self {
        Self { past: BrowseAdapter::new(browse.clone(), natives, notifier), browse, branches }
    }

    /// The tree that a number belongs to; `None` for past states.
    fn tree(&self, number: INodeNo) -> browse::Result<Option<Arc<Adapter>>> {
        self.browse.with_room(|| self.branches.tree(number.0))
    }
}

/// Answers from the tree that the number belongs to, or from past states.
macro_rules! either {
    ($self:ident, $number:expr, $reply:ident, $call:ident($($argument:expr),*)) => {
        match $self.tree($number) {
            Ok(Some(tree)) => tree.$call($($argument,)* $reply),
            Ok(None) => $self.past.$call($($argument,)* $reply),
            Err(error) => $reply.error(errno(error)),
        }
    };
}

/// Answers from the tree that the number belongs to; past states refuse it.
macro_rules! written {
    ($self:ident, $number:expr, $reply:ident, $call:ident($($argument:expr),*)) => {
        match $self.tree($number) {
            Ok(Some(tree)) => tree.$call($($argument,)* $reply),
            Ok(None) => $reply.error(Errno::EROFS),
            Err(error) => $reply.error(errno(error)),
        }
    };
}

impl Filesystem for MountAdapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if prepare(config) {
            self.past.pass_through();
            self.branches.pass_through();
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        either!(self, parent, reply, lookup(request, parent, name));
    }

    fn forget(&self, request: &Request, ino: INodeNo, nlookup: u64) {
        match (slot_of(ino.0), self.branches.open_tree(ino.0)) {
            (0, _) => self.past.forget(request, ino, nlookup),
            (_, Some(tree)) => tree.forget(request, ino, nlookup),
            // A tree that was let go of knows nothing any more.
            (_, None) => {}
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        either!(self, ino, reply, getattr(request, ino, fh));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        crtime: Option<SystemTime>,
        chgtime: Option<SystemTime>,
        bkuptime: Option<SystemTime>,
        flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        written!(
            self,
            ino,
            reply,
            setattr(request, ino, mode, uid, gid, size, atime, mtime, ctime, fh, crtime, chgtime, bkuptime, flags)
        );
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        either!(self, ino, reply, readlink(request, ino));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        written!(self, parent, reply, mknod(request, parent, name, mode, umask, rdev));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        if slot_of(parent.0) != 0 {
            return written!(self, parent, reply, mkdir(request, parent, name, mode, umask));
        }
        match self.browse.make_dir(parent.0, name) {
            Ok(attr) => reply.entry_with_ttls(&Duration::ZERO, &Duration::ZERO, &to_fuse(&attr), GENERATION),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        written!(self, parent, reply, unlink(request, parent, name));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if slot_of(parent.0) != 0 {
            return written!(self, parent, reply, rmdir(request, parent, name));
        }
        match self.browse.remove_dir(parent.0, name) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        written!(self, parent, reply, symlink(request, parent, name, target));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if slot_of(parent.0) != slot_of(newparent.0) {
            return reply.error(Errno::EXDEV);
        }
        written!(self, parent, reply, rename(request, parent, name, newparent, newname, flags));
    }

    fn link(&self, request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        if slot_of(ino.0) != slot_of(newparent.0) {
            return reply.error(Errno::EXDEV);
        }
        written!(self, ino, reply, link(request, ino, newparent, newname));
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let truncate = flags.0 & rustix::fs::OFlags::TRUNC.bits().cast_signed() != 0;
        if slot_of(ino.0) == 0 && (truncate || flags.acc_mode() != OpenAccMode::O_RDONLY) {
            return reply.error(Errno::EROFS);
        }
        either!(self, ino, reply, open(request, ino, flags));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        written!(self, parent, reply, create(request, parent, name, mode, umask, flags));
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        either!(self, ino, reply, read(request, ino, fh, offset, size, flags, owner));
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        written!(self, ino, reply, write(request, ino, fh, offset, data, write_flags, flags, owner));
    }

    fn flush(&self, request: &Request, ino: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        either!(self, ino, reply, flush(request, ino, fh, owner));
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        flush: bool,
        reply: ReplyEmpty,
    ) {
        either!(self, ino, reply, release(request, ino, fh, flags, owner, flush));
    }

    fn fsync(&self, request: &Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        match slot_of(ino.0) {
            0 => reply.ok(),
            _ => written!(self, ino, reply, fsync(request, ino, fh, datasync)),
        }
    }

    fn opendir(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        either!(self, ino, reply, opendir(request, ino, flags));
    }

    fn readdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        either!(self, ino, reply, readdir(request, ino, fh, offset));
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        either!(self, ino, reply, readdirplus(request, ino, fh, offset));
    }

    fn releasedir(&self, request: &Request, ino: INodeNo, fh: FileHandle, flags: OpenFlags, reply: ReplyEmpty) {
        either!(self, ino, reply, releasedir(request, ino, fh, flags));
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        match slot_of(ino.0) {
            0 => reply.ok(),
            _ => written!(self, ino, reply, fsyncdir(request, ino, fh, datasync)),
        }
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        either!(self, ino, reply, statfs(request, ino));
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        position: u32,
        reply: ReplyEmpty,
    ) {
        written!(self, ino, reply, setxattr(request, ino, name, value, flags, position));
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        either!(self, ino, reply, getxattr(request, ino, name, size));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        either!(self, ino, reply, listxattr(request, ino, size));
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        written!(self, ino, reply, removexattr(request, ino, name));
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        written!(self, ino, reply, fallocate(request, ino, fh, offset, length, mode));
    }

    fn lseek(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        either!(self, ino, reply, lseek(request, ino, fh, offset, whence));
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies by reading and writing.
        if slot_of(ino_in.0) != slot_of(ino_out.0) {
            return reply.error(Errno::EXDEV);
        }
        written!(
            self,
            ino_in,
            reply,
            copy_file_range(request, ino_in, fh_in, offset_in, ino_out, fh_out, offset_out, len, flags)
        );
    }
}
