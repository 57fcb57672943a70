//! Sealing: the layer that is written becomes one that never changes, and a new one begins.
//!
//! A store has a sequence of layers. Layer 0 lies in the store itself, the others in `layers/<number>`; the file `live` names the one
//! that is written, and replacing that file is the instant of the seal. What was sealed is, with all that lies below it, the
//! lower of what comes after: a tree of the same kind, read through [`Dir`].
//!
//! No file is moved or copied for it, whatever the size of the tree, but for those that the kernel writes past us at that moment
//! (passing through): their writers cannot be told to write elsewhere. Such a file stays the live one, and the sealed state
//! gets a copy of it, which shares its blocks where the file system can: both are found through the `index` of their
//! layers, as files with several names are.
//!
//! What is known of files in memory is brought up to date when it is next asked for: each known file remembers at which seal it
//! was true.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use fsnap_backend::{Dir, beneath};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::below::io_errno;
use super::data::copy_all;
use super::fd_cache::FdCache;
use super::look::{Lately, index_name};
use super::lower::{Below, Lower, LowerAt};
use super::node::{Ino, Nodes, ROOT};
use super::object::{self, Object, SAFE};
use super::sealed::SealedDir;
use super::store::{self, TreeStore};
use super::{Error, Overlay, Result, Tree};

/// So many layers a store can have: each look at what was never changed goes through all of them.
pub const MOST_LAYERS: usize = 128;

pub(super) const LAYERS: &str = "layers";
const LIVE: &str = "live";
/// Copies of files that were open, until they are in the index of the layer below.
const COPIES: &str = "copies";
/// For which image the layer below was sealed.
const SEALED_FOR: &str = "sealed-for";

/// The number of the layer that is written.
pub(super) fn live(store: &OwnedFd) -> Result<u64> {
    match store::read_file(store, LIVE)? {
        None => Ok(0),
        Some(text) => text.parse().map_err(|_| Errno::IO),
    }
}

/// The numbers of all layers, the lowest first. Where layers were merged, numbers are missing: what was sealed as one of those is
/// what the next lower one and all below it make.
pub(super) fn numbers(store: &OwnedFd) -> Result<Vec<u64>> {
    let live = live(store)?;
    let mut numbers = vec![0];
    if live > 0 {
        let names = object::names(object::open_dir(store, OsStr::new(LAYERS))?.as_fd())?;
        let found = names.iter().filter_map(|(name, _)| name.to_str()?.parse().ok());
        numbers.extend(found.filter(|&number: &u64| number <= live));
        numbers.sort_unstable();
    }
    Ok(numbers)
}

/// For which image all below this layer was sealed; empty for none.
pub(super) fn sealed_for(store: &OwnedFd, number: u64) -> Result<String> {
    Ok(store::read_file(&layer(store, number)?, SEALED_FOR)?.unwrap_or_default())
}

/// The number of the layer that was sealed for that image.
pub(super) fn layer_of(store: &OwnedFd, image: &str) -> Result<Option<u64>> {
    for number in numbers(store)?.into_iter().skip(1).rev() {
        if sealed_for(store, number)? == image {
            return Ok(Some(number - 1));
        }
    }
    Ok(None)
}

/// The two directories of a layer that what it holds is in.
pub(super) type Parts = (Arc<OwnedFd>, Arc<OwnedFd>);

/// Opens the upper and the index of a layer.
pub(super) fn parts(store: &OwnedFd, number: u64) -> Result<Parts> {
    if number == 0 { parts_of(store) } else { parts_of(&layer(store, number)?) }
}

/// Opens the upper and the index of the layer in that directory.
pub(super) fn parts_of(dir: &OwnedFd) -> Result<Parts> {
    let part = |name: &str| object::open_dir(dir, OsStr::new(name)).map(Arc::new);
    Ok((part("upper")?, part("index")?))
}

pub(super) fn layer(store: &OwnedFd, number: u64) -> Result<OwnedFd> {
    let layers = object::open_dir(store, OsStr::new(LAYERS))?;
    object::open_dir(&layers, OsStr::new(&number.to_string()))
}

impl Overlay {
    /// Seals what is there now for `image`, and begins a new layer; all changes after the call are in that.
    ///
    /// `passed` names the files that are written past this tree at this moment, and keeps others from becoming so until
    /// what it returns with them is dropped. Nothing is synced.
    pub fn seal<G>(&self, image: &str, passed: impl FnOnce() -> (G, Vec<Ino>)) -> Result<()> {
        self.seal_if(image, passed, |_| true)
    }

    pub(super) fn seal_if<G>(
        &self,
        image: &str,
        passed: impl FnOnce() -> (G, Vec<Ino>),
        may: impl FnOnce(&[Ino]) -> bool,
    ) -> Result<()> {
        let mut tree = self.tree();
        let gate = tree.store.gate.clone();
        let _closed = gate.changes.write().unwrap_or_else(PoisonError::into_inner);
        let (_guard, passed) = passed();
        if may(&passed) {
            tree.seal(image, &passed)?;
            gate.unsettled.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The state that was sealed as layer `number` of a store, for reading; whoever writes the store is not disturbed.
    pub fn sealed(below: Below, store: &Path, number: u64) -> Result<Arc<dyn Dir>, Error> {
        let (lower, opened) = store::open_to_read(below, store, number)?;
        let mut tree = Tree::new(lower, opened);
        let failed = store::failed("open a layer of", store);
        let numbers = numbers(&tree.store.dir).map_err(&failed)?;
        // Else it was not sealed, or it was merged with the next, because nobody needed it.
        if !numbers.contains(&(number + 1)) {
            return Err(failed(Errno::NOENT));
        }
        for number in numbers.into_iter().skip(1).take_while(|&at| at <= number) {
            tree.step(number).map_err(&failed)?;
        }
        Ok(Arc::new(tree.into_state()))
    }
}

impl Tree {
    pub(super) fn new(lower: Lower, store: TreeStore) -> Self {
        let nodes = Nodes::new(lower.root());
        let dirs = if store.read_only { FdCache::small() } else { FdCache::default() };
        let origin = lower.again();
        Self { lower, origin, store, nodes, dirs, lately: Lately::default(), epoch: 0 }
    }

    /// The root of what it shows, for reading.
    pub(super) fn into_state(self) -> SealedDir {
        SealedDir::root(Arc::new(Overlay::of(self)))
    }

    /// Goes up to the layer that is written. Finishes or undoes what a server that was killed had begun.
    pub(super) fn climb(&mut self) -> Result<()> {
        let live = live(&self.store.dir)?;
        if let Ok(layers) = object::open_dir(&self.store.dir, OsStr::new(LAYERS)) {
            for (name, _) in object::names(layers.as_fd())? {
                let number = name.to_str().and_then(|name| name.parse::<u64>().ok());
                if number.is_none_or(|number| number > live) {
                    beneath::remove_tree(&layers, &name).map_err(|error| io_errno(&error))?;
                }
            }
        }
        for number in numbers(&self.store.dir)?.into_iter().skip(1) {
            if number == live {
                self.place_copies(number)?;
            }
            self.step(number)?;
        }
        Ok(())
    }

    /// Makes the layer that is written one that lies below, and `number` the one that is written.
    fn step(&mut self, number: u64) -> Result<()> {
        let (upper, index) = parts(&self.store.dir, number)?;
        let below = self.store.replace_layer(upper, index);
        let nothing = self.origin.again();
        let sealed = Self::new(std::mem::replace(&mut self.lower, nothing), below);
        self.lower = Lower::over(sealed.into_state(), &self.store.dir)?;
        self.dirs = if self.store.read_only { FdCache::small() } else { FdCache::default() };
        self.epoch += 1;
        let (epoch, lower) = (self.epoch, self.lower.root());
        if let Some(root) = self.nodes.get_mut(ROOT) {
            root.epoch = epoch;
            root.lower_dir = Some(lower);
        }
        Ok(())
    }

    /// What these layers make over what the tree began with.
    pub(super) fn stack(&self, numbers: &[u64]) -> Result<Lower> {
        let mut lower = self.origin.again();
        for &number in numbers {
            let (upper, index) = parts(&self.store.dir, number)?;
            let layer = Self::new(lower, self.store.reading(upper, index));
            lower = Lower::over(layer.into_state(), &self.store.dir)?;
        }
        Ok(lower)
    }

    pub(super) fn seal(&mut self, image: &str, passed: &[Ino]) -> Result<()> {
        let number = live(&self.store.dir)? + 1;
        if numbers(&self.store.dir)?.len() >= MOST_LAYERS {
            return Err(Errno::MLINK);
        }
        let passed = self.named(passed)?;
        let prepared = self.make_layer(number, image).and_then(|()| self.copy_passed(number, &passed));
        let switched =
            prepared.and_then(|()| store::write_file(&self.store.dir, LIVE, format!("{number}\n").as_bytes()));
        switched.inspect_err(|_| {
            let _ = self.remove_layer(number);
        })?;
        // From here on it is sealed: what fails now is done when the store is opened next.
        let open = self.nodes.open();
        self.place_copies(number)?;
        self.step(number)?;
        let epoch = self.epoch;
        for ino in passed {
            let Some(node) = self.nodes.get_mut(ino) else { continue };
            node.epoch = epoch;
            node.upper = true;
            node.index = Some(index_name(ino));
            node.lower = None;
        }
        for ino in open {
            let node = self.nodes.get(ino).filter(|node| node.epoch != epoch && node.pin.is_none());
            if let Some(file) = node.and_then(|node| node.file.as_ref()) {
                file.seal();
            }
        }
        Ok(())
    }

    /// Those of the files that are regular, in the upper, and have a name.
    fn named(&mut self, passed: &[Ino]) -> Result<Vec<Ino>> {
        let mut named = Vec::new();
        for &ino in passed {
            let node = self.node(ino)?;
            if node.upper && node.pin.is_none() && node.kind == FileType::RegularFile {
                named.push(ino);
            }
        }
        Ok(named)
    }

    fn make_layer(&mut self, number: u64, image: &str) -> Result<()> {
        self.remove_layer(number)?;
        let layers = match object::open_dir(&self.store.dir, OsStr::new(LAYERS)) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&self.store.dir, LAYERS, Mode::RWXU)?;
                object::open_dir(&self.store.dir, OsStr::new(LAYERS))?
            }
            layers => layers?,
        };
        rustix::fs::mkdirat(&layers, number.to_string(), Mode::RWXU)?;
        let layer = Arc::new(object::open_dir(&layers, OsStr::new(&number.to_string()))?);
        for name in ["index", COPIES, "upper", "work"] {
            rustix::fs::mkdirat(&layer, name, Mode::RWXU)?;
        }
        store::write_file(&layer, SEALED_FOR, image.as_bytes())?;
        copy_raw(&Object::of(self.store.upper_root()), &Object::at(layer, "upper"))
    }

    fn remove_layer(&mut self, number: u64) -> Result<()> {
        match object::open_dir(&self.store.dir, OsStr::new(LAYERS)) {
            Err(Errno::NOENT) => Ok(()),
            layers => beneath::remove_tree(layers?, OsStr::new(&number.to_string())).map_err(|error| io_errno(&error)),
        }
    }

    /// Copies the files that are written past us, and gives them a name in the new layer.
    fn copy_passed(&mut self, number: u64, passed: &[Ino]) -> Result<()> {
        let layer = layer(&self.store.dir, number)?;
        let copies = Arc::new(object::open_dir(&layer, OsStr::new(COPIES))?);
        let index = object::open_dir(&layer, OsStr::new("index"))?;
        for &ino in passed {
            let object = self.object(ino)?;
            let (stat, name) = (object.stat()?, index_name(ino));
            let links = match self.node(ino)?.index {
                Some(_) => self.indexed_links(&object, &stat)?,
                None => stat.st_nlink.cast_signed(),
            };
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | SAFE;
            let file = rustix::fs::openat(&copies, &name, flags, Mode::RUSR | Mode::WUSR)?;
            let source = object.content()?;
            match source.as_file().map(|whole| rustix::fs::ioctl_ficlone(&file, whole)) {
                Some(Ok(())) => {}
                Some(Err(Errno::NOSPC | Errno::DQUOT)) => return Err(Errno::NOSPC),
                _ => copy_all(&source, &file)?,
            }
            let copy = Object::at(copies.clone(), name.clone());
            let keys = self.store.keys();
            copy_raw(&object, &copy)?;
            self.mark(&copy, keys.origin(), format!("{ino:x}").as_bytes())?;
            self.mark(&copy, keys.links(), links.to_string().as_bytes())?;
            copy.set_times(&object::times_of(&stat))?;
            object.link(&index, &name)?;
        }
        Ok(())
    }

    /// Puts the copies into the index of the layer below, where the names that it has of them lead to then.
    fn place_copies(&mut self, number: u64) -> Result<()> {
        let layer = layer(&self.store.dir, number)?;
        let copies = match object::open_dir(&layer, OsStr::new(COPIES)) {
            Err(Errno::NOENT) => return Ok(()),
            copies => copies?,
        };
        let index = Arc::new(object::open_dir(&layer, OsStr::new("index"))?);
        let keys = self.store.keys();
        for (name, _) in object::names(copies.as_fd())? {
            let live = Object::at(index.clone(), name.clone());
            let number = name.to_str().ok_or(Errno::IO)?;
            for (key, value) in [(keys.links(), "0"), (keys.origin(), number)] {
                if live.xattr(&key)?.is_none() {
                    self.mark(&live, key, value.as_bytes())?;
                }
            }
            rustix::fs::renameat(&copies, &name, &*self.store.index(), &name)?;
        }
        rustix::fs::unlinkat(&layer, COPIES, AtFlags::REMOVEDIR)
    }

    /// Brings what is known of a file up to date, after layers were sealed.
    pub(super) fn refresh(&mut self, ino: Ino) {
        let mut stale = Vec::new();
        let mut at = ino;
        while let Some(node) = self.nodes.get(at).filter(|node| node.epoch != self.epoch && node.pin.is_none()) {
            let Some((parent, _)) = node.names.first() else { break };
            stale.push(at);
            at = *parent;
        }
        for ino in stale.into_iter().rev() {
            self.move_down(ino);
        }
    }

    /// What the file was in the upper, it is in the lower now, under the name that it had.
    fn move_down(&mut self, ino: Ino) {
        let Some((parent, name)) = self.nodes.get(ino).and_then(|node| node.names.first()).cloned() else { return };
        let Some(dir) = self.nodes.get(parent).and_then(|parent| parent.lower_dir.clone()) else { return };
        let entered = self.lower.enter_known(&dir, &name);
        let epoch = self.epoch;
        let Some(node) = self.nodes.get_mut(ino) else { return };
        node.epoch = epoch;
        node.upper = false;
        node.index = None;
        match node.kind {
            FileType::Directory => node.lower_dir = Some(entered),
            _ => node.lower = Some(LowerAt { dir, name }),
        }
    }
}

/// Gives a file of the store all attributes of another one, fsnap's own included.
fn copy_raw(from: &Object, to: &Object) -> Result<()> {
    let stat = from.stat()?;
    let own = to.stat()?;
    if (own.st_uid, own.st_gid) != (stat.st_uid, stat.st_gid) {
        to.chown(Some(stat.st_uid), Some(stat.st_gid))?;
    }
    for name in from.xattr_names()? {
        let Some(value) = from.xattr(&name)? else { continue };
        to.set_xattr(name, &value, XattrFlags::empty())?;
    }
    to.chmod(object::mode_of(&stat))?;
    to.set_times(&object::times_of(&stat))
}
