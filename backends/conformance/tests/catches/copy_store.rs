//! The reference backend: whole copies in plain directories.
//!
//! Slow, and simple enough to be believed. A store is a directory:
//!
//! ```text
//! identity          the store's identity
//! s-7/tree          a snapshot, or what there is of it
//! s-7/whole         written last: its identity, a sum of its content, and one omission per line
//! v-8/...           a clone, in the same way
//! h-9               the files of a past state, which a look at the history takes
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use fsnap_backend::{
    Backend, Capabilities, Consistency, Damage, Differences, Dir, DirTree, Entry, Error, FileKind, FileMeta, Identity,
    Image, ImageKind, ImageState, IoContext, Kept, Locator, Moment, MountSpec, Omission, Result, Snapshot, Source,
    StoreInfo, Volume, Xattrs, beneath,
};
use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid};

/// What a store of copies can do.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    clones: true,
    constant_time_clones: false,
    xattrs: true,
    acls: true,
    ownership: true,
    mountable: true,
    verifies_contents: true,
    live: Consistency::Fuzzy,
};

/// Whether such a store keeps past states: one that can do little does not.
pub(crate) fn keeps_history(capabilities: Capabilities) -> bool {
    capabilities.clones
}

/// A directory of copies.
#[derive(Debug)]
pub(crate) struct CopyStore {
    place: PathBuf,
    info: StoreInfo,
}

/// What the mark of a whole image says.
struct Mark {
    identity: Identity,
    sums: BTreeMap<PathBuf, u64>,
    omissions: Vec<Omission>,
}

impl CopyStore {
    /// Makes a store at `place`.
    pub(crate) fn create(place: &Path, capabilities: Capabilities) -> Result<Self> {
        fs::create_dir(place).context("make", place)?;
        let unique = format!("copies-{}", identity_of(place)?);
        fs::write(place.join("identity"), unique).context("write", place)?;
        Self::open(place, capabilities)
    }

    /// Opens the store at `place`.
    pub(crate) fn open(place: &Path, capabilities: Capabilities) -> Result<Self> {
        let identity = fs::read_to_string(place.join("identity")).context("read", place)?;
        let info = StoreInfo { kind: "copies", identity: Identity::new(identity), capabilities };
        Ok(Self { place: place.to_owned(), info })
    }

    /// The directory of the image at `at`, if this store could have made the locator.
    pub(crate) fn image_dir(&self, at: &Locator) -> Option<PathBuf> {
        kind_of(at.as_str()).map(|_| self.place.join(at.as_str()))
    }

    /// Where its files lie.
    pub(crate) fn tree(&self, at: &Locator) -> PathBuf {
        self.place.join(at.as_str()).join("tree")
    }

    fn mark(&self, at: &Locator) -> Result<Mark> {
        let missing = || Error::NotFound { what: format!("a whole image at {at}") };
        let dir = self.image_dir(at).ok_or_else(missing)?;
        let text = match fs::read_to_string(dir.join("whole")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            text => text.context("read the mark of", &dir)?,
        };
        let mut lines = text.lines();
        let identity = Identity::new(lines.next().unwrap_or_default());
        let mut mark = Mark { identity, sums: BTreeMap::new(), omissions: Vec::new() };
        for line in lines {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["sum", sum, path] => {
                    mark.sums.insert(unescape(path).into(), sum.parse().unwrap_or_default());
                }
                ["omission", path, reason] => {
                    let text = |escaped| unescape(escaped).to_string_lossy().into_owned();
                    mark.omissions.push(Omission { path: text(path), reason: text(reason) });
                }
                _ => return Err(Error::Damaged { what: format!("the mark of {at}"), reason: line.into() }),
            }
        }
        Ok(mark)
    }

    /// Copies `source`, which may be a past state, to the image at `at`, and marks it as whole when all is there.
    fn copy(&self, source: &dyn Dir, state: Option<u64>, at: &Locator) -> Result<()> {
        let missing = || Error::NotFound { what: format!("the locator {at}") };
        let dir = self.image_dir(at).ok_or_else(missing)?;
        self.remove(at)?;
        fs::create_dir_all(dir.join("tree")).context("make", &dir)?;
        let copier = self.copy_to(source, &dir.join("tree"))?;
        let mut text = match state {
            Some(number) => format!("state-{number}\n"),
            None => format!("image-{}\n", identity_of(&dir.join("tree"))?),
        };
        for (path, sum) in &copier.sums {
            text += &format!("sum {sum} {}\n", escape(path.as_os_str()));
        }
        for Omission { path, reason } in &copier.omissions {
            text += &format!("omission {} {}\n", escape(path.as_ref()), escape(reason.as_ref()));
        }
        fs::write(dir.join("whole.new"), text).context("write the mark of", &dir)?;
        fs::rename(dir.join("whole.new"), dir.join("whole")).context("mark", &dir)
    }

    fn copy_to(&self, source: &dyn Dir, to: &Path) -> Result<Copier> {
        let root = beneath::open_root(to).context("open", to)?;
        let ownership = self.info.capabilities.ownership;
        let mut copier = Copier { ownership, links: BTreeMap::new(), sums: BTreeMap::new(), omissions: Vec::new() };
        copier.dir(source, Rc::new(root), Path::new(""))?;
        Ok(copier)
    }

    fn state(&self, number: u64) -> PathBuf {
        self.place.join(format!("h-{number}"))
    }

    fn check_history(&self) -> Result<()> {
        let (kind, reason) = ("copies", "it was told not to".to_owned());
        let refused = Error::Unsupported { kind, action: "show the history of a volume", reason };
        if keeps_history(self.info.capabilities) { Ok(()) } else { Err(refused) }
    }

    fn remove(&self, at: &Locator) -> Result<()> {
        let dir = self.image_dir(at).ok_or_else(|| Error::NotFound { what: format!("the locator {at}") })?;
        // First it is no longer whole, then it goes piece by piece.
        match fs::remove_file(dir.join("whole")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).context("unmark", &dir),
            _ => {}
        }
        let place = beneath::open_root(&self.place).context("open", &self.place)?;
        beneath::remove_tree(place, OsStr::new(at.as_str())).context("remove", &dir)
    }
}

fn kind_of(name: &str) -> Option<ImageKind> {
    let (kind, number) = name.split_once('-')?;
    let canonical = number.parse::<u64>().is_ok_and(|parsed| parsed.to_string() == number);
    match kind {
        "s" if canonical => Some(ImageKind::Snapshot),
        "v" if canonical => Some(ImageKind::Volume),
        _ => None,
    }
}

/// Device, inode and time of birth: an inode's number is used again, but not at the same nanosecond.
fn identity_of(dir: &Path) -> Result<String> {
    let descriptor = beneath::open_root(dir).context("open", dir)?;
    let meta = beneath::stat_fd(&descriptor).context("read the attributes of", dir)?;
    let device = fs::metadata(dir).context("read the attributes of", dir)?.dev();
    let born = meta.btime.unwrap_or_default();
    Ok(format!("{device}-{}-{}.{:09}", meta.ino, born.seconds, born.nanoseconds))
}

fn escape(text: &OsStr) -> String {
    let byte = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' => char::from(*byte).to_string(),
        other => format!("%{other:02x}"),
    };
    std::os::unix::ffi::OsStrExt::as_bytes(text).iter().map(byte).collect()
}

fn unescape(text: &str) -> OsString {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next().unwrap_or_default(), rest.next().unwrap_or_default()];
                std::str::from_utf8(&digits).ok().and_then(|text| u8::from_str_radix(text, 16).ok()).unwrap_or_default()
            }
            other => other,
        });
    }
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

impl Backend for CopyStore {
    fn store(&self) -> &StoreInfo {
        &self.info
    }

    fn adopt(&self, dir: &Path) -> Result<Volume> {
        let refuse = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: "copies", reason: reason.into() };
        let meta = fs::symlink_metadata(dir).context("read the attributes of", dir)?;
        if meta.is_symlink() {
            return Err(refuse("it is a symbolic link"));
        }
        if !meta.is_dir() {
            return Err(refuse("it is no directory"));
        }
        let descriptor = beneath::open_root(dir).context("open", dir)?;
        Ok(Volume::new(dir, Identity::new(identity_of(dir)?), descriptor))
    }

    fn reserve(&self, source: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator> {
        let kind = if matches!(source, Source::Volume(_)) { "s" } else { "v" };
        let mut number = 0;
        loop {
            let at: Locator = format!("{kind}-{number}").parse().expect("it has the form of one");
            if !known.contains(&at) && !self.place.join(at.as_str()).exists() {
                return Ok(at);
            }
            number += 1;
        }
    }

    fn prime(&self, _volume: &Volume, _at: &Locator) -> Result<()> {
        Ok(())
    }

    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        let found = self.adopt(volume.dir())?;
        if found.identity() != volume.identity() {
            return Err(Error::WrongIdentity {
                what: volume.dir().display().to_string(),
                expected: volume.identity().clone(),
                found: found.identity().clone(),
            });
        }
        if let Ok(whole) = self.settle(at) {
            return Ok(whole);
        }
        self.copy(&tree_of(volume)?, None, at)?;
        self.settle(at)
    }

    fn settle(&self, at: &Locator) -> Result<Snapshot> {
        let mark = self.mark(at)?;
        Ok(Snapshot { at: at.clone(), identity: mark.identity, omissions: mark.omissions })
    }

    fn clone_snapshot(&self, snapshot: &Snapshot, at: &Locator) -> Result<()> {
        if !self.info.capabilities.clones {
            let reason = "it was told not to".into();
            return Err(Error::Unsupported { kind: "copies", action: "clone", reason });
        }
        let found = self.mark(&snapshot.at)?.identity;
        if found != snapshot.identity {
            let expected = snapshot.identity.clone();
            return Err(Error::WrongIdentity { what: snapshot.at.to_string(), expected, found });
        }
        self.copy(&DirTree::open(&self.tree(&snapshot.at))?, None, at)
    }

    fn list(&self) -> Result<Vec<Image>> {
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.place).context("list", &self.place)? {
            let name = entry.context("list", &self.place)?.file_name();
            let Some((name, kind)) = name.to_str().and_then(|name| kind_of(name).map(|kind| (name, kind))) else {
                continue;
            };
            let whole = self.place.join(name).join("whole").exists();
            let state = if whole { ImageState::Whole } else { ImageState::Partial };
            images.push(Image { at: name.parse().expect("it has the form of one"), kind, state });
        }
        Ok(images)
    }

    fn activate(&self, at: &Locator) -> Result<MountSpec> {
        self.mark(at)?;
        let read_only = kind_of(at.as_str()) == Some(ImageKind::Snapshot);
        Ok(MountSpec::Bind { dir: self.tree(at), read_only })
    }

    fn deactivate(&self, _at: &Locator) -> Result<()> {
        Ok(())
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>> {
        let recorded = self.mark(&snapshot.at)?.sums;
        let mut found = BTreeMap::new();
        sum_tree(&DirTree::open(&self.tree(&snapshot.at))?, Path::new(""), &mut found)?;
        let damaged = recorded.iter().filter(|(path, sum)| found.get(*path) != Some(*sum));
        let damage = |(path, _): (&PathBuf, _)| Damage { path: path.into(), what: "its content changed".into() };
        Ok(damaged.map(damage).collect())
    }

    fn history(&self, volume: &Volume) -> Result<Vec<Moment>> {
        self.check_history()?;
        let last = (1..).take_while(|number| self.state(*number).exists()).last().unwrap_or_default() + 1;
        fs::create_dir(self.state(last)).context("make", self.state(last))?;
        self.copy_to(&tree_of(volume)?, &self.state(last))?;
        let mut snapshots: BTreeMap<String, Vec<Locator>> = BTreeMap::new();
        for image in self.list()?.into_iter().filter(|image| image.state == ImageState::Whole) {
            snapshots.entry(self.mark(&image.at)?.identity.as_str().to_owned()).or_default().push(image.at);
        }
        let moment = |number| {
            let kept = snapshots.remove(&format!("state-{number}")).map_or(Kept::Not, Kept::ByStore);
            Moment { number, seconds: 0, same: false, kept }
        };
        Ok((1..=last).map(moment).collect())
    }

    fn pin(&self, _volume: &Volume, number: u64, at: &Locator) -> Result<Snapshot> {
        self.check_history()?;
        if let Ok(whole) = self.settle(at) {
            return Ok(whole);
        }
        let state = self.state(number);
        if !state.exists() {
            return Err(Error::NotFound { what: format!("the state {number}") });
        }
        self.copy(&DirTree::open(&state)?, Some(number), at)?;
        self.settle(at)
    }

    fn differences(&self, _old: &Snapshot, _new: Source<'_>) -> Result<Option<Box<dyn Differences>>> {
        Ok(Some(Box::new(Bytes)))
    }

    fn delete(&self, at: &Locator) -> Result<()> {
        self.remove(at)
    }
}

fn tree_of(volume: &Volume) -> Result<DirTree> {
    // "." again: the descriptor of a volume may have been read from before.
    let root = volume.as_fd().try_clone_to_owned().context("open", volume.dir())?;
    Ok(DirTree::from_descriptor(root, volume.dir()))
}

/// Tells every byte that differs, by itself.
#[derive(Debug)]
struct Bytes;

impl Differences for Bytes {
    fn ranges(&self, old: &File, new: &File) -> io::Result<Option<Vec<Range<u64>>>> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let (mut old, mut new) = (old, new);
        old.read_to_end(&mut a)?;
        new.read_to_end(&mut b)?;
        if a.len() != b.len() {
            return Ok(None);
        }
        Ok(Some((0..a.len()).filter(|&at| a[at] != b[at]).map(|at| at as u64..at as u64 + 1).collect()))
    }
}

/// Calls `each` with every piece of data of a content.
fn for_data(
    content: &dyn fsnap_backend::Content,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut at = 0;
    while let Some(range) = content.data_after(at)? {
        at = range.start;
        while at < range.end {
            let wanted = buffer.len().min((range.end - at) as usize);
            let count = content.read_at(&mut buffer[..wanted], at)?;
            if count == 0 {
                return Ok(());
            }
            each(at, &buffer[..count])?;
            at += count as u64;
        }
    }
    Ok(())
}

/// FNV-1a over the bytes that are not zero and where they are, so that holes count as zeros.
fn sum_of(content: &dyn fsnap_backend::Content) -> io::Result<u64> {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64 ^ content.len();
    for_data(content, |at, data| {
        for (index, byte) in data.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            sum = (sum ^ (at + index as u64)).wrapping_mul(0x0100_0000_01b3);
            sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Ok(())
    })?;
    Ok(sum)
}

fn sum_tree(dir: &dyn Dir, path: &Path, sums: &mut BTreeMap<PathBuf, u64>) -> Result<()> {
    for entry in dir.entries()? {
        let path = path.join(&entry.name);
        match entry.meta.kind {
            FileKind::Dir => sum_tree(&*dir.open_dir(&entry.name)?, &path, sums)?,
            FileKind::File => {
                let sum = sum_of(&*dir.open_file(&entry.name)?).context("read", &path)?;
                sums.insert(path, sum);
            }
            _ => {}
        }
    }
    Ok(())
}

/// A copy that is being made.
struct Copier {
    ownership: bool,
    /// Where the first name of each file with several names was put.
    links: BTreeMap<u64, (Rc<OwnedFd>, OsString)>,
    sums: BTreeMap<PathBuf, u64>,
    omissions: Vec<Omission>,
}

impl Copier {
    fn dir(&mut self, from: &dyn Dir, to: Rc<OwnedFd>, path: &Path) -> Result<()> {
        for entry in from.entries()? {
            let path = path.join(&entry.name);
            self.entry(from, &to, &entry, &path)?;
        }
        let meta = from.meta()?;
        let xattrs = from.own_xattrs()?;
        self.attributes_of_dir(&to, &meta, &xattrs).context("set the attributes of", path)
    }

    fn entry(&mut self, from: &dyn Dir, to: &Rc<OwnedFd>, entry: &Entry, path: &Path) -> Result<()> {
        let (name, meta) = (&*entry.name, &entry.meta);
        if meta.nlink > 1
            && let Some((dir, first)) = self.links.get(&meta.ino)
            && meta.kind != FileKind::Dir
        {
            rustix::fs::linkat(&**dir, &**first, &**to, name, AtFlags::empty()).context("link", path)?;
            if let Some(sum) = self.sums.iter().find(|(known, _)| known.ends_with(first)).map(|(_, sum)| *sum) {
                self.sums.insert(path.into(), sum);
            }
            return Ok(());
        }
        let is_device = matches!(meta.kind, FileKind::CharDevice | FileKind::BlockDevice);
        if is_device && !self.ownership {
            self.omit(path, "device nodes are not kept");
            return Ok(());
        }
        self.make(from, to, name, meta, path)?;
        if meta.kind != FileKind::Dir {
            let xattrs = from.xattrs(name)?;
            self.attributes(to, name, meta, &xattrs).context("set the attributes of", path)?;
            self.links.insert(meta.ino, (to.clone(), name.to_owned()));
        }
        Ok(())
    }

    fn omit(&mut self, path: &Path, reason: &str) {
        self.omissions.push(Omission { path: path.to_string_lossy().into_owned(), reason: reason.into() });
    }

    fn make(&mut self, from: &dyn Dir, to: &Rc<OwnedFd>, name: &OsStr, meta: &FileMeta, path: &Path) -> Result<()> {
        let private = Mode::RUSR | Mode::WUSR;
        match meta.kind {
            FileKind::Dir => {
                let inner = match from.open_dir(name) {
                    Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::CrossesDevices => {
                        self.omit(path, "another file system is mounted there");
                        return Ok(());
                    }
                    inner => inner?,
                };
                rustix::fs::mkdirat(&**to, name, Mode::RWXU).context("make", path)?;
                let made = beneath::open_dir(&**to, name).context("open", path)?;
                self.dir(&*inner, Rc::new(made), path)?;
            }
            FileKind::File => {
                let content = from.open_file(name)?;
                let made = beneath::create_file(&**to, name, 0o600).context("make", path)?;
                copy_content(&*content, &made).context("copy", path)?;
                let copied = fsnap_backend::WholeFile::new(made).context("read", path)?;
                self.sums.insert(path.into(), sum_of(&copied).context("read", path)?);
            }
            FileKind::Symlink => {
                rustix::fs::symlinkat(from.read_link(name)?, &**to, name).context("make", path)?;
            }
            kind => {
                let kind = match kind {
                    FileKind::Fifo => rustix::fs::FileType::Fifo,
                    FileKind::Socket => rustix::fs::FileType::Socket,
                    FileKind::CharDevice => rustix::fs::FileType::CharacterDevice,
                    _ => rustix::fs::FileType::BlockDevice,
                };
                rustix::fs::mknodat(&**to, name, kind, private, meta.rdev).context("make", path)?;
            }
        }
        Ok(())
    }

    /// Owner, mode, extended attributes, times: in this order, since each takes something of the later ones away.
    fn attributes(&self, dir: &OwnedFd, name: &OsStr, meta: &FileMeta, xattrs: &Xattrs) -> io::Result<()> {
        if self.ownership {
            let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
            rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if meta.kind != FileKind::Symlink {
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(meta.mode), AtFlags::empty())?;
        }
        for (key, value) in xattrs {
            beneath::set_xattr(dir, name, key, value)?;
        }
        Ok(rustix::fs::utimensat(dir, name, &times(meta), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn attributes_of_dir(&self, dir: &OwnedFd, meta: &FileMeta, xattrs: &Xattrs) -> io::Result<()> {
        if self.ownership {
            rustix::fs::fchown(dir, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))?;
        }
        rustix::fs::fchmod(dir, Mode::from_raw_mode(meta.mode))?;
        for (key, value) in xattrs {
            rustix::fs::fsetxattr(dir, key.as_os_str(), value, rustix::fs::XattrFlags::empty())?;
        }
        Ok(rustix::fs::futimens(dir, &times(meta))?)
    }
}

fn copy_content(content: &dyn fsnap_backend::Content, to: &File) -> io::Result<()> {
    for_data(content, |at, data| to.write_all_at(data, at))?;
    to.set_len(content.len())
}

fn times(meta: &FileMeta) -> Timestamps {
    let time = |t: fsnap_backend::Timestamp| Timespec { tv_sec: t.seconds, tv_nsec: t.nanoseconds.into() };
    Timestamps { last_access: time(meta.atime), last_modification: time(meta.mtime) }
}
