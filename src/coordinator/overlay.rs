//! Branches that have to be mounted: clones that are file systems of their own, and overlays over snapshots that cannot
//! be written or cloned, by the kernel's overlayfs.
//!
//! ```text
//! <dir>/.fsnap/                  a store for snapshots of overlays
//! <dir>/<branch>/<volume>/files  where the volume is mounted
//!                        /upper  of an overlay: what differs from the snapshot
//!                        /work   of an overlay: the kernel's own
//! ```
//!
//! `<dir>` must lie on a file system that overlayfs can write to. The snapshot below is held by the branch, like a clone's image
//! is. The backend of the snapshot cannot capture an overlay; the rsync backend, which takes any directory, does.
//!
//! A mount does not survive a start of the machine; what differs does. [`Coordinator::mount_branches`], a part of every
//! recovery, mounts again what is not mounted.
//!
//! A character device 0:0 in a snapshot is overlayfs's own mark for "nothing here": it hides itself.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use fsnap_backend::{Backend, Dir, MountSpec, Snapshot, beneath};
use rustix::fs::{Mode, XattrFlags};
use rustix::io::Errno;

use super::{Coordinator, Recovered, open_snapshot};
use crate::branch::{BranchMember, Difference, Form, Keeper};
use crate::checkpoint::PathText;
use crate::error::IoContext;
use crate::mount::{Prepared, Restrictions};
use crate::name::Name;
use crate::stores::Kind;
use crate::volume::StoreRecord;
use crate::{Error, Result};

const UPPER: &str = "upper";
const WORK: &str = "work";
const FILES: &str = "files";

/// The store of the backend that takes any directory.
const KEEPER: &str = "rsync";
const KEEPER_STORE: &str = ".fsnap";

/// `OVERLAYFS_SUPER_MAGIC` in linux/magic.h.
const OVERLAYFS: u64 = 0x794c_7630;

impl Coordinator {
    /// Removes the directory of a branch's volume that the catalog does not have any more.
    #[cfg(feature = "fuse")]
    pub(crate) fn discard(&self, dir: &Path) -> Result<()> {
        remove(dir)
    }

    /// Where the overlay for a volume of a branch is to be; refused where none can be kept.
    pub(super) fn plan_overlay(&self, branch: &Name, volume: &Name) -> Result<Difference> {
        make_private(&self.homes)?;
        check(&self.homes)?;
        let dir = PathText(self.homes.join(branch.as_str()).join(volume.as_str()));
        Ok(Difference { dir, keeper: self.keeper()? })
    }

    /// Makes the store for snapshots of overlays, or opens it.
    fn keeper(&self) -> Result<Option<Keeper>> {
        let Ok(kind) = Kind::named(KEEPER) else { return Ok(None) };
        let place = self.homes.join(KEEPER_STORE);
        let identity = kind.create(&place)?.store().identity.clone();
        let record = StoreRecord { identity, backend: KEEPER.to_owned(), place: PathText(place) };
        if self.catalog.store(&record.identity)?.as_ref() != Some(&record) {
            self.catalog.add_store(&record)?;
        }
        Ok(Some(Keeper { backend: record.backend, store: record.identity }))
    }

    /// Makes the overlay, empty, over the snapshot, and mounts it. Its intent is recorded.
    pub(super) fn make_overlay(
        &self,
        store: &dyn Backend,
        snapshot: &Snapshot,
        overlay: &Difference,
    ) -> Result<PathBuf> {
        let dir = overlay.dir.as_path();
        for name in [UPPER, WORK, FILES] {
            make_private(&dir.join(name))?;
        }
        // The root of the mount has the attributes of the upper root.
        take_attributes(open_snapshot(store, snapshot)?.as_ref(), dir, UPPER)?;
        self.mount_overlay(store, snapshot, dir)
    }

    fn mount_overlay(&self, store: &dyn Backend, snapshot: &Snapshot, dir: &Path) -> Result<PathBuf> {
        let files = dir.join(FILES);
        let recipe = store.activate(&snapshot.at)?;
        Prepared::overlay(&recipe, dir, Restrictions::default())?.attach(&files)?.keep();
        Ok(files)
    }

    /// What the branch's record says of an overlay that is mounted.
    pub(super) fn overlay_identity(&self, overlay: &Difference) -> Result<fsnap_backend::Identity> {
        let files = overlay.dir.as_path().join(FILES);
        match &overlay.keeper {
            Some(keeper) => Ok(self.store(&keeper.store)?.adopt(&files)?.identity().clone()),
            None => Ok(fsnap_backend::Identity::new(format!("overlay:{}", overlay.dir))),
        }
    }

    /// Mounts what of branches has to be mounted and is not.
    pub(super) fn mount_branches(&self) -> Result<Vec<Recovered>> {
        let mut done = Vec::new();
        if self.catalog.branches_to_mount()?.is_empty() {
            return Ok(done);
        }
        // Of two commands that find a branch unmounted, the second would mount it over the first one's mount, which may be in use by then.
        let path = self.catalog.state().join("mounts.lock");
        let lock = fs::File::create(&path).context("open", &path)?;
        lock.lock().context("lock", &path)?;
        for branch in self.catalog.branches_to_mount()? {
            let mut changed = branch.clone();
            let mounted = changed.members.iter_mut().try_fold(0, |count, member| {
                Ok::<usize, Error>(count + usize::from(self.mount_member(&branch.checkpoint, member)?))
            });
            match mounted {
                Ok(0) => {}
                Ok(_) => {
                    if changed != branch {
                        self.catalog.update_branch(&changed)?;
                    }
                    done.push(Recovered::Mounted(branch.name));
                }
                Err(error) => {
                    done.push(Recovered::Postponed { what: format!("mounting branch {} again", branch.name), error });
                }
            }
        }
        Ok(done)
    }

    /// Mounts one again, if it has to be mounted and is not; tells whether it was.
    fn mount_member(&self, checkpoint: &crate::checkpoint::CheckpointId, member: &mut BranchMember) -> Result<bool> {
        let (dir, overlay) = match &member.form {
            Form::Clone | Form::Layers(_) => return Ok(false),
            Form::MountedClone(home) => (home.as_path(), None),
            Form::Overlay(overlay) => (overlay.dir.as_path(), Some(overlay)),
        };
        if is_mounted(dir).context("examine", dir)? {
            return Ok(false);
        }
        let Some(overlay) = overlay else {
            mount_clone(&self.store(&member.store)?.activate(&member.at)?, dir)?;
            return Ok(true);
        };
        let snapshot = self.catalog.checkpoint(checkpoint)?.and_then(|checkpoint| {
            checkpoint.members.into_iter().map(|member| member.snapshot).find(|snapshot| snapshot.at == member.at)
        });
        let snapshot =
            snapshot.ok_or_else(|| fsnap_backend::Error::NotFound { what: format!("the snapshot {}", member.at) })?;
        self.mount_overlay(self.store(&member.store)?.as_ref(), &snapshot, dir)?;
        member.identity = self.overlay_identity(overlay)?;
        Ok(true)
    }
}

/// Mounts a clone in its directory, and tells where its files are.
pub(super) fn mount_clone(spec: &MountSpec, dir: &Path) -> Result<PathBuf> {
    let files = dir.join(FILES);
    make_private(&files)?;
    Prepared::new(spec, Restrictions::default())?.attach(&files)?.keep();
    Ok(files)
}

/// Unmounts an overlay or a clone, and removes the directory; succeeds if it is not there.
pub(super) fn remove(dir: &Path) -> Result<()> {
    match dir.symlink_metadata() {
        // Whoever removed it may have been killed before the branch's directory was, too.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return dir.parent().map_or(Ok(()), remove_if_empty),
        found => found.context("examine", dir)?,
    };
    let files = dir.join(FILES);
    while is_mounted(dir).context("examine", dir)? {
        match rustix::mount::unmount(&files, rustix::mount::UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => return Err(crate::mount::Error::Busy { dir: files }.into()),
            unmounted => unmounted.map_err(io::Error::from).context("unmount", &files)?,
        }
    }
    if crate::stores::is_needed(dir)? {
        // Checkpoints were taken on it, and read what it had sealed.
        return Ok(());
    }
    let (Some(branch), Some(volume)) = (dir.parent(), dir.file_name()) else { return Ok(()) };
    let parent = beneath::open_root(branch).context("open", branch)?;
    beneath::remove_tree(&parent, volume).context("remove", dir)?;
    // The last one takes the branch's directory with it.
    remove_if_empty(branch)
}

fn remove_if_empty(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
            Err(error).context("remove", dir)
        }
        _ => Ok(()),
    }
}

/// Whether the overlay or the clone in `dir` is mounted.
fn is_mounted(dir: &Path) -> io::Result<bool> {
    let dir = match beneath::open_root(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        dir => dir?,
    };
    match beneath::is_mount_root(dir, OsStr::new(FILES)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        answered => answered,
    }
}

/// Refuses a directory to which overlayfs could not write.
fn check(dir: &Path) -> Result<()> {
    let refused = |reason: String| Error::NoOverlay { dir: PathText(dir.to_owned()), reason };
    let root = beneath::open_root(dir).context("open", dir)?;
    let system = rustix::fs::fstatfs(&root).map_err(io::Error::from).context("examine", dir)?;
    if system.f_type as u64 == OVERLAYFS {
        return Err(refused("it lies on an overlay itself".into()));
    }
    let key = "trusted.overlay.fsnap";
    let tried = rustix::fs::fsetxattr(&root, key, b"y", XattrFlags::empty());
    tried.map_err(|error| refused(format!("its file system does not take what an overlay has to note: {error}")))?;
    rustix::fs::fremovexattr(&root, key).map_err(io::Error::from).context("change the attributes of", dir)
}

/// Gives `name` in `dir` the owner, mode, times and attributes of another directory.
fn take_attributes(from: &dyn Dir, dir: &Path, name: &str) -> Result<()> {
    let meta = from.meta()?;
    let parent = beneath::open_root(dir).context("open", dir)?;
    let name = OsStr::new(name);
    let give = || -> io::Result<()> {
        beneath::chown(&parent, name, meta.uid, meta.gid)?;
        let root = beneath::open_dir(&parent, name)?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(meta.mode))?;
        beneath::set_times(&parent, name, meta.atime, meta.mtime)
    };
    give().context("give the attributes of the snapshot to", dir.join(name))?;
    for (key, value) in from.own_xattrs()? {
        if !key.as_encoded_bytes().starts_with(b"trusted.overlay.") {
            beneath::set_xattr(&parent, name, &key, &value).context("give the attributes of the snapshot to", dir)?;
        }
    }
    Ok(())
}

fn make_private(dir: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).context("make the directory", dir)
}
