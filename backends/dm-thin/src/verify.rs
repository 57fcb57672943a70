//! Reads everything there is in a snapshot.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use fsnap_backend::{Damage, IoContext, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use crate::superblock::FileSystem;

/// Mounts the device where nobody else sees it, reads every name, attribute and content, and names what cannot be read.
pub(crate) fn read_all(device: &Path, file_system: FileSystem) -> Result<Vec<Damage>> {
    match open(device, file_system) {
        Ok(root) => fsnap_backend::read_all(root, device, &[]),
        Err(error) if is_damage(&error) => {
            Ok(vec![Damage { path: OsString::new(), what: format!("it cannot be mounted: {error}") }])
        }
        Err(error) => Err(error).context("mount", device),
    }
}

/// What a file system answers for a block that cannot be read, and for a structure that cannot be.
fn is_damage(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw_os_error), Some(Errno::IO | Errno::UCLEAN | Errno::BADMSG))
}

/// Opens the root of the file system on the device, mounted nowhere.
fn open(device: &Path, file_system: FileSystem) -> io::Result<OwnedFd> {
    let context = fsopen(file_system.name(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device)?;
    fsconfig_set_flag(&context, "ro")?;
    for option in file_system.snapshot_options().split(',') {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, option)?,
        }
    }
    fsconfig_create(&context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(mount, ".", flags, Mode::empty())?)
}
