//! What a store remembers of each image, and in which stage the image is.
//!
//! One small file per image, named by its locator. The directory in which it lies is the stage:
//!
//! * `begun`: its thin device may be made at any moment. Whether it *is* there, only the pool knows: it makes one whole or
//!   not at all, so that an image whose device is there is whole.
//! * `images`: its thin device was made.
//! * `leaving`: it is being removed, and never becomes whole again.
//!
//! A record is durable before its thin device is made, and goes after that is gone: no device of fsnap's is forgotten.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use fsnap_backend::{Error, Identity, ImageKind, IoContext, Locator, Result, beneath};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::pool::ThinId;
use crate::superblock::FileSystem;

/// The version of a record.
const VERSION: u32 = 1;

/// No record is longer.
const LONGEST: u64 = 4096;

/// What is remembered of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    version: u32,
    /// Random: a locator may be used again, and is another image then.
    pub(crate) token: String,
    /// The length of the thin device, in sectors.
    pub(crate) length: u64,
    pub(crate) file_system: FileSystem,
    /// The UUID of the file system.
    pub(crate) uuid: String,
    /// The volume it is a snapshot of, or the snapshot it is a clone of.
    pub(crate) origin: Identity,
}

impl Record {
    pub(crate) fn new(length: u64, file_system: FileSystem, uuid: String, origin: Identity) -> Result<Self> {
        Ok(Self { version: VERSION, token: random_hex(8)?, length, file_system, uuid, origin })
    }
}

/// Where an image stands between nothing and nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Begun,
    Whole,
    Leaving,
}

impl Stage {
    /// In the direction in which images move: whoever looks in this order misses none.
    pub(crate) const ALL: [Self; 3] = [Self::Begun, Self::Whole, Self::Leaving];

    pub(crate) fn dir(self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Whole => "images",
            Self::Leaving => "leaving",
        }
    }
}

/// The records of a store.
#[derive(Debug)]
pub(crate) struct Records {
    place: PathBuf,
    dirs: [OwnedFd; 3],
}

impl Records {
    pub(crate) fn open(root: &OwnedFd, place: &Path) -> Result<Self> {
        let open =
            |stage: Stage| beneath::open_dir(root, OsStr::new(stage.dir())).context("open", place.join(stage.dir()));
        let [begun, whole, leaving] = Stage::ALL;
        Ok(Self { place: place.to_owned(), dirs: [open(begun)?, open(whole)?, open(leaving)?] })
    }

    fn dir(&self, stage: Stage) -> &OwnedFd {
        match stage {
            Stage::Begun => &self.dirs[0],
            Stage::Whole => &self.dirs[1],
            Stage::Leaving => &self.dirs[2],
        }
    }

    pub(crate) fn path(&self, stage: Stage, at: &Locator) -> PathBuf {
        self.place.join(stage.dir()).join(at.as_str())
    }

    /// Finds an image's record, and locks it: one call at a time deals with its device.
    pub(crate) fn find(&self, at: &Locator) -> Result<Option<Found>> {
        loop {
            let mut moved = false;
            for stage in Stage::ALL {
                let path = || self.path(stage, at);
                let file = match beneath::open_file(self.dir(stage), OsStr::new(at.as_str())) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    file => file.context("open", path())?,
                };
                let lock = Lock::take(file).context("lock", path())?;
                // It may have gone to another stage, or away, until the lock was free.
                if !self.is(stage, at, &lock.file).context("look at", path())? {
                    moved = true;
                    break;
                }
                let record = read(&lock.file).context("read", path())?;
                let record = record.ok_or_else(|| Error::Damaged {
                    what: format!("the record {}", path().display()),
                    reason: "it is not one that fsnap writes".to_owned(),
                })?;
                return Ok(Some(Found { stage, record, lock }));
            }
            if !moved {
                return Ok(None);
            }
        }
    }

    fn is(&self, stage: Stage, at: &Locator, file: &File) -> io::Result<bool> {
        match beneath::stat(self.dir(stage), OsStr::new(at.as_str())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            found => Ok(found?.ino == beneath::stat_fd(file)?.ino),
        }
    }

    /// Writes the record of an image that is to be made; durable when this returns.
    pub(crate) fn begin(&self, at: &Locator, record: &Record) -> Result<()> {
        let path = || self.path(Stage::Begun, at);
        let write = || {
            let dir = self.dir(Stage::Begun);
            let hidden = format!(".{at}.{}", record.token);
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let mut file = File::from(rustix::fs::openat(dir, &*hidden, flags, Mode::RUSR | Mode::WUSR)?);
            file.write_all(&serde_json::to_vec(record)?)?;
            file.sync_all()?;
            rustix::fs::renameat(dir, &*hidden, dir, at.as_str())?;
            rustix::fs::fsync(dir)?;
            Ok::<_, io::Error>(())
        };
        write().context("write", path())
    }

    /// Moves a record to another stage, durably unless time is short.
    pub(crate) fn advance(&self, at: &Locator, from: Stage, to: Stage, durably: bool) -> Result<()> {
        let (old, new) = (self.dir(from), self.dir(to));
        rustix::fs::renameat(old, at.as_str(), new, at.as_str()).context("rename", self.path(from, at))?;
        if durably { self.sync(&[to, from]) } else { Ok(()) }
    }

    /// Makes durable what happened in these stages; what is read-only is durable.
    pub(crate) fn sync(&self, stages: &[Stage]) -> Result<()> {
        for &stage in stages {
            match rustix::fs::fsync(self.dir(stage)) {
                Err(Errno::ROFS) => {}
                synced => synced.context("sync", self.place.join(stage.dir()))?,
            }
        }
        Ok(())
    }

    /// Removes the record of an image whose device is gone.
    pub(crate) fn forget(&self, at: &Locator, stage: Stage) -> Result<()> {
        match rustix::fs::unlinkat(self.dir(stage), at.as_str(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => self.sync(&[stage]),
            Err(error) => Err(error).context("remove", self.path(stage, at)),
        }
    }

    /// Every image that is recorded, each once.
    pub(crate) fn list(&self) -> Result<BTreeMap<Locator, Stage>> {
        let mut found = BTreeMap::new();
        for stage in Stage::ALL {
            let names = beneath::names(self.dir(stage)).context("list", self.place.join(stage.dir()))?;
            let named = names.iter().filter_map(|name| name.to_str()?.parse().ok());
            found.extend(named.filter(|at| Form::of(at).is_some()).map(|at| (at, stage)));
        }
        Ok(found)
    }

    /// Removes what a killed call left of a record that never got its name.
    pub(crate) fn sweep(&self, at: &Locator) -> Result<()> {
        let prefix = format!(".{at}.");
        let dir = self.dir(Stage::Begun);
        for name in beneath::names(dir).context("list", self.place.join(Stage::Begun.dir()))? {
            if name.to_str().is_some_and(|name| name.starts_with(&prefix)) {
                match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(error).context("remove", self.place.join(Stage::Begun.dir()).join(name)),
                }
            }
        }
        Ok(())
    }
}

/// A record that was found; no other call deals with its image as long as this lives.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) stage: Stage,
    pub(crate) record: Record,
    #[expect(dead_code, reason = "it is held")]
    lock: Lock,
}

/// An exclusive lock of flock(2), given up by unlocking: a program that is being started may have a copy of the
/// descriptor.
#[derive(Debug)]
pub(crate) struct Lock {
    pub(crate) file: File,
}

impl Lock {
    pub(crate) fn take(file: File) -> io::Result<Self> {
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                locked => return locked.map(|()| Self { file }).map_err(Into::into),
            }
        }
    }

    /// Takes the lock if nobody has it.
    pub(crate) fn try_take(file: File) -> io::Result<Option<Self>> {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            locked => Ok(locked.map(|()| Some(Self { file }))?),
        }
    }

    /// Locks the file of that name, which is made if it is not there; waits for who has it.
    pub(crate) fn take_named(dir: &OwnedFd, name: &str) -> io::Result<Self> {
        loop {
            let lock = Self::take(open_note(dir, name)?)?;
            if lock.is_named(dir, name)? {
                return Ok(lock);
            }
        }
    }

    /// The same, if nobody has it.
    pub(crate) fn try_take_named(dir: &OwnedFd, name: &str) -> io::Result<Option<Self>> {
        loop {
            match Self::try_take(open_note(dir, name)?)? {
                Some(lock) if !lock.is_named(dir, name)? => {}
                taken => return Ok(taken),
            }
        }
    }

    /// Whether the file still has its name: who had it locked may have removed it.
    fn is_named(&self, dir: &OwnedFd, name: &str) -> io::Result<bool> {
        match beneath::stat(dir, OsStr::new(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            found => Ok(found?.ino == beneath::stat_fd(&self.file)?.ino),
        }
    }
}

fn open_note(dir: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?.into())
}

impl Drop for Lock {
    fn drop(&mut self) {
        // It goes with the descriptor at the latest.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

fn read(file: &File) -> io::Result<Option<Record>> {
    // At once, and not in ever larger pieces.
    let mut text = Vec::with_capacity(LONGEST as usize);
    file.take(LONGEST).read_to_end(&mut text)?;
    let record = serde_json::from_slice::<Record>(&text).ok();
    Ok(record.filter(|record| record.version == VERSION))
}

/// What a locator says: `s-800001-0123456789`, the letter for the kind, the thin device, and something random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) kind: ImageKind,
    pub(crate) id: ThinId,
}

impl Form {
    pub(crate) fn of(at: &Locator) -> Option<Self> {
        let (kind, rest) = at.as_str().split_once('-')?;
        let (id, random) = rest.split_once('-')?;
        let kind = match kind {
            "s" => ImageKind::Snapshot,
            "v" => ImageKind::Volume,
            _ => return None,
        };
        let hex = |text: &str, len| text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let id = u32::from_str_radix(id, 16).ok().filter(|_| hex(id, 6) && hex(random, 10))?;
        (ThinId::FIRST..ThinId::END).contains(&id).then_some(Self { kind, id: ThinId(id) })
    }

    /// A new locator of that form.
    pub(crate) fn locator(self) -> Result<Locator> {
        let kind = match self.kind {
            ImageKind::Snapshot => "s",
            ImageKind::Volume => "v",
        };
        let text = format!("{kind}-{:06x}-{}", self.id.0, random_hex(5)?);
        Locator::try_from(text).map_err(|error| Error::NotFound { what: error.to_string() })
    }
}

/// So many random bytes, as text.
pub(crate) fn random_hex(bytes: usize) -> Result<String> {
    Ok(random(bytes)?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A random number of a thin device, of those that fsnap uses.
pub(crate) fn random_id() -> Result<ThinId> {
    let number = random(3)?.iter().fold(0, |number, &byte| number << 8 | u32::from(byte));
    Ok(ThinId(ThinId::FIRST | number))
}

fn random(bytes: usize) -> Result<Vec<u8>> {
    let mut random = vec![0; bytes];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).context("ask for", "random bytes")?;
    Ok(random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_reserve_makes_is_a_locator() {
        let form = |text: &str| Form::of(&text.parse().unwrap());
        let id = ThinId(0x80_0001);
        assert_eq!(form("s-800001-0123456789"), Some(Form { kind: ImageKind::Snapshot, id }));
        assert_eq!(form("v-800001-0123456789"), Some(Form { kind: ImageKind::Volume, id }));
        for other in
            ["s-700001-0123456789", "s-800001-012345678", "s-80000A-0123456789", "x-800001-0123456789", "s", "s-"]
        {
            assert_eq!(form(other), None, "{other:?} was taken");
        }
        let made = Form { kind: ImageKind::Volume, id: random_id().unwrap() };
        assert_eq!(Form::of(&made.locator().unwrap()), Some(made));
    }
}
