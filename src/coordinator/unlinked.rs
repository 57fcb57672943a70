//! Files without names: kept while their processes are frozen, with as much as possible done ahead; and found again for a restore.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use fsnap_backend::{Backend, Identity};

use super::search::{aimed_at, planned};
use super::{Coordinator, Target, Window};
use crate::catalog::{PendingCheckpoint, RoomRef};
use crate::checkpoint::{Checkpoint, CheckpointId};
use crate::engine::{self, Images};
use crate::error::IoContext;
use crate::processes::{self, AuditRules, Observation, Policy, Tree, Unlinked};
use crate::unlinked::{Attributes, KeptFile, Room};
use crate::{Error, Result, failpoint};

/// Of files outside the volumes, which an engine saves itself, more than this is not read while processes are frozen.
const MOST_OUTSIDE: u64 = 64 << 20;

/// The rooms of the state directory, in the place of a store's.
const OF_STATE: &str = "unlinked";

impl Coordinator {
    /// What the engine is told to leave out of its images, as it calls it: the files of these volumes that have no name any more.
    pub fn external_files(&self, tree: &Tree, targets: &[Target]) -> Result<Vec<String>> {
        let seen = look(tree, aimed_at(targets)?)?;
        let inside = seen.unlinked().iter().filter(|unlinked| unlinked.place.volume.is_some());
        let mut keys: Vec<_> =
            inside.filter(|unlinked| !seen.has_namesake(unlinked)).filter_map(external_key).collect();
        keys.sort();
        Ok(keys)
    }

    /// The room in which a store, or the state directory, keeps files of a checkpoint.
    pub(crate) fn room(&self, store: Option<&Identity>, checkpoint: &CheckpointId) -> Result<Option<Room>> {
        let store = store.map(|store| self.store(store)).transpose()?;
        Ok(room_in(store.as_deref(), self.catalog.state(), checkpoint))
    }

    pub(super) fn remove_room(&self, room: &RoomRef) -> Result<()> {
        match self.room(room.store.as_ref(), &room.checkpoint)? {
            Some(room) => room.remove().context("remove", room.path()),
            None => Ok(()),
        }
    }

    /// Copies ahead what has no name, while the processes run. What fails here fails again when it matters, and is told then.
    pub(super) fn prime_unlinked(&self, pending: &PendingCheckpoint, tree: &Tree) -> Result<()> {
        let Ok(seen) = planned(pending).and_then(|volumes| look(tree, volumes)) else { return Ok(()) };
        let stores = pending.members.iter().map(|member| self.store(&member.store)).collect::<Result<Vec<_>>>()?;
        let stores: Vec<&dyn Backend> = stores.iter().map(AsRef::as_ref).collect();
        let keeper = Keeper { pending, stores: &stores, state: self.catalog.state() };
        for unlinked in seen.unlinked().iter().filter(|unlinked| unlinked.can_be_opened()) {
            let Ok(file) = open(&seen, unlinked) else { continue };
            let _ = file.sync_data();
            let (_, room) = keeper.room_for(unlinked);
            let _ = room.keep(&file, &crate::unlinked::name_of(unlinked.device, unlinked.inode));
            failpoint::hit("begin:unlinked");
        }
        Ok(())
    }

    /// Makes what was kept durable, and removes what was copied ahead in vain.
    pub(super) fn settle_kept(&self, pending: &PendingCheckpoint, kept: &[KeptFile]) -> Result<()> {
        for RoomRef { store, checkpoint } in pending.rooms() {
            let Some(room) = self.room(store.as_ref(), &checkpoint)? else { continue };
            let mine = kept.iter().filter(|kept| kept.store == store && kept.lost.is_none());
            let names: Vec<_> = mine.map(KeptFile::name).collect();
            match room.settle(&names) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let what = format!("a file without a name that was kept in {}", room.path().display());
                    return Err(Error::Backend(fsnap_backend::Error::NotFound { what }));
                }
                settled => settled.context("make durable", room.path())?,
            }
            failpoint::hit("seal:unlinked");
        }
        Ok(())
    }

    /// Opens the content that is kept of a file; `None` if none is.
    pub fn open_kept(&self, checkpoint: &Checkpoint, kept: &KeptFile) -> Result<Option<File>> {
        if kept.lost.is_some() {
            return Ok(None);
        }
        let Some(room) = self.room(kept.store.as_ref(), &checkpoint.id)? else { return Ok(None) };
        room.open(&kept.name()).context("open", room.path().join(kept.name())).map(Some)
    }

    /// Reads what is kept of a file to its end, and makes sure that none of it is missing.
    pub(super) fn read_kept(&self, checkpoint: &Checkpoint, kept: &KeptFile) -> Result<()> {
        let Some(file) = self.open_kept(checkpoint, kept)? else { return Ok(()) };
        let found = crate::unlinked::read_through(&file).context("read", kept.name())?;
        if found == kept.attributes.size {
            return Ok(());
        }
        let reason = format!("it has {found} bytes, and had {}", kept.attributes.size);
        Err(Error::NotKept { path: kept.place.path.clone(), reason })
    }
}

impl Window {
    /// Keeps the contents of files that have no name any more, while their processes are frozen; `seen` is a look at these, and `images` where
    /// their engine has saved them.
    ///
    /// Fails if the engine relies on what cannot be kept; what it has saved itself is only told.
    pub fn keep(&mut self, seen: Option<&Observation>, images: Option<&Images>) -> Result<()> {
        let Some(taken) = &mut self.begun.taken else { return Ok(()) };
        taken.kept = keep(&self.begun.pending, &self.stores, self.begun.lock.state(), seen, images)?;
        Ok(())
    }

    pub(super) fn remove_rooms(&self) -> Result<()> {
        for RoomRef { store, checkpoint } in self.begun.pending.rooms() {
            // Every member's store is open here.
            let open = |store: &Identity| self.stores.iter().find(|open| open.store().identity == *store);
            let open = store.as_ref().and_then(open).map(AsRef::as_ref);
            if open.is_none() && store.is_some() {
                continue;
            }
            if let Some(room) = room_in(open, self.begun.lock.state(), &checkpoint) {
                room.remove().context("remove", room.path())?;
            }
        }
        Ok(())
    }
}

fn keep(
    pending: &PendingCheckpoint,
    stores: &[Arc<dyn Backend>],
    state: &Path,
    seen: Option<&Observation>,
    images: Option<&Images>,
) -> Result<Vec<KeptFile>> {
    let unlinked = seen.map(Observation::unlinked).unwrap_or_default();
    if unlinked.is_empty() && !pending.external {
        return Ok(Vec::new());
    }
    let engine = pending.engine.as_ref().map_or("", |engine| &engine.name);
    let mut external = match images {
        Some(images) => engine::external_files(engine, images)?,
        None => BTreeSet::new(),
    };
    let stores: Vec<&dyn Backend> = stores.iter().map(AsRef::as_ref).collect();
    let keeper = Keeper { pending, stores: &stores, state };
    let mut all = Vec::with_capacity(unlinked.len());
    for (seen, unlinked) in unlinked.iter().filter_map(|unlinked| Some((seen?, unlinked))) {
        let mut kept = keeper.keep(seen, unlinked);
        kept.external = external_key(unlinked).filter(|key| external.remove(key));
        if kept.external.is_some() {
            let path = || unlinked.place.path.clone();
            if seen.has_namesake(unlinked) {
                let reason =
                    "on its mount is another file with its number, and the engine would take one for the other";
                return Err(Error::NotKept { path: path(), reason: reason.into() });
            }
            if let Some(reason) = kept.lost {
                return Err(Error::NotKept { path: path(), reason });
            }
        }
        if let (Some(reason), Some(_), Policy::Refuse) = (&kept.lost, &kept.place.volume, pending.audit.policy) {
            let what = format!("{}, which has no name any more and cannot be kept: {reason}", kept.place.path);
            return Err(Error::Outside { what });
        }
        all.push(kept);
        failpoint::hit("take:unlinked");
    }
    match external.pop_first() {
        Some(key) => Err(Error::LeftOut { key }),
        None => Ok(all),
    }
}

/// The room of a checkpoint in a store, or in the state directory; `None` if the store lies in no directory.
fn room_in(store: Option<&dyn Backend>, state: &Path, checkpoint: &CheckpointId) -> Option<Room> {
    match store {
        Some(store) => Some(Room::of(&store.beside()?, checkpoint)),
        None => Some(room_of_state(state, checkpoint)),
    }
}

fn room_of_state(state: &Path, checkpoint: &CheckpointId) -> Room {
    Room::of(&state.join(OF_STATE), checkpoint)
}

/// Where files are kept for a checkpoint.
struct Keeper<'a> {
    pending: &'a PendingCheckpoint,
    /// One for each member.
    stores: &'a [&'a dyn Backend],
    state: &'a Path,
}

impl Keeper<'_> {
    /// With the snapshots of its volume, if there is room, and else in the state directory.
    fn room_for(&self, unlinked: &Unlinked) -> (Option<Identity>, Room) {
        let (state, checkpoint) = (self.state, &self.pending.id);
        let volume = unlinked.place.volume.as_ref();
        let member = self.pending.members.iter().position(|member| Some(&member.volume) == volume.map(|v| &v.name));
        let store = member.map(|index| self.stores[index]);
        match store.and_then(|store| Some((store, room_in(Some(store), state, checkpoint)?))) {
            Some((store, room)) => (Some(store.store().identity.clone()), room),
            None => (None, room_of_state(state, checkpoint)),
        }
    }

    fn keep(&self, seen: &Observation, unlinked: &Unlinked) -> KeptFile {
        let Unlinked { place, device, inode, .. } = unlinked;
        let (store, room) = self.room_for(unlinked);
        let mut kept = KeptFile {
            place: place.clone(),
            device: *device,
            inode: *inode,
            store,
            attributes: Attributes::default(),
            external: None,
            lost: None,
        };
        if !unlinked.can_be_opened() {
            kept.lost = Some("its file system belongs to a server, which is not asked while processes stand".into());
            return kept;
        }
        let done = open(seen, unlinked).and_then(|file| {
            room.keep(&file, &kept.name())?;
            Attributes::of(&file)
        });
        match done {
            Ok(attributes) => kept.attributes = attributes,
            Err(error) => kept.lost = Some(error.to_string()),
        }
        kept
    }
}

/// Opens a file whose content is to be kept.
fn open(seen: &Observation, unlinked: &Unlinked) -> io::Result<File> {
    let file = seen.open(unlinked)?;
    let allocated = rustix::fs::fstat(&file)?.st_blocks.cast_unsigned() * 512;
    if unlinked.place.volume.is_none() && allocated > MOST_OUTSIDE {
        let reason = format!("it was in no volume, and has {} MiB", allocated >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
    }
    Ok(file)
}

fn external_key(unlinked: &Unlinked) -> Option<String> {
    Some(engine::external_key(unlinked.mount?, unlinked.inode))
}

/// Looks at a tree for what it has in use, and for nothing else.
fn look(tree: &Tree, volumes: Vec<(crate::name::Name, processes::Candidate)>) -> Result<Observation> {
    let rules = AuditRules { policy: Policy::Ignore, ..AuditRules::default() };
    Ok(processes::observe(tree, volumes, &rules)?)
}
