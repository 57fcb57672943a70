//! The oracle: a tree of files that nobody could get wrong.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use fsnap_backend::{FileKind, FileMeta};

use crate::Listing;
use crate::listing::Item;
use crate::op::{Live, Op, TreePath};

/// A tree of files in memory, and the live directory that is changed along with it.
///
/// Naive on purpose: a flat table of whole paths, no directories, no sharing. What the kernel alone decides (the time
/// of a change, the attributes that a new file is born with) is read from the live tree after a change, and only for
/// the files that the change names; everything else is predicted.
#[derive(Debug)]
pub struct Model {
    live: Live,
    names: BTreeMap<TreePath, FileId>,
    files: BTreeMap<FileId, Item>,
    next: FileId,
}

type FileId = u64;

impl Model {
    /// Begins with the empty directory at `dir`.
    pub fn of_empty(dir: &Path) -> io::Result<Self> {
        let mut model = Self { live: Live::open(dir)?, names: BTreeMap::new(), files: BTreeMap::new(), next: 0 };
        model.add(TreePath::new(), FileKind::Dir);
        model.read_back(&[])?;
        Ok(model)
    }

    /// Takes over what a listing holds, for the live tree at `dir`, which must be equal to it.
    pub fn of_listing(listing: &Listing, dir: &Path) -> io::Result<Self> {
        let mut model = Self { live: Live::open(dir)?, names: BTreeMap::new(), files: BTreeMap::new(), next: 0 };
        for (path, item) in listing.items() {
            match model.names.get(&item.first_name).copied() {
                Some(id) => drop(model.names.insert(path.clone(), id)),
                None => {
                    let id = model.add(path.clone(), item.kind);
                    model.files.insert(id, item.clone());
                }
            }
        }
        Ok(model)
    }

    /// Changes the live tree and the model alike.
    pub fn apply(&mut self, op: &Op) -> io::Result<()> {
        self.live.apply(op)?;
        match op {
            Op::Create(path) => self.born(path, FileKind::File)?,
            Op::MakeDir(path) => self.born(path, FileKind::Dir)?,
            Op::Fifo(path) => self.born(path, FileKind::Fifo)?,
            Op::Socket(path) => self.born(path, FileKind::Socket)?,
            Op::CharDevice(path, major, minor) => {
                self.born(path, FileKind::CharDevice)?;
                self.file(path).rdev = rustix::fs::makedev(*major, *minor);
            }
            Op::BlockDevice(path, major, minor) => {
                self.born(path, FileKind::BlockDevice)?;
                self.file(path).rdev = rustix::fs::makedev(*major, *minor);
            }
            Op::Symlink(path, target) => {
                self.born(path, FileKind::Symlink)?;
                self.file(path).target = std::os::unix::ffi::OsStringExt::from_vec(target.clone());
            }
            Op::Link(from, to) => {
                self.names.insert(to.clone(), self.names[from]);
                self.read_times(parent(to))?;
            }
            Op::Rename(from, to) => self.rename(from, to)?,
            Op::Remove(path) => {
                self.names.remove(path);
                self.read_times(parent(path))?;
            }
            Op::Write(path, offset, data) | Op::Store(path, offset, data) => {
                self.file(path).content.write(*offset, data);
                self.read_times(path)?;
            }
            Op::Truncate(path, len) => {
                self.file(path).content.resize(*len);
                self.read_times(path)?;
            }
            Op::Punch(path, offset, len) => {
                self.file(path).content.zero(*offset, *len);
                self.read_times(path)?;
            }
            Op::Chmod(path, mode) => self.file(path).mode = *mode,
            Op::Chown(path, uid, gid) => {
                let file = self.file(path);
                (file.uid, file.gid) = (*uid, *gid);
            }
            // Read back and not predicted: file systems clamp what they cannot hold.
            Op::Touch(path, _) => self.read_times(path)?,
            Op::SetXattr(path, key, value) => {
                self.file(path).xattrs.insert(key.clone(), value.clone());
            }
            Op::RemoveXattr(path, key) => {
                self.file(path).xattrs.remove(key);
            }
        }
        Ok(())
    }

    /// Carries out several changes.
    pub fn apply_all<'a>(&mut self, ops: impl IntoIterator<Item = &'a Op>) -> io::Result<()> {
        ops.into_iter().try_for_each(|op| self.apply(op))
    }

    /// The tree as it must be now.
    pub fn listing(&self) -> Listing {
        let mut listing = Listing::default();
        for (path, id) in &self.names {
            let mut item = self.files[id].clone();
            let mut names = self.names.iter().filter(|(_, other)| *other == id).map(|(path, _)| path);
            item.first_name = names.next().cloned().unwrap_or_default();
            item.nlink = if item.kind == FileKind::Dir { 0 } else { 1 + names.count() as u32 };
            listing.insert(path.clone(), item);
        }
        listing
    }

    /// The live tree.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// All paths, in order, with what is there.
    pub fn paths(&self) -> impl Iterator<Item = (&TreePath, &Item)> {
        self.names.iter().map(|(path, id)| (path, &self.files[id]))
    }

    fn add(&mut self, path: TreePath, kind: FileKind) -> FileId {
        let id = self.next;
        self.next += 1;
        self.names.insert(path, id);
        self.files.insert(id, Item::empty(kind));
        id
    }

    fn file(&mut self, path: &[u8]) -> &mut Item {
        self.files.get_mut(&self.names[path]).expect("every name has a file")
    }

    fn born(&mut self, path: &TreePath, kind: FileKind) -> io::Result<()> {
        self.add(path.clone(), kind);
        self.read_back(path)?;
        self.read_times(parent(path))
    }

    fn rename(&mut self, from: &TreePath, to: &TreePath) -> io::Result<()> {
        // rename(2): when both are names of one file, nothing happens.
        if self.names.get(to) == Some(&self.names[from]) {
            return Ok(());
        }
        let below: Vec<TreePath> = self.names.keys().filter(|path| is_at_or_below(path, from)).cloned().collect();
        for path in below {
            let id = self.names.remove(&path).expect("it was just found");
            self.names.insert([to, &path[from.len()..]].concat(), id);
        }
        self.read_times(parent(from))?;
        self.read_times(parent(to))?;
        self.read_times(to)
    }

    fn read_times(&mut self, path: &[u8]) -> io::Result<()> {
        self.file(path).mtime = self.live.meta(path)?.mtime;
        Ok(())
    }

    fn read_back(&mut self, path: &[u8]) -> io::Result<()> {
        let FileMeta { mode, uid, gid, mtime, .. } = self.live.meta(path)?;
        let xattrs = self.live.xattrs(path)?.into_iter().collect();
        let file = self.file(path);
        *file = Item { mode, uid, gid, mtime, xattrs, ..file.clone() };
        Ok(())
    }
}

/// The path of the directory that holds `path`.
pub(crate) fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(&[], |slash| &path[..slash])
}

/// Whether `path` is `top` or lies below it.
pub(crate) fn is_at_or_below(path: &[u8], top: &[u8]) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest[0] == b'/' || top.is_empty())
}
