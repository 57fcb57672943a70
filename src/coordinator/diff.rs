//! Tells what differs between two trees of files.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Content, Differences, Dir, DirTree, Entry, FileKind, Source};

use super::Coordinator;
use crate::checkpoint::{Checkpoint, Member};
use crate::name::Name;
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
    /// A volume that only one side has is skipped and returned.
    pub fn diff(&self, old: &Checkpoint, new: Side<'_>, report: &mut dyn FnMut(Change)) -> Result<Vec<Name>> {
        let mut skipped = Vec::new();
        for member in &old.members {
            let differences = self.differences(old, member, new)?;
            let before = self.read(self.store(&member.store)?.as_ref(), &member.snapshot)?;
            let after: Arc<dyn Dir> = match new {
                Side::Now => match self.live_path(old, &member.volume)? {
                    Some(path) => Arc::new(DirTree::open(&path)?),
                    None => {
                        skipped.push(member.volume.clone());
                        continue;
                    }
                },
                Side::Checkpoint(other) => match other.members.iter().find(|m| m.volume == member.volume) {
                    Some(found) => self.read(self.store(&found.store)?.as_ref(), &found.snapshot)?,
                    None => {
                        skipped.push(member.volume.clone());
                        continue;
                    }
                },
            };
            let mut comparison =
                Comparison { volume: &member.volume, path: PathBuf::new(), differences, report: &mut *report };
            comparison.dirs(before.as_ref(), after.as_ref())?;
        }
        if let Side::Checkpoint(other) = new {
            let missing = |name: &&Name| !old.members.iter().any(|member| member.volume == **name);
            skipped.extend(other.members.iter().map(|member| &member.volume).filter(missing).cloned());
        }
        Ok(skipped)
    }

    /// What the member's store knows ahead of what differs. It only saves time: what it cannot tell is read.
    fn differences(&self, old: &Checkpoint, member: &Member, new: Side<'_>) -> Result<Option<Box<dyn Differences>>> {
        let store = self.store(&member.store)?;
        Ok(match new {
            Side::Checkpoint(other) => {
                let found = other.members.iter().find(|m| m.volume == member.volume && m.store == member.store);
                found.and_then(|found| store.differences(&member.snapshot, Source::Snapshot(&found.snapshot)).ok())
            }
            Side::Now => {
                let volume = self.live_path(old, &member.volume)?.and_then(|path| store.adopt(&path).ok());
                volume.and_then(|volume| store.differences(&member.snapshot, Source::Volume(&volume)).ok())
            }
        }
        .flatten())
    }

    /// Where the files of a checkpoint's line of work are now; `None` if the volume was forgotten.
    fn live_path(&self, checkpoint: &Checkpoint, volume: &Name) -> Result<Option<PathBuf>> {
        if let Some(name) = &checkpoint.branch {
            let branch = self.catalog.branch(name)?.ok_or_else(|| self.no_such_branch(name))?;
            let member = branch.members.iter().find(|member| member.volume == *volume);
            return Ok(member.map(|member| member.path.0.clone()));
        }
        Ok(self.catalog.volume(volume)?.map(|volume| volume.path.0))
    }
}

/// One walk down two trees. Recursion is bounded by the trees' depth, each level of which holds two descriptors.
struct Comparison<'a> {
    volume: &'a Name,
    path: PathBuf,
    differences: Option<Box<dyn Differences>>,
    report: &'a mut dyn FnMut(Change),
}

impl Comparison<'_> {
    fn found(&mut self, name: Option<&OsStr>, kind: ChangeKind) {
        let path = name.map_or_else(|| self.path.clone(), |name| self.path.join(name));
        (self.report)(Change { volume: self.volume.clone(), path, kind });
    }

    fn dirs(&mut self, old: &dyn Dir, new: &dyn Dir) -> Result<()> {
        if old.token().is_some_and(|token| new.token() == Some(token)) {
            return Ok(());
        }
        let (a, b) = (old.meta()?, new.meta()?);
        if (a.mode, a.uid, a.gid) != (b.mode, b.uid, b.gid) || old.own_xattrs()? != new.own_xattrs()? {
            self.found(None, ChangeKind::Attributes);
        }
        let (olds, news) = (old.entries()?, new.entries()?);
        let (mut olds, mut news) = (olds.into_iter().peekable(), news.into_iter().peekable());
        loop {
            let order = match (olds.peek(), news.peek()) {
                (None, None) => return Ok(()),
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(a), Some(b)) => a.name.cmp(&b.name),
            };
            match order {
                std::cmp::Ordering::Less => self.whole(old, olds.next(), ChangeKind::Removed)?,
                std::cmp::Ordering::Greater => self.whole(new, news.next(), ChangeKind::Added)?,
                std::cmp::Ordering::Equal => {
                    if let (Some(a), Some(b)) = (olds.next(), news.next()) {
                        self.both(old, new, &a, &b)?;
                    }
                }
            }
        }
    }

    /// Reports an entry that only one side has, and everything below it.
    fn whole(&mut self, dir: &dyn Dir, entry: Option<Entry>, kind: ChangeKind) -> Result<()> {
        let Some(entry) = entry else { return Ok(()) };
        self.found(Some(&entry.name), kind);
        if entry.meta.kind == FileKind::Dir {
            let below = dir.open_dir(&entry.name)?;
            self.path.push(&entry.name);
            for entry in below.entries()? {
                self.whole(below.as_ref(), Some(entry), kind)?;
            }
            self.path.pop();
        }
        Ok(())
    }

    fn both(&mut self, old: &dyn Dir, new: &dyn Dir, a: &Entry, b: &Entry) -> Result<()> {
        let name: &OsString = &a.name;
        if a.meta.kind != b.meta.kind {
            self.whole(old, Some(a.clone()), ChangeKind::Removed)?;
            return self.whole(new, Some(b.clone()), ChangeKind::Added);
        }
        if a.meta.kind == FileKind::Dir {
            let (below_old, below_new) = (old.open_dir(name)?, new.open_dir(name)?);
            self.path.push(name);
            self.dirs(below_old.as_ref(), below_new.as_ref())?;
            self.path.pop();
            return Ok(());
        }
        // The inode's change time moves with every change of the content or the attributes, and cannot be set back.
        let unchanged = (a.meta.ino, a.meta.ctime, a.meta.mtime, a.meta.size)
            == (b.meta.ino, b.meta.ctime, b.meta.mtime, b.meta.size);
        if unchanged {
            return Ok(());
        }
        let content_differs = match a.meta.kind {
            FileKind::File => {
                a.meta.size != b.meta.size
                    || self.contents_differ(old.open_file(name)?.as_ref(), new.open_file(name)?.as_ref()).map_err(
                        |source| Error::Io {
                            action: "compare",
                            object: crate::printable(self.path.join(name).as_os_str()),
                            source,
                        },
                    )?
            }
            FileKind::Symlink => old.read_link(name)? != new.read_link(name)?,
            _ => a.meta.rdev != b.meta.rdev,
        };
        let attributes = |entry: &Entry| (entry.meta.mode, entry.meta.uid, entry.meta.gid);
        if content_differs {
            self.found(Some(name), ChangeKind::Modified);
        } else if attributes(a) != attributes(b) || old.xattrs(name)? != new.xattrs(name)? {
            self.found(Some(name), ChangeKind::Attributes);
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
