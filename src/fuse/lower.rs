//! Opening what a copy-on-write tree begins with: one way, for who serves the tree and for who reads its snapshots later.

use std::path::Path;

use fsnap_backend::{Backend, Locator, MountSpec};

use super::overlay::Below;
use crate::coordinator::activate;
use crate::mount::{Error, Result, open};

/// Activates a snapshot and opens it.
pub fn of_image(store: &dyn Backend, at: &Locator) -> crate::Result<Below> {
    match activate(store, at)? {
        (MountSpec::Tree(tree), _) => Ok(Below::Tree(tree)),
        (spec, _held) => Ok(Below::Dir(open(&spec)?)),
    }
}

/// Opens a directory that a user has named.
pub fn of_dir(dir: &Path) -> Result<Below> {
    let resolved = dir.canonicalize();
    let dir =
        resolved.map_err(|source| Error::Io { action: "open", object: dir.into(), source, detail: String::new() })?;
    Ok(Below::Dir(open(&MountSpec::Bind { dir, read_only: true })?))
}
