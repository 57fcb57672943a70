//! The upper part of the tree: what the catalog records, as directories and links.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fsnap_backend::{FileKind, FileMeta, Timestamp};

use super::tree::{Tree, Trees};
use super::unchanged::Remembered;
use super::{Keep, processes};
use crate::branch::Branch;
use crate::catalog::{Access, Catalog};
use crate::checkpoint::{Checkpoint, CheckpointId};
use crate::coordinator::{Coordinator, Side};
use crate::fuse::branches::Branches;
use crate::name::Name;
use crate::processes::ProcessRecord;
use crate::unlinked::Attributes;
use crate::{Error, Result, reference};

const README: &str = "\
These are the checkpoints and branches of fsnap. Everything here but branches is read-only.

ids/<id>/<volume>/...           the files of a checkpoint, as they were
ids/<id>/.fsnap/                not listed: meta.json, changed (since the parent), and the
                                links parent and images
ids/<id>/@processes/<pid>/      not listed: a process as it stood: cmdline, cwd, exe, root, fd/<n>
snapshots/<time>                links into ids; snapshots/latest is the newest
tags/<tag>                      links into ids
latest                          a link to the newest checkpoint
branches/<name>/<volume>/...    the files of a branch, to be written; of those that `fsnap branch` made, a link to them

`mkdir branches/NAME@CKPT` makes a branch here, where CKPT is an id or its beginning, a tag, or latest. It begins as the
checkpoint was, and takes room for what differs only. `rmdir branches/NAME` removes it while nothing was written to it,
`fsnap rm --branch NAME` in any case.

New checkpoints show up by themselves. `fsnap umount` ends this.
";

/// The directory of what belongs to a checkpoint besides its files. No volume has such a name.
const EXTRAS: &str = ".fsnap";
const META: &str = "meta.json";
const CHANGED: &str = "changed";
const PARENT: &str = "parent";
const IMAGES: &str = "images";
const PROCESSES: &str = "processes";
/// A link to them beside the volumes. It is not listed: copies of the directory are to hold the files.
const PROCESSES_LINK: &str = "@processes";
const LATEST: &str = "latest";

/// So many lists of what has changed are remembered.
const MOST_CHANGED: usize = 64;

/// Describes a checkpoint, with its tags, for `meta.json`.
pub type Describe = fn(&Checkpoint, &[Name]) -> String;

/// Where the records are.
#[derive(Debug, Clone)]
pub struct Records {
    /// The directory of the catalog.
    pub state: PathBuf,
    /// How long a look waits for another fsnap that changes the catalog.
    pub patience: Duration,
    /// What `meta.json` says.
    pub describe: Describe,
    /// Where branches keep what differs; beside the catalog, if not set.
    pub branches: Option<PathBuf>,
}

impl Records {
    /// Opens the catalog to read it. Whoever has it open keeps nobody from anything, and nothing is held when it is closed.
    pub(in crate::fuse) fn open(&self) -> Result<Coordinator> {
        self.open_for(Access::Read)
    }

    /// Opens the catalog for a change. Undoes nothing: that is for commands, which tell somebody of it.
    pub(super) fn open_to_write(&self) -> Result<Coordinator> {
        self.open_for(Access::Write)
    }

    fn open_for(&self, access: Access) -> Result<Coordinator> {
        let mut coordinator = Coordinator::open(&self.state, access, self.patience)?;
        if let Some(dir) = &self.branches {
            coordinator.keep_branches_in(dir);
        }
        Ok(coordinator)
    }
}

/// A file or directory of the upper part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Place {
    Root,
    Readme,
    Ids,
    Snapshots,
    Tags,
    Branches,
    Checkpoint(CheckpointId),
    Extras(CheckpointId),
    Meta(CheckpointId),
    /// What differs from the first to the second.
    Changed(CheckpointId, CheckpointId),
    Processes(CheckpointId),
    Process(CheckpointId, i32),
    CommandLine(CheckpointId, i32),
    Descriptors(CheckpointId, i32),
    /// The content of a file that had no name, by its device and inode.
    Kept(CheckpointId, u64, u64),
    /// With when it was made: a later one of the same name is another directory. What the kernel has removed, it shows nothing in any more.
    Branch(Name, jiff::Timestamp),
    Link(PathBuf),
}

impl Place {
    pub(super) fn of_branch(branch: &Branch) -> Self {
        Self::Branch(branch.name.clone(), branch.time)
    }

    fn kind(&self) -> FileKind {
        match self {
            Self::Readme | Self::Meta(_) | Self::Changed(..) | Self::CommandLine(..) | Self::Kept(..) => FileKind::File,
            Self::Link(_) => FileKind::Symlink,
            _ => FileKind::Dir,
        }
    }

    pub(super) fn keep(&self) -> Keep {
        match self {
            Self::Root | Self::Readme | Self::Ids | Self::Snapshots | Self::Tags | Self::Branches => Keep::Forever,
            Self::Checkpoint(_) | Self::Extras(_) | Self::Branch(..) => Keep::Briefly,
            Self::Processes(_) | Self::Process(..) | Self::Descriptors(..) | Self::Kept(..) => Keep::Briefly,
            Self::Meta(_) | Self::Changed(..) | Self::CommandLine(..) | Self::Link(_) => Keep::Not,
        }
    }
}

/// What a name leads to.
#[derive(Debug, Clone)]
pub(super) enum Found {
    Place(Place),
    Volume(Arc<Tree>),
    /// A volume of a branch that is written here, by its number.
    Written(u64),
    Entry {
        tree: Arc<Tree>,
        meta: FileMeta,
        /// Of the directory that it is in.
        realm: u64,
    },
}

impl Found {
    pub(super) fn kind(&self) -> FileKind {
        match self {
            Self::Place(place) => place.kind(),
            Self::Volume(_) | Self::Written(_) => FileKind::Dir,
            Self::Entry { meta, .. } => meta.kind,
        }
    }
}

/// The upper part.
#[derive(Debug)]
pub(super) struct Layout {
    records: Records,
    branches: Arc<Branches>,
    changed: Mutex<HashMap<(CheckpointId, CheckpointId), String>>,
    /// What has which name in the uppermost directories.
    recorded: Remembered<(Place, String), Option<Place>>,
    since: Timestamp,
    owner: (u32, u32),
}

impl Layout {
    pub(super) fn new(records: Records, branches: Arc<Branches>) -> Self {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (changed, recorded, since) = (Mutex::default(), Remembered::default(), timestamp(jiff::Timestamp::now()));
        Self { records, branches, changed, recorded, since, owner }
    }

    pub(super) fn records(&self) -> &Records {
        &self.records
    }

    /// Makes the branch that `NAME@CKPT` asks for.
    pub(super) fn make_branch(&self, wanted: &OsStr) -> Result<Branch> {
        let bad = |reason| Error::BadReference { reference: wanted.to_string_lossy().into_owned(), reason };
        let text = wanted.to_str().ok_or_else(|| bad("it is no text"))?;
        let (name, checkpoint) = text.split_once('@').ok_or_else(|| bad("make a branch by `mkdir NAME@CKPT`"))?;
        let name: Name = name.parse()?;
        let is_latest = checkpoint.strip_prefix(LATEST).is_some_and(|steps| steps.is_empty() || steps.starts_with('~'));
        let checkpoint = if is_latest { format!("@{checkpoint}") } else { checkpoint.to_owned() };
        let coordinator = self.records.open_to_write()?;
        let checkpoint = reference::resolve(coordinator.catalog(), &checkpoint)?;
        coordinator.branch_to_write(&checkpoint, &name)
    }

    /// Removes a branch to which nothing was written.
    pub(super) fn remove_branch(&self, name: &Name) -> Result<()> {
        self.records.open_to_write()?.remove_unchanged_branch(name)
    }

    pub(super) fn is_recorded(&self, checkpoint: &CheckpointId) -> Result<bool> {
        Ok(self.records.open()?.catalog().checkpoint(checkpoint)?.is_some())
    }

    /// Tells which directories of checkpoints and branches are there.
    pub(super) fn there(&self) -> Result<impl Fn(&Place) -> bool + use<>> {
        let records = self.records.open()?;
        let ids: HashSet<_> = records.catalog().ids_with_prefix("", u32::MAX)?.into_iter().collect();
        let branches: HashSet<_> = records.catalog().branches()?.iter().map(Place::of_branch).collect();
        Ok(move |place: &Place| match place {
            Place::Checkpoint(id) => ids.contains(id),
            place => branches.contains(place),
        })
    }

    /// What a directory has under this name.
    pub(super) fn child(&self, place: &Place, name: &OsStr, trees: &Trees) -> Result<Option<Found>> {
        let Some(name) = name.to_str() else { return Ok(None) };
        let recorded = match place {
            Place::Root | Place::Ids | Place::Snapshots | Place::Tags | Place::Branches => {
                let asked = (place.clone(), name.to_owned());
                self.recorded.ask(&self.records.state, asked, || self.recorded_child(place, name))?
            }
            Place::Checkpoint(id) if name == EXTRAS => Some(Place::Extras(*id)),
            Place::Checkpoint(id) if name == PROCESSES_LINK => {
                let tree = self.records.open()?.catalog().tree(id)?;
                tree.map(|_| Place::Link(Path::new(EXTRAS).join(PROCESSES)))
            }
            Place::Checkpoint(_)
            | Place::Extras(_)
            | Place::Branch(..)
            | Place::Processes(_)
            | Place::Process(..)
            | Place::Descriptors(..) => {
                let listed = self.children(place, trees)?;
                return Ok(listed.into_iter().find(|(listed, _)| listed == name).map(|(_, found)| found));
            }
            Place::Readme
            | Place::Meta(_)
            | Place::Changed(..)
            | Place::CommandLine(..)
            | Place::Kept(..)
            | Place::Link(_) => None,
        };
        Ok(recorded.map(Found::Place))
    }

    /// What one of the uppermost directories has under this name.
    fn recorded_child(&self, place: &Place, name: &str) -> Result<Option<Place>> {
        Ok(match place {
            Place::Root => match name {
                "README" => Some(Place::Readme),
                "ids" => Some(Place::Ids),
                "snapshots" => Some(Place::Snapshots),
                "tags" => Some(Place::Tags),
                "branches" => Some(Place::Branches),
                LATEST => self.latest("ids")?,
                _ => None,
            },
            Place::Ids => match name.parse::<CheckpointId>() {
                // In one way of writing only, so that one directory has one name.
                Ok(id) if id.to_string() == name && self.is_recorded(&id)? => Some(Place::Checkpoint(id)),
                _ => None,
            },
            Place::Snapshots if name == LATEST => self.latest("../ids")?,
            Place::Snapshots => {
                self.snapshots()?.into_iter().find(|(time, _)| time == name).map(|(_, id)| link_up(&id))
            }
            Place::Tags => match name.parse::<Name>() {
                Ok(tag) => self.records.open()?.catalog().tagged(&tag)?.map(|id| link_up(&id)),
                Err(_) => None,
            },
            Place::Branches => match name.parse::<Name>() {
                Ok(branch) => self.records.open()?.catalog().branch(&branch)?.map(|branch| Place::of_branch(&branch)),
                Err(_) => None,
            },
            _ => None,
        })
    }

    /// What a directory has, sorted by name.
    pub(super) fn children(&self, place: &Place, trees: &Trees) -> Result<Vec<(OsString, Found)>> {
        let records = self.records.open()?;
        let catalog = records.catalog();
        let mut found: Vec<(OsString, Found)> = Vec::new();
        let mut add = |name: &str, place: Place| found.push((name.into(), Found::Place(place)));
        match place {
            Place::Root => {
                add("README", Place::Readme);
                add("branches", Place::Branches);
                add("ids", Place::Ids);
                add("snapshots", Place::Snapshots);
                add("tags", Place::Tags);
                if let Some(latest) = self.latest("ids")? {
                    add(LATEST, latest);
                }
            }
            Place::Ids => {
                for id in catalog.ids_with_prefix("", u32::MAX)? {
                    add(&id.to_string(), Place::Checkpoint(id));
                }
            }
            Place::Snapshots => {
                let times = names(&catalog.times()?);
                if let Some((_, newest)) = times.last() {
                    add(LATEST, link_up(newest));
                }
                for (name, id) in times {
                    add(&name, link_up(&id));
                }
            }
            Place::Tags => {
                for (id, tags) in catalog.tags()? {
                    tags.iter().for_each(|tag| add(tag.as_str(), link_up(&id)));
                }
            }
            Place::Branches => {
                for branch in catalog.branches()? {
                    add(branch.name.as_str(), Place::of_branch(&branch));
                }
            }
            Place::Checkpoint(id) => {
                for member in catalog.checkpoint(id)?.map(|checkpoint| checkpoint.members).unwrap_or_default() {
                    let tree = trees.get(*id, &member, &self.records);
                    found.push((member.volume.as_str().into(), Found::Volume(tree)));
                }
            }
            Place::Extras(id) => {
                if let Some(checkpoint) = catalog.checkpoint(id)? {
                    add(META, Place::Meta(*id));
                    if catalog.tree(id)?.is_some() {
                        add(PROCESSES, Place::Processes(*id));
                    }
                    if let Some(engine) = checkpoint.engine {
                        add(IMAGES, Place::Link(engine.images.0));
                    }
                    if let Some(parent) = checkpoint.parent {
                        add(CHANGED, Place::Changed(parent, *id));
                        add(PARENT, Place::Link(PathBuf::from(format!("../../{parent}"))));
                    }
                }
            }
            Place::Branch(name, made) => {
                let branch = catalog.branch(name)?.filter(|branch| branch.time == *made);
                for member in branch.map(|branch| branch.members).unwrap_or_default() {
                    let place = match self.branches.number_of(catalog, name, &member)? {
                        Some(number) => Found::Written(number),
                        None => Found::Place(Place::Link(member.path.0)),
                    };
                    found.push((member.volume.as_str().into(), place));
                }
            }
            Place::Processes(id) => {
                let listed = catalog.tree(id)?.map(|tree| processes::all(id, &tree));
                listed.into_iter().flatten().for_each(|(name, place)| add(&name, place));
            }
            Place::Process(id, pid) | Place::Descriptors(id, pid) => {
                let checkpoint = catalog.checkpoint(id)?;
                let listed = checkpoint.zip(process_in(catalog, id, *pid)?).map(|(checkpoint, process)| match place {
                    Place::Process(..) => processes::one(id, &process),
                    _ => processes::descriptors(&checkpoint, &process),
                });
                listed.into_iter().flatten().for_each(|(name, place)| add(&name, place));
            }
            Place::Readme
            | Place::Meta(_)
            | Place::Changed(..)
            | Place::CommandLine(..)
            | Place::Kept(..)
            | Place::Link(_) => {}
        }
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(found)
    }

    /// The attributes; `None` if it is gone. Their number is for the caller to say.
    pub(super) fn meta(&self, place: &Place) -> Result<Option<FileMeta>> {
        if let (meta, true) = self.meta_at_once(place) {
            return Ok(Some(meta));
        }
        let records = self.records.open()?;
        let catalog = records.catalog();
        if let Place::Kept(id, device, inode) = place {
            let checkpoint = catalog.checkpoint(id)?;
            let kept = checkpoint.as_ref().and_then(|checkpoint| checkpoint.kept(*device, *inode));
            return Ok(kept.map(|kept| self.kept_meta(&kept.attributes)));
        }
        let (time, size) = match place {
            Place::Branch(name, made) => {
                (catalog.branch(name)?.map(|branch| branch.time).filter(|time| time == made), 0)
            }
            // It has a length for whoever has opened it, and was computed for him.
            Place::Changed(_, id) => (catalog.checkpoint(id)?.map(|checkpoint| checkpoint.time), 0),
            Place::Checkpoint(id)
            | Place::Extras(id)
            | Place::Processes(id)
            | Place::Process(id, _)
            | Place::Descriptors(id, _) => (catalog.checkpoint(id)?.map(|checkpoint| checkpoint.time), 0),
            Place::CommandLine(id, pid) => match catalog.checkpoint(id)? {
                Some(checkpoint) => {
                    let process = process_in(catalog, id, *pid)?;
                    let size = process.map_or(0, |process| processes::command_line(&process).len());
                    (Some(checkpoint.time), size as u64)
                }
                None => (None, 0),
            },
            Place::Meta(id) => match catalog.checkpoint(id)? {
                Some(checkpoint) => (Some(checkpoint.time), self.describe(catalog, &checkpoint)?.len() as u64),
                None => (None, 0),
            },
            _ => (None, 0),
        };
        Ok(time.map(timestamp).map(|time| {
            let (meta, _) = self.meta_at_once(place);
            FileMeta { size, atime: time, mtime: time, ctime: time, ..meta }
        }))
    }

    /// The attributes as far as they are known without the catalog, and whether these are all.
    pub(super) fn meta_at_once(&self, place: &Place) -> (FileMeta, bool) {
        let dir = self.dir_meta();
        match place {
            Place::Root | Place::Ids | Place::Snapshots | Place::Tags => (dir, true),
            // Branches are made and removed in it.
            Place::Branches => (FileMeta { mode: 0o755, ..dir }, true),
            Place::Checkpoint(_) | Place::Extras(_) | Place::Branch(..) => (dir, false),
            Place::Processes(_) | Place::Process(..) | Place::Descriptors(..) => (dir, false),
            Place::Readme => (FileMeta { kind: FileKind::File, mode: 0o444, size: README.len() as u64, ..dir }, true),
            Place::Meta(_) | Place::Changed(..) | Place::CommandLine(..) | Place::Kept(..) => {
                (FileMeta { kind: FileKind::File, mode: 0o444, ..dir }, false)
            }
            Place::Link(target) => {
                let size = target.as_os_str().as_bytes().len() as u64;
                (FileMeta { kind: FileKind::Symlink, mode: 0o777, size, ..dir }, true)
            }
        }
    }

    /// The attributes of a directory of the upper part.
    pub(super) fn dir_meta(&self) -> FileMeta {
        let (uid, gid) = self.owner;
        let time = self.since;
        FileMeta {
            kind: FileKind::Dir,
            ino: 0,
            nlink: 1,
            mode: 0o555,
            uid,
            gid,
            rdev: 0,
            size: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: None,
        }
    }

    /// Whoever could open the file can read it here: set-id bits say nothing of a file that is only read.
    fn kept_meta(&self, was: &Attributes) -> FileMeta {
        let time = |(seconds, nanoseconds)| Timestamp { seconds, nanoseconds };
        let (atime, mtime) = (time(was.accessed), time(was.modified));
        let (mode, uid, gid, size) = (was.mode & 0o777, was.uid, was.gid, was.size);
        FileMeta { kind: FileKind::File, mode, uid, gid, size, atime, mtime, ctime: mtime, ..self.dir_meta() }
    }

    /// Opens the content of a file that had no name; `None` if none is kept.
    pub(super) fn kept(&self, place: &Place) -> Result<Option<File>> {
        let Place::Kept(id, device, inode) = place else { return Ok(None) };
        let records = self.records.open()?;
        let Some(checkpoint) = records.catalog().checkpoint(id)? else { return Ok(None) };
        let Some(kept) = checkpoint.kept(*device, *inode) else { return Ok(None) };
        records.open_kept(&checkpoint, kept)
    }

    /// The content of a file of the upper part.
    pub(super) fn text(&self, place: &Place) -> Result<Option<Vec<u8>>> {
        match place {
            Place::Changed(old, new) => Ok(self.changed(old, new)?.map(String::into_bytes)),
            Place::Readme => Ok(Some(README.into())),
            Place::CommandLine(id, pid) => {
                let process = process_in(self.records.open()?.catalog(), id, *pid)?;
                Ok(process.map(|process| processes::command_line(&process)))
            }
            Place::Meta(id) => {
                let records = self.records.open()?;
                let checkpoint = records.catalog().checkpoint(id)?;
                let describe = |checkpoint| Ok(self.describe(records.catalog(), &checkpoint)?.into_bytes());
                checkpoint.map(describe).transpose()
            }
            _ => Ok(None),
        }
    }

    /// What `fsnap diff` prints, found out at the first look.
    fn changed(&self, old: &CheckpointId, new: &CheckpointId) -> Result<Option<String>> {
        let known = || self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = known().get(&(*old, *new)) {
            return Ok(Some(text.clone()));
        }
        let records = self.records.open()?;
        let catalog = records.catalog();
        let (Some(old), Some(new)) = (catalog.checkpoint(old)?, catalog.checkpoint(new)?) else { return Ok(None) };
        let mut text = String::new();
        records.diff(&old, Side::Checkpoint(&new), &mut |change| {
            text.push_str(&format!("{} {}\n", change.kind.letter(), change.shown()));
        })?;
        let mut known = known();
        if known.len() >= MOST_CHANGED {
            known.clear();
        }
        known.insert((old.id, new.id), text.clone());
        Ok(Some(text))
    }

    fn describe(&self, catalog: &Catalog, checkpoint: &Checkpoint) -> Result<String> {
        Ok((self.records.describe)(checkpoint, &catalog.tags_of(&checkpoint.id)?))
    }

    fn latest(&self, ids: &str) -> Result<Option<Place>> {
        let latest = self.records.open()?.catalog().latest()?;
        Ok(latest.map(|latest| Place::Link(PathBuf::from(format!("{ids}/{}", latest.id)))))
    }

    fn snapshots(&self) -> Result<Vec<(String, CheckpointId)>> {
        Ok(names(&self.records.open()?.catalog().times()?))
    }
}

fn process_in(catalog: &Catalog, id: &CheckpointId, pid: i32) -> Result<Option<ProcessRecord>> {
    Ok(catalog.tree(id)?.and_then(|tree| tree.process(pid).cloned()))
}

fn link_up(id: &CheckpointId) -> Place {
    Place::Link(PathBuf::from(format!("../ids/{id}")))
}

/// The names of checkpoints by their times: RFC 3339, to the second; what was taken in the same second as an earlier one has a number
/// behind it.
fn names(times: &[(CheckpointId, jiff::Timestamp)]) -> Vec<(String, CheckpointId)> {
    let mut seen: HashMap<String, u32> = HashMap::new();
    let name = |(id, time): &(CheckpointId, jiff::Timestamp)| {
        let name = time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let count = seen.entry(name.clone()).or_default();
        *count += 1;
        (if *count == 1 { name } else { format!("{name}-{}", *count - 1) }, *id)
    };
    times.iter().map(name).collect()
}

fn timestamp(time: jiff::Timestamp) -> Timestamp {
    const BILLION: i128 = 1_000_000_000;
    let nanoseconds = time.as_nanosecond();
    // A moment that jiff can say is a number of seconds that fits by far.
    let seconds = i64::try_from(nanoseconds.div_euclid(BILLION)).unwrap_or_default();
    Timestamp { seconds, nanoseconds: u32::try_from(nanoseconds.rem_euclid(BILLION)).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_names_and_no_two_are_the_same() {
        let (a, b, c) = (random(), random(), random());
        let time = |text: &str| text.parse().unwrap();
        let taken = [
            (a, time("2026-03-01T12:00:00.2Z")),
            (b, time("2026-03-01T12:00:00.7Z")),
            (c, time("1969-12-31T23:59:59.5Z")),
        ];
        let expected = [("2026-03-01T12:00:00Z", a), ("2026-03-01T12:00:00Z-1", b), ("1969-12-31T23:59:59Z", c)];
        assert_eq!(names(&taken), expected.map(|(name, id)| (name.to_owned(), id)));
        assert_eq!(timestamp(time("1969-12-31T23:59:59.5Z")), Timestamp { seconds: -1, nanoseconds: 500_000_000 });
    }

    fn random() -> CheckpointId {
        CheckpointId::random().unwrap()
    }
}
