//! What has to be done so that one layer has in it what two have: found out before anything is changed.
//!
//! The upper of the two (*above*) is moved into the lower one (*below*), because that is the larger one after a while: the work is as much as was
//! changed above. What above has stands, and what below has under the same name goes; directories that both have become one. Paths
//! that above recorded lead into the tree that below is part of; they are replaced by paths into the tree under that.
//!
//! Three things outlive what stood for them:
//!
//! * A directory of below that above shows under another name (`overlay.redirect`) is moved there.
//! * A file that is in above by parts only takes those parts back down to the file of below, which goes to its place.
//! * A file's number may be the inode number of a file of below that goes: an empty file keeps it taken, else a new file could get it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use super::below::LowerContent;
use super::data::{self, Partial};
use super::list::Union;
use super::look::{index_name, is_whiteout};
use super::lower::{LowerAt, LowerDir};
use super::node::Ino;
use super::object::{self, Object};
use super::open_dirs::OpenDirs;
use super::seal::Parts;
use super::sealed::SealedDir;
use super::steps::{self, Place, ROOT_ITEM, Root, Step, split, taken_name};
use super::{Result, Tree};

/// A directory of the tree that below is the uppermost layer of: its part in below, and what shows through that.
#[derive(Debug, Clone, Default)]
struct Under {
    raw: Option<Vec<u8>>,
    lower: Option<Arc<LowerDir>>,
}

impl Under {
    /// Names it among all directories of that tree.
    fn key(&self) -> Option<Vec<u8>> {
        match (&self.raw, &self.lower) {
            (Some(raw), _) => Some([b"below/", &raw[..]].concat()),
            (None, Some(lower)) => Some([b"lower".to_vec(), lower.path()].concat()),
            (None, None) => None,
        }
    }

    fn is_nothing(&self) -> bool {
        self.raw.is_none() && self.lower.is_none()
    }
}

/// What stands under a name in that tree.
#[derive(Debug, Clone)]
enum Standing {
    Nothing,
    Dir(Under),
    /// A file of below.
    File(Vec<u8>),
    /// A file of what is under below.
    Lower(LowerAt, Box<Stat>),
}

/// How the steps are found.
pub(super) struct Planner {
    /// The tree that below is the uppermost layer of.
    tree: Tree,
    /// The same, for reading contents.
    state: SealedDir,
    above_index: Arc<OwnedFd>,
    above: OpenDirs,
    below: OpenDirs,
    links: HashMap<u64, (Place, i64)>,
    takes: Vec<(Place, u32)>,
    puts: Vec<(u32, Place)>,
    rest: Vec<Step>,
    times: BTreeMap<Vec<u8>, [i64; 4]>,
    items: u32,
    /// What is taken out of below, as which item.
    taken: HashMap<Vec<u8>, u32>,
    /// Of that, what goes to another place.
    moved: Vec<(Vec<u8>, Vec<u8>)>,
    /// Numbers that files of above bear.
    alive: HashSet<Ino>,
    /// What above hides.
    hidden: Vec<Standing>,
    /// Directories that above shows under another name.
    shown: HashSet<Vec<u8>>,
    unprivileged: bool,
}

/// A directory of above that was entered, and what it lies over.
struct MergedDir {
    path: Vec<u8>,
    /// What the directory that it is in lies over.
    under: Under,
    name: OsString,
    redirected: bool,
    own: Under,
}

/// What is left to do while above is gone through; what is in a directory comes before its end.
enum Visit {
    Enter(Vec<u8>, Under),
    Leave(Box<MergedDir>),
}

/// The number that a name in the index stands for; `None` for names that keep a number taken.
fn number_in_index(name: &OsStr) -> Option<Ino> {
    u64::from_str_radix(name.to_str()?, 16).ok()
}

fn join(dir: &[u8], name: &OsStr) -> Vec<u8> {
    if dir.is_empty() { name.as_bytes().to_vec() } else { [dir, b"/", name.as_bytes()].concat() }
}

fn below(path: &[u8]) -> Place {
    Place { root: Root::Below, path: path.to_owned() }
}

fn in_index(root: Root, name: &OsStr) -> Place {
    Place { root, path: name.as_bytes().to_owned() }
}

impl Planner {
    /// `tree` and `state` are both the tree whose uppermost layer is the lower of the two.
    pub(super) fn new(tree: Tree, state: SealedDir, (above, above_index): Parts) -> Self {
        Self {
            below: OpenDirs::new(tree.store.upper_root()),
            tree,
            state,
            above_index,
            above: OpenDirs::new(above),
            links: HashMap::new(),
            takes: Vec::new(),
            puts: Vec::new(),
            rest: Vec::new(),
            times: BTreeMap::new(),
            items: 0,
            taken: HashMap::new(),
            moved: Vec::new(),
            alive: HashSet::new(),
            hidden: Vec::new(),
            shown: HashSet::new(),
            unprivileged: !rustix::process::geteuid().is_root(),
        }
    }

    /// Finds all steps, in the order in which they are to be done; the counts of names are still differences.
    pub(super) fn plan(mut self) -> Result<Vec<Step>> {
        let index = object::names(self.above_index.as_fd())?;
        self.alive.extend(index.iter().filter_map(|(name, _)| number_in_index(name)));
        let root = Under { raw: Some(Vec::new()), lower: Some(self.tree.lower.root()) };
        self.visit_all(root)?;
        self.rest.push(Step::Like(ROOT_ITEM, Vec::new()));
        for (name, _) in &index {
            self.merge_index(name)?;
        }
        self.remove_unneeded()?;
        if index.iter().any(|(name, _)| number_in_index(name).is_some()) {
            let roots = [vec![(Vec::new(), Vec::new())], self.moved.clone()].concat();
            for (raw, path) in roots {
                if object::kind_of(&self.stat_below(&raw)?) == FileType::Directory {
                    self.relink_in(&raw, &path)?;
                }
            }
        }
        Ok(self.ordered())
    }

    fn ordered(mut self) -> Vec<Step> {
        let depth = |place: &Place| place.path.iter().filter(|&&byte| byte == b'/').count();
        self.takes.sort_by_cached_key(|(at, _)| (Reverse(depth(at)), at.path.clone()));
        self.puts.sort_by_cached_key(|(_, at)| (depth(at), at.path.clone()));
        let order = |step: &Step| match step {
            Step::Like(..) => 0,
            Step::Mark(..) => 1,
            Step::Relink(..) => 2,
            _ => 3,
        };
        self.rest.sort_by_key(order);
        let links = self.links.into_values().filter(|(_, change)| *change != 0);
        links
            .map(|(place, change)| Step::Links(place, change))
            .chain(self.takes.into_iter().map(|(place, item)| Step::Take(place, item)))
            .chain(self.puts.into_iter().map(|(item, place)| Step::Put(item, place)))
            .chain(self.rest)
            .chain(self.times.into_iter().map(|(path, times)| Step::Times(path, times)))
            .collect()
    }

    /// Makes sure that something may be changed in a directory of a layer.
    fn check(&self, dir: Arc<OwnedFd>) -> Result<Arc<OwnedFd>> {
        // Who is not root cannot work in directories that he has closed to himself.
        if self.unprivileged && rustix::fs::fstat(&dir)?.st_mode & 0o700 != 0o700 {
            return Err(Errno::ACCESS);
        }
        Ok(dir)
    }

    fn open_below(&mut self, path: &[u8]) -> Result<Arc<OwnedFd>> {
        let dir = self.below.open(path)?;
        self.check(dir)
    }

    fn stat_below(&mut self, raw: &[u8]) -> Result<Stat> {
        let (dir, name) = split(raw);
        if name.is_empty() {
            return rustix::fs::fstat(&*self.tree.store.upper_root());
        }
        object::stat_at(&*self.open_below(dir)?, name)
    }

    fn object_below(&mut self, raw: &[u8]) -> Result<Object> {
        let (dir, name) = split(raw);
        Ok(Object::at(self.open_below(dir)?, name))
    }

    fn take(&mut self, place: Place) -> u32 {
        self.items += 1;
        self.takes.push((place, self.items));
        self.items
    }

    /// Takes out something of below, once.
    fn take_below(&mut self, raw: &[u8]) -> u32 {
        if let Some(item) = self.taken.get(raw) {
            return *item;
        }
        let item = self.take(below(raw));
        self.taken.insert(raw.to_owned(), item);
        item
    }

    /// What stands under the name, seen from above.
    fn child(&mut self, under: &Under, name: &OsStr) -> Result<Standing> {
        if let Some(raw) = &under.raw {
            let dir = self.open_below(raw)?;
            if let Some(stat) = object::find_at(&dir, name)? {
                let raw = join(raw, name);
                return Ok(match object::kind_of(&stat) {
                    _ if is_whiteout(&stat) => Standing::Nothing,
                    FileType::Directory => {
                        let lower = self.lower_of(&Object::at(dir, name), under, name)?;
                        Standing::Dir(Under { raw: Some(raw), lower })
                    }
                    _ => Standing::File(raw),
                });
            }
        }
        let Some(lower) = &under.lower else { return Ok(Standing::Nothing) };
        let Some(stat) = self.tree.lower.find(lower, name)? else { return Ok(Standing::Nothing) };
        if object::kind_of(&stat) == FileType::Directory {
            let entered = self.tree.lower.enter(lower, name, &stat);
            return Ok(Standing::Dir(Under { raw: None, lower: Some(entered) }));
        }
        Ok(Standing::Lower(LowerAt { dir: lower.clone(), name: name.to_owned() }, Box::new(stat)))
    }

    /// What shows through a directory of below.
    fn lower_of(&mut self, object: &Object, parent: &Under, name: &OsStr) -> Result<Option<Arc<LowerDir>>> {
        let keys = self.tree.store.keys();
        let found = match object.xattr(keys.redirect())? {
            Some(path) => {
                let path = self.tree.store.lengthen(path)?;
                if path.iter().all(|&byte| byte == b'/') {
                    return Ok(Some(self.tree.lower.root()));
                }
                self.tree.lower.resolve(&path)?
            }
            None if object.xattr(keys.opaque())?.is_some() => None,
            None => {
                let Some(dir) = parent.lower.clone() else { return Ok(None) };
                self.tree.lower.find(&dir, name)?.map(|stat| (LowerAt { dir, name: name.to_owned() }, stat))
            }
        };
        let found = found.filter(|(_, stat)| object::kind_of(stat) == FileType::Directory);
        Ok(found.map(|(at, stat)| self.tree.lower.enter(&at.dir, &at.name, &stat)))
    }

    /// What a path that above recorded leads to.
    fn resolve(&mut self, path: &[u8]) -> Result<Standing> {
        let mut at = Standing::Dir(Under { raw: Some(Vec::new()), lower: Some(self.tree.lower.root()) });
        for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
            let Standing::Dir(under) = at else { return Ok(Standing::Nothing) };
            at = self.child(&under, OsStr::from_bytes(name))?;
        }
        Ok(at)
    }

    /// Goes through above, whose root lies over `root`. What is left to do is a list, and not the stack, for a tree may be deeper than that.
    fn visit_all(&mut self, root: Under) -> Result<()> {
        let mut left = vec![Visit::Enter(Vec::new(), root)];
        while let Some(next) = left.pop() {
            match next {
                Visit::Enter(path, under) => self.visit(&path, &under, &mut left)?,
                Visit::Leave(dir) => self.leave_dir(*dir)?,
            }
        }
        Ok(())
    }

    /// Goes through a directory of above, which lies over `under`.
    fn visit(&mut self, path: &[u8], under: &Under, left: &mut Vec<Visit>) -> Result<()> {
        let dir = self.above.open(path)?;
        let dir = self.check(dir)?;
        self.times.insert(path.to_owned(), steps::times(&object::times_of(&rustix::fs::fstat(&dir)?)));
        for (name, _) in object::names(dir.as_fd())? {
            let stat = object::stat_at(&dir, &name)?;
            let standing = self.child(under, &name)?;
            if is_whiteout(&stat) {
                self.hide(path, under, &name, standing)?;
            } else if object::kind_of(&stat) == FileType::Directory {
                let merged = self.enter_dir(&Object::at(dir.clone(), name.clone()), path, under, name, standing)?;
                let (path, own) = (merged.path.clone(), merged.own.clone());
                left.extend([Visit::Leave(Box::new(merged)), Visit::Enter(path, own)]);
            } else {
                self.merge_file(&Object::at(dir.clone(), name.clone()), &stat, path, under, &name, standing)?;
            }
        }
        Ok(())
    }

    /// Takes out what below itself has under the name, if it has a part of the directory.
    fn clear(&mut self, under: &Under, name: &OsStr) -> Result<()> {
        if let Some(raw) = &under.raw
            && object::find_at(&*self.open_below(raw)?, name)?.is_some()
        {
            self.take_below(&join(raw, name));
        }
        Ok(())
    }

    /// Moves something of above down, to where nothing of below is any more.
    fn move_down(&mut self, path: &[u8]) {
        let item = self.take(Place { root: Root::Above, path: path.to_owned() });
        self.puts.push((item, below(path)));
    }

    /// A whiteout: needed only where there still is something to hide.
    fn hide(&mut self, path: &[u8], under: &Under, name: &OsStr, standing: Standing) -> Result<()> {
        if under.raw.is_some() {
            self.clear(under, name)?;
            let hides = match &under.lower {
                Some(lower) => self.tree.lower.find(lower, name)?.is_some(),
                None => false,
            };
            if hides {
                self.move_down(&join(path, name));
            }
        }
        self.hidden.push(standing);
        Ok(())
    }

    fn mark(&mut self, path: &[u8], key: OsString, value: Option<Vec<u8>>) {
        self.rest.push(Step::Mark(below(path), key, value));
    }

    fn enter_dir(
        &mut self,
        object: &Object,
        parent: &[u8],
        under: &Under,
        name: OsString,
        standing: Standing,
    ) -> Result<MergedDir> {
        let (path, keys) = (join(parent, &name), self.tree.store.keys());
        let redirect = object.xattr(keys.redirect())?;
        let natural = if let Standing::Dir(natural) = &standing { natural.clone() } else { Under::default() };
        let own = match &redirect {
            Some(redirect) => {
                let redirect = self.tree.store.lengthen(redirect.clone())?;
                if let Standing::Dir(found) = self.resolve(&redirect)? { found } else { Under::default() }
            }
            None if object.xattr(keys.opaque())?.is_some() => Under::default(),
            None => natural.clone(),
        };
        if own.is_nothing() || own.key() != natural.key() {
            self.shown.extend(own.key());
            self.hidden.push(standing);
        }
        Ok(MergedDir { path, under: under.clone(), name, redirected: redirect.is_some(), own })
    }

    /// What is to be done with a directory when all that is in it was gone through.
    fn leave_dir(&mut self, MergedDir { path, under, name, redirected, own }: MergedDir) -> Result<()> {
        let keys = self.tree.store.keys();
        let lower = own.lower.as_ref().map(|lower| lower.path());
        let Some(raw) = &own.raw else {
            if under.raw.is_some() {
                self.clear(&under, &name)?;
                self.move_down(&path);
            }
            match lower {
                Some(lower) if redirected => {
                    let lower = self.tree.store.shorten(lower)?;
                    self.mark(&path, keys.redirect(), Some(lower));
                }
                Some(_) => {}
                None => {
                    // Nothing showed through it, whatever lies under that name in what it comes to lie over.
                    self.mark(&path, keys.redirect(), None);
                    if under.raw.is_some() && under.lower.is_some() {
                        self.mark(&path, keys.opaque(), Some(b"y".to_vec()));
                    }
                }
            }
            return Ok(());
        };
        let skeleton = self.take(Place { root: Root::Above, path: path.clone() });
        self.rest.push(Step::Like(skeleton, path.clone()));
        if under.raw.as_ref().map(|dir| join(dir, &name)).as_ref() == Some(raw) {
            return Ok(());
        }
        self.clear(&under, &name)?;
        let item = self.take_below(raw);
        self.puts.push((item, below(&path)));
        self.moved.push((raw.clone(), path.clone()));
        match lower {
            Some(lower) => {
                let lower = self.tree.store.shorten(lower)?;
                self.mark(&path, keys.redirect(), Some(lower));
                self.mark(&path, keys.opaque(), None);
            }
            None => {
                self.mark(&path, keys.redirect(), None);
                self.mark(&path, keys.opaque(), Some(b"y".to_vec()));
            }
        }
        Ok(())
    }

    fn merge_file(
        &mut self,
        object: &Object,
        stat: &Stat,
        parent: &[u8],
        under: &Under,
        name: &OsStr,
        standing: Standing,
    ) -> Result<()> {
        let path = join(parent, name);
        self.alive.insert(self.tree.number_of(object, stat)?);
        self.hidden.push(standing);
        self.clear(under, name)?;
        if let Some(raw) = self.settle_parts(object, stat, &below(&path))? {
            let from = self.take(Place { root: Root::Above, path: path.clone() });
            let item = self.take_below(&raw);
            self.puts.push((item, below(&path)));
            self.moved.push((raw, path.clone()));
            self.rest.push(Step::Like(from, path));
        } else if under.raw.is_some() {
            self.move_down(&path);
        }
        Ok(())
    }

    /// Sees to it that a file that is in above by parts has the rest where it will be. Returns the file of below that is to take its
    /// place.
    fn settle_parts(&mut self, object: &Object, stat: &Stat, at: &Place) -> Result<Option<Vec<u8>>> {
        let keys = self.tree.store.keys();
        if object::kind_of(stat) != FileType::RegularFile {
            return Ok(None);
        }
        let Some(value) = object.xattr(keys.partial())? else { return Ok(None) };
        let (valid, path) = data::parts_of(&value, stat.st_size.cast_unsigned())?;
        let long = self.tree.store.lengthen(path.clone())?;
        let standing = self.resolve(&long)?;
        match &standing {
            Standing::File(raw) => {
                let (lower, lower_stat) = (self.object_below(raw)?, self.stat_below(raw)?);
                let alone = stat.st_nlink == 1 && lower_stat.st_nlink == 1 && lower.xattr(keys.links())?.is_none();
                if alone && object::kind_of(&lower_stat) == FileType::RegularFile {
                    let (from, to) = (object.open(OFlags::RDONLY)?, lower.open(OFlags::RDWR)?);
                    data::write_parts_back(&File::from(from), valid, &File::from(to), keys)?;
                    return Ok(Some(raw.clone()));
                }
            }
            Standing::Lower(lower, lower_stat) => {
                let number = self.tree.number_below(&lower.dir, lower_stat);
                if object::find_at(&self.tree.store.index(), &index_name(number))?.is_none() {
                    let mut value = format!("{valid:x} ").into_bytes();
                    value.extend(self.tree.store.shorten(lower.path())?);
                    self.rest.push(Step::Mark(at.clone(), keys.partial(), Some(value)));
                    return Ok(None);
                }
            }
            Standing::Nothing | Standing::Dir(_) => return Err(Errno::IO),
        }
        // Some other names lead to what is below: it stays as it is, and the rest is brought up.
        let lower = LowerContent::Content(self.open_in_state(&long)?);
        let file = Arc::new(File::from(object.open(OFlags::RDWR)?));
        Partial { file, lower, valid, block: self.tree.store.block, keys, path }.complete()?;
        object.set_times(&object::times_of(stat))?;
        Ok(None)
    }

    fn open_in_state(&self, path: &[u8]) -> Result<Box<dyn fsnap_backend::Content>> {
        use fsnap_backend::Dir;
        let mut names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).map(OsStr::from_bytes);
        let last = names.next_back().ok_or(Errno::IO)?;
        let dir =
            names.try_fold(None::<SealedDir>, |dir, name| dir.as_ref().unwrap_or(&self.state).enter(name).map(Some))?;
        dir.as_ref().unwrap_or(&self.state).open_file(last).map_err(super::below::errno)
    }

    /// One name in the index of above.
    fn merge_index(&mut self, name: &OsStr) -> Result<()> {
        let at = in_index(Root::AboveIndex, name);
        let to = in_index(Root::BelowIndex, name);
        if number_in_index(name).is_some() {
            let object = Object::at(self.above_index.clone(), name);
            // A file with several names has nobody's place to take.
            let taken = self.settle_parts(&object, &object.stat()?, &to)?;
            debug_assert!(taken.is_none());
        }
        if object::find_at(&self.tree.store.index(), name)?.is_some() {
            self.take(to.clone());
        }
        let item = self.take(at);
        self.puts.push((item, to));
        Ok(())
    }

    /// Looks after what goes: counts of names, numbers that must stay taken, and files of the index that have lost their last name.
    fn remove_unneeded(&mut self) -> Result<()> {
        let moved: HashSet<Vec<u8>> = self.moved.iter().map(|(raw, _)| raw.clone()).collect();
        let going: Vec<_> = self.taken.keys().filter(|raw| !moved.contains(*raw)).cloned().collect();
        for raw in going {
            self.bury(&raw)?;
        }
        let mut indexed = HashSet::new();
        for (name, _) in object::names(self.tree.store.index().as_fd())? {
            indexed.extend(number_in_index(&name));
        }
        indexed.retain(|number| !self.alive_in_index(*number));
        if indexed.is_empty() {
            return Ok(());
        }
        let mut hidden = std::mem::take(&mut self.hidden);
        let mut gone = HashSet::new();
        while let Some(standing) = hidden.pop() {
            match standing {
                Standing::Nothing => {}
                Standing::Dir(under) => {
                    if !under.key().is_none_or(|key| self.shown.contains(&key)) {
                        for name in self.names(&under)? {
                            hidden.push(self.child(&under, &name)?);
                        }
                    }
                }
                Standing::File(raw) => {
                    let (object, stat) = (self.object_below(&raw)?, self.stat_below(&raw)?);
                    gone.insert(self.tree.number_of(&object, &stat)?);
                }
                Standing::Lower(at, stat) => {
                    gone.insert(self.tree.number_below(&at.dir, &stat));
                }
            }
        }
        for number in gone.into_iter().filter(|number| indexed.contains(number)) {
            self.take(in_index(Root::BelowIndex, &index_name(number)));
        }
        Ok(())
    }

    fn alive_in_index(&self, number: Ino) -> bool {
        object::find_at(&self.above_index, &index_name(number)).is_ok_and(|found| found.is_some())
    }

    fn names(&mut self, under: &Under) -> Result<HashSet<OsString>> {
        let mut names = HashSet::new();
        if let Some(raw) = &under.raw {
            names.extend(object::names(self.open_below(raw)?.as_fd())?.into_iter().map(|(name, _)| name));
        }
        if let Some(lower) = &under.lower {
            let mut union = Union::default();
            self.tree.lower.names(lower, &mut union)?;
            names.extend(union.names());
        }
        Ok(names)
    }

    /// What was taken out of below and goes nowhere, with all that is in it.
    fn bury(&mut self, raw: &[u8]) -> Result<()> {
        let mut left = vec![raw.to_owned()];
        while let Some(raw) = left.pop() {
            let stat = self.stat_below(&raw)?;
            if object::kind_of(&stat) == FileType::Directory {
                let names = object::names(self.open_below(&raw)?.as_fd())?;
                let inner = names.iter().map(|(name, _)| join(&raw, name));
                left.extend(inner.filter(|inner| !self.taken.contains_key(inner)));
            } else if !is_whiteout(&stat) {
                self.bury_file(&raw, &stat)?;
            }
        }
        Ok(())
    }

    fn bury_file(&mut self, raw: &[u8], stat: &Stat) -> Result<()> {
        let (object, keys, index) = (self.object_below(raw)?, self.tree.store.keys(), self.tree.store.index());
        let number = self.tree.number_of(&object, stat)?;
        let indexed = object::find_at(&index, &index_name(number))?;
        if object.xattr(keys.links())?.is_some() && indexed.is_none_or(|indexed| indexed.st_ino != stat.st_ino) {
            // A file that is written in a later layer, or was: there it is counted by the names that it has in all layers.
            self.links.entry(stat.st_ino).or_insert((below(raw), 0)).1 += 1;
        }
        let keeper = taken_name(&index_name(number));
        if !self.alive.contains(&number) {
            if object::find_at(&index, &keeper)?.is_some() {
                self.take(in_index(Root::BelowIndex, &keeper));
            }
        } else if object.xattr(keys.origin())?.is_none() {
            let item = self.take_below(raw);
            self.puts.push((item, in_index(Root::BelowIndex, &keeper)));
            self.rest.push(Step::Empty(keeper));
        }
        Ok(())
    }

    /// Makes what stays of below under the number of a file in the index of above lead to that.
    fn relink_in(&mut self, raw: &[u8], path: &[u8]) -> Result<()> {
        let mut left = vec![(raw.to_owned(), path.to_owned())];
        while let Some((raw, path)) = left.pop() {
            self.relink_names(&raw, &path, &mut left)?;
        }
        Ok(())
    }

    fn relink_names(&mut self, raw: &[u8], path: &[u8], left: &mut Vec<(Vec<u8>, Vec<u8>)>) -> Result<()> {
        let dir = self.open_below(raw)?;
        let times = steps::times(&object::times_of(&rustix::fs::fstat(&dir)?));
        let mut changed = false;
        for (name, _) in object::names(dir.as_fd())? {
            let (inner, stat) = (join(raw, &name), object::stat_at(&dir, &name)?);
            if self.taken.contains_key(&inner) || is_whiteout(&stat) {
                continue;
            }
            if object::kind_of(&stat) == FileType::Directory {
                left.push((inner, join(path, &name)));
                continue;
            }
            if stat.st_nlink < 2 {
                continue;
            }
            let (object, keys) = (Object::at(dir.clone(), name.clone()), self.tree.store.keys());
            let index = index_name(self.tree.number_of(&object, &stat)?);
            let Some(new) = object::find_at(&self.above_index, &index)? else { continue };
            let old = object::find_at(&self.tree.store.index(), &index)?;
            // One that is written in a later layer leads to the index as it is.
            let elsewhere = object.xattr(keys.links())?.is_some() && old.is_none_or(|old| old.st_ino != stat.st_ino);
            if new.st_ino == stat.st_ino || elsewhere {
                continue;
            }
            let keep = object.xattr(keys.origin())?.is_none();
            if keep {
                self.rest.push(Step::Empty(taken_name(&index)));
            }
            self.rest.push(Step::Relink(join(path, &name), index.clone(), keep));
            self.links.entry(new.st_ino).or_insert((in_index(Root::AboveIndex, &index), 0)).1 -= 1;
            changed = true;
        }
        if changed {
            self.times.entry(path.to_owned()).or_insert(times);
        }
        Ok(())
    }
}
