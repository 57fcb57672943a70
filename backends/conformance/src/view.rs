//! Carries out a recipe, so that an activated image can be read and written.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Dir, IoContext, MountSpec};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::Listing;
use crate::failure::Verdict;

/// The files of an activated image, visible until dropped.
#[derive(Debug)]
pub enum View {
    /// They lie in a directory.
    At(PathBuf),
    /// They are mounted on a directory of their own.
    Mounted(MountPoint),
    /// They can only be read through the contract; there is nothing that could be written.
    Tree(Arc<dyn Dir>),
}

impl View {
    /// Carries out `spec`. A read-only bind needs privileges; without them the directory is looked at where it lies.
    pub fn carry_out(spec: &MountSpec) -> fsnap_backend::Result<Self> {
        match spec {
            MountSpec::Bind { dir, read_only } if *read_only && is_root() => {
                Ok(Self::Mounted(MountPoint::bind_read_only(dir).context("bind", dir)?))
            }
            MountSpec::Bind { dir, .. } => Ok(Self::At(dir.clone())),
            MountSpec::Mount { fstype, source, options, read_only } => {
                let mount = |target: &Path| {
                    let flags = MountFlags::NODEV | MountFlags::NOSUID;
                    let flags = if *read_only { flags | MountFlags::RDONLY } else { flags };
                    let options = std::ffi::CString::new(options.as_str())?;
                    Ok(rustix::mount::mount(source, target, fstype.as_str(), flags, options.as_c_str())?)
                };
                Ok(Self::Mounted(MountPoint::new(mount).context("mount", source)?))
            }
            MountSpec::Tree(tree) => Ok(Self::Tree(tree.clone())),
        }
    }

    /// Where the files are, if they have a path.
    pub fn dir(&self) -> Option<&Path> {
        match self {
            Self::At(dir) => Some(dir),
            Self::Mounted(mounted) => Some(mounted.dir.path()),
            Self::Tree(_) => None,
        }
    }

    /// Reads everything.
    pub fn listing(&self) -> Verdict<Listing> {
        match self {
            Self::Tree(tree) => Listing::read(&**tree),
            Self::At(dir) => Listing::of(dir),
            Self::Mounted(mounted) => Listing::of(mounted.dir.path()),
        }
    }
}

/// A mount on a directory of its own; both are gone when dropped.
#[derive(Debug)]
pub struct MountPoint {
    dir: tempfile::TempDir,
}

impl MountPoint {
    fn new(mount: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("fsnap-view-").tempdir()?;
        mount(dir.path())?;
        Ok(Self { dir })
    }

    fn bind_read_only(source: &Path) -> io::Result<Self> {
        let mounted = Self::new(|target| Ok(rustix::mount::mount_bind(source, target)?))?;
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount_remount(mounted.dir.path(), flags, "")?;
        Ok(mounted)
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        // Nothing can be reported from here; what stays mounted goes with the suite's mount namespace.
        let _ = rustix::mount::unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

/// Gives this process a mount namespace of its own, so that no mount of the suite outlives it, however it ends.
///
/// Does nothing without the privilege. Requires that the process has one thread only.
pub(crate) fn isolate_mounts() -> io::Result<()> {
    if is_root() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private)?;
    }
    Ok(())
}

/// Whether the suite can mount, change owners and make device nodes.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
