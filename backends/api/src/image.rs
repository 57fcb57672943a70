//! Volumes, snapshots, and what a store says of its images.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Identity, Locator};

/// A live, writable tree, opened and pinned.
///
/// The descriptor keeps naming the same tree whatever happens to the path. Only [`Backend::adopt`](crate::Backend::adopt)
/// makes one.
#[derive(Debug)]
pub struct Volume {
    dir: PathBuf,
    identity: Identity,
    descriptor: OwnedFd,
}

impl Volume {
    /// Pins the tree that `descriptor` (an open directory) stands for. For backends.
    pub fn new(dir: impl Into<PathBuf>, identity: Identity, descriptor: OwnedFd) -> Self {
        Self { dir: dir.into(), identity, descriptor }
    }

    /// The path it was adopted by; it may lead elsewhere by now.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the tree was when it was adopted.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

impl AsFd for Volume {
    /// The open directory at the root of the tree.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// A complete image of one volume that never changes.
///
/// A record, fit to be kept by the caller: it names the image and holds nothing open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Where it lives in its store.
    pub at: Locator,
    /// What it is: compared with what is found at `at` before each use.
    pub identity: Identity,
    /// What of the volume is not in it, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub omissions: Vec<Omission>,
}

/// Something of a volume that a snapshot does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Omission {
    /// The path below the volume's root; bytes that are not UTF-8 are escaped.
    pub path: String,
    /// What was not kept, and why.
    pub reason: String,
}

/// What a new image is made of.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A snapshot is to be made of this volume.
    Volume(&'a Volume),
    /// A clone is to be made of this snapshot.
    Snapshot(&'a Snapshot),
}

/// One image of a store, as [`Backend::list`](crate::Backend::list) found it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Image {
    /// Where it lives.
    pub at: Locator,
    /// Whether it can be written.
    pub kind: ImageKind,
    /// Whether it is whole.
    pub state: ImageState,
}

/// Whether an image can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ImageKind {
    /// It never changes.
    Snapshot,
    /// It was made by `clone_snapshot`.
    Volume,
}

/// Whether an image is whole, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ImageState {
    /// Complete and usable.
    Whole,
    /// Left by a call that was cut short; `snapshot` or `clone_snapshot` finishes it, `delete` removes it.
    Partial,
    /// Not made by fsnap: shown, never touched.
    Foreign,
}

/// One damaged thing that [`Backend::verify`](crate::Backend::verify) found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The path below the snapshot's root; empty for the image as a whole.
    pub path: OsString,
    /// What is wrong with it.
    pub what: String,
}
