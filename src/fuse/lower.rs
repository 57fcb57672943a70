//! Opening what a copy-on-write tree begins with: one way, for who serves the tree and for who reads its snapshots later.

use std::path::Path;

use fsnap_backend::MountSpec;

use super::overlay::Below;
use crate::mount::{Error, Result, open};

/// Opens what a backend's recipe for a snapshot shows.
pub fn of_recipe(spec: MountSpec) -> Result<Below> {
    match spec {
        MountSpec::Tree(tree) => Ok(Below::Tree(tree)),
        spec => Ok(Below::Dir(open(&spec)?)),
    }
}

/// Opens a directory that a user has named.
pub fn of_dir(dir: &Path) -> Result<Below> {
    let resolved = dir.canonicalize();
    let dir =
        resolved.map_err(|source| Error::Io { action: "open", object: dir.into(), source, detail: String::new() })?;
    of_recipe(MountSpec::Bind { dir, read_only: true })
}
