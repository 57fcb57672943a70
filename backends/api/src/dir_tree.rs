//! A tree that lies in a directory of a mounted file system.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::{Content, Dir, Entry, FileMeta, IoContext, Result, Xattrs, beneath};

/// One open directory of a mounted file system, with the path that names it in messages.
#[derive(Debug)]
pub struct DirTree {
    descriptor: OwnedFd,
    shown: PathBuf,
}

impl DirTree {
    /// Opens the tree at `path`, whose last component may not be a symbolic link.
    pub fn open(path: &Path) -> Result<Self> {
        let descriptor = beneath::open_root(path).context("open the directory", path)?;
        Ok(Self { descriptor, shown: path.to_owned() })
    }

    /// Takes an open directory as a tree; `shown` names it in messages.
    pub fn from_descriptor(descriptor: OwnedFd, shown: impl Into<PathBuf>) -> Self {
        Self { descriptor, shown: shown.into() }
    }

    fn shown(&self, name: &OsStr) -> PathBuf {
        self.shown.join(name)
    }
}

impl Dir for DirTree {
    fn meta(&self) -> Result<FileMeta> {
        beneath::stat_fd(&self.descriptor).context("read the attributes of", &self.shown)
    }

    fn own_xattrs(&self) -> Result<Xattrs> {
        beneath::xattrs_fd(&self.descriptor).context("read the extended attributes of", &self.shown)
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let mut names = beneath::names(&self.descriptor).context("list", &self.shown)?;
        names.sort();
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            // A name that went away while a live directory was listed is no entry.
            if let Some(entry) = self.entry(&name)? {
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    fn entry(&self, name: &OsStr) -> Result<Option<Entry>> {
        match beneath::stat(&self.descriptor, name) {
            Ok(meta) => Ok(Some(Entry { name: name.to_owned(), meta })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("read the attributes of", self.shown(name)),
        }
    }

    fn open_dir(&self, name: &OsStr) -> Result<Box<dyn Dir>> {
        let shown = self.shown(name);
        let descriptor = beneath::open_dir(&self.descriptor, name).context("open the directory", &shown)?;
        Ok(Box::new(Self { descriptor, shown }))
    }

    fn open_file(&self, name: &OsStr) -> Result<Box<dyn Content>> {
        let (file, meta) = beneath::open_known_file(&self.descriptor, name).context("open", self.shown(name))?;
        Ok(Box::new(WholeFile { file, length: meta.size }))
    }

    fn read_link(&self, name: &OsStr) -> Result<OsString> {
        beneath::read_link(&self.descriptor, name).context("read the link", self.shown(name))
    }

    fn file_system(&self) -> Result<u64> {
        Ok(beneath::look_fd(&self.descriptor).context("read the attributes of", &self.shown)?.device)
    }

    fn xattrs(&self, name: &OsStr) -> Result<Xattrs> {
        beneath::xattrs(&self.descriptor, name).context("read the extended attributes of", self.shown(name))
    }
}

/// A content that is a whole file of the file system.
#[derive(Debug)]
pub struct WholeFile {
    file: File,
    length: u64,
}

impl WholeFile {
    /// Takes an open file, as long as it is now.
    pub fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }
}

impl Content for WholeFile {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        data_in(&self.file, self.length, offset)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// The first range at or after `offset` that is no hole, in a file that counts up to `length`: [`Content::data_after`] of it.
pub fn data_in(file: &File, length: u64, offset: u64) -> io::Result<Option<Range<u64>>> {
    if offset >= length {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) if start < length => start,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..end.min(length)))
}

impl From<DirTree> for Box<dyn Dir> {
    fn from(tree: DirTree) -> Self {
        Box::new(tree)
    }
}
