//! From the kernel's requests to the tree and back. Nothing is decided here but what the kernel may cache.
//!
//! Names and attributes are cached without end, for nothing changes them but requests that went through the kernel; a file
//! that the kernel writes past us is the exception, and so long its attributes are not cached.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::OFlags;

use super::given::Given;
use super::handles::{Access, Handle, Handles};
use super::open::{Dots, locked, with_buffer};
use super::overlay::{Attr, Change, Had, MERGE, OpenFile, Overlay, ROOT, SEAL, STORE, privileges};
use super::wire::{
    GENERATION, caller, done, errno, kind, nothing, set_time, sized, to_fuse, unpack_device, xattr_list,
};
use crate::processes::Author;

pub(super) const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// As libfuse has it: what a name in a listing leads to that is known no more.
const UNKNOWN: u64 = 0xffff_ffff;
/// The shortest time that is not none: the kernel counts in ticks of some milliseconds, in which no clock of a file moves either.
const OPENING: Duration = Duration::from_millis(1);
/// The kernel keeps this for the file that it passes writes through to, when a program takes it off later (`F_SETFL`): all that it wrote anywhere
/// would be added at the end. So it asks us for what is read and written by whoever opens a file so.
const APPEND: i32 = OFlags::APPEND.bits().cast_signed();

/// Serves a copy-on-write tree.
#[derive(Debug)]
pub struct Adapter {
    pub(super) overlay: Arc<Overlay>,
    handles: Arc<Handles>,
    given: Given,
    notifier: Arc<OnceLock<Notifier>>,
    /// The directory of its layers.
    store: PathBuf,
    /// What is added to the tree's numbers, where one mount shows several.
    base: u64,
}

impl Adapter {
    /// Serves this tree, whose layers lie in the directory `store`. The notifier is set once the session has one.
    pub fn new(overlay: Overlay, store: &Path, notifier: Arc<OnceLock<Notifier>>) -> Self {
        let given = Given::new(notifier.clone());
        let (overlay, store) = (Arc::new(overlay), store.to_owned());
        Self { overlay, handles: Arc::default(), given, notifier, store, base: 0 }
    }

    /// Serves this tree as one of several in a mount, all of whose numbers have `base` added.
    pub(super) fn within(
        overlay: Overlay,
        store: &Path,
        notifier: Arc<OnceLock<Notifier>>,
        base: u64,
        passthrough: bool,
    ) -> Self {
        let adapter = Self { base, ..Self::new(overlay, store, notifier) };
        adapter.handles.passthrough.store(passthrough, Ordering::Relaxed);
        adapter
    }

    /// Whether the kernel knows no file of it but the root.
    pub(super) fn is_idle(&self) -> bool {
        self.overlay.known() == 1 && self.handles.is_empty()
    }

    /// The tree's own number of a file.
    fn own(&self, number: INodeNo) -> u64 {
        number.0 - self.base
    }

    fn to_fuse(&self, attr: &Attr) -> FileAttr {
        FileAttr { ino: INodeNo(attr.ino + self.base), ..to_fuse(attr) }
    }

    fn attr_of(&self, attr: &Attr) -> (FileAttr, Duration) {
        let ttl = if attr.upper && self.handles.is_passed(attr.ino) { Duration::ZERO } else { FOREVER };
        (self.to_fuse(attr), ttl)
    }

    fn entry(&self, found: Result<Attr, rustix::io::Errno>, reply: ReplyEntry) {
        match found {
            Ok(attr) => {
                let (attr, ttl) = self.attr_of(&attr);
                reply.entry_with_ttls(&ttl, &FOREVER, &attr, GENERATION);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn file(&self, handle: FileHandle) -> Result<Arc<OpenFile>, Errno> {
        match self.handles.get(handle.0).as_deref() {
            Some(Handle::File(file)) => Ok(file.file.clone()),
            _ => Err(Errno::EBADF),
        }
    }

    /// The names of an open directory; from the beginning, they are read anew.
    ///
    /// With them, whether a name that is gone by now must be told: the kernel finds the place of others who read the directory by it.
    fn names(&self, ino: u64, handle: FileHandle, offset: u64) -> Result<(Arc<Vec<OsString>>, bool), Errno> {
        let found = self.handles.get(handle.0);
        let Some(Handle::Dir(dir)) = found.as_deref() else { return Err(Errno::EBADF) };
        let names = dir.names(offset, || {
            self.overlay.list(ino).map(|listed| listed.into_iter().map(|entry| entry.name).collect())
        });
        Ok((names.map_err(errno)?, dir.is_shared()))
    }

    /// Notes what had a name that was taken away, where somebody may still be told of it.
    fn gone_from(&self, dir: u64, name: &OsStr, removed: super::overlay::Result<Had>) -> super::overlay::Result<()> {
        self.handles.name_gone(dir, name, removed?);
        Ok(())
    }

    /// The number and the kind to be told of a name that is gone.
    fn gone(&self, dir: u64, name: &OsStr) -> (u64, FileType) {
        let had = self.handles.gone(dir, name);
        had.map_or((UNKNOWN, FileType::RegularFile), |(ino, of)| (ino + self.base, kind(of)))
    }

    /// Answers with what was made in a directory.
    fn made_in(&self, parent: INodeNo, made: super::overlay::Result<Attr>, reply: ReplyEntry) {
        self.handles.names_changed(&[self.own(parent)]);
        self.entry(made, reply);
    }

    /// The entries before the names.
    fn dots(&self, ino: u64) -> Dots {
        Dots { own: ino + self.base, parent: self.overlay.parent(ino) + self.base }
    }
}

/// Asks the kernel for what a tree that is written wants; tells whether requests may be passed through.
pub(super) fn prepare(config: &mut KernelConfig) -> bool {
    let wanted = [
        // Permissions are the kernel's, ACLs included; it leaves the umask to us, which a default ACL replaces.
        InitFlags::FUSE_POSIX_ACL,
        InitFlags::FUSE_DONT_MASK,
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        InitFlags::FUSE_ATOMIC_O_TRUNC,
        // Always, and not only when the kernel guesses that attributes will be asked for: it guesses after the first page of names,
        // and who lists a whole directory before the first look pays a round trip for each file of the other pages.
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_CACHE_SYMLINKS,
        InitFlags::FUSE_ASYNC_DIO,
        InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    ];
    for flag in wanted {
        // What an older kernel does not have is done without.
        let _ = config.add_capabilities(flag);
    }
    let _ = config.set_max_write(1 << 20);
    let _ = config.set_max_background(64);
    config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() && config.set_max_stack_depth(2).is_ok()
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if prepare(config) {
            self.handles.passthrough.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.overlay.look_up(self.own(parent), name) {
            Err(rustix::io::Errno::NOENT) => {
                // The number 0 lets the kernel remember that there is nothing.
                let nothing = FileAttr { ino: INodeNo(0), ..nothing() };
                reply.entry_with_ttls(&FOREVER, &FOREVER, &nothing, GENERATION);
            }
            found => self.entry(found, reply),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, nlookup: u64) {
        self.handles.forgotten(self.own(ino));
        self.given.forgotten(ino);
        self.overlay.forget(self.own(ino), nlookup);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.overlay.attr(self.own(ino)) {
            Ok(attr) => {
                let (attr, ttl) = self.attr_of(&attr);
                reply.attr(&ttl, &attr);
            }
            Err(error) => reply.error(errno(error)),
        }
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
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (atime, mtime) = (atime.map(set_time), mtime.map(set_time));
        let mut change = Change { mode, uid, gid, size, atime, mtime, ..Change::default() };
        match self.privileges_after(request, self.own(ino), &mut change) {
            Allowed::Yes => {}
            Allowed::Nothing => return self.getattr(request, ino, None, reply),
            Allowed::No => return reply.error(Errno::EPERM),
        }
        let _resizing = size.map(|_| locked(&self.handles.resizing));
        match self.overlay.change(self.own(ino), &change) {
            Ok(attr) => {
                let (attr, ttl) = self.attr_of(&attr);
                reply.attr(&ttl, &attr);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.overlay.read_link(self.own(ino)) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(error) => reply.error(errno(error)),
        }
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
        let made = self.overlay.make_node(self.own(parent), name, mode, umask, unpack_device(rdev), caller(request));
        self.made_in(parent, made, reply);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.made_in(parent, self.overlay.make_dir(self.own(parent), name, mode, umask, caller(request)), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.gone_from(self.own(parent), name, self.overlay.unlink(self.own(parent), name));
        self.handles.names_changed(&[self.own(parent)]);
        done(removed, reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.gone_from(self.own(parent), name, self.overlay.rmdir(self.own(parent), name));
        self.handles.names_changed(&[self.own(parent)]);
        done(removed, reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let made = self.overlay.make_symlink(self.own(parent), name, target.as_os_str(), caller(request));
        self.made_in(parent, made, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (no_replace, exchange) =
            (flags.contains(RenameFlags::RENAME_NOREPLACE), flags.contains(RenameFlags::RENAME_EXCHANGE));
        if flags.contains(RenameFlags::RENAME_WHITEOUT) || (no_replace && exchange) {
            return reply.error(Errno::EINVAL);
        }
        let (from, to) = (self.own(parent), self.own(newparent));
        let renamed = self.overlay.rename((from, name), (to, newname), no_replace, exchange);
        let renamed = self.gone_from(from, name, renamed);
        self.handles.names_changed(&[from, to]);
        done(renamed, reply);
    }

    fn link(&self, _: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        self.made_in(newparent, self.overlay.link(self.own(ino), self.own(newparent), newname), reply);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let truncate = flags.0 & OFlags::TRUNC.bits().cast_signed() != 0;
        let file = match self.overlay.open_file(self.own(ino), write, truncate) {
            Ok(file) => file,
            Err(error) => return reply.error(errno(error)),
        };
        if truncate {
            self.was_written_by(request, self.own(ino), false);
        }
        let appends = write && flags.0 & APPEND != 0;
        let may_pass =
            self.overlay.may_be_passed() && !appends && (!write || self.overlay.is_unprivileged(self.own(ino)));
        let access = if write { Access::Write } else { Access::Read };
        // Read before anything is locked: it may come from a disk.
        let length = if write { None } else { file.unwritten() };
        let wanted = length.and_then(|length| self.given.wanted(ino, length));
        with_buffer(wanted.unwrap_or(0), |content| {
            let whole = wanted.is_some() && file.read(content, 0) == Ok(content.len());
            let give = |file: &OpenFile| {
                // Who makes it shorter or longer right now has not told the kernel yet.
                let kept = self.handles.resizing.try_lock();
                if whole && kept.is_ok() && file.unwritten().is_some() {
                    self.given.give(ino, content);
                }
            };
            let register = |file: &_| reply.open_backing(file);
            let opened = self.handles.open_file(self.own(ino), file, access, may_pass, register, give);
            match &opened.backing {
                Some(backing) => {
                    reply.opened_passthrough(FileHandle(opened.handle), opened.flags, backing);
                    if write {
                        self.attributes_changed(self.own(ino));
                    }
                }
                None => reply.opened(FileHandle(opened.handle), opened.flags),
            }
        });
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
        let (attr, file) = match self.overlay.create(self.own(parent), name, mode, umask, caller(request)) {
            Ok(created) => created,
            Err(error) => return reply.error(errno(error)),
        };
        self.handles.names_changed(&[self.own(parent)]);
        let may_pass = self.overlay.may_be_passed() && mode & 0o6000 == 0 && flags & APPEND == 0;
        let access = Access::Create;
        let register = |file: &_| reply.open_backing(file);
        let opened = self.handles.open_file(attr.ino, file, access, may_pass, register, |_| {});
        let fuse = self.to_fuse(&attr);
        let handle = FileHandle(opened.handle);
        match &opened.backing {
            Some(backing) => {
                // The name and the attributes share one time here: as long as the kernel's opening of it takes, which would
                // else ask for the attributes once more. Afterwards the name is looked up again; that is all.
                reply.created_passthrough(&OPENING, &fuse, GENERATION, handle, opened.flags, backing);
            }
            None => reply.created(&FOREVER, &fuse, GENERATION, handle, opened.flags),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let file = match self.file(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error),
        };
        with_buffer(size, |buffer| match file.read(buffer, offset) {
            Ok(read) => reply.data(&buffer[..read]),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let file = match self.file(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error),
        };
        match self.overlay.write(self.own(ino), &file, data, offset) {
            Ok(written) => {
                if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
                    self.was_written_by(request, self.own(ino), true);
                }
                reply.written(written as u32);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Nothing is held back here; told so, the kernel does not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let behind = self.handles.close(fh.0);
        self.overlay.close_file(self.own(ino));
        self.handles.let_go(self.own(ino));
        reply.ok();
        if behind {
            self.attributes_changed(self.own(ino));
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        match self.file(fh) {
            Ok(file) => done(file.sync(datasync), reply),
            Err(error) => reply.error(error),
        }
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let (handle, kept) = self.handles.open_dir(self.own(ino));
        reply.opened(FileHandle(handle), kept);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let (names, tells_gone) = match self.names(self.own(ino), fh, offset) {
            Ok(names) => names,
            Err(error) => return reply.error(error),
        };
        if self.dots(self.own(ino)).add_to(&mut reply, offset) {
            return reply.ok();
        }
        for (at, name) in names.iter().enumerate().skip((offset as usize).saturating_sub(Dots::COUNT)) {
            let (number, kind) = match self.overlay.peek(self.own(ino), name) {
                Ok(Some(attr)) => (attr.ino + self.base, kind(attr.kind)),
                _ if tells_gone => self.gone(self.own(ino), name),
                _ => continue,
            };
            if reply.add(INodeNo(number), at as u64 + 3, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let (names, tells_gone) = match self.names(self.own(ino), fh, offset) {
            Ok(names) => names,
            Err(error) => return reply.error(error),
        };
        if self.dots(self.own(ino)).add_to_plus(&mut reply, offset) {
            return reply.ok();
        }
        for (at, name) in names.iter().enumerate().skip((offset as usize).saturating_sub(Dots::COUNT)) {
            let at = at as u64 + 3;
            let Ok(attr) = self.overlay.look_up(self.own(ino), name) else {
                // Without a number of its own, the kernel takes the name and nothing else.
                let (number, kind) = self.gone(self.own(ino), name);
                let gone = FileAttr { ino: INodeNo(number), kind, ..nothing() };
                if tells_gone && reply.add(INodeNo(0), at, name, &Duration::ZERO, &gone, GENERATION) {
                    break;
                }
                continue;
            };
            let (fuse, ttl) = self.attr_of(&attr);
            if reply.add(fuse.ino, at, name, &ttl, &fuse, GENERATION) {
                // It did not fit, so that the kernel does not hold it.
                self.overlay.forget(attr.ino, 1);
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, ino: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.handles.close_dir(fh.0, || {
            if let Some(notifier) = self.notifier.get() {
                let _ = notifier.inval_inode(ino, 0, 0);
            }
        });
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.overlay.sync_dir(self.own(ino)), reply);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.overlay.space() {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                s.f_namemax as u32,
                s.f_frsize as u32,
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        if name == MERGE && self.own(ino) == ROOT {
            return if self.is_ours(request) { self.merge_for(reply) } else { reply.error(Errno::EPERM) };
        }
        if name != SEAL {
            let ino = self.own(ino);
            let mut set = self.overlay.set_xattr(ino, name, value, flags.cast_unsigned());
            if set.is_ok() && name == "system.posix_acl_access" {
                set = self.list_was_set_by(request, ino);
            }
            return done(set, reply);
        }
        match std::str::from_utf8(value) {
            Ok(image) if self.own(ino) == ROOT && self.is_ours(request) => self.seal(image, reply),
            Ok(_) => reply.error(Errno::EPERM),
            Err(_) => reply.error(Errno::EINVAL),
        }
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if name == STORE {
            return match self.own(ino) {
                ROOT => sized(self.store.as_os_str().as_encoded_bytes(), size, reply),
                _ => reply.error(Errno::ENODATA),
            };
        }
        match self.overlay.xattr(self.own(ino), name) {
            Ok(value) => sized(&value, size, reply),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.overlay.xattr_names(self.own(ino)) {
            Ok(names) => sized(&xattr_list(request, names.iter().map(AsRef::as_ref)), size, reply),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.overlay.remove_xattr(self.own(ino), name), reply);
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
        let file = match self.file(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error),
        };
        let allocated = self.overlay.allocate(self.own(ino), &file, mode.cast_unsigned(), offset, length);
        if allocated.is_ok() {
            self.was_written_by(request, self.own(ino), false);
        }
        done(allocated, reply);
    }

    fn lseek(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let file = match self.file(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let found = match whence {
            SEEK_DATA => file.seek(offset, false),
            SEEK_HOLE => file.seek(offset, true),
            _ => return reply.error(Errno::EINVAL),
        };
        match found {
            Ok(at) => reply.offset(at.cast_signed()),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let files = self.file(fh_in).and_then(|from| Ok((from, self.file(fh_out)?)));
        let (from, to) = match files {
            Ok(files) => files,
            Err(error) => return reply.error(error),
        };
        match self.overlay.copy_range(self.own(ino_out), &to, &from, (offset_in, offset_out), len) {
            Ok(copied) => {
                self.was_written_by(request, self.own(ino_out), false);
                reply.written(copied as u32);
                if self.handles.is_passed(self.own(ino_out)) {
                    self.attributes_changed(self.own(ino_out));
                }
            }
            Err(error) => reply.error(errno(error)),
        }
    }
}

/// Whether a change may be made.
enum Allowed {
    Yes,
    /// It is for others to make.
    No,
    /// It is asked for beside another one that says more.
    Nothing,
}

fn author(request: &Request) -> Author {
    Author::of(request.pid().cast_signed(), request.uid(), request.gid())
}

impl Adapter {
    /// Whether somebody asks who may do with the store what he likes.
    fn is_ours(&self, request: &Request) -> bool {
        [0, rustix::process::geteuid().as_raw()].contains(&request.uid())
    }

    /// Takes off what a write by somebody else takes off. That it is one, the kernel says of a plain write alone.
    fn was_written_by(&self, request: &Request, ino: u64, drops: bool) {
        if self.overlay.is_unprivileged(ino) {
            return;
        }
        let author = author(request);
        if drops || !author.keeps_set_ids() {
            let outsider = self.overlay.attr(ino).is_ok_and(|attr| !author.is_of(attr.stat.st_gid));
            let _ = self.overlay.drop_privileges(ino, outsider);
        }
    }

    /// Finds what a change of the length or the owner leaves of the set-id bits, and whether it may be made.
    ///
    /// A change of nothing is what the kernel asks for when it wants the bits off: for `chown` to nobody else, which it lets anybody call, and
    /// before each write, even if that says so itself. Only what it writes past us says nothing more.
    fn privileges_after(&self, request: &Request, ino: u64, change: &mut Change) -> Allowed {
        let nothing = change.is_empty();
        let gives = change.uid.is_some() || change.gid.is_some();
        if !(nothing || gives || change.size.is_some()) || self.overlay.is_unprivileged(ino) {
            return Allowed::Yes;
        }
        let Ok(Attr { stat, kind, .. }) = self.overlay.attr(ino) else { return Allowed::Yes };
        // A directory keeps them.
        if kind == rustix::fs::FileType::Directory {
            return Allowed::Yes;
        }
        let author = author(request);
        change.drop_privileges = !author.keeps_set_ids();
        change.outsider = !author.is_of(stat.st_gid);
        let allowed = !nothing || author.owns(stat.st_uid);
        match (allowed, self.handles.is_open(ino)) {
            (true, _) => Allowed::Yes,
            (false, true) if change.drop_privileges && self.handles.is_passed(ino) => Allowed::Yes,
            (false, false) if privileges(&stat, change.outsider) != 0 => Allowed::No,
            (false, _) => Allowed::Nothing,
        }
    }

    /// Takes the set-group-ID bit off a file whose access control list somebody has set who is not in its group: that may give the mode
    /// anew, and so the kernel does it for a change of the mode. For a list it says so only in a form of the request that fuser does not read.
    fn list_was_set_by(&self, request: &Request, ino: u64) -> super::overlay::Result<()> {
        let stat = self.overlay.attr(ino)?.stat;
        if stat.st_mode & 0o2000 == 0 || author(request).is_of(stat.st_gid) {
            return Ok(());
        }
        let change = Change { mode: Some(stat.st_mode & 0o5777), ..Change::default() };
        self.overlay.change(ino, &change).map(drop)
    }

    /// Seals the layer, in a thread of its own: the kernel writes to us meanwhile what it holds back.
    fn seal(&self, image: &str, reply: ReplyEmpty) {
        let (overlay, handles, notifier) = (self.overlay.clone(), self.handles.clone(), self.notifier.clone());
        let (image, base) = (image.to_owned(), self.base);
        std::thread::spawn(move || {
            if let Some(notifier) = notifier.get() {
                for ino in handles.dirty() {
                    // Waits until what was changed in shared mappings is written.
                    let _ = notifier.inval_inode(INodeNo(ino + base), 0, 0);
                }
            }
            done(overlay.seal(&image, || handles.passed()), reply);
        });
    }

    /// What merges the layers that nobody needs any more, when it is called.
    pub(super) fn merger(&self) -> impl Fn() -> super::overlay::Result<()> + Send + use<> {
        let (overlay, handles) = (self.overlay.clone(), self.handles.clone());
        move || overlay.merge(|| handles.passed())
    }

    /// Merges layers, in a thread of its own: it may take a while.
    fn merge_for(&self, reply: ReplyEmpty) {
        let merge = self.merger();
        std::thread::spawn(move || done(merge(), reply));
    }

    /// Makes the kernel ask for the attributes again.
    fn attributes_changed(&self, ino: u64) {
        if let Some(notifier) = self.notifier.get() {
            // A negative offset spares the pages; a file that the kernel has forgotten by now needs nothing.
            let _ = notifier.inval_inode(INodeNo(ino + self.base), -1, 0);
        }
    }
}
