//! A volume: a file system that is mounted, by its root, from a thin device.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use fsnap_backend::mounts::{self, Mount};
use fsnap_backend::{Error, Identity, IoContext, Result, Volume, beneath};

use crate::KIND;
use crate::dm::{Mapper, Number};
use crate::pool::{Pool, ThinDevice, ThinId, owner};
use crate::superblock::FileSystem;
use crate::suspend::Notes;

/// A file system that can be a volume, with everything that was found out about it.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    pub(crate) thin: ThinDevice,
    pub(crate) pool: Pool,
    pub(crate) file_system: FileSystem,
    pub(crate) uuid: String,
    pub(crate) mount: Mount,
}

impl Live {
    /// Opens `dir` and finds what it lies on; reads nothing from a device that is suspended.
    ///
    /// Waits for one that the notes say is suspended by another call.
    pub(crate) fn open(mapper: &Mapper, notes: Option<&Notes>, dir: &Path) -> Result<(OwnedFd, Self)> {
        let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason: reason.to_owned() };
        let root = beneath::open_volume(dir, KIND)?;
        if !beneath::look_fd(&root).context("examine", dir)?.mount_root {
            return Err(refused(
                "it is not the root of a mounted file system, and a thin device is captured as a whole; name the mount point",
            ));
        }
        let Some(mount) = mounts::of_file(&root).context("find the mount of", dir)? else {
            return Err(refused("its mount is not one that this process can see"));
        };
        if mount.root.path != Path::new("/") {
            return Err(refused("only a part of its file system is mounted there"));
        }
        let Some(file_system) = FileSystem::named(&mount.fstype) else {
            let named = mount.fstype.escape_ascii();
            return Err(refused(&format!("its file system is {named}; ext4 and xfs can be volumes")));
        };
        if file_system == FileSystem::Btrfs {
            return Err(refused(
                "it is btrfs, which does not stand still with its device, and confuses two devices of one UUID, as every copy would \
                 be; its own snapshots do better: choose the btrfs backend",
            ));
        }
        if !mount.writable {
            return Err(refused("it is mounted read-only, and has no new states to capture"));
        }
        let number = Number::from(mount.root.device);
        let Some(name) = mapper.name_of(number)? else {
            return Err(refused(&format!("its device {} is not one of device-mapper's", mount.source.display())));
        };
        let thin = ThinDevice::named(mapper, &name)?.map_err(refused)?;
        if let Some(why) = owner(&thin.device.uuid) {
            return Err(refused(why));
        }
        let Some(pool) = mapper.name_of(thin.pool)?.map(|name| Pool::named(mapper, &name)).transpose()?.flatten()
        else {
            return Err(refused("the pool of its device cannot be found"));
        };
        if let Some(why) = pool.owner() {
            return Err(refused(why));
        }
        let thin = match notes {
            Some(notes) => notes.wait_until_running(mapper, thin)?,
            None => thin,
        };
        thin.check_running()?;
        let node = number.node();
        let uuid = file_system.uuid_on(&node).context("read the superblock of", &node)?;
        let uuid = uuid.ok_or_else(|| refused("its device does not hold the file system that is mounted"))?;
        Ok((root, Self { thin, pool, file_system, uuid, mount }))
    }

    /// Names the volume in the store of that UUID.
    pub(crate) fn identity(&self, store: &str) -> Identity {
        // A number in the pool and a UUID of a file system are both used again. What fsnap activated has a name that
        // is not.
        let given = self.thin.device.uuid.strip_prefix("FSNAP-").map(|rest| format!("-{rest}")).unwrap_or_default();
        Identity::new(format!("{KIND}:{store}/{}-{}{given}", self.thin.id, self.uuid))
    }
}

/// What was found out about the volumes that were adopted, so that it need not be found out again while writers stand.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<BTreeMap<Identity, Live>>);

impl Known {
    /// Remembers a volume that is adopted.
    pub(crate) fn keep(&self, identity: Identity, live: Live) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(identity, live);
    }

    /// The numbers of the volumes' devices.
    pub(crate) fn ids(&self) -> Vec<ThinId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().map(|live| live.thin.id).collect()
    }

    /// Tells what is known of the volume, if its path still leads there.
    ///
    /// Its descriptor keeps the file system mounted, and so its device open under the same number. What can have changed is
    /// where the path leads, and the table of the device, as of one that was enlarged: both are looked at.
    /// Waits for a volume that the notes say is suspended by another call.
    pub(crate) fn still(&self, mapper: &Mapper, notes: &Notes, volume: &Volume) -> Result<Option<Live>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(volume.identity()).cloned();
        let Some((known, root)) = known.zip(beneath::open_volume(volume.dir(), KIND).ok()) else { return Ok(None) };
        let look = |file: BorrowedFd<'_>| beneath::look_fd(file).context("examine", volume.dir());
        let (now, then) = (look(root.as_fd())?, look(volume.as_fd())?);
        let Ok(thin) = ThinDevice::named(mapper, &known.thin.device.name)? else { return Ok(None) };
        let same = |thin: &ThinDevice| (thin.device.number, thin.pool, thin.id);
        let leads_there = (now.device, now.meta.ino) == (then.device, then.meta.ino);
        if !leads_there || Number::of(now.device) != thin.device.number || same(&thin) != same(&known.thin) {
            return Ok(None);
        }
        let thin = notes.wait_until_running(mapper, thin)?;
        Ok(Some(Live { thin, ..known }))
    }
}
