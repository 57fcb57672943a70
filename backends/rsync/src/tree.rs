//! Reading a snapshot: a tree over its records.

use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use fsnap_backend::{Content, Dir, Entry, Error, FileMeta, Locator, Result, Xattrs};

use crate::content;
use crate::record::{Body, Item, Record, RecordRef};
use crate::store::Inner;

/// One directory of a snapshot.
#[derive(Debug)]
pub(crate) struct Tree {
    store: Arc<Inner>,
    at: RecordRef,
    record: Record,
    /// For messages: the locator, and the path in the snapshot.
    shown: PathBuf,
}

impl Tree {
    /// Opens the root of a snapshot.
    pub(crate) fn open(store: Arc<Inner>, root: RecordRef, at: &Locator) -> Result<Self> {
        Self::new(store, root, at.as_str().into())
    }

    fn new(store: Arc<Inner>, at: RecordRef, shown: PathBuf) -> Result<Self> {
        let record = store.record(&at)?;
        Ok(Self { store, at, record, shown })
    }

    fn item(&self, name: &OsStr) -> Result<&Item> {
        self.record.item(name).ok_or_else(|| Error::NotFound { what: self.shown.join(name).display().to_string() })
    }

    fn not_a(&self, name: &OsStr, kind: &'static str) -> Error {
        Error::NotFound { what: format!("{kind} {}", self.shown.join(name).display()) }
    }
}

fn entry_of(item: &Item) -> Entry {
    Entry { name: item.name.clone(), meta: item.meta }
}

impl Dir for Tree {
    fn meta(&self) -> Result<FileMeta> {
        Ok(self.record.meta)
    }

    fn own_xattrs(&self) -> Result<Xattrs> {
        Ok(self.record.xattrs.clone())
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        Ok(self.record.items.iter().map(entry_of).collect())
    }

    fn entry(&self, name: &OsStr) -> Result<Option<Entry>> {
        Ok(self.record.item(name).map(entry_of))
    }

    fn open_dir(&self, name: &OsStr) -> Result<Box<dyn Dir>> {
        match self.item(name)?.body {
            Body::Dir(below) => Ok(Box::new(Self::new(self.store.clone(), below, self.shown.join(name))?)),
            _ => Err(self.not_a(name, "the directory")),
        }
    }

    fn open_file(&self, name: &OsStr) -> Result<Box<dyn Content>> {
        let item = self.item(name)?;
        match item.body {
            Body::File(Some(content)) => content::open(&self.store, &content, item.meta.size),
            Body::File(None) => Ok(Box::new(Empty)),
            _ => Err(self.not_a(name, "the regular file")),
        }
    }

    fn read_link(&self, name: &OsStr) -> Result<OsString> {
        match &self.item(name)?.body {
            Body::Symlink(target) => Ok(target.clone()),
            _ => Err(self.not_a(name, "the symbolic link")),
        }
    }

    fn xattrs(&self, name: &OsStr) -> Result<Xattrs> {
        let item = self.item(name)?;
        match item.body {
            Body::Dir(below) => Ok(self.store.record(&below)?.xattrs),
            _ => Ok(item.xattrs.clone()),
        }
    }

    fn token(&self) -> Option<[u8; 32]> {
        Some(self.at.hash)
    }
}

/// The content of an empty file.
#[derive(Debug)]
struct Empty;

impl Content for Empty {
    fn len(&self) -> u64 {
        0
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn data_after(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }
}
