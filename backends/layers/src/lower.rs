//! The lower: a directory tree that never changes, and the files in it.

use std::any::Any;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use fsnap_backend::Dir;
use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::Result;
use super::below::{self, errno};
use super::fd_cache::{FdCache, Open};
use super::list::Union;
use super::object::{self, Object};
use super::sealed::{SealedDir, Unreadable};

/// What a copy-on-write tree begins with.
#[derive(Debug)]
pub enum Below {
    /// A directory of a mounted file system.
    Dir(OwnedFd),
    /// A snapshot that the kernel cannot mount. Its files' numbers must be unique in the whole tree; they are kept.
    Tree(Arc<dyn Dir>),
}

/// A directory of the lower.
///
/// It never moves, so that its parents say for ever how it is reached, whatever happens to the tree that users see.
#[derive(Debug)]
pub(super) struct LowerDir {
    number: u64,
    parent: Option<(Arc<Self>, OsString)>,
    /// The file system it lies on, as `st_dev`: a btrfs subvolume has its own.
    dev: u64,
    /// Tells the inode numbers of different file systems apart; 0 for the root's own.
    realm: u64,
}

impl LowerDir {
    /// Its path below the lower's root, beginning with `/`.
    pub(super) fn path(&self) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = self;
        while let Some((parent, name)) = &at.parent {
            names.push(name.as_bytes());
            at = parent;
        }
        names.iter().rev().fold(Vec::new(), |path, name| [&path, &b"/"[..], name].concat())
    }
}

/// A file of the lower, by its directory and name.
#[derive(Debug, Clone)]
pub(super) struct LowerAt {
    pub(super) dir: Arc<LowerDir>,
    pub(super) name: OsString,
}

impl LowerAt {
    pub(super) fn path(&self) -> Vec<u8> {
        let mut path = self.dir.path();
        path.push(b'/');
        path.extend_from_slice(self.name.as_bytes());
        path
    }
}

/// An open directory of the lower.
#[derive(Debug, Clone)]
enum Opened {
    Dir(Arc<OwnedFd>),
    Tree(Arc<dyn Dir>),
    /// A state that was sealed, of this store or another one.
    Sealed(Arc<SealedDir>),
}

impl Open for Opened {
    fn is_descriptor(&self) -> bool {
        matches!(self, Self::Dir(_))
    }
}

impl Opened {
    /// A snapshot, which may be a sealed state of another store.
    fn of(root: Arc<dyn Dir>) -> Self {
        let any: Arc<dyn Any + Send + Sync> = root.clone();
        any.downcast().map_or(Self::Tree(root), Self::Sealed)
    }

    fn below(&self, name: &OsStr) -> Result<Self> {
        match self {
            Self::Dir(dir) => Ok(Self::Dir(Arc::new(object::open_dir(dir, name)?))),
            Self::Tree(dir) => Ok(Self::Tree(Arc::from(dir.open_dir(name).map_err(errno)?))),
            Self::Sealed(dir) => Ok(Self::Sealed(Arc::new(dir.enter(name)?))),
        }
    }
}

/// The lower tree.
#[derive(Debug)]
pub(super) struct Lower {
    root: Arc<LowerDir>,
    opened: Opened,
    open: FdCache<Opened>,
    made: u64,
    /// What attributes of a [`Dir`] are filled into.
    template: Stat,
    given_up: bool,
}

/// Numbers above this one are given to files that the lower does not have.
pub(super) const UPPER_NUMBERS: u64 = 1 << 52;

impl Lower {
    /// `store` is any open file.
    pub(super) fn new(below: Below, store: impl AsFd) -> Result<Self> {
        let template = rustix::fs::fstat(store)?;
        let (opened, dev) = match below {
            Below::Dir(root) => {
                let dev = rustix::fs::fstat(&root)?.st_dev;
                (Opened::Dir(Arc::new(root)), dev)
            }
            Below::Tree(root) => (Opened::of(root), template.st_dev),
        };
        Ok(Self::of(opened, dev, template))
    }

    /// A sealed layer, with all below it.
    pub(super) fn over(sealed: SealedDir, store: impl AsFd) -> Result<Self> {
        let template = rustix::fs::fstat(store)?;
        Ok(Self::of(Opened::Sealed(Arc::new(sealed)), template.st_dev, template))
    }

    fn of(opened: Opened, dev: u64, template: Stat) -> Self {
        let root = Arc::new(LowerDir { number: 0, parent: None, dev, realm: 0 });
        Self { root, opened, open: FdCache::default(), made: 0, template, given_up: false }
    }

    /// The same once more, with nothing open.
    pub(super) fn again(&self) -> Self {
        Self::of(self.opened.clone(), self.root.dev, self.template)
    }

    /// Goes on with another way to read the same tree: paths that are known stay.
    pub(super) fn reread(&mut self, other: Self) {
        self.opened = other.opened;
        self.open = FdCache::default();
        self.given_up = false;
    }

    /// Takes out all that is open, to be dropped.
    pub(super) fn close(&mut self) -> impl Send + use<> {
        (std::mem::replace(&mut self.opened, Opened::Tree(Arc::new(Unreadable))), std::mem::take(&mut self.open))
    }

    /// Answers nothing but that it cannot be read, until it is [read anew](Self::reread).
    pub(super) fn give_up(&mut self) {
        self.opened = Opened::Tree(Arc::new(Unreadable));
        self.open = FdCache::default();
        self.given_up = true;
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up
    }

    pub(super) fn root(&self) -> Arc<LowerDir> {
        self.root.clone()
    }

    /// Opens a directory of the lower.
    fn open(&mut self, dir: &Arc<LowerDir>) -> Result<Opened> {
        let mut missing = Vec::new();
        let mut at = dir.clone();
        let mut open = loop {
            if at.parent.is_none() {
                break self.opened.clone();
            }
            if let Some(found) = self.open.get(at.number) {
                break found;
            }
            missing.push(at.clone());
            let Some((parent, _)) = &at.parent else { break self.opened.clone() };
            at = parent.clone();
        };
        for dir in missing.into_iter().rev() {
            let Some((_, name)) = &dir.parent else { continue };
            open = open.below(name)?;
            self.open.put(dir.number, open.clone());
        }
        Ok(open)
    }

    /// The directory as an object.
    pub(super) fn dir(&mut self, dir: &Arc<LowerDir>) -> Result<Object> {
        Ok(match self.open(dir)? {
            Opened::Dir(dir) => Object::of(dir),
            Opened::Tree(dir) => Object::below(dir, None, self.template),
            Opened::Sealed(dir) => Object::below(dir, None, self.template),
        })
    }

    /// Adds all names in a directory to those that are above.
    pub(super) fn names(&mut self, dir: &Arc<LowerDir>, union: &mut Union) -> Result<()> {
        match self.open(dir)? {
            Opened::Dir(dir) => {
                object::names(dir.as_fd())?.into_iter().for_each(|(name, _)| union.add(name, false, false));
            }
            Opened::Tree(dir) => {
                let entries = dir.entries().map_err(errno)?;
                entries.into_iter().for_each(|entry| union.add(entry.name, false, false));
            }
            // Nobody's attributes are looked at: that would be done again in each layer above.
            Opened::Sealed(dir) => dir.names(union)?,
        }
        Ok(())
    }

    pub(super) fn find(&mut self, dir: &Arc<LowerDir>, name: &OsStr) -> Result<Option<Stat>> {
        match self.open(dir)? {
            Opened::Dir(dir) => object::find_at(&dir, name),
            Opened::Tree(dir) => {
                let found = dir.entry(name).map_err(errno)?;
                Ok(found.map(|entry| below::stat(&entry.meta, self.template)))
            }
            Opened::Sealed(dir) => {
                let found = dir.entry(name).map_err(errno)?;
                Ok(found.map(|entry| below::stat(&entry.meta, self.template)))
            }
        }
    }

    pub(super) fn object(&mut self, at: &LowerAt) -> Result<Object> {
        Ok(match self.open(&at.dir)? {
            Opened::Dir(dir) => Object::at(dir, at.name.clone()),
            Opened::Tree(dir) => Object::below(dir, Some(at.name.clone()), self.template),
            Opened::Sealed(dir) => Object::below(dir, Some(at.name.clone()), self.template),
        })
    }

    /// The directory `name` in `dir`, whose attributes are `stat`.
    pub(super) fn enter(&mut self, dir: &Arc<LowerDir>, name: &OsStr, stat: &Stat) -> Arc<LowerDir> {
        self.made += 1;
        let mut entered = LowerDir {
            number: self.made,
            parent: Some((dir.clone(), name.to_owned())),
            dev: stat.st_dev,
            realm: dir.realm,
        };
        if stat.st_dev != dir.dev && matches!(self.opened, Opened::Dir(_)) {
            let hash = blake3::hash(&entered.path());
            // 19 bits between the inode numbers of ordinary size and the bit of the upper's.
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&hash.as_bytes()[..4]);
            entered.realm = ((u64::from_le_bytes(bytes) % 0x7_ffff) + 1) << 33;
        }
        Arc::new(entered)
    }

    /// The directory `name` in `dir` of a tree that is one file system.
    pub(super) fn enter_known(&mut self, dir: &Arc<LowerDir>, name: &OsStr) -> Arc<LowerDir> {
        let mut stat = self.template;
        stat.st_dev = dir.dev;
        self.enter(dir, name, &stat)
    }

    /// Whether it is read through [`Dir`], so that it may be layers itself.
    pub(super) fn is_tree(&self) -> bool {
        !matches!(self.opened, Opened::Dir(_))
    }

    /// The number that users see for a file of the lower.
    pub(super) fn number(&self, dir: &LowerDir, stat: &Stat) -> u64 {
        let number = match self.opened {
            Opened::Dir(_) => (stat.st_ino ^ dir.realm) & (UPPER_NUMBERS - 1),
            // Layers have numbers above that one, too.
            Opened::Tree(_) | Opened::Sealed(_) => stat.st_ino & (2 * UPPER_NUMBERS - 1),
        };
        match number {
            // 0 is no inode, and 1 is the root of the mount.
            number @ (0 | 1) => number | (1 << 51),
            number => number,
        }
    }

    /// Finds what a path that was recorded leads to.
    pub(super) fn resolve(&mut self, path: &[u8]) -> Result<Option<(LowerAt, Stat)>> {
        let mut dir = self.root();
        let mut names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).peekable();
        while let Some(name) = names.next() {
            if name == b"." || name == b".." {
                return Err(Errno::IO);
            }
            let name = OsString::from_vec(name.to_vec());
            let Some(stat) = self.find(&dir, &name)? else { return Ok(None) };
            if names.peek().is_none() {
                return Ok(Some((LowerAt { dir, name }, stat)));
            }
            if object::kind_of(&stat) != FileType::Directory {
                return Ok(None);
            }
            dir = self.enter(&dir, &name, &stat);
        }
        Ok(None)
    }
}
