//! What merging two layers does, step by step, written down before the first one is done.
//!
//! Every step can be repeated, so that whoever finds the list finishes it: nothing is lost whenever its writer is killed, and nobody
//! reads the two layers before all is done. Everything that is to be moved is first taken out, by one rename each, into numbered items;
//! then a file says so, and the items are put where they belong; what is left of them is removed at the end.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use fsnap_backend::beneath;
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::Result;
use super::below::io_errno;
use super::object::{self, Object, SAFE};
use super::open_dirs::OpenDirs;
use super::seal::{self, Parts};
use super::store::{self, Keys};

/// The directory in the store for all of this.
pub(super) const DIR: &str = "merge";
const LIST: &str = "steps";
/// Says that everything is taken out.
const TAKEN: &str = "taken";
/// What is left of the upper layer.
const LEFT: &str = "left";
/// Stands for the root of the upper layer, which is no item.
pub(super) const ROOT_ITEM: u32 = u32::MAX;

/// One of the directories that things are taken from and put into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Root {
    Below,
    BelowIndex,
    Above,
    AboveIndex,
}

/// A file of one of the layers, by the names on the way to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) root: Root,
    pub(super) path: Vec<u8>,
}

/// One change. They are done in the order in which they stand here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// So many names of the file are not in its own layer's index; done before anything is taken.
    Links(Place, i64),
    Take(Place, u32),
    Put(u32, Place),
    /// Gives the file of the lower layer all that users see of the item, but its content.
    Like(u32, Vec<u8>),
    /// Sets one of fsnap's own attributes, or removes it.
    Mark(Place, OsString, Option<Vec<u8>>),
    /// The name leads to the file of that name in the index from now on; with `true`, the old file keeps its number taken.
    Relink(Vec<u8>, OsString, bool),
    /// A file that only keeps its number taken needs no content.
    Empty(OsString),
    Times(Vec<u8>, [i64; 4]),
}

/// The name in the index of a file that lets no other one have its number: a copy that bears that number took its place.
pub(super) fn taken_name(index: &OsStr) -> OsString {
    let mut name = index.to_owned();
    name.push(".taken");
    name
}

pub(super) fn times(times: &Timestamps) -> [i64; 4] {
    let (access, change) = (times.last_access, times.last_modification);
    [access.tv_sec, access.tv_nsec, change.tv_sec, change.tv_nsec]
}

fn encode(low: u64, high: u64, steps: &[Step]) -> Vec<u8> {
    let mut text = Vec::new();
    let mut field = |bytes: &[u8]| {
        text.extend_from_slice(format!("{}:", bytes.len()).as_bytes());
        text.extend_from_slice(bytes);
    };
    let number = |number: &dyn ToString| number.to_string().into_bytes();
    field(&number(&low));
    field(&number(&high));
    for step in steps {
        let place = |place: &Place| {
            let root = match place.root {
                Root::Below => b'b',
                Root::BelowIndex => b'i',
                Root::Above => b'a',
                Root::AboveIndex => b'j',
            };
            [&[root], &place.path[..]].concat()
        };
        let fields = match step {
            Step::Links(at, links) => vec![b"links".to_vec(), place(at), number(links)],
            Step::Take(at, item) => vec![b"take".to_vec(), place(at), number(item)],
            Step::Put(item, at) => vec![b"put".to_vec(), number(item), place(at)],
            Step::Like(item, path) => vec![b"like".to_vec(), number(item), path.clone()],
            Step::Mark(at, key, Some(value)) => {
                vec![b"mark".to_vec(), place(at), key.as_bytes().to_vec(), value.clone()]
            }
            Step::Mark(at, key, None) => vec![b"unmark".to_vec(), place(at), key.as_bytes().to_vec()],
            Step::Relink(path, name, keep) => {
                let kind: &[u8] = if *keep { b"keep" } else { b"link" };
                vec![kind.to_vec(), path.clone(), name.as_bytes().to_vec()]
            }
            Step::Empty(name) => vec![b"empty".to_vec(), name.as_bytes().to_vec()],
            Step::Times(path, times) => {
                [vec![b"times".to_vec(), path.clone()], times.iter().map(|time| number(time)).collect()].concat()
            }
        };
        fields.iter().for_each(|bytes| field(bytes));
    }
    text
}

/// The fields of a list that was written down.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes(&mut self) -> Option<Vec<u8>> {
        let colon = self.0.iter().position(|&byte| byte == b':')?;
        let length: usize = std::str::from_utf8(&self.0[..colon]).ok()?.parse().ok()?;
        let rest = &self.0[colon + 1..];
        let bytes = rest.get(..length)?.to_vec();
        self.0 = &rest[length..];
        Some(bytes)
    }

    fn name(&mut self) -> Option<OsString> {
        self.bytes().map(OsString::from_vec)
    }

    fn number<T: std::str::FromStr>(&mut self) -> Option<T> {
        std::str::from_utf8(&self.bytes()?).ok()?.parse().ok()
    }

    fn place(&mut self) -> Option<Place> {
        let mut path = self.bytes()?;
        let root = match path.first()? {
            b'b' => Root::Below,
            b'i' => Root::BelowIndex,
            b'a' => Root::Above,
            b'j' => Root::AboveIndex,
            _ => return None,
        };
        path.remove(0);
        Some(Place { root, path })
    }

    fn step(&mut self) -> Option<Step> {
        Some(match &self.bytes()?[..] {
            b"links" => Step::Links(self.place()?, self.number()?),
            b"take" => Step::Take(self.place()?, self.number()?),
            b"put" => Step::Put(self.number()?, self.place()?),
            b"like" => Step::Like(self.number()?, self.bytes()?),
            b"mark" => Step::Mark(self.place()?, self.name()?, Some(self.bytes()?)),
            b"unmark" => Step::Mark(self.place()?, self.name()?, None),
            b"keep" => Step::Relink(self.bytes()?, self.name()?, true),
            b"link" => Step::Relink(self.bytes()?, self.name()?, false),
            b"empty" => Step::Empty(self.name()?),
            b"times" => Step::Times(self.bytes()?, [self.number()?, self.number()?, self.number()?, self.number()?]),
            _ => return None,
        })
    }
}

fn decode(text: &[u8]) -> Option<(u64, u64, Vec<Step>)> {
    let mut fields = Fields(text);
    let (low, high) = (fields.number()?, fields.number()?);
    let mut steps = Vec::new();
    while !fields.0.is_empty() {
        steps.push(fields.step()?);
    }
    Some((low, high, steps))
}

/// Makes the directory for items, or empties it: what is in it is left over.
pub(super) fn prepare(store: &OwnedFd) -> Result<OwnedFd> {
    match rustix::fs::mkdirat(store, DIR, Mode::RWXU) {
        Err(Errno::EXIST) => {}
        made => made?,
    }
    let dir = object::open_dir(store, OsStr::new(DIR))?;
    for (name, _) in object::names(dir.as_fd())? {
        beneath::remove_tree(&dir, &name).map_err(|error| io_errno(&error))?;
    }
    Ok(dir)
}

/// Writes the list down, durably: from then on it has to be carried out.
pub(super) fn commit(store: &OwnedFd, low: u64, high: u64, steps: &[Step]) -> Result<()> {
    use std::io::Write;
    let dir = object::open_dir(store, OsStr::new(DIR))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | SAFE;
    let mut file = File::from(rustix::fs::openat(&dir, "new", flags, Mode::RUSR | Mode::WUSR)?);
    let written = file.write_all(&encode(low, high, steps)).and_then(|()| file.sync_all());
    written.map_err(|error| io_errno(&error))?;
    rustix::fs::renameat(&dir, "new", &dir, LIST)?;
    rustix::fs::fsync(rustix::fs::openat(&dir, ".", OFlags::RDONLY | SAFE, Mode::empty())?)
}

/// The list that has to be carried out, if there is one, and the number of the lower of its layers.
pub(super) fn pending(store: &OwnedFd) -> Result<Option<u64>> {
    Ok(read(store)?.map(|(low, _, _)| low))
}

fn read(store: &OwnedFd) -> Result<Option<(u64, u64, Vec<Step>)>> {
    use std::io::Read;
    let path = format!("{DIR}/{LIST}");
    let file = match rustix::fs::openat(store, path, OFlags::RDONLY | SAFE, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        file => file?,
    };
    let mut text = Vec::new();
    File::from(file).read_to_end(&mut text).map_err(|error| io_errno(&error))?;
    decode(&text).map(Some).ok_or(Errno::UCLEAN)
}

/// Carries out the list, if there is one, from wherever it was left.
pub(super) fn finish(store: &OwnedFd) -> Result<()> {
    let Some((low, high, steps)) = read(store)? else { return Ok(()) };
    let dir = Arc::new(object::open_dir(store, OsStr::new(DIR))?);
    let above = match seal::parts(store, high) {
        Err(Errno::NOENT) => seal::parts_of(&object::open_dir(&dir, OsStr::new(LEFT))?)?,
        above => above?,
    };
    let below = seal::parts(store, low)?;
    let mut work =
        Work { items: dir.clone(), below: Dirs::new(below), above: Dirs::new(above), keys: store::keys_of_ours() };
    let (taking, putting): (Vec<_>, Vec<_>) =
        steps.iter().partition(|step| matches!(step, Step::Links(..) | Step::Take(..)));
    if object::find_at(&dir, OsStr::new(TAKEN))?.is_none() {
        taking.into_iter().try_for_each(|step| work.carry_out(step))?;
        interrupted()?;
        drop(rustix::fs::openat(&dir, TAKEN, OFlags::WRONLY | OFlags::CREATE | SAFE, Mode::RUSR | Mode::WUSR)?);
    }
    putting.into_iter().try_for_each(|step| work.carry_out(step))?;
    interrupted()?;
    let layers = object::open_dir(store, OsStr::new(seal::LAYERS))?;
    match rustix::fs::renameat(&layers, high.to_string(), &dir, LEFT) {
        Err(Errno::NOENT) => {}
        moved => moved?,
    }
    interrupted()?;
    rustix::fs::unlinkat(&dir, LIST, AtFlags::empty())
}

/// A layer: its index, and the directories of its upper.
struct Dirs {
    upper: OpenDirs,
    index: Arc<OwnedFd>,
}

impl Dirs {
    fn new((upper, index): Parts) -> Self {
        Self { upper: OpenDirs::new(upper), index }
    }
}

/// The directory's path and the name in it.
pub(super) fn split(path: &[u8]) -> (&[u8], &OsStr) {
    let slash = path.iter().rposition(|&byte| byte == b'/');
    let (dir, name) = slash.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]));
    (dir, OsStr::from_bytes(name))
}

struct Work {
    items: Arc<OwnedFd>,
    below: Dirs,
    above: Dirs,
    keys: Keys,
}

impl Work {
    fn object(&mut self, place: &Place) -> Result<Object> {
        let (dir, name) = split(&place.path);
        Ok(match place.root {
            Root::BelowIndex => Object::at(self.below.index.clone(), name),
            Root::AboveIndex => Object::at(self.above.index.clone(), name),
            Root::Below if place.path.is_empty() => Object::of(self.below.upper.root()),
            Root::Below => Object::at(self.below.upper.open(dir)?, name),
            Root::Above => Object::at(self.above.upper.open(dir)?, name),
        })
    }

    fn below(&mut self, path: &[u8]) -> Result<Object> {
        self.object(&Place { root: Root::Below, path: path.to_owned() })
    }

    fn item(&self, item: u32) -> Object {
        if item == ROOT_ITEM {
            return Object::of(self.above.upper.root());
        }
        Object::at(self.items.clone(), item.to_string())
    }

    fn carry_out(&mut self, step: &Step) -> Result<()> {
        interrupted()?;
        match step {
            Step::Links(place, links) => match self.object(place) {
                Ok(object) => absent_is_done(object.set_xattr(
                    self.keys.links(),
                    links.to_string().as_bytes(),
                    XattrFlags::empty(),
                )),
                gone => absent_is_done(gone.map(drop)),
            },
            Step::Take(place, item) => match self.object(place) {
                Ok(object) => {
                    let (dir, name) = object.place()?;
                    absent_is_done(rustix::fs::renameat(dir, name, &self.items, item.to_string()))
                }
                gone => absent_is_done(gone.map(drop)),
            },
            Step::Put(item, place) => {
                let to = self.object(place)?;
                let (dir, name) = to.place()?;
                absent_is_done(rustix::fs::renameat(&self.items, item.to_string(), dir, name))
            }
            Step::Like(item, path) => {
                let (from, to) = (self.item(*item), self.below(path)?);
                make_like(&from, &to, self.keys)
            }
            Step::Mark(place, key, Some(value)) => self.object(place)?.set_xattr(key, value, XattrFlags::empty()),
            Step::Mark(place, key, None) => match self.object(place)?.remove_xattr(key) {
                Err(Errno::NODATA) => Ok(()),
                removed => removed,
            },
            Step::Relink(path, name, keep) => self.relink(path, name, *keep),
            Step::Empty(name) => {
                let object = Object::at(self.below.index.clone(), name.clone());
                match object::find_at(&self.below.index, name)? {
                    // Other names of it are replaced when their turn comes.
                    Some(stat) if stat.st_nlink == 1 && object::kind_of(&stat) == rustix::fs::FileType::RegularFile => {
                        rustix::fs::ftruncate(object.open(OFlags::RDWR)?, 0)
                    }
                    _ => Ok(()),
                }
            }
            Step::Times(path, [access, access_nsec, change, change_nsec]) => {
                let time = |tv_sec: i64, tv_nsec: i64| Timespec { tv_sec, tv_nsec };
                self.below(path)?.set_times(&Timestamps {
                    last_access: time(*access, *access_nsec),
                    last_modification: time(*change, *change_nsec),
                })
            }
        }
    }

    fn relink(&mut self, path: &[u8], name: &OsStr, keep: bool) -> Result<()> {
        let (dir, own) = split(path);
        let dir = self.below.upper.open(dir)?;
        let (old, new) = (object::stat_at(&dir, own)?, object::stat_at(&self.below.index, name)?);
        if old.st_ino == new.st_ino {
            return Ok(());
        }
        if keep {
            match Object::at(dir.clone(), own).link(&self.below.index, &taken_name(name)) {
                Err(Errno::EXIST) => {}
                linked => linked?,
            }
        }
        let temporary = OsStr::new("name");
        match Object::at(self.below.index.clone(), name).link(&self.items, temporary) {
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(&self.items, temporary, AtFlags::empty())?;
                Object::at(self.below.index.clone(), name).link(&self.items, temporary)?;
            }
            linked => linked?,
        }
        rustix::fs::renameat(&self.items, temporary, &dir, own)
    }
}

/// What was moved already is not there any more.
fn absent_is_done(done: Result<()>) -> Result<()> {
    if done == Err(Errno::NOENT) { Ok(()) } else { done }
}

/// Gives `to` the owner, permissions and attributes that `from` has, and those of fsnap's own that are users'.
fn make_like(from: &Object, to: &Object, keys: Keys) -> Result<()> {
    let (stat, own) = (from.stat()?, to.stat()?);
    let private = [keys.origin(), keys.links(), keys.partial(), keys.redirect(), keys.opaque()];
    if (own.st_uid, own.st_gid) != (stat.st_uid, stat.st_gid) {
        to.chown(Some(stat.st_uid), Some(stat.st_gid))?;
    }
    let names = from.xattr_names()?;
    for name in to.xattr_names()? {
        if !private.contains(&name) && !names.contains(&name) {
            to.remove_xattr(name)?;
        }
    }
    for name in names.into_iter().filter(|name| !private.contains(name)) {
        let Some(value) = from.xattr(&name)? else { continue };
        to.set_xattr(name, &value, XattrFlags::empty())?;
    }
    to.chmod(object::mode_of(&stat))?;
    to.set_times(&object::times_of(&stat))
}

#[cfg(test)]
thread_local! {
    /// After so many steps a test stops the work, as if the process had been killed.
    pub(super) static STOP: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
    /// It is killed indeed.
    pub(super) static KILL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[cfg(test)]
fn interrupted() -> Result<()> {
    match STOP.get() {
        Some(0) if KILL.get() => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        Some(0) => return Err(Errno::INTR),
        steps => STOP.set(steps.map(|steps| steps - 1)),
    }
    Ok(())
}

#[cfg(not(test))]
#[expect(clippy::unnecessary_wraps, reason = "in tests it can fail")]
fn interrupted() -> Result<()> {
    Ok(())
}
