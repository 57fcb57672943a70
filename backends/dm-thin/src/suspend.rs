//! A device that stands still, and never for longer than its keeper lives.
//!
//! Every access to a suspended device waits, so that one that is left suspended takes the whole application with it.
//! [`Suspended`] resumes it when it is dropped. Against being killed there is a [guard](crate::guard), which resumes it at once;
//! nothing is suspended without one. Should that be killed as well, there is a note in the store's directory
//! `suspended`, named by the number of the thin device and locked as long as its author lives: whoever finds a note
//! that nobody has locked resumes the device. A process that ends itself in a hurry, in a signal handler, resumes what it has suspended by
//! [`resume_at_once`](crate::resume_at_once). A note need not outlive a power cut; neither does a suspension. Its name may, without
//! its content, which is not synced: such a note says nothing, and is removed.
//!
//! The note is also what makes two calls for one volume follow each other: the kernel takes a second suspension for
//! granted, and the first resume would end both.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fsnap_backend::{Error, IoContext, Locator, Result, beneath};
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::dm::{By, Device, Mapper};
use crate::guard::{Guard, Guards};
use crate::pool::ThinDevice;
use crate::record::{Lock, random_hex};
use crate::sys::Remembered;

/// The directory of the notes, in the store.
pub(crate) const DIR: &str = "suspended";

/// What a note says: which device is suspended.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    device: String,
    uuid: String,
    number: String,
}

impl Note {
    fn of(thin: &ThinDevice) -> Self {
        let Device { name, uuid, number, .. } = &thin.device;
        Self { device: name.clone(), uuid: uuid.clone(), number: number.to_string() }
    }
}

/// A note that is written and locked, under a name that says nothing yet.
#[derive(Debug)]
struct Hidden {
    name: String,
    note: Note,
    lock: Lock,
}

/// The notes of a store.
#[derive(Debug)]
pub(crate) struct Notes {
    dir: OwnedFd,
    path: PathBuf,
    /// Written ahead, for the snapshots that are going to be made.
    ready: Mutex<BTreeMap<Locator, Hidden>>,
}

impl Notes {
    pub(crate) fn open(root: &OwnedFd, place: &Path) -> Result<Self> {
        let path = place.join(DIR);
        let dir = beneath::open_dir(root, OsStr::new(DIR)).context("open", &path)?;
        Ok(Self { dir, path, ready: Mutex::default() })
    }

    /// Writes the note ahead that the snapshot at `at` will need.
    pub(crate) fn prepare(&self, thin: &ThinDevice, at: &Locator) -> Result<()> {
        let hidden = match self.take_ready(thin, at)? {
            Some(hidden) => hidden,
            None => self.hide(thin)?,
        };
        self.ready().insert(at.clone(), hidden);
        Ok(())
    }

    /// Removes what was written ahead for the snapshot at `at`, which needs it no more.
    pub(crate) fn discard(&self, at: &Locator) -> Result<()> {
        let unused = self.ready().remove(at);
        unused.map_or(Ok(()), |hidden| self.remove(OsStr::new(&hidden.name)))
    }

    fn ready(&self) -> MutexGuard<'_, BTreeMap<Locator, Hidden>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The note that was written ahead, if it is of that device.
    fn take_ready(&self, thin: &ThinDevice, at: &Locator) -> Result<Option<Hidden>> {
        if self.ready().get(at).is_some_and(|hidden| hidden.note != Note::of(thin)) {
            self.discard(at)?;
        }
        Ok(self.ready().remove(at))
    }

    /// Writes a note and locks it.
    fn hide(&self, thin: &ThinDevice) -> Result<Hidden> {
        let (name, note) = (format!(".{}", random_hex(8)?), Note::of(thin));
        let write = || {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let mut file = File::from(rustix::fs::openat(&self.dir, &*name, flags, Mode::RUSR | Mode::WUSR)?);
            file.write_all(&serde_json::to_vec(&note)?)?;
            Lock::take(file)
        };
        let lock = write().context("write", self.path.join(&name))?;
        Ok(Hidden { name, note, lock })
    }

    /// Resumes what killed calls left suspended; tells what was.
    pub(crate) fn resume_left_behind(&self, mapper: &Mapper) -> Result<Vec<String>> {
        let mut resumed = Vec::new();
        for name in beneath::names(&self.dir).context("list", &self.path)? {
            let path = self.path.join(&name);
            let Some(file) = self.open_note(&name).context("open", &path)? else { continue };
            let Some(lock) = Lock::try_take(file).context("lock", &path)? else { continue };
            resumed.extend(self.settle(mapper, &name, &lock)?);
        }
        Ok(resumed)
    }

    /// Waits until no call of fsnap has the device suspended, and resumes it if one was killed there.
    ///
    /// Fails with [`ErrorKind::Busy`](fsnap_backend::ErrorKind::Busy) if it is suspended by somebody else, who may never resume it.
    pub(crate) fn wait_until_running(&self, mapper: &Mapper, mut thin: ThinDevice) -> Result<ThinDevice> {
        let name = OsString::from(thin.id.to_string());
        let path = self.path.join(&name);
        let mut noted = true;
        while thin.device.suspended {
            if !noted {
                thin.check_running()?;
            }
            let file = self.open_note(&name).context("open", &path)?;
            noted = file.is_some();
            if let Some(file) = file {
                // Also held for a moment by a guard that is starting, and has its author's files open until then.
                let theirs = Lock::take(file).context("lock", &path)?;
                self.settle(mapper, &name, &theirs)?;
            }
            // Without a note it can have been resumed since it was looked at.
            thin.device = mapper.find(By::Name(&thin.device.name))?.unwrap_or(thin.device);
        }
        Ok(thin)
    }

    fn open_note(&self, name: &OsStr) -> io::Result<Option<File>> {
        match beneath::open_file(&self.dir, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => Ok(Some(file?)),
        }
    }

    /// Whether the open file is still the note of that name.
    fn is(&self, name: &OsStr, file: &File) -> io::Result<bool> {
        match beneath::stat(&self.dir, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            found => Ok(found?.ino == beneath::stat_fd(file)?.ino),
        }
    }

    /// Does what the author of a note, who is gone, can no longer do.
    fn settle(&self, mapper: &Mapper, name: &OsStr, lock: &Lock) -> Result<Option<String>> {
        let path = self.path.join(name);
        // Under another name, and torn, as long as nothing is suspended yet.
        let torn = name.as_encoded_bytes().starts_with(b".");
        let mut resumed = None;
        if !torn {
            if !self.is(name, &lock.file).context("look at", &path)? {
                // Its author lived, and took it away.
                return Ok(None);
            }
            let mut text = Vec::new();
            (&lock.file).take(4096).read_to_end(&mut text).context("read", &path)?;
            if text.iter().all(|byte| *byte == 0) {
                // It was written before it got its name, so that the power was cut since: the device has lost its suspension.
                self.remove(name)?;
                return Ok(None);
            }
            let note: Note = serde_json::from_slice(&text).map_err(|error| Error::Damaged {
                what: format!("the note {}", path.display()),
                reason: format!("it names no device that could be resumed: {error}"),
            })?;
            let device = mapper.find(By::Name(&note.device))?;
            if let Some(device) = device.filter(|found| found.suspended && found.uuid == note.uuid) {
                // The author's guard may do so in the same moment, and the kernel refuses to be second; a later call succeeds.
                let resume = || mapper.resume(&device.name);
                resume().or_else(|_| resume()).context("resume", By::Name(&device.name).to_string())?;
                resumed = Some(device.name);
            }
        }
        self.remove(name)?;
        Ok(resumed)
    }

    fn remove(&self, name: &OsStr) -> Result<()> {
        match rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error).context("remove", self.path.join(name)),
        }
    }

    /// Notes that the device is about to be suspended for the snapshot at `at`, once nobody else has it so.
    fn write(&self, mapper: &Mapper, thin: &ThinDevice, at: &Locator) -> Result<(OsString, Lock)> {
        let name = OsString::from(thin.id.to_string());
        let path = self.path.join(&name);
        let mut ready = self.take_ready(thin, at)?;
        loop {
            let hidden = match ready.take() {
                Some(hidden) => hidden,
                None => self.hide(thin)?,
            };
            match rustix::fs::renameat_with(&self.dir, &*hidden.name, &self.dir, &*name, RenameFlags::NOREPLACE) {
                Ok(()) => return Ok((name, hidden.lock)),
                Err(Errno::EXIST) => {
                    // Somebody is at work on the volume, or was killed there.
                    ready = Some(hidden);
                    let Some(file) = self.open_note(&name).context("open", &path)? else { continue };
                    let theirs = Lock::take(file).context("lock", &path)?;
                    self.settle(mapper, &name, &theirs)?;
                }
                // Somebody took it for torn before it was locked.
                Err(Errno::NOENT) => {}
                Err(error) => {
                    let error = Err(error).context("write", &path);
                    return error.map_err(|error: Error| error.and_undo(self.remove(OsStr::new(&hidden.name))));
                }
            }
        }
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        // One that stays says nothing, and the next command removes it.
        let ready = std::mem::take(&mut *self.ready());
        ready.values().for_each(|hidden| drop(self.remove(OsStr::new(&hidden.name))));
    }
}

/// A device that is suspended, and the file system on it frozen; resumed when dropped.
#[derive(Debug)]
pub(crate) struct Suspended<'a> {
    mapper: &'a Mapper,
    notes: &'a Notes,
    device: String,
    /// `None` once the device is resumed.
    note: Option<(OsString, Lock)>,
    guards: &'a Guards,
    /// From before it is suspended until it is resumed.
    guard: Option<Guard>,
    remembered: Option<Remembered<'a>>,
}

impl<'a> Suspended<'a> {
    /// Suspends the device for the snapshot at `at`; when this fails, it is not suspended.
    pub(crate) fn new(
        mapper: &'a Mapper,
        notes: &'a Notes,
        guards: &'a Guards,
        thin: &ThinDevice,
        at: &Locator,
    ) -> Result<Self> {
        let note = notes.write(mapper, thin, at)?;
        let device = thin.device.name.clone();
        let mut guard = Self { mapper, notes, device, note: Some(note), guards, guard: None, remembered: None };
        // Somebody else may have it suspended for a purpose of their own, and is not to be resumed by us.
        if let Some(found) = mapper.find(By::Name(&guard.device))?
            && found.suspended
        {
            let what = By::Name(&guard.device).to_string();
            guard.leave()?;
            return Err(Error::Busy { what, by: "somebody else has suspended it".to_owned() });
        }
        match guards.watch(mapper, at, &guard.device).context("start", "the process that resumes if this one is killed")
        {
            Ok(watching) => guard.guard = Some(watching),
            Err(error) => return Err(error.and_undo(guard.leave())),
        }
        guard.remembered = Some(mapper.remember(&guard.device));
        match mapper.suspend(&guard.device).context("suspend", By::Name(&guard.device).to_string()) {
            Ok(()) => Ok(guard),
            // A suspension that failed may have got half way.
            Err(error) => Err(error.and_undo(guard.resume())),
        }
    }

    /// Whether it stands still all the while: somebody else could have resumed it.
    pub(crate) fn holds(&self) -> Result<bool> {
        Ok(self.mapper.find(By::Name(&self.device))?.is_some_and(|device| device.suspended))
    }

    /// Resumes the device. If that fails, the note stays, and the next command tries again.
    pub(crate) fn resume(mut self) -> Result<()> {
        self.end()
    }

    fn leave(mut self) -> Result<()> {
        match self.note.take() {
            Some((name, _lock)) => self.notes.remove(&name),
            None => Ok(()),
        }
    }

    fn end(&mut self) -> Result<()> {
        let Some((name, lock)) = self.note.take() else { return Ok(()) };
        let resume = || self.mapper.resume(&self.device);
        resume().or_else(|_| resume()).context("resume", By::Name(&self.device).to_string())?;
        self.remembered = None;
        self.guard.take().into_iter().for_each(|guard| self.guards.end(guard));
        let removed = self.notes.remove(&name);
        drop(lock);
        removed
    }
}

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        // There is nobody to tell; the note stays where it fails, and the next command tries again.
        let _ = self.end();
    }
}
