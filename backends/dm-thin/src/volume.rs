//! A volume: a file system that is mounted, by its root, from a thin device.

use std::os::fd::OwnedFd;
use std::path::Path;

use fsnap_backend::mounts::{self, Mount};
use fsnap_backend::{Error, Identity, IoContext, Result, beneath};

use crate::KIND;
use crate::dm::{Mapper, Number};
use crate::pool::{Pool, ThinDevice, owner};
use crate::superblock::FileSystem;

/// A directory that can be a volume, with everything that was found out about it.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) root: OwnedFd,
    pub(crate) thin: ThinDevice,
    pub(crate) pool: Pool,
    pub(crate) file_system: FileSystem,
    pub(crate) uuid: String,
    pub(crate) mount: Mount,
}

impl Live {
    /// Opens `dir` and finds what it lies on; reads nothing from a device that is suspended.
    pub(crate) fn open(mapper: &Mapper, dir: &Path) -> Result<Self> {
        let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason: reason.to_owned() };
        let root = beneath::open_volume(dir, KIND)?;
        if !beneath::look_fd(&root).context("examine", dir)?.mount_root {
            return Err(refused(
                "it is not the root of a mounted file system, and a thin device is captured as a whole; name the \
                 mount point, or choose the rsync backend, which takes any directory",
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
        let Some(device) = mapper.of_number(number)? else {
            return Err(refused(&format!("its device {} is not one of device-mapper's", mount.source.display())));
        };
        if let Some(why) = owner(&device.uuid) {
            return Err(refused(why));
        }
        let thin = ThinDevice::of(mapper, device)?.map_err(refused)?;
        let Some(pool) = mapper.of_number(thin.pool)?.map(|device| Pool::of(mapper, device)).transpose()?.flatten()
        else {
            return Err(refused("the pool of its device cannot be found"));
        };
        if let Some(why) = pool.owner() {
            return Err(refused(why));
        }
        if thin.device.suspended {
            return Err(Error::Busy {
                what: format!("the device {}", thin.device.name),
                by: "somebody has suspended it, so that every access waits; `dmsetup resume` ends that".to_owned(),
            });
        }
        let node = number.node();
        let uuid = file_system.uuid_on(&node).context("read the superblock of", &node)?;
        let uuid = uuid.ok_or_else(|| refused("its device does not hold the file system that is mounted"))?;
        Ok(Self { root, thin, pool, file_system, uuid, mount })
    }

    /// Names the volume in the store of that UUID.
    pub(crate) fn identity(&self, store: &str) -> Identity {
        // A number in the pool and a UUID of a file system are both used again. What fsnap activated has a name that
        // is not.
        let given = self.thin.device.uuid.strip_prefix("FSNAP-").map(|rest| format!("-{rest}")).unwrap_or_default();
        Identity::new(format!("{KIND}:{store}/{}-{}{given}", self.thin.id, self.uuid))
    }
}
