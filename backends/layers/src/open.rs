//! Opening contents.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::data::{self, OpenFile, Partial, Source};
use super::node::Ino;
use super::{Overlay, Result, Tree};

impl Overlay {
    /// Opens a regular file; it stays known until it is closed as often as it was opened.
    pub fn open_file(&self, ino: Ino, write: bool, truncate: bool) -> Result<Arc<OpenFile>> {
        self.tree().open_file(ino, write, truncate)
    }

    /// Undoes one [`open_file`](Self::open_file).
    pub fn close_file(&self, ino: Ino) {
        let mut tree = self.tree();
        if let Some(node) = tree.nodes.get_mut(ino) {
            node.opens = node.opens.saturating_sub(1);
            if node.opens == 0 {
                node.file = None;
            }
        }
        tree.nodes.drop_unused(ino);
    }
}

impl Overlay {
    /// Writes at `offset`; a file that was sealed while it was open is copied up first.
    pub fn write(&self, ino: Ino, file: &OpenFile, data: &[u8], offset: u64) -> Result<usize> {
        self.changing(ino, file, || file.write(data, offset))
    }

    /// `fallocate(2)`.
    pub fn allocate(&self, ino: Ino, file: &OpenFile, mode: u32, offset: u64, length: u64) -> Result<()> {
        self.changing(ino, file, || file.allocate(mode, offset, length))
    }

    /// Copies from another file, or from this one, as much as can be done at once.
    pub fn copy_range(
        &self,
        ino: Ino,
        file: &Arc<OpenFile>,
        other: &Arc<OpenFile>,
        (from, to): (u64, u64),
        length: u64,
    ) -> Result<u64> {
        self.changing(ino, file, || file.copy_from(other, from, to, length))
    }

    fn changing<T>(&self, ino: Ino, file: &OpenFile, change: impl Fn() -> Result<T>) -> Result<T> {
        let mut done = change();
        // Sealed again and again at the right moments, it would have to be tried for ever.
        while done.is_err() && file.is_below() {
            self.tree().copy_up(ino, true)?;
            done = change();
        }
        done
    }
}

impl Tree {
    pub(super) fn open_file(&mut self, ino: Ino, write: bool, truncate: bool) -> Result<Arc<OpenFile>> {
        if write || truncate {
            self.copy_up(ino, !truncate)?;
        }
        let file = self.content(ino)?;
        if truncate {
            file.truncate(0)?;
        }
        let node = self.node_mut(ino)?;
        node.opens += 1;
        node.file = Some(file.clone());
        Ok(file)
    }

    /// The content of a regular file: the open one, or opened for the moment.
    pub(super) fn content(&mut self, ino: Ino) -> Result<Arc<OpenFile>> {
        if let Some(file) = &self.node(ino)?.file {
            return Ok(file.clone());
        }
        let source = self.source(ino)?;
        Ok(Arc::new(OpenFile::new(source, self.store.gate.clone())))
    }

    /// Opens the content where it is now.
    pub(super) fn source(&mut self, ino: Ino) -> Result<Source> {
        let node = self.node(ino)?;
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        let upper = node.upper;
        // Its name went before a layer was sealed: what it says of the lower is of another one.
        let lost = node.pin.is_some() && node.epoch != self.epoch;
        let object = self.object(ino)?;
        if !upper {
            return Ok(Source::Lower(object.content()?));
        }
        let opened = if self.store.read_only { object.open_sealed() } else { object.open(OFlags::RDWR) };
        let file = match opened {
            // Without privileges, the file's own mode may allow only one of them.
            Err(Errno::ACCESS) => object.open(OFlags::RDONLY).or_else(|_| object.open(OFlags::WRONLY))?,
            opened => opened?,
        };
        let file = Arc::new(File::from(file));
        let keys = self.store.keys();
        let Some(value) = object.xattr(keys.partial())? else { return Ok(Source::Whole(file)) };
        if lost {
            return Err(Errno::STALE);
        }
        let size = file.metadata().map_err(|_| Errno::IO)?.len();
        let (valid, path) = data::parts_of(&value, size)?;
        let long = self.store.lengthen(path.clone())?;
        let (at, _) = self.lower.resolve(&long)?.ok_or(Errno::IO)?;
        let lower = self.lower.object(&at)?.content()?;
        Ok(Source::Partial(Partial { file, lower, valid, block: self.store.block, keys, path }))
    }
}
