//! From the kernel's requests to the tree of past states and back. Nothing is decided here but what the kernel may cache.

use std::ffi::OsStr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, UNIX_EPOCH};

use fsnap_backend::FileKind;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, LockOwner, Notifier, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyXattr, Request,
};

use super::adapter::FOREVER;
use super::browse::{self, Attr, Browse, Keep, Listed, Natives};
use super::given::Given;
use super::open::{Dots, with_buffer};
use super::overlay::no_such_xattr;
use super::readers::{Reader, Readers};
use super::wire::{GENERATION, errno, moment, pack_device, sized, xattr_list};

/// How soon a removed checkpoint is seen to be gone by those who walk through its directory.
const BRIEFLY: Duration = Duration::from_secs(1);

/// Serves past states.
#[derive(Debug)]
pub struct BrowseAdapter {
    browse: Arc<Browse>,
    /// Set if snapshots are attached.
    natives: Option<Arc<Natives>>,
    readers: Readers,
    given: Given,
}

impl BrowseAdapter {
    /// Serves this tree. The notifier is set once the session has one.
    pub fn new(browse: Arc<Browse>, natives: Option<Arc<Natives>>, notifier: Arc<OnceLock<Notifier>>) -> Self {
        Self { browse, natives, readers: Readers::default(), given: Given::new(notifier) }
    }

    /// Reads may be passed through to files below.
    pub(super) fn pass_through(&self) {
        self.readers.passthrough.store(true, Ordering::Relaxed);
    }

    /// The names of an open directory; from the beginning, they are read anew.
    fn names(&self, ino: u64, handle: FileHandle, offset: u64) -> Result<Arc<Vec<Listed>>, Errno> {
        let found = self.readers.get(handle.0);
        let Some(Reader::Dir(names)) = found.as_deref() else { return Err(Errno::EBADF) };
        names.at(offset, |_| self.browse.list(ino).map(Arc::new).map_err(errno))
    }

    fn dots(&self, ino: u64) -> Dots {
        Dots { own: ino, parent: self.browse.parent(ino) }
    }
}

fn time_of(keep: Keep) -> Duration {
    match keep {
        Keep::Forever => FOREVER,
        Keep::Briefly => BRIEFLY,
        Keep::Not => Duration::ZERO,
    }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Dir => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

pub(super) fn to_fuse(attr: &Attr) -> FileAttr {
    let meta = &attr.meta;
    let time = |time: fsnap_backend::Timestamp| moment(time.seconds, time.nanoseconds.into());
    FileAttr {
        ino: INodeNo(meta.ino),
        size: meta.size,
        blocks: blocks(meta.size),
        atime: time(meta.atime),
        mtime: time(meta.mtime),
        ctime: time(meta.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(meta.kind),
        perm: (meta.mode & 0o7777) as u16,
        nlink: meta.nlink,
        uid: meta.uid,
        gid: meta.gid,
        rdev: pack_device(meta.rdev),
        blksize: 4096,
        flags: 0,
    }
}

/// What a file takes on the disk is the store's affair, and is not told. But programs such as cp(1) ask for holes only where there seem
/// to be some; a large file seems to have one, lest a tebibyte of holes is read as zeros.
fn blocks(size: u64) -> u64 {
    const LARGE: u64 = 64 << 10;
    size.div_ceil(512) - u64::from(size >= LARGE)
}

impl Filesystem for BrowseAdapter {
    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let answer = move |found: browse::Result<Attr>| match found {
            Ok(attr) => {
                let (name, attributes) = (time_of(attr.name), time_of(attr.attributes));
                reply.entry_with_ttls(&attributes, &name, &to_fuse(&attr), GENERATION);
            }
            Err(error) => reply.error(errno(error)),
        };
        match &self.natives {
            Some(natives) => natives.look_up(parent.0, name, request.pid(), Box::new(answer)),
            None => answer(self.browse.look_up(parent.0, name)),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, nlookup: u64) {
        self.given.forgotten(ino);
        self.browse.forget(ino.0, nlookup);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let answer = move |attr: browse::Result<Attr>| match attr {
            Ok(attr) => reply.attr(&time_of(attr.attributes), &to_fuse(&attr)),
            Err(error) => reply.error(errno(error)),
        };
        match &self.natives {
            Some(natives) => natives.answer(ino.0, request.pid(), Box::new(answer)),
            None => answer(self.browse.attr(ino.0)),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.browse.read_link(ino.0) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let opened = match self.browse.open(ino.0) {
            Ok(opened) => opened,
            Err(error) => return reply.error(errno(error)),
        };
        let flags = if opened.is_text() { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::FOPEN_KEEP_CACHE };
        let wanted = self.given.wanted(ino, opened.length()).filter(|_| !opened.is_text());
        with_buffer(wanted.unwrap_or(0), |content| {
            let whole = wanted.is_some() && opened.read(content, 0) == Ok(content.len());
            let give = || {
                if whole {
                    self.given.give(ino, content);
                }
            };
            let (handle, backing) = self.readers.open_file(ino.0, opened, |file| reply.open_backing(file), give);
            match backing {
                Some(backing) => reply.opened_passthrough(FileHandle(handle), FopenFlags::empty(), &backing),
                None => reply.opened(FileHandle(handle), flags),
            }
        });
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
        let reader = self.readers.get(fh.0);
        let Some(Reader::File { opened, .. }) = reader.as_deref() else { return reply.error(Errno::EBADF) };
        with_buffer(size, |buffer| match opened.read(buffer, offset) {
            Ok(read) => reply.data(&buffer[..read]),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn lseek(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let reader = self.readers.get(fh.0);
        let Some(Reader::File { opened, .. }) = reader.as_deref() else { return reply.error(Errno::EBADF) };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let found = match whence {
            SEEK_DATA => opened.seek(offset, false),
            SEEK_HOLE => opened.seek(offset, true),
            _ => return reply.error(Errno::EINVAL),
        };
        match found {
            Ok(at) => reply.offset(at.cast_signed()),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // There is nothing to write: the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.readers.close(fh.0);
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if let Err(error) = self.browse.open_dir(ino.0) {
            return reply.error(errno(error));
        }
        let kept = match self.browse.never_changes(ino.0) {
            true => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
            false => FopenFlags::empty(),
        };
        reply.opened(FileHandle(self.readers.open_dir()), kept);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let names = match self.names(ino.0, fh, offset) {
            Ok(names) => names,
            Err(error) => return reply.error(error),
        };
        if self.dots(ino.0).add_to(&mut reply, offset) {
            return reply.ok();
        }
        for (at, listed) in names.iter().enumerate().skip((offset as usize).saturating_sub(Dots::COUNT)) {
            if reply.add(INodeNo(listed.number), at as u64 + 3, file_type(listed.kind), &listed.name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let names = match self.names(ino.0, fh, offset) {
            Ok(names) => names,
            Err(error) => return reply.error(error),
        };
        if self.dots(ino.0).add_to_plus(&mut reply, offset) {
            return reply.ok();
        }
        for (at, listed) in names.iter().enumerate().skip((offset as usize).saturating_sub(Dots::COUNT)) {
            let Ok(attr) = self.browse.look_up_listed(ino.0, listed) else { continue };
            // The name and the attributes share one time here: the shorter one, so that neither is ever wrong.
            let time = time_of(attr.name).min(time_of(attr.attributes));
            let fuse = to_fuse(&attr);
            if reply.add(fuse.ino, at as u64 + 3, &listed.name, &time, &fuse, GENERATION) {
                // It did not fit, so that the kernel does not hold it.
                self.browse.forget(attr.meta.ino, 1);
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.readers.close(fh.0);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // Nothing of it can be written, and what there is takes room elsewhere.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.browse.xattrs(ino.0) {
            Ok(xattrs) => match xattrs.iter().find(|(key, _)| key == name) {
                Some((_, value)) => sized(value, size, reply),
                None => reply.error(errno(no_such_xattr(name))),
            },
            Err(error) => reply.error(errno(error)),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.browse.xattrs(ino.0) {
            Ok(xattrs) => sized(&xattr_list(request, xattrs.iter().map(|(name, _)| name.as_ref())), size, reply),
            Err(error) => reply.error(errno(error)),
        }
    }
}
