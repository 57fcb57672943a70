//! Records: which snapshot of which NILFS2 stands behind a locator.
//!
//! A record is a symbolic link that leads nowhere. Its name is the locator, and its text is
//! `UUID NUMBER CREATED made|found`: the file system, the checkpoint's number, its time, and whether fsnap made the
//! snapshot or found one that somebody else had made. It comes to be in one system call, whole, before the snapshot
//! does; so that whatever cuts a call short, a snapshot of fsnap's always has a record, and a record without its
//! snapshot is a *partial* image. A link is metadata: one fsync of its directory makes it durable, which `settle` does
//! when the processes run again.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fsnap_backend::{Error, Identity, IoContext, Locator, Result, Snapshot, beneath};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::KIND;
use crate::file_system::Uuid;
use crate::store::Store;
use crate::sys::{Checkpoint, Number};

/// What a locator of fsnap's begins with; 16 hexadecimal digits follow.
const PREFIX: &str = "s-";

/// What the locator of another's snapshot begins with; the UUID and the number follow.
const FOREIGN: &str = "cp";

/// Whether fsnap could have made the locator.
pub(crate) fn owns(at: &Locator) -> bool {
    let digits = at.as_str().strip_prefix(PREFIX);
    digits.is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// The locator of that number.
pub(crate) fn own(random: u64) -> Result<Locator> {
    let text = format!("{PREFIX}{random:016x}");
    Locator::try_from(text).map_err(|error| Error::NotFound { what: error.to_string() })
}

/// The locator under which a snapshot that fsnap did not make is shown.
pub(crate) fn foreign(uuid: Uuid, number: Number) -> Option<Locator> {
    format!("{FOREIGN}:{uuid}:{number}").parse().ok()
}

/// What stands behind a locator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) uuid: Uuid,
    pub(crate) number: Number,
    /// The checkpoint's time: a copy of the file system that went its own way has other ones.
    pub(crate) created: u64,
    /// The snapshot is somebody else's: it stays one when the record goes.
    pub(crate) found: bool,
}

impl Record {
    fn text(&self) -> String {
        let whose = if self.found { "found" } else { "made" };
        format!("{} {} {} {whose}", self.uuid, self.number, self.created)
    }

    fn parse(text: &OsStr) -> Option<Self> {
        let mut words = text.to_str()?.split(' ');
        let uuid = Uuid::parse(words.next()?)?;
        let (number, created) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let found = match words.next()? {
            "found" => true,
            "made" => false,
            _ => return None,
        };
        words.next().is_none().then_some(Self { uuid, number, created, found })
    }

    /// Whether the checkpoint is the recorded one, and a snapshot.
    pub(crate) fn is_whole(&self, found: &Checkpoint) -> bool {
        found.is_snapshot && (found.number, found.created) == (self.number, self.created)
    }

    /// What the caller is to know of it.
    pub(crate) fn snapshot(&self, at: &Locator) -> Snapshot {
        let identity = Identity::new(format!("{KIND}:{}/{}-{}", self.uuid, self.number, self.created));
        Snapshot { at: at.clone(), identity, omissions: Vec::new() }
    }
}

impl Store {
    /// How messages name a locator.
    pub(crate) fn shown(&self, at: &Locator) -> String {
        format!("the snapshot {at} in {}", self.place.display())
    }

    /// Reads a record, if there is one.
    pub(crate) fn record(&self, at: &Locator) -> Result<Option<Record>> {
        if !owns(at) {
            return Ok(None);
        }
        match beneath::read_link(&self.snapshots, OsStr::new(at.as_str())) {
            Ok(text) => Record::parse(&text).map(Some).ok_or_else(|| Error::Damaged {
                what: self.shown(at),
                reason: "its record is none that fsnap writes".to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("read the record of", self.shown(at)),
        }
    }

    /// Every record that can be read.
    pub(crate) fn records(&self) -> Result<Vec<(Locator, Record)>> {
        let mut records = Vec::new();
        for name in beneath::names(&self.snapshots).context("list", &self.place)? {
            let at = name.to_str().and_then(|name| name.parse().ok()).filter(owns);
            // It may be gone since the directory was read.
            if let Some((at, record)) = at.map(|at| self.record(&at).map(|record| (at, record))).transpose()?
                && let Some(record) = record
            {
                records.push((at, record));
            }
        }
        Ok(records)
    }

    /// Writes a record; not durable until [`Store::sync_records`].
    pub(crate) fn write_record(&self, at: &Locator, record: &Record) -> Result<()> {
        match rustix::fs::symlinkat(record.text(), &self.snapshots, at.as_str()) {
            Err(Errno::EXIST) => Err(Error::Exists { what: self.shown(at) }),
            written => written.context("write the record of", self.shown(at)),
        }
    }

    /// Removes a record, if it is there.
    pub(crate) fn remove_record(&self, at: &Locator) -> Result<()> {
        match rustix::fs::unlinkat(&self.snapshots, at.as_str(), AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            removed => removed.context("remove the record of", self.shown(at)),
        }
    }

    /// Makes records durable, and what was removed of them.
    pub(crate) fn sync_records(&self) -> Result<()> {
        match rustix::fs::fsync(&self.snapshots) {
            // A store that cannot be written has nothing to make durable.
            Err(Errno::ROFS) => Ok(()),
            synced => synced.context("make durable the records in", &self.place),
        }
    }

    /// Locks a file system against other calls for this store; waits for them.
    pub(crate) fn lock(&self, uuid: Uuid) -> Result<Lock<'_>> {
        let idle = self.lock_files.idle().remove(&uuid);
        let file = idle.map_or_else(|| self.open_lock(uuid), Ok)?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                locked => {
                    locked.context("lock the file system", uuid.to_string())?;
                    return Ok(Lock { file: Some(file), uuid, files: &self.lock_files });
                }
            }
        }
    }

    /// Opens ahead what [`Store::lock`] locks.
    pub(crate) fn prepare_lock(&self, uuid: Uuid) -> Result<()> {
        if !self.lock_files.idle().contains_key(&uuid) {
            let file = self.open_lock(uuid)?;
            self.lock_files.idle().insert(uuid, file);
        }
        Ok(())
    }

    fn open_lock(&self, uuid: Uuid) -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = uuid.to_string();
        let opened = rustix::fs::openat(&self.file_systems, &name, flags, Mode::from_raw_mode(0o600));
        opened.context("open the lock of the file system", &name)
    }

    /// The file systems that have ever had a snapshot here.
    pub(crate) fn known_file_systems(&self) -> Result<Vec<Uuid>> {
        let names = beneath::names(&self.file_systems).context("list", &self.place)?;
        Ok(names.iter().filter_map(|name| Uuid::parse(name.to_str()?)).collect())
    }
}

/// The files of locks that nobody in this process has: open, for the time when writers stand.
#[derive(Debug, Default)]
pub(crate) struct LockFiles(Mutex<BTreeMap<Uuid, OwnedFd>>);

impl LockFiles {
    fn idle(&self) -> MutexGuard<'_, BTreeMap<Uuid, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file system's lock, given up when dropped.
///
/// By unlocking, and not just by closing: a child that is being started has a copy of every descriptor. Two locks never share a
/// file, for they would share the lock.
#[derive(Debug)]
pub(crate) struct Lock<'a> {
    /// Always there, until it is dropped.
    file: Option<OwnedFd>,
    uuid: Uuid,
    files: &'a LockFiles,
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        if rustix::fs::flock(file.as_fd(), FlockOperation::Unlock).is_ok() {
            self.files.idle().insert(self.uuid, file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_reserve_makes_is_a_locator_of_ours() {
        assert!(owns(&own(7).unwrap()));
        let uuid = Uuid::parse("00112233445566778899aabbccddeeff").unwrap();
        assert!(!owns(&foreign(uuid, u64::MAX).unwrap()));
        for other in ["s-0123456789ABCDEF", "s-0123456789abcde", "s-0123456789abcdef0", "s-", "snapshots"] {
            assert!(!owns(&other.parse().unwrap()), "{other:?} was taken");
        }
    }

    #[test]
    fn a_record_is_read_back_and_garbage_is_not() {
        let uuid = Uuid::parse("00112233445566778899aabbccddeeff").unwrap();
        for found in [false, true] {
            let record = Record { uuid, number: 42, created: u64::MAX, found };
            assert_eq!(Record::parse(OsStr::new(&record.text())), Some(record));
            assert_eq!(Record::parse(OsStr::new(&format!("{} ", record.text()))), None);
        }
        for bad in
            ["", "x 1 2 made", "00112233445566778899aabbccddeeff 1 2", "00112233445566778899aabbccddeeff -1 2 made"]
        {
            assert_eq!(Record::parse(OsStr::new(bad)), None, "{bad:?} was taken");
        }
    }
}
