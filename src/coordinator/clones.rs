//! Clones that the kernel has to mount before their files are anywhere.
//!
//! `<state>/branches/<branch>/<volume>` is where such a clone is mounted. As with overlays, the mount does not survive a start of
//! the machine, and every recovery mounts again what is not mounted. A clone is mounted on the host without devices and set-id
//! bits; restored processes see it as they saw the volume.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use fsnap_backend::{Backend, Locator, MountSpec, beneath};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::Coordinator;
use crate::branch::BranchMember;
use crate::error::IoContext;
use crate::mount::Restrictions;
use crate::name::Name;
use crate::{Error, Result};

impl Coordinator {
    /// Where a clone is mounted, if it has to be.
    pub(super) fn mount_point(&self, branch: &Name, volume: &Name) -> PathBuf {
        self.catalog.state().join("branches").join(branch.as_str()).join(volume.as_str())
    }

    /// Makes a clone's files visible; tells where, and whether they had to be mounted there.
    pub(super) fn show(
        &self,
        store: &dyn Backend,
        at: &Locator,
        branch: &Name,
        volume: &Name,
    ) -> Result<(PathBuf, bool)> {
        match store.activate(at)? {
            MountSpec::Bind { dir, .. } => Ok((dir, false)),
            spec => {
                let dir = self.mount_point(branch, volume);
                fs::create_dir_all(&dir).context("make the directory", &dir)?;
                crate::mount::mount(&spec, &dir, Restrictions::default())?.keep();
                Ok((dir, true))
            }
        }
    }

    /// Mounts a clone again, if it has to be and is not; tells whether it was.
    pub(super) fn show_again(&self, branch: &Name, member: &BranchMember) -> Result<bool> {
        let dir = member.path.as_path();
        if !member.mounted || is_mounted(dir).context("examine", dir)? {
            return Ok(false);
        }
        let store = self.store(&member.store)?;
        self.show(store.as_ref(), &member.at, branch, &member.volume)?;
        let found = store.adopt(dir)?.identity().clone();
        if found == member.identity {
            return Ok(true);
        }
        let (volume, path, expected) = (member.volume.clone(), member.path.clone(), member.identity.clone());
        Err(Error::WrongVolume { volume, path, expected, found }.and_undo(hide(dir)))
    }
}

/// Unmounts a clone and removes the mount point; succeeds if there is none.
pub(super) fn hide(dir: &Path) -> Result<()> {
    while is_mounted(dir).context("examine", dir)? {
        match rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => return Err(crate::mount::Error::Busy { dir: dir.into() }.into()),
            unmounted => unmounted.map_err(io::Error::from).context("unmount", dir)?,
        }
    }
    // The last one takes the branch's directory with it.
    for dir in [Some(dir), dir.parent()].into_iter().flatten() {
        match fs::remove_dir(dir) {
            Ok(()) => {}
            Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::DirectoryNotEmpty].contains(&error.kind()) => {}
            Err(error) => return Err(error).context("remove", dir),
        }
    }
    Ok(())
}

/// Whether something is mounted on `dir`.
fn is_mounted(dir: &Path) -> io::Result<bool> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(false) };
    match beneath::open_root(parent).and_then(|parent| beneath::is_mount_root(parent, name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        answered => answered,
    }
}
