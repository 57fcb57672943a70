//! A volume is a mounted NILFS2 file system.
//!
//! # What is captured
//!
//! NILFS2 writes everything to a log, and makes a *checkpoint* of its own every few seconds, and whenever somebody
//! syncs: a consistent state with a number. Its cleaner takes old checkpoints to make room; a checkpoint that is marked
//! as a NILFS2 *snapshot* it leaves alone. So a snapshot of fsnap's is made in three steps: write out what is dirty,
//! which yields the number; write a record of it into the store; mark it. `prime` writes out most of what is dirty
//! ahead, while the writers still run.
//!
//! **The number is not the locator.** NILFS2 gives the number when the content is fixed, and the caller records the
//! locator before. The locator is therefore a name of the store's own, and the record behind it says which number it
//! stands for. The record comes before the mark: a mark of fsnap's always has a record, whatever cuts the call short.
//!
//! **Snapshots of others** (`mkcp -s`, `chcp ss`) are listed as foreign, and keep their mark whatever fsnap does.
//!
//! **The history** is every checkpoint that the cleaner has left. `pin` makes a snapshot of one that nobody asked for. A
//! checkpoint may be pinned several times, each time under another locator: the records count, and the mark goes with the
//! last of them.
//!
//! # Code map
//!
//! * `store`: finding, making and opening a store, and its layout on disk; `record`: which checkpoint stands behind a locator.
//! * `file_system`: a NILFS2, told from others and reached mounted or not.
//! * `sys`: the ioctls.
//!
//! # Limits
//!
//! * NILFS2 keeps neither extended attributes nor ACLs, and has no writable snapshots: there is nothing to clone by.
//! * Only root (`CAP_SYS_ADMIN`) can use this backend: the kernel lets nobody else change checkpoints or mount.
//! * The volume is the whole file system; other file systems that are mounted in it are not part of it.
//! * The record becomes durable in `settle`, and the mark by itself, seconds later. After a power cut before `settle`, a
//!   mark may be there whose record is lost. It is listed as foreign, and never removed by fsnap; `lscp -s` shows it,
//!   and `chcp cp` takes it away.
//! * NILFS2 does not tell holes from zeros to those who read: `verify` reads both.
//! * The kernel does not compare contents with checksums when it reads them: `verify` finds what cannot be read, and not
//!   what reads otherwise than it was written.

mod file_system;
mod record;
mod store;
mod sys;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use fsnap_backend::{
    Backend, Damage, Error, Image, ImageKind, ImageState, IoContext, Kept, Locator, Moment, MountSpec, Result,
    Snapshot, Source, StoreInfo, Volume, beneath,
};
use rustix::io::Errno;

use crate::file_system::{Access, FSTYPE, FileSystem, Uuid, open_volume, snapshot_options};
use crate::record::{Record, owns};
pub use crate::store::Store;
use crate::sys::{Checkpoint, Number};

/// The backend's name, as users write it.
const KIND: &str = "nilfs2";

/// How long a snapshot is given to become unmounted before it is said to be in use.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a checkpoint is made anew because the cleaner, or somebody else, has taken the one before.
const ATTEMPTS: usize = 8;

impl Backend for Store {
    fn store(&self) -> &StoreInfo {
        &self.info
    }

    fn adopt(&self, dir: &Path) -> Result<Volume> {
        let (root, uuid) = open_volume(dir)?;
        let own = beneath::look_fd(&self.root).context("examine", &self.place)?.device;
        if own == beneath::look_fd(&root).context("examine", dir)?.device {
            let reason = format!("the store {} lies in it: every snapshot would hold the store", self.place.display());
            return Err(Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason });
        }
        Ok(Volume::new(dir, uuid.identity(), root))
    }

    fn reserve(&self, source: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator> {
        if let Source::Snapshot(_) = source {
            return Err(no_clones());
        }
        loop {
            let at = record::own(store::random().context("ask for", "random bytes")?)?;
            if !known.contains(&at) && self.record(&at)?.is_none() {
                return Ok(at);
            }
        }
    }

    fn prime(&self, volume: &Volume, _: &Locator) -> Result<()> {
        Uuid::of(volume.identity()).map_or(Ok(()), |uuid| self.prepare_lock(uuid))?;
        sys::sync(volume).context("write out", volume.dir()).map(drop)
    }

    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        let uuid = check(volume)?;
        if !owns(at) {
            return Err(no_image(at));
        }
        let _lock = self.lock(uuid)?;
        for _ in 0..ATTEMPTS {
            let number = sys::sync(volume).context("write out", volume.dir())?;
            let found = sys::checkpoint(volume, number).context("ask for a checkpoint of", volume.dir())?;
            // Gone already, or marked by somebody else at this moment. Their mark is a change: the next number is ours.
            let Some(Checkpoint { created, is_snapshot: false, .. }) = found else { continue };
            let record = Record { uuid, number, created, found: false };
            match self.mark(volume, at, &record) {
                Ok(true) => return Ok(record.snapshot(at)),
                Ok(false) => {}
                // An earlier call got so far: looked for only now, since hardly ever one did.
                Err(Error::Exists { what }) => match self.record(at)? {
                    Some(record) if record.uuid != uuid => return Err(Error::Exists { what }),
                    Some(record) if whole(volume, &record, volume.dir())? => return Ok(record.snapshot(at)),
                    // What it was to be is of another instant.
                    _ => self.remove_record(at)?,
                },
                Err(error) => return Err(error),
            }
        }
        Err(cleaned(volume))
    }

    fn settle(&self, at: &Locator) -> Result<Snapshot> {
        let record = self.record(at)?.ok_or_else(|| no_image(at))?;
        let file_system = FileSystem::reach(record.uuid, Access::Read)?;
        if !whole(&file_system, &record, &file_system.device)? {
            return Err(no_image(at));
        }
        // First the record: a mark without one would be nobody's.
        self.sync_records()?;
        match sys::sync(&file_system) {
            // Where nobody writes, there is nothing that is not written.
            Err(error) if is(&error, Errno::ROFS) => {}
            synced => drop(synced.context("write out", &file_system.device)?),
        }
        Ok(record.snapshot(at))
    }

    fn clone_snapshot(&self, _: &Snapshot, _: &Locator) -> Result<()> {
        Err(no_clones())
    }

    fn list(&self) -> Result<Vec<Image>> {
        let mut records: BTreeMap<Uuid, Vec<(Locator, Record)>> = BTreeMap::new();
        for (at, record) in self.records()? {
            records.entry(record.uuid).or_default().push((at, record));
        }
        let mut images = Vec::new();
        let image = |at, state| Image { at, kind: ImageKind::Snapshot, state };
        let known: BTreeSet<Uuid> = self.known_file_systems()?.into_iter().chain(records.keys().copied()).collect();
        for uuid in known {
            let ours = records.remove(&uuid).unwrap_or_default();
            let file_system = match FileSystem::reach(uuid, Access::Read) {
                // Nothing is known of it but that it was here once.
                Err(_) if ours.is_empty() => continue,
                reached => reached?,
            };
            let marked = sys::snapshots(&file_system).context("list the snapshots of", &file_system.device)?;
            let marked: BTreeMap<Number, Checkpoint> = marked.into_iter().map(|one| (one.number, one)).collect();
            let numbers: BTreeSet<Number> = ours.iter().map(|(_, record)| record.number).collect();
            let others = marked.keys().filter(|number| !numbers.contains(number));
            images.extend(
                others.filter_map(|&number| record::foreign(uuid, number)).map(|at| image(at, ImageState::Foreign)),
            );
            images.extend(ours.into_iter().map(|(at, record)| {
                let is_whole = marked.get(&record.number).is_some_and(|found| record.is_whole(found));
                image(at, if is_whole { ImageState::Whole } else { ImageState::Partial })
            }));
        }
        Ok(images)
    }

    fn activate(&self, at: &Locator) -> Result<MountSpec> {
        let record = self.record(at)?.ok_or_else(|| no_image(at))?;
        let file_system = FileSystem::reach_for_reading(record.uuid)?;
        if !whole(&file_system, &record, &file_system.device)? {
            return Err(no_image(at));
        }
        Ok(MountSpec::Mount {
            fstype: FSTYPE.to_owned(),
            source: file_system.device.clone(),
            options: snapshot_options(record.number),
            read_only: true,
        })
    }

    fn deactivate(&self, _: &Locator) -> Result<()> {
        Ok(())
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>> {
        let record = self.record(&snapshot.at)?.ok_or_else(|| no_image(&snapshot.at))?;
        let found = record.snapshot(&snapshot.at).identity;
        if found != snapshot.identity {
            let (what, expected) = (self.shown(&snapshot.at), snapshot.identity.clone());
            return Err(Error::WrongIdentity { what, expected, found });
        }
        let file_system = FileSystem::reach_for_reading(record.uuid)?;
        if !whole(&file_system, &record, &file_system.device)? {
            return Err(no_image(&snapshot.at));
        }
        let root = file_system.open_snapshot(record.number)?;
        fsnap_backend::read_all(root, Path::new(snapshot.at.as_str()), &[])
    }

    fn history(&self, volume: &Volume) -> Result<Vec<Moment>> {
        let uuid = check(volume)?;
        let mut ours: BTreeMap<(Number, u64), (Vec<Locator>, bool)> = BTreeMap::new();
        for (at, record) in self.records()? {
            if record.uuid == uuid {
                let (snapshots, found) = ours.entry((record.number, record.created)).or_default();
                snapshots.push(at);
                *found |= record.found;
            }
        }
        let found = sys::checkpoints(volume).context("list the checkpoints of", volume.dir())?;
        let moment = |one: Checkpoint| Moment {
            number: one.number,
            seconds: one.created,
            same: one.is_minor,
            kept: match ours.remove(&(one.number, one.created)) {
                Some((snapshots, true)) if one.is_snapshot => Kept::ByBoth(snapshots),
                Some((snapshots, false)) if one.is_snapshot => Kept::ByStore(snapshots),
                _ if one.is_snapshot => Kept::ByOthers,
                _ => Kept::Not,
            },
        };
        Ok(found.into_iter().map(moment).collect())
    }

    fn pin(&self, volume: &Volume, number: u64, at: &Locator) -> Result<Snapshot> {
        let uuid = check(volume)?;
        if !owns(at) {
            return Err(no_image(at));
        }
        let _lock = self.lock(uuid)?;
        match self.record(at)? {
            None => {}
            Some(record) if (record.uuid, record.number) != (uuid, number) => {
                return Err(Error::Exists { what: self.shown(at) });
            }
            Some(record) => match whole(volume, &record, volume.dir())? {
                true => return Ok(record.snapshot(at)),
                false => self.remove_record(at)?,
            },
        }
        let found = sys::checkpoint(volume, number).context("ask for a checkpoint of", volume.dir())?;
        let found = found.ok_or_else(|| taken_back(volume, number))?;
        let mut record = Record { uuid, number, created: found.created, found: false };
        if found.is_snapshot {
            // A mark that fsnap made goes with the last record of it; anybody else's stays.
            let made = |other: &Record| Record { found: false, ..*other } == record && !other.found;
            record.found = !self.records()?.iter().any(|(_, other)| made(other));
            self.write_record(at, &record)?;
            return Ok(record.snapshot(at));
        }
        if self.mark(volume, at, &record)? { Ok(record.snapshot(at)) } else { Err(taken_back(volume, number)) }
    }

    fn delete(&self, at: &Locator) -> Result<()> {
        if !owns(at) {
            return Err(no_image(at));
        }
        let Some(record) = self.record(at)? else { return Ok(()) };
        let _lock = self.lock(record.uuid)?;
        if !record.found && !self.is_shared(at, &record)? {
            self.unmark(at, &record)?;
        }
        self.remove_record(at)?;
        self.sync_records()
    }
}

impl Store {
    /// Writes the record and marks the checkpoint; `false`, and nothing left, if the cleaner was faster.
    fn mark(&self, volume: &Volume, at: &Locator, record: &Record) -> Result<bool> {
        self.write_record(at, record)?;
        match sys::make_snapshot(volume, record.number) {
            Ok(()) => Ok(true),
            Err(error) if is(&error, Errno::NOENT) => self.remove_record(at).map(|()| false),
            failed => {
                let what = format!("checkpoint {} of {}", record.number, volume.dir().display());
                failed.context("make a snapshot of", what).map_err(|error| error.and_undo(self.remove_record(at)))?;
                Ok(true)
            }
        }
    }

    /// Takes the mark away, durably, so that the cleaner may have the checkpoint.
    fn unmark(&self, at: &Locator, record: &Record) -> Result<()> {
        let file_system = FileSystem::reach(record.uuid, Access::Read)?;
        if !whole(&file_system, record, &file_system.device)? {
            return Ok(());
        }
        drop(file_system);
        let file_system = FileSystem::reach(record.uuid, Access::Write)?;
        let what = || format!("checkpoint {} on {}", record.number, file_system.device.display());
        let mut unmarked = sys::make_checkpoint(&file_system, record.number);
        if unmarked.as_ref().is_err_and(|error| is(error, Errno::BUSY)) {
            // The newest checkpoint is always taken for busy. The mark has not been written yet, so there will be a newer.
            sys::sync(&file_system).context("write out", &file_system.device)?;
            // The kernel ends a mount some time after its last user closed it, and a child that is being started has a
            // copy of every descriptor; nothing tells when that is over.
            let begun = Instant::now();
            loop {
                unmarked = sys::make_checkpoint(&file_system, record.number);
                let busy = unmarked.as_ref().is_err_and(|error| is(error, Errno::BUSY));
                if !busy || begun.elapsed() > PATIENCE {
                    break;
                }
                std::thread::sleep(PATIENCE / 50);
            }
        }
        match unmarked {
            Err(error) if is(&error, Errno::BUSY) => {
                return Err(Error::Busy { what: self.shown(at), by: format!("{} is mounted", what()) });
            }
            Err(error) if is(&error, Errno::NOENT) => {}
            unmarked => unmarked.context("take the mark from", what())?,
        }
        sys::sync(&file_system).context("write out", &file_system.device).map(drop)
    }

    /// Whether another record stands for the same snapshot.
    fn is_shared(&self, at: &Locator, record: &Record) -> Result<bool> {
        let same = |other: &Record| (other.uuid, other.number) == (record.uuid, record.number);
        Ok(self.records()?.iter().any(|(other_at, other)| other_at != at && same(other)))
    }
}

/// Makes sure that a volume's path still leads to the file system that was adopted.
fn check(volume: &Volume) -> Result<Uuid> {
    // What the descriptor stands for stays mounted, and its device keeps its number: no device has to be looked at.
    if let Some(uuid) = Uuid::of(volume.identity())
        && beneath::leads_to(volume.dir(), volume).context("examine", volume.dir())?
    {
        return Ok(uuid);
    }
    let (expected, what) = (volume.identity(), format!("the directory {}", volume.dir().display()));
    let found = match open_volume(volume.dir()) {
        Ok((_, uuid)) if uuid.identity() == *expected => return Ok(uuid),
        Ok((_, uuid)) => uuid.identity(),
        Err(Error::NotAVolume { .. }) => fsnap_backend::Identity::new("no NILFS2 volume"),
        Err(error) => return Err(error),
    };
    Err(Error::WrongIdentity { what, expected: expected.clone(), found })
}

/// Whether the recorded snapshot is there.
fn whole(file: impl AsFd, record: &Record, shown: &Path) -> Result<bool> {
    let found = sys::checkpoint(file, record.number).context("ask for a checkpoint of", shown)?;
    Ok(found.is_some_and(|found| record.is_whole(&found)))
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn no_image(at: &Locator) -> Error {
    Error::NotFound { what: format!("a whole snapshot at {at}") }
}

fn cleaned(volume: &Volume) -> Error {
    let dir = volume.dir().display();
    Error::NotFound { what: format!("the newest checkpoint of {dir}, which its cleaner took {ATTEMPTS} times, by now") }
}

fn taken_back(volume: &Volume, number: Number) -> Error {
    let dir = volume.dir().display();
    Error::NotFound { what: format!("checkpoint {number} of {dir}, which its cleaner may have taken,") }
}

fn no_clones() -> Error {
    Error::Unsupported {
        kind: KIND,
        action: "make a writable clone",
        reason: "its snapshots can only be read".to_owned(),
    }
}
