//! Opening a directory as the lower of a copy-on-write tree.

use std::path::Path;

use fsnap_backend::MountSpec;
use rustix::fs::{CWD, Mode, OFlags};

use super::overlay::Below;
use super::session::Error;
use crate::mount::{Prepared, Restrictions};

/// Opens what a backend's recipe for a snapshot shows. What the kernel has to mount for it is attached nowhere.
pub(super) fn of_recipe(spec: MountSpec) -> Result<Below, Error> {
    match spec {
        MountSpec::Tree(tree) => Ok(Below::Tree(tree)),
        MountSpec::Bind { dir, .. } => open_lower(&dir),
        spec @ MountSpec::Mount { .. } => Ok(Below::Dir(Prepared::new(&spec, Restrictions::default())?.open()?)),
    }
}

/// Opens a directory so that nothing of it can change, access times included, and nothing that is mounted in it shows.
pub fn open_lower(lower: &Path) -> Result<Below, Error> {
    let failed = |source| Error::Io { action: "open", object: lower.into(), source };
    if rustix::process::geteuid().is_root() {
        let dir = std::path::absolute(lower).and_then(|dir| dir.canonicalize()).map_err(failed)?;
        let spec = MountSpec::Bind { dir, read_only: true };
        // The first user of it holds the mount; here it is a descriptor that only this process has.
        return Ok(Below::Dir(Prepared::new(&spec, Restrictions::default())?.open()?));
    }
    let opened = rustix::fs::openat(CWD, lower, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    Ok(Below::Dir(opened.map_err(|error| failed(error.into()))?))
}
