//! A branch: a named writable line of work grown from a checkpoint.

use fsnap_backend::{Identity, Locator};
use serde::{Deserialize, Serialize};

use crate::catalog::ImageRef;
use crate::checkpoint::{CheckpointId, PathText};
use crate::name::Name;

/// A branch, as the catalog records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Its name.
    pub name: Name,
    /// The checkpoint it grew from.
    pub checkpoint: CheckpointId,
    /// When it was made; for people only.
    pub time: jiff::Timestamp,
    /// One writable volume per member of the checkpoint, sorted by the volume's name.
    pub members: Vec<BranchMember>,
}

/// One writable volume of a branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchMember {
    /// The name of the volume that it continues.
    pub volume: Name,
    /// The backend's name.
    pub backend: String,
    /// The store that holds it, or the snapshot below it.
    pub store: Identity,
    /// Where that lives in the store.
    pub at: Locator,
    /// Where its files can be read and written.
    pub path: PathText,
    /// What it is, for comparison before each use.
    pub identity: Identity,
    /// Where the volume's files were when the checkpoint was taken: a restored process finds the branch there.
    pub origin: PathText,
    /// How it is made where the store cannot clone; `at` is then the snapshot below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
    /// It is written through `fsnap mount`: where its layers are; `at` is then the snapshot below them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Overlay>,
    /// Images below that snapshot, without which it cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<ImageRef>,
    /// The directory that holds its mount point, where the store's clones have to be mounted to be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<PathText>,
}

/// A writable volume over a snapshot that is not written: what differs is kept beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The directory that holds what differs.
    pub dir: PathText,
    /// Who takes snapshots of the volume, for the snapshot's own backend cannot; `None` if no backend that takes any
    /// directory is compiled in.
    pub keeper: Option<Keeper>,
}

/// The store for snapshots of an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keeper {
    /// The backend's name.
    pub backend: String,
    /// The store.
    pub store: Identity,
}

impl Branch {
    /// The directories of what is kept or mounted for it: of its overlays, and of the mount points of its clones.
    pub fn homes(&self) -> Vec<PathText> {
        let layers = |member: &BranchMember| member.layers.as_ref().map(|layers| layers.dir.clone());
        self.members.iter().filter_map(|member| member.home().cloned().or_else(|| layers(member))).collect()
    }
}

impl BranchMember {
    /// The directory of its overlay or of its mount point, if it has either.
    pub fn home(&self) -> Option<&PathText> {
        self.overlay.as_ref().map(|overlay| &overlay.dir).or(self.home.as_ref())
    }
}
