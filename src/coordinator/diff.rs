//! Tells what differs between two trees of files.

use std::cmp::Ordering;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use fsnap_backend::{Content, Differences, Dir, Entry, FileKind, Source, Volume};

use super::open::Reading;
use super::{Coordinator, Target, adopt};
use crate::checkpoint::{Checkpoint, Member};
use crate::name::Name;
use crate::progress::{Underway, Work};
use crate::{Error, Result};

/// One file that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The volume.
    pub volume: Name,
    /// The path below the volume's root; empty for the root itself.
    pub path: PathBuf,
    /// How it differs.
    pub kind: ChangeKind,
}

/// How a file differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// Only the second tree has it.
    Added,
    /// Only the first tree has it.
    Removed,
    /// Its content, its link's target, or its kind.
    Modified,
    /// Only its owner, mode, or extended attributes.
    Attributes,
}

/// What was left out of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Skipped {
    /// Only one side has the volume.
    Volume(Name),
    /// Something else is mounted there now, and hides what the volume has.
    Mounted {
        /// The volume.
        volume: Name,
        /// The path below the volume's root.
        path: PathBuf,
    },
}

/// What a checkpoint is compared with.
#[derive(Debug, Clone, Copy)]
pub enum Side<'a> {
    /// Another checkpoint.
    Checkpoint(&'a Checkpoint),
    /// The files as they are now.
    Now,
}

impl Coordinator {
    /// Tells `report` of every file that differs from `old` to `new`, volume by volume, in the order of paths.
    ///
    /// What cannot be compared is returned.
    pub fn diff(&self, old: &Checkpoint, new: Side<'_>, report: &mut dyn FnMut(Change)) -> Result<Vec<Skipped>> {
        let mut skipped = Vec::new();
        // How many files there are is known only when all were compared.
        let work = self.begin_work(Work::Comparing, None);
        for member in &old.members {
            let Some((after, differences)) = self.new_side(old, member, new)? else {
                skipped.push(Skipped::Volume(member.volume.clone()));
                continue;
            };
            let before = self.read(&self.store(&member.store)?, &member.snapshot)?;
            let roots = [before.root.as_ref(), after.root.as_ref()];
            let volume = &member.volume;
            let (work, report, skipped) = (&work, &mut *report, &mut skipped);
            Comparison { volume, roots, levels: Vec::new(), differences, work, report, skipped }.run()?;
        }
        if let Side::Checkpoint(other) = new {
            let missing = |name: &&Name| !old.members.iter().any(|member| member.volume == **name);
            skipped.extend(
                other.members.iter().map(|member| &member.volume).filter(missing).cloned().map(Skipped::Volume),
            );
        }
        Ok(skipped)
    }

    /// The files that the member is compared with, and what its store knows ahead of what differs; `None` if there are none.
    ///
    /// What the store knows only saves time: what it cannot tell is read.
    fn new_side(&self, old: &Checkpoint, member: &Member, new: Side<'_>) -> Result<Option<NewSide>> {
        let store = self.store(&member.store)?;
        let known = |source: Source<'_>| store.differences(&member.snapshot, source).ok().flatten();
        match new {
            Side::Now => {
                let Some(volume) = self.live(old, &member.volume)? else { return Ok(None) };
                let differences = known(Source::Volume(&volume));
                Ok(Some((Reading::live(volume.dir())?, differences)))
            }
            Side::Checkpoint(other) => {
                let found = other.members.iter().find(|found| found.volume == member.volume);
                let Some(found) = found else { return Ok(None) };
                let same_store = found.store == member.store;
                let differences = same_store.then(|| known(Source::Snapshot(&found.snapshot))).flatten();
                Ok(Some((self.read(&self.store(&found.store)?, &found.snapshot)?, differences)))
            }
        }
    }

    /// The volume that a checkpoint's line of work goes on in; `None` if it was forgotten.
    ///
    /// What is at its path now must be the volume: all files would be missing where it is only not mounted.
    fn live(&self, checkpoint: &Checkpoint, volume: &Name) -> Result<Option<Volume>> {
        let target = match &checkpoint.branch {
            Some(name) => self.targets_of_branch(name)?.into_iter().find(|target| target.volume == *volume),
            None => self.catalog.volume(volume)?.map(|volume| self.registered(volume)).transpose()?,
        };
        let adopted =
            |target: Target| adopt(self.store(&target.store)?.as_ref(), &target.volume, &target.path, &target.identity);
        target.map(adopted).transpose()
    }
}

type NewSide = (Reading, Option<Box<dyn Differences>>);

/// How many directories of each tree are kept open; the usual limit of a process is 1,024 descriptors.
const OPEN: usize = 128;

/// One walk down two trees.
///
/// Nothing recurses, however deep they are, and the directories far above the one that is compared are closed. On the way
/// back they are opened again from the root, name by name.
struct Comparison<'a> {
    volume: &'a Name,
    roots: [&'a dyn Dir; 2],
    /// The directories from the root down to the one that is compared.
    levels: Vec<Level>,
    differences: Option<Box<dyn Differences>>,
    work: &'a Underway<'a>,
    report: &'a mut dyn FnMut(Change),
    skipped: &'a mut Vec<Skipped>,
}

/// One directory, in the old tree and in the new one, or in one of them.
struct Level {
    /// Its name; that of the root is empty.
    name: OsString,
    /// What has not been compared yet; `None` where this tree does not have the directory.
    entries: [Option<Entries>; 2],
    /// Closed, or the root's.
    open: [Option<Box<dyn Dir>>; 2],
}

type Entries = std::iter::Peekable<std::vec::IntoIter<Entry>>;

const OLD: usize = 0;
const NEW: usize = 1;

impl Comparison<'_> {
    fn run(&mut self) -> Result<()> {
        let [old, new] = self.roots;
        self.descend(OsString::new(), [Some(old), Some(new)], [None, None])?;
        while let Some(level) = self.levels.last_mut() {
            let [old, new] =
                level.entries.each_mut().map(|entries| entries.as_mut().and_then(|entries| entries.peek()));
            let order = match (old, new) {
                (None, None) => {
                    self.levels.pop();
                    continue;
                }
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                // What became something else was removed and added.
                (Some(a), Some(b)) if a.name == b.name && a.meta.kind != b.meta.kind => Ordering::Less,
                (Some(a), Some(b)) => a.name.cmp(&b.name),
            };
            self.work.step();
            match order {
                Ordering::Less => self.one(OLD, ChangeKind::Removed)?,
                Ordering::Greater => self.one(NEW, ChangeKind::Added)?,
                Ordering::Equal => self.both()?,
            }
        }
        Ok(())
    }

    /// The path of the directory that is compared, or of `name` in it.
    fn path(&self, name: &OsStr) -> PathBuf {
        self.levels.iter().map(|level| &*level.name).chain([name]).filter(|name| !name.is_empty()).collect()
    }

    fn found(&mut self, name: &OsStr, kind: ChangeKind) {
        let path = self.path(name);
        (self.report)(Change { volume: self.volume.clone(), path, kind });
    }

    fn next(&mut self, side: usize) -> Option<Entry> {
        self.levels.last_mut()?.entries[side].as_mut()?.next()
    }

    /// Goes down into a directory, of which the root's are not owned.
    fn descend(&mut self, name: OsString, dirs: [Option<&dyn Dir>; 2], open: [Option<Box<dyn Dir>>; 2]) -> Result<()> {
        let dirs = [OLD, NEW].map(|side| open[side].as_deref().or(dirs[side]));
        if let [Some(old), Some(new)] = dirs {
            if old.token().is_some_and(|token| new.token() == Some(token)) {
                return Ok(());
            }
            let (a, b) = (old.meta()?, new.meta()?);
            if (a.mode, a.uid, a.gid) != (b.mode, b.uid, b.gid) || old.own_xattrs()? != new.own_xattrs()? {
                self.found(&name, ChangeKind::Attributes);
            }
        }
        let mut entries = [None, None];
        for (entries, dir) in entries.iter_mut().zip(dirs) {
            *entries = dir.map(|dir| Ok::<_, Error>(dir.entries()?.into_iter().peekable())).transpose()?;
        }
        self.levels.push(Level { name, entries, open });
        if let Some(far) = self.levels.len().checked_sub(OPEN) {
            self.levels[far].open = [None, None];
        }
        Ok(())
    }

    /// The directory of one tree that is compared, opened again if it was closed.
    fn dir(&mut self, side: usize) -> Result<&dyn Dir> {
        let last = self.levels.len() - 1;
        let nearest = (1..=last).rev().find(|&level| self.levels[level].open[side].is_some()).unwrap_or(0);
        for level in nearest + 1..=last {
            let above = self.levels[level - 1].open[side].as_deref().unwrap_or(self.roots[side]);
            let opened = above.open_dir(&self.levels[level].name)?;
            self.levels[level].open[side] = Some(opened);
            if let Some(far) = level.checked_sub(OPEN) {
                self.levels[far].open[side] = None;
            }
        }
        Ok(self.levels[last].open[side].as_deref().unwrap_or(self.roots[side]))
    }

    /// Reports an entry that only one side has, and goes down into it.
    fn one(&mut self, side: usize, kind: ChangeKind) -> Result<()> {
        let Some(entry) = self.next(side) else { return Ok(()) };
        self.found(&entry.name, kind);
        if entry.meta.kind == FileKind::Dir {
            let mut open = [None, None];
            let opened = self.dir(side)?.open_dir(&entry.name);
            let Some(opened) = self.unless_mounted(&entry.name, opened)? else { return Ok(()) };
            open[side] = Some(opened);
            self.descend(entry.name, [None, None], open)?;
        }
        Ok(())
    }

    /// What was opened; `None`, and noted, if the volume's own file is hidden by what is mounted on it.
    fn unless_mounted<T>(&mut self, name: &OsStr, opened: fsnap_backend::Result<T>) -> Result<Option<T>> {
        match opened {
            Err(fsnap_backend::Error::Io { source, .. }) if source.kind() == ErrorKind::CrossesDevices => {
                let path = self.path(name);
                self.skipped.push(Skipped::Mounted { volume: self.volume.clone(), path });
                Ok(None)
            }
            opened => Ok(Some(opened?)),
        }
    }

    fn both(&mut self) -> Result<()> {
        let (Some(a), Some(b)) = (self.next(OLD), self.next(NEW)) else { return Ok(()) };
        let name = &a.name;
        if a.meta.kind == FileKind::Dir {
            let (old, new) = (self.dir(OLD)?.open_dir(name)?, self.dir(NEW)?.open_dir(name));
            let Some(new) = self.unless_mounted(name, new)? else { return Ok(()) };
            return self.descend(a.name, [None, None], [Some(old), Some(new)]);
        }
        // The inode's change time moves with every change of the content or the attributes, and cannot be set back.
        let unchanged = (a.meta.ino, a.meta.ctime, a.meta.mtime, a.meta.size)
            == (b.meta.ino, b.meta.ctime, b.meta.mtime, b.meta.size);
        if unchanged {
            return Ok(());
        }
        let content_differs = match a.meta.kind {
            FileKind::File if a.meta.size != b.meta.size => true,
            FileKind::File => {
                let (old, new) = (self.dir(OLD)?.open_file(name)?, self.dir(NEW)?.open_file(name));
                let Some(new) = self.unless_mounted(name, new)? else { return Ok(()) };
                self.contents_differ(old.as_ref(), new.as_ref()).map_err(|source| Error::Io {
                    action: "compare",
                    object: crate::printable(self.path(name).as_os_str()),
                    source,
                })?
            }
            FileKind::Symlink => self.dir(OLD)?.read_link(name)? != self.dir(NEW)?.read_link(name)?,
            _ => a.meta.rdev != b.meta.rdev,
        };
        let attributes = |entry: &Entry| (entry.meta.mode, entry.meta.uid, entry.meta.gid);
        if content_differs {
            self.found(name, ChangeKind::Modified);
        } else if attributes(&a) != attributes(&b) || self.dir(OLD)?.xattrs(name)? != self.dir(NEW)?.xattrs(name)? {
            self.found(name, ChangeKind::Attributes);
        }
        Ok(())
    }
}

impl Comparison<'_> {
    /// Compares two contents of equal length where they can differ.
    fn contents_differ(&self, a: &dyn Content, b: &dyn Content) -> std::io::Result<bool> {
        let parts = match (&self.differences, a.as_file(), b.as_file()) {
            (Some(differences), Some(a), Some(b)) => differences.ranges(a, b)?,
            _ => None,
        };
        let Some(parts) = parts else { return part_differs(a, b, 0..a.len()) };
        for part in parts {
            if part_differs(a, b, part)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Compares a part of two contents of equal length; what is a hole in both is not read.
fn part_differs(a: &dyn Content, b: &dyn Content, part: Range<u64>) -> std::io::Result<bool> {
    const BLOCK: u64 = 1 << 17;
    let (mut left, mut right) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
    let mut offset = part.start;
    loop {
        if offset >= part.end {
            return Ok(false);
        }
        let next = [a.data_after(offset)?, b.data_after(offset)?].into_iter().flatten().map(|range| range.start).min();
        let Some(next) = next else { return Ok(false) };
        offset = next.max(offset);
        if offset >= part.end {
            return Ok(false);
        }
        let length = BLOCK.min(part.end - offset) as usize;
        let (left, right) = (&mut left[..length], &mut right[..length]);
        let (got, other) = (read_full(a, left, offset)?, read_full(b, right, offset)?);
        if left[..got] != right[..other] {
            return Ok(true);
        }
        if got == 0 {
            return Ok(false);
        }
        offset += got as u64;
    }
}

fn read_full(content: &dyn Content, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match content.read_at(&mut buffer[filled..], offset + filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

impl ChangeKind {
    /// The letter that stands before the path in a listing.
    pub fn letter(self) -> char {
        match self {
            Self::Added => 'A',
            Self::Removed => 'D',
            Self::Modified => 'M',
            Self::Attributes => 'a',
        }
    }

    /// The word in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Modified => "modified",
            Self::Attributes => "attributes",
        }
    }
}

impl Change {
    /// The path with the volume in front, fit for a terminal.
    pub fn shown(&self) -> String {
        crate::printable(Path::new(self.volume.as_str()).join(&self.path).as_os_str())
    }
}
