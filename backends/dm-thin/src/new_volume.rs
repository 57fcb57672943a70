//! Making a volume in a pool: whole, or not at all.
//!
//! mkfs takes its time, and may fill the pool. So a volume is listed when it has its file system, and not before. Until then a note tells of
//! it, which is locked by whoever makes it: by the call, and by mkfs, which goes on when the call is killed. A note that nobody has locked
//! is what a killed call has left, and the next one undoes that.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use fsnap_backend::{Error, IoContext, Result, beneath};
use rustix::fs::AtFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::bring_up::{BLOCK, PoolVolume, SECTOR, check_name, run, start_volume, volumes};
use crate::pool::{Fill, Mode};
use crate::record::Lock;
use crate::store::{Store, VOLUMES, write_json};
use crate::superblock::FileSystem;

/// In the store: the volume that is being made.
const NOTE: &str = "new-volume";

#[derive(Debug, Serialize, Deserialize)]
struct NewVolume {
    name: String,
    volume: PoolVolume,
}

impl Store {
    /// Makes a volume of so many bytes with a file system on it, and returns the node of its device.
    ///
    /// Waits for another that is being made. Leaves nothing if it fails; with [`ErrorKind::NoSpace`](fsnap_backend::ErrorKind::NoSpace) if
    /// the pool has no room for what the empty file system writes.
    pub fn make_volume(&self, name: &str, bytes: u64, file_system: FileSystem) -> Result<PathBuf> {
        check_name(name)?;
        let shown = self.place.join(NOTE);
        let note = Lock::take_named(&self.root, NOTE).context("lock", &shown)?;
        self.undo_volume(&note)?;
        let made = self.make_noted(&note, name, bytes, file_system);
        let cleared = self.undo_volume(&note).and_then(|()| self.remove_new_volume());
        match made {
            Ok(node) => cleared.map(|()| node),
            Err(error) => Err(error.and_undo(cleared)),
        }
    }

    fn make_noted(&self, note: &Lock, name: &str, bytes: u64, file_system: FileSystem) -> Result<PathBuf> {
        let shown = || format!("the volume {name} of {}", self.pool);
        let dir = beneath::open_dir(&self.root, OsStr::new(VOLUMES)).context("open", self.place.join(VOLUMES))?;
        if volumes(&dir, &self.place)?.iter().any(|(other, _)| other == name) {
            return Err(Error::Exists { what: shown() });
        }
        self.pool.check_room(&self.mapper, &self.settings.limits, true)?;
        let volume = PoolVolume { id: self.free_id()?, length: bytes / SECTOR, file_system };
        let new = NewVolume { name: name.to_owned(), volume };
        self.write_new_volume(&note.file, &new).context("write", self.place.join(NOTE))?;
        let volume = new.volume;
        self.pool.create(&self.mapper, volume.id).context("make", shown())?;
        self.pool.check_commit(&self.mapper)?;
        let node = start_volume(&self.mapper, &self.pool, &self.settings.uuid, name, &volume)?;
        let before = self.fill()?.data;
        make_file_system(note, &node, file_system).map_err(|error| self.too_large(name, &volume, before, error))?;
        write_json(&dir, name, &volume).context("write the record of", shown())?;
        Ok(node)
    }

    /// What is told of an empty file system for which there was no room, of which mkfs says no more than that a write failed.
    ///
    /// `before` is what the pool had, in blocks: how many in use, and how many at all.
    fn too_large(&self, name: &str, volume: &PoolVolume, before: (u64, u64), error: Error) -> Error {
        let full = |fill: Fill| fill.mode == Mode::OutOfData || fill.data.0 == fill.data.1;
        if !self.fill().is_ok_and(full) {
            return error;
        }
        let mib = |bytes: u64| bytes >> 20;
        let (used, all) = (before.0 * BLOCK * SECTOR, before.1 * BLOCK * SECTOR);
        let object = format!(
            "for the volume {name}: an empty {} of {} MiB takes more than the {} MiB that are free of the {} MiB of {}",
            volume.file_system.name(),
            mib(volume.bytes()),
            mib(all - used),
            mib(all),
            self.pool,
        );
        Error::Io { action: "make a file system", object, source: Errno::NOSPC.into() }
    }

    /// Undoes what a killed call has left of a new volume, unless somebody is at work on it.
    ///
    /// What cannot be undone now, since the device is open or the pool takes no message, keeps nobody from the other things in the
    /// store: whoever makes the next volume is told of it.
    pub(crate) fn undo_volume_left_behind(&self) {
        if beneath::stat(&self.root, OsStr::new(NOTE)).is_ok()
            && let Ok(Some(note)) = Lock::try_take_named(&self.root, NOTE)
        {
            let _ = self.undo_volume(&note).and_then(|()| self.remove_new_volume());
        }
    }

    /// Removes the volume that the note tells of, if that was not completed.
    fn undo_volume(&self, note: &Lock) -> Result<()> {
        let mut text = String::new();
        let mut file = &note.file;
        file.rewind().and_then(|()| file.read_to_string(&mut text)).context("read", self.place.join(NOTE))?;
        // It is written before anything is made: one that is cut short tells of nothing.
        let Ok(NewVolume { name, volume }) = serde_json::from_str(&text) else { return Ok(()) };
        if self.volumes()?.iter().any(|(_, known)| known.id == volume.id) {
            return Ok(());
        }
        self.stop_volume(&name)?;
        self.pool.delete(&self.mapper, volume.id)
    }

    /// Durably, and in place: the lock is the file's.
    fn write_new_volume(&self, file: &File, new: &NewVolume) -> io::Result<()> {
        file.set_len(0)?;
        file.write_all_at(&serde_json::to_vec(new)?, 0)?;
        file.sync_all()?;
        Ok(rustix::fs::fsync(&self.root)?)
    }

    fn remove_new_volume(&self) -> Result<()> {
        rustix::fs::unlinkat(&self.root, NOTE, AtFlags::empty()).context("remove", self.place.join(NOTE))
    }
}

/// What mkfs.ext4 is told of a new thin device: every block of it reads as zeroes, and need not be written to do so. Else the journal of a
/// volume of 200 GiB would take 1 GiB of its pool at once, and the tables of inodes 3 GiB when it is mounted.
const PREZEROED: &str = "assume_storage_prezeroed";

/// The same of the journal alone, for mkfs.ext4 before 1.47.
const LAZY_JOURNAL: &str = "lazy_journal_init";

/// Runs mkfs, which has the note open, and with it the lock, for as long as it runs.
fn make_file_system(note: &Lock, node: &Path, file_system: FileSystem) -> Result<()> {
    let mkfs = |option: Option<&str>| {
        let mut command = Command::new(format!("mkfs.{}", file_system.name()));
        command.arg("-q").stdin(note.file.try_clone().context("duplicate the descriptor of", NOTE)?);
        if let Some(option) = option {
            command.args(["-E", &format!("{option}=1")]);
        }
        run(command.arg(node)).map(drop)
    };
    match file_system {
        FileSystem::Xfs | FileSystem::Btrfs => mkfs(None),
        // An option that it does not know it names, and has written nothing yet.
        FileSystem::Ext4 => mkfs(Some(PREZEROED))
            .or_else(|error| if error.to_string().contains(PREZEROED) { mkfs(Some(LAZY_JOURNAL)) } else { Err(error) }),
    }
}
