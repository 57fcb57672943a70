//! Taking a snapshot: what `prime` does ahead, and what `snapshot` does while the writers stand still.
//!
//! Both are one walk over the volume that compares it with an earlier record: `prime` with the newest settled snapshot
//! of the volume, `snapshot` with what `prime` left. Both write to one batch. Nothing here waits for the disk; `settle`
//! does.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use fsnap_backend::{Error, Identity, IoContext, Locator, Result, Snapshot, Timestamp, Volume};
use rustix::time::ClockId;

use crate::format::{self, Writer};
use crate::lock::Lock;
use crate::maker::{Maker, Making};
use crate::manifest::{Manifest, Partial, Primed, Unsettled};
use crate::pack::Pack;
use crate::record::{BatchId, RecordRef};
use crate::store::{Inner, is_snapshot, no_image, private_file, random, remove_file, write_file};
use crate::walk::{Walk, Walked};
use crate::{crew, volume};

/// Copies ahead what a snapshot at `at` will need.
pub(crate) fn prime(store: &Inner, volume: &Volume, at: &Locator) -> Result<()> {
    if let Begun::Partial(begun) = Begun::open(store, volume, at)? {
        begun.prime(store, volume, at)?;
    }
    Ok(())
}

/// Fixes the content of `volume` at `at`.
pub(crate) fn snapshot(store: &Inner, volume: &Volume, at: &Locator) -> Result<Snapshot> {
    match Begun::open(store, volume, at)? {
        Begun::Whole(manifest) => Ok(snapshot_of(at, &manifest)),
        Begun::Partial(begun) => begun.finish(store, volume, at),
    }
}

pub(crate) fn snapshot_of(at: &Locator, manifest: &Manifest) -> Snapshot {
    Snapshot { at: at.clone(), identity: manifest.identity(), omissions: manifest.omissions.clone() }
}

/// What is at a locator.
enum Begun {
    /// A snapshot that is whole: it never changes again.
    Whole(Manifest),
    /// A snapshot that was begun, now or earlier.
    Partial(Taking),
}

/// A snapshot that is being taken by this call, and by no other.
struct Taking {
    partial: Partial,
    /// The earlier record to compare with.
    before: Option<RecordRef>,
    _batch: Lock,
}

impl Begun {
    fn open(store: &Inner, volume: &Volume, at: &Locator) -> Result<Self> {
        if !is_snapshot(at) {
            return Err(no_image(at));
        }
        volume::check(volume)?;
        let of_this_volume = |found: &Identity| {
            if found == volume.identity() {
                return Ok(());
            }
            let what = format!("the volume of the snapshot {at}");
            Err(Error::WrongIdentity { what, expected: volume.identity().clone(), found: found.clone() })
        };
        loop {
            if let Some(manifest) = store.manifest(at)? {
                of_this_volume(&manifest.volume)?;
                return Ok(Self::Whole(manifest));
            }
            let Some(partial) = store.partial(at)? else { break };
            of_this_volume(&partial.volume)?;
            let _batch = store.lock_batch(partial.batch, at)?;
            // Another call may have ended between the two, and left a whole snapshot, or nothing.
            if store.partial(at)?.as_ref() != Some(&partial) {
                continue;
            }
            let before = match (&partial.primed, &partial.base) {
                (Some(primed), _) => Some(primed.root),
                (None, Some(base)) => store.manifest(base)?.map(|base| base.root),
                (None, None) => None,
            };
            return Ok(Self::Partial(Taking { partial, before, _batch }));
        }
        // The base is written down before the lock is released: no removal overlooks it.
        let lock = store.begin_lock()?;
        let batch = BatchId(random()?);
        let base = store.newest_of(volume.identity())?;
        let (base, before) = base.map(|(at, manifest)| ((at, manifest.family), manifest.root)).unzip();
        let (base, family) = base.map_or((None, batch), |(base, family)| (Some(base), family));
        let dir = store.batch_dir(batch);
        fs::DirBuilder::new().mode(0o700).create(&dir).context("make the directory", &dir)?;
        let partial = Partial { batch, family, volume: volume.identity().clone(), base, primed: None };
        let written = write_file(&store.partial_path(at), &format::seal(Partial::MAGIC, partial.encode()), false);
        written.map_err(|error| error.and_undo(fs::remove_dir(&dir).context("remove the directory", &dir)))?;
        let _batch = store.lock_batch(batch, at)?;
        drop(lock);
        Ok(Self::Partial(Taking { partial, before, _batch }))
    }
}

impl Taking {
    fn prime(self, store: &Inner, volume: &Volume, at: &Locator) -> Result<()> {
        let flushed = flush(volume)?;
        let Passed { walked, records, table } = self.pass(store, volume, false, flushed)?;
        let primed = Primed { root: walked.root, records, table: table.len() as u64, flushed };
        let partial = Partial { primed: Some(primed), ..self.partial };
        write_file(&store.partial_path(at), &format::seal(Partial::MAGIC, partial.encode()), false)
    }

    fn finish(self, store: &Inner, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        // Without an earlier `prime` its flush is done here: a record without one would trust no file's times.
        let flushed = self.partial.primed.as_ref().map_or_else(|| flush(volume), |primed| Ok(primed.flushed))?;
        let Passed { walked, table, .. } = self.pass(store, volume, true, flushed)?;
        let manifest = Manifest {
            batch: self.partial.batch,
            family: self.partial.family,
            volume: self.partial.volume,
            taken: now(),
            root: walked.root,
            omissions: walked.omissions,
            unsettled: Some(Unsettled { boot: boot_id().unwrap_or_default(), table: *blake3::hash(&table).as_bytes() }),
        };
        write_file(&store.manifest_path(at), &format::seal(Manifest::MAGIC, manifest.encode()), false)?;
        remove_file(&store.partial_path(at))?;
        Ok(snapshot_of(at, &manifest))
    }

    /// Walks once, adding to the batch after what `prime` left in it.
    fn pass(&self, store: &Inner, volume: &Volume, frozen: bool, flushed: Timestamp) -> Result<Passed> {
        let Partial { batch, ref primed, .. } = self.partial;
        let (records, table) = primed.as_ref().map_or((0, 0), |primed| (primed.records, primed.table));
        let pack = Pack::open(store, batch, records)?;
        let making = Making::new(store, batch, frozen)?;
        let walk = Walk::new(store, volume, &pack, frozen, flushed)?;
        let (walked, makers) = walk.run(self.before, crew::hands(|_| Maker::new(store, &making)))?;
        let mut made = Writer::default();
        makers.iter().flat_map(|maker| &maker.made).for_each(|one| one.encode(&mut made));
        let table = extend_table(&store.batch_dir(batch).join("table"), table, &made.0)?;
        Ok(Passed { walked, records: pack.flush()?, table })
    }
}

/// What one walk left in the batch.
struct Passed {
    walked: Walked,
    /// The length of the batch's records.
    records: u64,
    /// The batch's whole table.
    table: Vec<u8>,
}

/// Adds to the first `length` bytes of a table, and returns all of it.
fn extend_table(path: &Path, length: u64, more: &[u8]) -> Result<Vec<u8>> {
    let mut options = private_file();
    let mut file = options.read(true).write(true).create(true).truncate(false).open(path).context("open", path)?;
    file.set_len(length).context("shorten", path)?;
    let mut table = Vec::new();
    file.read_to_end(&mut table).context("read", path)?;
    file.write_all(more).context("write", path)?;
    table.extend_from_slice(more);
    Ok(table)
}

/// Writes back what the volume's file system has not written yet; returns the time just before.
fn flush(volume: &Volume) -> Result<Timestamp> {
    let before = now();
    rustix::fs::syncfs(volume).context("flush the file system of", volume.dir())?;
    Ok(before)
}

/// The clock that files are stamped with.
fn now() -> Timestamp {
    let now = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
    Timestamp { seconds: now.tv_sec, nanoseconds: now.tv_nsec as u32 }
}

/// Names this start of the system; where it has no name, nothing equals it.
pub(crate) fn boot_id() -> Option<[u8; 16]> {
    let name = fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    blake3::hash(&name).as_bytes().first_chunk().copied()
}
