//! Where a tree is served from, and where it is shown: the one must neither hide nor change the other.
//!
//! A server that looks for its own files beneath its own mount waits for itself. What only paths tell is told here; who binds
//! one directory into another has to know what he does.

use std::path::{Path, PathBuf};

use super::session::Error;

/// Refuses to mount on `dir` if any of `needed`, which lie below what is served, would be out of sight then.
pub fn check_shown(dir: &Path, needed: impl IntoIterator<Item = PathBuf>) -> Result<(), Error> {
    let dir = real(dir);
    match needed.into_iter().find(|path| real(path).starts_with(&dir)) {
        Some(hidden) => Err(Error::Hides { dir, hidden }),
        None => Ok(()),
    }
}

/// Refuses a store that is a part of what it is to keep the changes of, or the other way round.
pub fn check_apart(lower: &Path, store: &Path) -> Result<(), Error> {
    let (below, kept) = (real(lower), real(store));
    if kept.starts_with(&below) || below.starts_with(&kept) {
        return Err(Error::NotApart { lower: lower.to_owned(), store: store.to_owned() });
    }
    Ok(())
}

/// The path without links; what is not there, and what a killed server has left, has the name that was given.
fn real(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let found = absolute.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    // Name by name: to join with nothing would add a slash.
    found
        .and_then(|(above, real)| {
            Some(real.components().chain(absolute.strip_prefix(above).ok()?.components()).collect())
        })
        .unwrap_or(absolute)
}
