//! A tree of files as one value that can be compared.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fsnap_backend::{Capabilities, Dir, DirTree, FileKind, FileMeta, Timestamp, Xattrs};

use crate::Bytes;
use crate::failure::{During, Failure, Verdict, ensure};

/// Everything of a tree that a snapshot keeps, by path.
///
/// Two times are left out. The time of the last *access* changes when the suite reads, and the time of the last change
/// of the *attributes* cannot be set by anybody, so no backend that copies can keep it. Inode numbers are left out too;
/// which names belong to one file is kept.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    items: BTreeMap<Vec<u8>, Item>,
}

/// One file of a [`Listing`].
#[derive(Debug, Clone)]
pub struct Item {
    /// What kind of file it is.
    pub kind: FileKind,
    /// Permission, set-id and sticky bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The device that a node stands for.
    pub rdev: u64,
    /// The last change of the content.
    pub mtime: Timestamp,
    /// How many names it has; 0 for directories, whose count file systems make up.
    pub nlink: u32,
    /// The first path, in order, of the same file.
    pub first_name: Vec<u8>,
    /// The target of a symbolic link.
    pub target: OsString,
    /// The content of a regular file.
    pub content: Bytes,
    /// The extended attributes.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// One way in which two listings differ.
#[derive(Debug, Clone)]
pub struct Difference {
    /// The path below the root; empty for the root.
    pub path: Vec<u8>,
    /// What differs there.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {}: {}", shown(&self.path), self.what)
    }
}

/// A path as people can read it, cut where it is longer than a line.
fn shown(path: &[u8]) -> String {
    shortened(format!("/{}", path.escape_ascii()))
}

fn shortened(text: String) -> String {
    if text.len() <= 100 { text } else { format!("{:.60}... ({} bytes)", text, text.len()) }
}

/// More than this must not be allocated beyond what the original has; less is the file system's own rounding.
const ROUNDING: u64 = 64 * 1024;

impl Listing {
    /// Reads a tree through the contract, and checks that it keeps its promises while it does so.
    pub fn read(root: &dyn Dir) -> Verdict<Self> {
        let mut reader = Reader::default();
        let top = Item::new(&root.meta()?, root.own_xattrs()?);
        reader.listing.insert(Vec::new(), top);
        reader.read_below(root, &[])?;
        Ok(reader.finish())
    }

    /// Reads the tree in a directory of a mounted file system.
    pub fn of(dir: &Path) -> Verdict<Self> {
        Self::read(&DirTree::open(dir)?)
    }

    /// Adds or replaces the item at `path`.
    pub(crate) fn insert(&mut self, path: Vec<u8>, item: Item) {
        self.items.insert(path, item);
    }

    /// The same, with every block of zeros taken for a hole.
    pub(crate) fn with_zeros_as_holes(mut self) -> Self {
        self.items.values_mut().for_each(|item| item.content.drop_zeros());
        self
    }

    /// All paths, in order, with what is there.
    pub fn items(&self) -> impl Iterator<Item = (&Vec<u8>, &Item)> {
        self.items.iter()
    }

    /// The item at `path`, if there is one.
    pub fn get(&self, path: &[u8]) -> Option<&Item> {
        self.items.get(path)
    }

    /// In what `copy` differs from this original, as far as `capabilities` promise it to be kept.
    pub fn differences(&self, copy: &Self, capabilities: &Capabilities) -> Vec<Difference> {
        let mut found = Vec::new();
        for (path, item) in &self.items {
            let mut add = |what: String| found.push(Difference { path: path.clone(), what });
            match copy.items.get(path) {
                None => add("is missing".into()),
                Some(other) => item.differences(other, capabilities, &mut add),
            }
        }
        let more = copy.items.keys().filter(|path| !self.items.contains_key(*path));
        found.extend(more.map(|path| Difference { path: path.clone(), what: "should not be there".into() }));
        found
    }

    /// Requires that `copy` is equal, as far as `capabilities` promise it; `what` names the copy.
    pub fn expect(&self, copy: &Self, capabilities: &Capabilities, what: impl fmt::Display) -> Verdict {
        let found = self.differences(copy, capabilities);
        if found.is_empty() {
            return Ok(());
        }
        let mut text = format!("{what} differs in {} places:", found.len());
        for difference in found.iter().take(10) {
            text += &format!("\n{difference}");
        }
        Err(Failure::new(text))
    }
}

/// A listing that is being read.
#[derive(Default)]
struct Reader {
    listing: Listing,
    /// All names of each file that is no directory.
    names: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl Reader {
    fn read_below(&mut self, dir: &dyn Dir, path: &[u8]) -> Verdict {
        let entries = dir.entries()?;
        ensure!(entries.is_sorted_by(|a, b| a.name < b.name), "the entries of {} are not sorted", shown(path));
        for entry in entries {
            let (name, meta) = (&entry.name, &entry.meta);
            let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
            let path = [path, separator, name.as_bytes()].concat();
            self.read_entry(dir, name, meta, &path).during(shown(&path))?;
            if meta.kind == FileKind::Dir {
                self.read_below(&*dir.open_dir(name)?, &path)?;
            }
        }
        Ok(())
    }

    fn read_entry(&mut self, dir: &dyn Dir, name: &OsStr, meta: &FileMeta, path: &[u8]) -> Verdict {
        let alone = dir.entry(name)?.map(|entry| FileMeta { atime: meta.atime, ..entry.meta });
        ensure!(alone == Some(*meta), "`entries` says {meta:?}, `entry` says {alone:?}");
        let mut item = Item::new(meta, dir.xattrs(name)?);
        match meta.kind {
            FileKind::File => {
                let content = dir.open_file(name)?;
                item.content = Bytes::read(&*content)?;
                ensure!(content.len() == meta.size, "its size is {}, its content has {}", meta.size, content.len());
            }
            FileKind::Symlink => item.target = dir.read_link(name)?,
            _ => {}
        }
        match meta.kind {
            FileKind::Dir => item.first_name = path.to_vec(),
            _ => self.names.entry(meta.ino).or_default().push(path.to_vec()),
        }
        self.listing.insert(path.to_vec(), item);
        Ok(())
    }

    fn finish(mut self) -> Listing {
        for names in self.names.values() {
            let first = names.iter().min().cloned().unwrap_or_default();
            for name in names {
                self.listing.items.get_mut(name).expect("it was inserted with its name").first_name = first.clone();
            }
        }
        self.listing
    }
}

impl Item {
    /// A file of which nothing is known but its kind.
    pub(crate) fn empty(kind: FileKind) -> Self {
        Self {
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            mtime: Timestamp::default(),
            nlink: 0,
            first_name: Vec::new(),
            target: OsString::new(),
            content: Bytes::default(),
            xattrs: BTreeMap::new(),
        }
    }

    fn new(meta: &FileMeta, xattrs: Xattrs) -> Self {
        Self {
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            rdev: meta.rdev,
            mtime: meta.mtime,
            nlink: if meta.kind == FileKind::Dir { 0 } else { meta.nlink },
            xattrs: xattrs.into_iter().collect(),
            ..Self::empty(meta.kind)
        }
    }

    fn differences(&self, other: &Self, capabilities: &Capabilities, add: &mut impl FnMut(String)) {
        let mut field = |name: &str, mine: &dyn fmt::Debug, others: &dyn fmt::Debug| {
            let (mine, others) = (format!("{mine:?}"), format!("{others:?}"));
            if mine != others {
                add(format!("{name} should be {}, is {}", shortened(mine), shortened(others)));
            }
        };
        field("kind", &self.kind, &other.kind);
        field("mode", &format_args!("{:04o}", self.mode), &format_args!("{:04o}", other.mode));
        if capabilities.ownership {
            field("owner", &(self.uid, self.gid), &(other.uid, other.gid));
        }
        field("device", &self.rdev, &other.rdev);
        field("mtime", &self.mtime, &other.mtime);
        field("number of names", &self.nlink, &other.nlink);
        field("first name", &self.first_name.escape_ascii(), &other.first_name.escape_ascii());
        field("target", &self.target, &other.target);
        field("size", &self.content.len(), &other.content.len());
        for key in self.xattrs.keys().chain(other.xattrs.keys().filter(|key| !self.xattrs.contains_key(*key))) {
            if is_kept(key, capabilities) {
                let value = |item: &Self| item.xattrs.get(key).map(|value| value.escape_ascii().to_string());
                field(&format!("xattr {}", key.display()), &value(self), &value(other));
            }
        }
        if let Some(offset) = self.content.first_difference(&other.content) {
            add(format!("content differs at byte {offset} of {}", self.content.len()));
        }
        if other.content.allocated() > self.content.allocated() + ROUNDING {
            let (mine, others) = (self.content.allocated(), other.content.allocated());
            add(format!("holes were filled: {mine} bytes are allocated in the original, {others} in the copy"));
        }
    }
}

/// Whether a store with these capabilities keeps the extended attribute `key`.
fn is_kept(key: &OsStr, capabilities: &Capabilities) -> bool {
    let key = key.as_bytes();
    // XFS shows the same ACLs a second time under these names.
    if key.starts_with(b"trusted.SGI_ACL_") {
        return false;
    }
    if key.starts_with(b"system.posix_acl_") { capabilities.acls } else { capabilities.xattrs }
}
