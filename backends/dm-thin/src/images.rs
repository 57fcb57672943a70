//! The thin devices of images: whether they are there, putting them to use, and removing them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fsnap_backend::{Error, ErrorKind, Identity, Image, ImageKind, ImageState, IoContext, Locator, Result, Snapshot};
use rustix::io::Errno;

use crate::KIND;
use crate::dm::{By, Device};
use crate::pool::{ThinDevice, ThinId};
use crate::record::{Form, Found, Record, Stage};
use crate::store::Store;

/// How long a device may take to be free: the kernel takes off the mounts of a mount namespace a moment after the last process in it has ended.
const LETTING_GO: Duration = Duration::from_secs(1);

pub(crate) fn no_image(at: &Locator) -> Error {
    Error::NotFound { what: format!("the image {at} of this {KIND} store") }
}

impl Store {
    pub(crate) fn shown(&self, at: &Locator) -> String {
        format!("the image {at} of {}", self.pool)
    }

    /// What device-mapper calls the device of an image.
    fn device_name(&self, at: &Locator) -> String {
        format!("fsnap-{at}")
    }

    /// Names the device of an image of this store, and no other.
    fn device_uuid(&self, at: &Locator) -> String {
        format!("FSNAP-{}-{at}", self.settings.uuid)
    }

    fn device(&self, at: &Locator) -> Result<Option<Device>> {
        self.mapper.find(By::Uuid(&self.device_uuid(at)))
    }

    pub(crate) fn is_active(&self, at: &Locator) -> Result<bool> {
        Ok(self.device(at)?.is_some_and(|device| device.active))
    }

    /// Finds a whole image, and holds its record.
    pub(crate) fn whole(&self, at: &Locator) -> Result<Option<Found>> {
        let (Some(form), Some(found)) = (Form::of(at), self.records.find(at)?) else { return Ok(None) };
        Ok(if found.stage != Stage::Leaving && self.exists(at, form, &found.record)? { Some(found) } else { None })
    }

    /// Finds a recorded snapshot, if it is the recorded one; that it is there, its first use tells.
    pub(crate) fn recorded(&self, snapshot: &Snapshot) -> Result<Found> {
        let found = self.records.find(&snapshot.at)?.filter(|found| found.stage != Stage::Leaving);
        let found = found.ok_or_else(|| no_image(&snapshot.at))?;
        let there = Identity::new(format!("{KIND}:{}/{}-{}", self.settings.uuid, snapshot.at, found.record.token));
        if there != snapshot.identity {
            let expected = snapshot.identity.clone();
            return Err(Error::WrongIdentity { what: self.shown(&snapshot.at), expected, found: there });
        }
        Ok(found)
    }

    /// Whether the thin device of an image is in the pool. The kernel tells by taking it into a table, or refusing to.
    ///
    /// The caller holds the image's record.
    fn exists(&self, at: &Locator, form: Form, record: &Record) -> Result<bool> {
        let there = self.device(at)?;
        if there.as_ref().is_some_and(|device| device.active) {
            return Ok(true);
        }
        let loaded = self.load(there.is_some(), at, form, record);
        self.stop(at)?;
        loaded
    }

    /// Makes the device of an image, unless it is there, with a table that is not in use yet; false if its thin device is not in the
    /// pool.
    fn load(&self, there: bool, at: &Locator, form: Form, record: &Record) -> Result<bool> {
        let name = self.device_name(at);
        if !there {
            self.mapper.create(&name, &self.device_uuid(at)).context("make", By::Name(&name).to_string())?;
        }
        let read_only = form.kind == ImageKind::Snapshot;
        match self.mapper.load(&name, &[self.pool.table(form.id, record.length)], read_only) {
            Err(error) if error.raw_os_error() == Some(Errno::NODATA.raw_os_error()) => Ok(false),
            loaded => loaded.map(|()| true).context("load the table of", By::Name(&name).to_string()),
        }
    }

    /// Makes a whole image's device ready for use, and tells its node.
    ///
    /// The caller holds the image's record.
    pub(crate) fn start(&self, at: &Locator, form: Form, record: &Record) -> Result<PathBuf> {
        let name = self.device_name(at);
        let device = match self.device(at)? {
            Some(device) if device.active && !device.suspended => device,
            there => {
                if !self.load(there.is_some(), at, form, record)? {
                    self.stop(at)?;
                    return Err(no_image(at));
                }
                self.mapper.start(&name).context("start", By::Name(&name).to_string())?
            }
        };
        let node = device.number.node();
        if form.kind == ImageKind::Snapshot {
            let found = record.file_system.uuid_on(&node).context("read the superblock of", &node)?;
            if found.as_deref() != Some(&record.uuid) {
                let expected = Identity::new(record.uuid.clone());
                let found = Identity::new(found.unwrap_or_else(|| "no such file system".to_owned()));
                let error = Error::WrongIdentity { what: self.shown(at), expected, found };
                return Err(error.and_undo(self.stop(at)));
            }
        }
        Ok(node)
    }

    /// Removes the device of an image, so that only the pool has it; busy while it is used.
    pub(crate) fn stop(&self, at: &Locator) -> Result<()> {
        let Some(device) = self.device(at)? else { return Ok(()) };
        let until = Instant::now() + LETTING_GO;
        loop {
            match self.mapper.remove(&device.name) {
                Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                    if Instant::now() > until {
                        let by = "it is mounted, or its device is open".to_owned();
                        return Err(Error::Busy { what: self.shown(at), by });
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                removed => return removed.context("remove", By::Name(&device.name).to_string()),
            }
        }
    }

    /// Removes an image, whole or partial, and then its record.
    pub(crate) fn remove(&self, at: &Locator) -> Result<()> {
        let Some(form) = Form::of(at) else { return Err(no_image(at)) };
        self.notes.discard(at)?;
        self.records.sweep(at)?;
        let Some(found) = self.records.find(at)? else { return Ok(()) };
        self.stop(at)?;
        if found.stage == Stage::Whole {
            self.check_ours(at, form, &found.record)?;
        }
        if found.stage != Stage::Leaving {
            self.records.advance(at, found.stage, Stage::Leaving, true)?;
        }
        self.pool.delete(&self.mapper, form.id)?;
        self.records.forget(at, Stage::Leaving)
    }

    /// Refuses to remove what somebody else has put in the place of a snapshot, such as in a pool that was made anew.
    fn check_ours(&self, at: &Locator, form: Form, record: &Record) -> Result<()> {
        if form.kind == ImageKind::Volume {
            // Whoever wrote to it may have given it another UUID.
            return Ok(());
        }
        match self.start(at, form, record) {
            Ok(_) => self.stop(at),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The thin devices in the pool that are in use and are not among the store's `own`.
    pub(crate) fn foreign(&self, own: &BTreeSet<ThinId>) -> Result<Vec<Image>> {
        let mut found = BTreeSet::new();
        for name in self.mapper.names()? {
            // Any may be gone, or change, since it was listed.
            let Ok(Ok(thin)) = ThinDevice::named(&self.mapper, &name) else { continue };
            if thin.pool == self.pool.number && !own.contains(&thin.id) {
                found.extend(format!("foreign:{}", thin.id).parse::<Locator>().ok());
            }
        }
        let image = |at| Image { at, kind: ImageKind::Volume, state: ImageState::Foreign };
        Ok(found.into_iter().map(image).collect())
    }
}
