//! A volume is a mounted file system on a thin device of device-mapper.
//!
//! # What is captured
//!
//! A snapshot is a thin device that shares every block with the volume's. The volume's device is suspended while it is
//! made, which freezes the file system: every writer of the volume is stopped in the same instant, with all that it had
//! written, so that the snapshot is a point in time for all of them. `prime` writes out ahead what is dirty, while the
//! writers still run.
//!
//! **The device never stays suspended.** It is resumed when the call ends, however it ends; by a process that stands by if fsnap is
//! killed; and by the next command if that is killed too. As long as it is suspended, nothing of fsnap's touches the volume.
//!
//! **A pool that is short of room refuses** before anything is suspended, in `reserve`, `prime` and again in `snapshot`; the
//! store's [`Limits`] say how much must be free. After each change of the pool its status is looked at, since the kernel
//! answers that a message succeeded though its commit failed.
//!
//! **What could not be written is in no snapshot.** A file system that is frozen writes all that is dirty, and does not say if
//! that failed: contents that the device or the pool refused are dropped, the suspension succeeds, and the copy holds
//! what was there before. Only `syncfs(2)` tells, on a descriptor from before the failure, as the volume's is. So that is the
//! first step: all that the stopped processes wrote is written before anything is suspended, or there is no snapshot. What others
//! write between that and the suspension, and never synced, may be missing, as after a power cut.
//!
//! **Whole or not there.** The kernel makes a thin device in one step and commits the pool before it answers, and it is
//! only asked once the volume stands still. So an image is whole if its thin device exists; the record that says which
//! device that is was durable before.
//!
//! # Pools
//!
//! Any thin pool can be used, except those that LVM and Stratis manage: they keep records of their own of what is in a
//! pool, and are not changed behind their backs. fsnap takes numbers for its thin devices from the upper half of the 24 bits,
//! at random, and others count from 0; a number that turns out to be taken is an error that another `reserve` ends.
//!
//! # Code map
//!
//! * `store`: finding, making and opening a store, and its layout on disk; `record`: what it remembers of each image.
//! * `volume`: which mount is a volume; `superblock`: what its file system is, and how a copy of that is mounted.
//! * `suspend`: a device that stands still while a snapshot is made; `guard`: the process that resumes it when this one cannot.
//! * `images`: putting the thin devices of images to use, and removing them; `verify`: reading one; `delta`: where two can differ.
//! * `pool`: what is in a pool, and the messages that it takes; `survey`: which pools there are; `bring_up`: making one for those who have none;
//!   `new_volume`: making a volume in it; `grow`: enlarging it; `sign`: what its data and metadata are known by.
//! * `dm`: devices and tables of device-mapper; `sys`: what the crate for that lacks.
//! # Limits
//!
//! * Only root can use this backend.
//! * The volume must be the root of its file system, and ext4 or xfs. btrfs on a thin device is refused: suspending the device does
//!   not freeze it, the kernel confuses two of one UUID, and it takes snapshots of its own, which the btrfs backend uses.
//! * `list` shows thin devices that others made only while they are in use: the kernel does not tell of those that are not. It leaves out
//!   the volumes that were adopted.
//! * ext4 and xfs have no checksums of contents: `verify` finds what cannot be read, not what was changed.

mod bring_up;
mod delta;
mod dm;
mod grow;
mod guard;
mod images;
mod new_volume;
mod pool;
mod record;
mod sign;
mod store;
mod superblock;
mod survey;
mod suspend;
mod sys;
mod verify;
mod volume;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::Path;

use fsnap_backend::{
    Backend, Damage, Differences, Error, ErrorKind, Identity, Image, ImageKind, ImageState, IoContext, Locator,
    MountSpec, Result, Snapshot, Source, StoreInfo, Volume,
};
use rustix::io::Errno;

pub use crate::bring_up::{Backing, Plan, PoolVolume};
use crate::images::no_image;
pub use crate::pool::{Fill, Limits, Mode, Refusal};
use crate::record::{Form, Record, Stage, random_id};
pub use crate::store::{STORES, Store, resume_left_behind};
pub use crate::superblock::FileSystem;
pub use crate::survey::{PoolState, survey};
use crate::suspend::Suspended;
pub use crate::sys::resume_at_once;
use crate::volume::Live;

/// The backend's name, as users write it.
const KIND: &str = "dm-thin";

impl Backend for Store {
    fn store(&self) -> &StoreInfo {
        &self.info
    }

    fn adopt(&self, dir: &Path) -> Result<Volume> {
        let (root, live) = self.open_volume(dir)?;
        let identity = live.identity(&self.settings.uuid);
        self.known.keep(identity.clone(), live);
        Ok(Volume::new(dir, identity, root))
    }

    fn reserve(&self, source: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator> {
        self.pool.check_room(&self.mapper, &self.settings.limits, true)?;
        let kind = match source {
            Source::Volume(_) => ImageKind::Snapshot,
            Source::Snapshot(_) => ImageKind::Volume,
        };
        let recorded = self.records.list()?;
        let taken: BTreeSet<_> = recorded.keys().chain(known).filter_map(Form::of).map(|form| form.id).collect();
        loop {
            let id = random_id()?;
            if !taken.contains(&id) {
                return Form { kind, id }.locator();
            }
        }
    }

    fn prime(&self, volume: &Volume, at: &Locator) -> Result<()> {
        let live = self.check(volume)?;
        self.pool.check_room(&self.mapper, &self.settings.limits, true)?;
        self.begin(&live, volume.identity(), at)?;
        self.guards.prepare(&self.mapper, at).context("start", "the process that resumes if this one is killed")?;
        self.notes.prepare(&live.thin, at)?;
        rustix::fs::syncfs(volume).context("write out the file system of", volume.dir())
    }

    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        let live = self.check(volume)?;
        let begun = self.begin(&live, volume.identity(), at)?;
        if begun.stage == Stage::Whole {
            return Ok(self.record_of(at, &begun.record));
        }
        let form = self.form(at, ImageKind::Snapshot)?;
        let captured = self.pool.check_room(&self.mapper, &self.settings.limits, false).and_then(|()| {
            rustix::fs::syncfs(volume).context("write out all that the snapshot is to hold of", volume.dir())?;
            let suspended = Suspended::new(&self.mapper, &self.notes, &self.guards, &live.thin, at)?;
            let copied = self.pool.copy(&self.mapper, form.id, live.thin.id);
            let held = suspended.holds();
            // Before anything else, whatever came of it.
            suspended.resume()?;
            self.check_copy(at, copied, begun.fresh)?;
            self.pool.check_commit(&self.mapper)?;
            if !held? {
                let what = format!("the device {}", live.thin.device.name);
                return Err(Error::Busy { what, by: "somebody resumed it while the snapshot was taken".to_owned() });
            }
            Ok(())
        });
        // Only a name moves here, and nothing is synced: the device itself is what makes the image whole.
        let moved = captured.and_then(|()| self.records.advance(at, Stage::Begun, Stage::Whole, false));
        match moved {
            Ok(()) => Ok(self.record_of(at, &begun.record)),
            Err(error) => {
                let record = self.record_of(at, &begun.record);
                drop(begun);
                // What was there before this call stays.
                let ours = error.kind() != ErrorKind::Exists;
                let undone = if ours { self.remove(&record.at) } else { self.records.forget(at, Stage::Begun) };
                Err(error.and_undo(undone))
            }
        }
    }

    fn settle(&self, at: &Locator) -> Result<Snapshot> {
        self.form(at, ImageKind::Snapshot)?;
        let found = self.whole(at)?.ok_or_else(|| no_image(at))?;
        if found.stage == Stage::Begun {
            self.records.advance(at, Stage::Begun, Stage::Whole, false).or_else(|error| match error.kind() {
                // What is read-only is durable.
                ErrorKind::ReadOnly => Ok(()),
                _ => Err(error),
            })?;
        }
        self.records.sync(&[Stage::Whole, Stage::Begun])?;
        Ok(self.record_of(at, &found.record))
    }

    fn clone_snapshot(&self, snapshot: &Snapshot, at: &Locator) -> Result<()> {
        let form = self.form(at, ImageKind::Volume)?;
        let source = self.form(&snapshot.at, ImageKind::Snapshot)?;
        // Held until the end: nobody removes it meanwhile.
        let original = self.recorded(snapshot)?;
        let (length, uuid) = (original.record.length, original.record.uuid.clone());
        self.pool.check_room(&self.mapper, &self.settings.limits, true)?;
        let record = Record::new(length, original.record.file_system, uuid, snapshot.identity.clone())?;
        let begun = self.begin_with(at, record)?;
        if begun.stage == Stage::Whole {
            return Err(Error::Exists { what: self.shown(at) });
        }
        let copied = self.pool.copy(&self.mapper, form.id, source.id);
        let made = self
            .check_copy(at, copied, begun.fresh)
            .and_then(|()| self.pool.check_commit(&self.mapper))
            .and_then(|()| self.records.advance(at, Stage::Begun, Stage::Whole, true));
        made.map_err(|error| {
            drop(begun);
            let ours = error.kind() != ErrorKind::Exists;
            error.and_undo(if ours { self.remove(at) } else { self.records.forget(at, Stage::Begun) })
        })
    }

    fn list(&self) -> Result<Vec<Image>> {
        let mut images = Vec::new();
        let recorded = self.records.list()?;
        for (at, stage) in &recorded {
            let Some(form) = Form::of(at) else { continue };
            let state = match stage {
                Stage::Whole => ImageState::Whole,
                Stage::Leaving => ImageState::Partial,
                Stage::Begun if self.whole(at)?.is_some() => ImageState::Whole,
                Stage::Begun => ImageState::Partial,
            };
            images.push(Image { at: at.clone(), kind: form.kind, state });
        }
        let mut own: BTreeSet<_> = recorded.keys().filter_map(Form::of).map(|form| form.id).collect();
        own.insert(sign::ID);
        own.extend(self.volumes()?.into_iter().map(|(_, volume)| volume.id));
        // Others made these, and whoever adopts one knows what it is.
        own.extend(self.known.ids());
        images.extend(self.foreign(&own)?);
        Ok(images)
    }

    fn activate(&self, at: &Locator) -> Result<MountSpec> {
        let form = Form::of(at).ok_or_else(|| no_image(at))?;
        let found = self.records.find(at)?.filter(|found| found.stage != Stage::Leaving).ok_or_else(|| no_image(at))?;
        let source = self.start(at, form, &found.record)?;
        let read_only = form.kind == ImageKind::Snapshot;
        let file_system = found.record.file_system;
        let options = if read_only { file_system.snapshot_options() } else { file_system.clone_options() };
        Ok(MountSpec::Mount { fstype: file_system.name().into(), source, options: options.into(), read_only })
    }

    fn deactivate(&self, at: &Locator) -> Result<()> {
        Form::of(at).ok_or_else(|| no_image(at))?;
        let _lock = self.records.find(at)?;
        self.stop(at)
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>> {
        let form = self.form(&snapshot.at, ImageKind::Snapshot)?;
        let found = self.recorded(snapshot)?;
        let was_active = self.is_active(&snapshot.at)?;
        let device = self.start(&snapshot.at, form, &found.record)?;
        let damage = verify::read_all(&device, found.record.file_system);
        let stopped = if was_active { Ok(()) } else { self.stop(&snapshot.at) };
        damage.map_err(|error| error.and_undo(stopped))
    }

    fn differences(&self, old: &Snapshot, new: Source<'_>) -> Result<Option<Box<dyn Differences>>> {
        Ok(self.delta(old, new)?.map(|delta| Box::new(delta) as Box<dyn Differences>))
    }

    fn delete(&self, at: &Locator) -> Result<()> {
        Form::of(at).ok_or_else(|| no_image(at))?;
        self.remove(at)
    }
}

/// An image's record, held for the call that makes the image.
struct Begun {
    stage: Stage,
    record: Record,
    /// It was written by this very call, so that no earlier one can have made the device.
    fresh: bool,
    _held: record::Found,
}

impl Store {
    /// The image's form, if it is one of that kind.
    pub(crate) fn form(&self, at: &Locator, kind: ImageKind) -> Result<Form> {
        Form::of(at).filter(|form| form.kind == kind).ok_or_else(|| no_image(at))
    }

    fn record_of(&self, at: &Locator, record: &Record) -> Snapshot {
        let identity = Identity::new(format!("{KIND}:{}/{at}-{}", self.settings.uuid, record.token));
        Snapshot { at: at.clone(), identity, omissions: Vec::new() }
    }

    /// Opens a directory that is to be a volume of this store.
    fn open_volume(&self, dir: &Path) -> Result<(OwnedFd, Live)> {
        let refused = |reason: String| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason };
        let (root, live) = Live::open(&self.mapper, Some(&self.notes), dir)?;
        if live.pool.number != self.pool.number {
            return Err(refused(format!(
                "it lies in {}, and the store {} is for {}",
                live.pool,
                self.place.display(),
                self.pool
            )));
        }
        let device = |file| rustix::fs::fstat(file).map(|meta| meta.st_dev);
        if device(&root).context("look at", dir)? == device(&self.root).context("look at", &self.place)? {
            return Err(refused(format!(
                "the store {} lies in it, and could not be written while it is suspended",
                self.place.display()
            )));
        }
        Ok((root, live))
    }

    /// Checks that the volume's path still leads to the volume.
    pub(crate) fn check(&self, volume: &Volume) -> Result<Live> {
        let what = || format!("the directory {}", volume.dir().display());
        let replaced = |found| Error::WrongIdentity { what: what(), expected: volume.identity().clone(), found };
        if let Some(live) = self.known.still(&self.mapper, &self.notes, volume)? {
            return Ok(live);
        }
        match self.open_volume(volume.dir()) {
            Ok((_, live)) => match live.identity(&self.settings.uuid) {
                same if same == *volume.identity() => Ok(live),
                other => Err(replaced(other)),
            },
            Err(Error::NotAVolume { reason, .. }) => Err(replaced(Identity::new(reason))),
            Err(error) => Err(error),
        }
    }

    /// Finds the record of the snapshot that is to be made, or writes it.
    fn begin(&self, live: &Live, volume: &Identity, at: &Locator) -> Result<Begun> {
        self.form(at, ImageKind::Snapshot)?;
        self.begin_with(at, Record::new(live.thin.length, live.file_system, live.uuid.clone(), volume.clone())?)
    }

    /// Finds the record of the image that is to be made, or writes `record` as it.
    ///
    /// What is left of another image there goes first, unless it is whole.
    fn begin_with(&self, at: &Locator, record: Record) -> Result<Begun> {
        let same = |found: &Record| {
            (&found.origin, found.length, &found.uuid) == (&record.origin, record.length, &record.uuid)
        };
        let mut fresh = false;
        loop {
            match self.records.find(at)? {
                Some(held) if held.stage != Stage::Leaving && same(&held.record) => {
                    return Ok(Begun { stage: held.stage, record: held.record.clone(), fresh, _held: held });
                }
                Some(held) if held.stage == Stage::Whole => return Err(Error::Exists { what: self.shown(at) }),
                Some(held) => {
                    drop(held);
                    self.remove(at)?;
                }
                None => {
                    self.records.begin(at, &record)?;
                    fresh = true;
                    // A later call takes a device of that number for its own.
                    if self.whole(at)?.is_some() {
                        return Err(self.taken(at).and_undo(self.records.forget(at, Stage::Begun)));
                    }
                }
            }
        }
    }

    /// The number of the image is somebody else's.
    fn taken(&self, at: &Locator) -> Error {
        Error::Exists { what: format!("a thin device with the number of {}", self.shown(at)) }
    }

    /// Understands the answer to the message that makes the image's device.
    fn check_copy(&self, at: &Locator, copied: std::io::Result<()>, fresh: bool) -> Result<()> {
        match copied {
            // An earlier call, for this very record, got as far as that.
            Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {
                if fresh {
                    Err(self.taken(at))
                } else {
                    Ok(())
                }
            }
            Err(error) if error.raw_os_error() == Some(Errno::NODATA.raw_os_error()) => {
                Err(Error::NotFound { what: format!("what {} is to be made of", self.shown(at)) })
            }
            copied => copied.context("make", self.shown(at)),
        }
    }
}
