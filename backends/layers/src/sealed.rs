//! A sealed state, read through the contract's [`Dir`].

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use fsnap_backend::{Content, Dir, Entry, Error, FileKind, FileMeta, Result, Timestamp, Xattrs};
use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::attr::Attr;
use super::below::{LowerContent, io_errno};
use super::data::Source;
use super::deeper::deeper;
use super::list::Union;
use super::node::{Ino, ROOT};
use super::{Overlay, Result as TreeResult};

/// One directory of a sealed state.
#[derive(Debug)]
pub(super) struct SealedDir {
    overlay: Arc<Overlay>,
    ino: Ino,
}

impl SealedDir {
    pub(super) fn root(overlay: Arc<Overlay>) -> Self {
        Self { overlay, ino: ROOT }
    }

    /// Asks the state, which may ask the one below.
    fn ask<T: Send>(&self, question: impl FnOnce(&Overlay) -> TreeResult<T> + Send) -> TreeResult<T> {
        deeper(|| question(&self.overlay)).map_err(|error| io_errno(&error))?
    }

    /// Opens the directory of that name.
    pub(super) fn enter(&self, name: &OsStr) -> TreeResult<Self> {
        let attr = self.ask(|overlay| overlay.look_up(self.ino, name))?;
        let dir = Self { overlay: self.overlay.clone(), ino: attr.ino };
        if attr.kind == FileType::Directory { Ok(dir) } else { Err(Errno::NOTDIR) }
    }

    /// Adds all names to those that are above.
    pub(super) fn names(&self, union: &mut Union) -> TreeResult<()> {
        self.ask(|overlay| overlay.list_into(self.ino, union))
    }

    /// Does something with the file of that name.
    fn with<T: Send>(&self, name: &OsStr, act: impl FnOnce(&Overlay, Ino) -> TreeResult<T> + Send) -> TreeResult<T> {
        self.ask(|overlay| {
            let attr = overlay.look_up(self.ino, name)?;
            let done = act(overlay, attr.ino);
            overlay.forget(attr.ino, 1);
            done
        })
    }
}

impl Drop for SealedDir {
    fn drop(&mut self) {
        if self.ino != ROOT {
            self.overlay.forget(self.ino, 1);
        }
    }
}

fn failed(action: &'static str, name: &OsStr) -> impl Fn(Errno) -> Error {
    let object = name.to_string_lossy().into_owned();
    move |error| Error::Io { action, object: object.clone(), source: error.into() }
}

fn kind(kind: FileType) -> FileKind {
    match kind {
        FileType::Directory => FileKind::Dir,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::RegularFile | FileType::Unknown => FileKind::File,
    }
}

fn meta(attr: &Attr) -> FileMeta {
    let stat: &Stat = &attr.stat;
    let time = |seconds: i64, nanoseconds: u64| Timestamp { seconds, nanoseconds: nanoseconds as u32 };
    FileMeta {
        kind: kind(attr.kind),
        ino: attr.ino,
        nlink: attr.nlink,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: if matches!(attr.kind, FileType::CharacterDevice | FileType::BlockDevice) { attr.rdev } else { 0 },
        size: stat.st_size.cast_unsigned(),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        btime: None,
    }
}

impl Dir for SealedDir {
    fn meta(&self) -> Result<FileMeta> {
        let attr =
            self.ask(|overlay| overlay.attr(self.ino)).map_err(failed("read the attributes of", OsStr::new(".")))?;
        Ok(meta(&attr))
    }

    fn own_xattrs(&self) -> Result<Xattrs> {
        self.ask(|overlay| overlay.xattrs(self.ino)).map_err(failed("read the extended attributes of", OsStr::new(".")))
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let listed = self.ask(|overlay| overlay.list(self.ino)).map_err(failed("list", OsStr::new(".")))?;
        let mut entries = Vec::with_capacity(listed.len());
        for listed in listed {
            entries.extend(self.entry(&listed.name)?);
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn entry(&self, name: &OsStr) -> Result<Option<Entry>> {
        let found = self.ask(|overlay| overlay.peek(self.ino, name)).map_err(failed("read the attributes of", name))?;
        Ok(found.map(|attr| Entry { name: name.to_owned(), meta: meta(&attr) }))
    }

    fn open_dir(&self, name: &OsStr) -> Result<Box<dyn Dir>> {
        Ok(Box::new(self.enter(name).map_err(failed("open the directory", name))?))
    }

    fn open_file(&self, name: &OsStr) -> Result<Box<dyn Content>> {
        match self.with(name, Overlay::source).map_err(failed("open", name))? {
            // Nothing of it is here: a reading does not go through all levels.
            Source::Lower(LowerContent::Content(below)) => Ok(below),
            source => Ok(Box::new(source)),
        }
    }

    fn read_link(&self, name: &OsStr) -> Result<OsString> {
        self.with(name, Overlay::read_link).map_err(failed("read the link", name))
    }

    fn xattrs(&self, name: &OsStr) -> Result<Xattrs> {
        self.with(name, Overlay::xattrs).map_err(failed("read the extended attributes of", name))
    }
}

/// A directory that cannot be read: what stands below as long as nothing else can.
#[derive(Debug)]
pub(super) struct Unreadable;

fn unreadable<T>() -> Result<T> {
    Err(Error::Io { action: "read", object: "the layers below".into(), source: Errno::IO.into() })
}

impl Dir for Unreadable {
    fn meta(&self) -> Result<FileMeta> {
        unreadable()
    }

    fn own_xattrs(&self) -> Result<Xattrs> {
        unreadable()
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        unreadable()
    }

    fn entry(&self, _: &OsStr) -> Result<Option<Entry>> {
        unreadable()
    }

    fn open_dir(&self, _: &OsStr) -> Result<Box<dyn Dir>> {
        unreadable()
    }

    fn open_file(&self, _: &OsStr) -> Result<Box<dyn Content>> {
        unreadable()
    }

    fn read_link(&self, _: &OsStr) -> Result<OsString> {
        unreadable()
    }

    fn xattrs(&self, _: &OsStr) -> Result<Xattrs> {
        unreadable()
    }
}
