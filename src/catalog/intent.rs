//! Changes of the outside world, recorded before they are made.

use fsnap_backend::{Consistency, Identity, Locator, Snapshot};
use serde::{Deserialize, Serialize};

use super::SearchAnswer;
use crate::checkpoint::{CheckpointId, EngineImages, Member, OtherWriters, PathText};
use crate::name::Name;
use crate::processes::{AuditRules, ProcessId, TreeRecord};
use crate::quiesce::FreezeRecord;
use crate::unlinked::KeptFile;
use crate::volume::StoreRecord;

/// The number of an intent; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IntentId(pub(super) i64);

impl std::fmt::Display for IntentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A change that was begun: whoever finds it finishes or undoes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Intent {
    /// Snapshots are being taken.
    Checkpoint(Box<PendingCheckpoint>),
    /// Clones are being made for a branch; undone unless the branch is recorded, or every clone has outlived the boot.
    Branch {
        /// The branch's name.
        name: Name,
        /// The boot during which it was begun.
        #[serde(default)]
        boot: String,
        /// Where the clones will be, and the snapshots below overlays.
        images: Vec<ImageRef>,
        /// The directories of what is mounted for it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        overlays: Vec<PathText>,
        /// The checkpoint that it grows from; not known of one that an earlier release began.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        checkpoint: Option<CheckpointId>,
    },
    /// Images that nothing needs are being deleted; always finished.
    Remove {
        /// The boot during which it was begun.
        #[serde(default)]
        boot: String,
        /// The images that may still be there.
        images: Vec<ImageRef>,
        /// The directories of what may still be mounted, or lie there.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        overlays: Vec<PathText>,
        /// Where files without names may still be kept.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rooms: Vec<RoomRef>,
    },
}

impl Intent {
    /// The images that the change makes or removes.
    pub fn images(&self) -> Vec<ImageRef> {
        match self {
            Self::Checkpoint(pending) => pending.members.iter().map(PlannedMember::image).collect(),
            Self::Branch { images, .. } | Self::Remove { images, .. } => images.clone(),
        }
    }

    /// The boot during which it was begun; empty if nobody knows.
    pub fn boot(&self) -> &str {
        match self {
            Self::Checkpoint(pending) => &pending.boot,
            Self::Branch { boot, .. } | Self::Remove { boot, .. } => boot,
        }
    }

    /// A removal that begins now.
    pub(super) fn removal(doomed: &Doomed) -> Self {
        let Doomed { images, overlays, rooms } = doomed.clone();
        Self::Remove { boot: crate::boot_id().unwrap_or_default(), images, overlays, rooms }
    }

    /// Where the change may keep files without names, or removes them.
    pub fn rooms(&self) -> Vec<RoomRef> {
        match self {
            Self::Checkpoint(pending) => pending.rooms(),
            Self::Branch { .. } => Vec::new(),
            Self::Remove { rooms, .. } => rooms.clone(),
        }
    }

    /// The directories of what the change mounts or unmounts.
    pub fn overlays(&self) -> Vec<PathText> {
        match self {
            Self::Checkpoint(_) => Vec::new(),
            Self::Branch { overlays, .. } | Self::Remove { overlays, .. } => overlays.clone(),
        }
    }
}

/// What nothing needs any more.
#[derive(Debug, Clone, Default)]
pub struct Doomed {
    /// Images of stores.
    pub images: Vec<ImageRef>,
    /// Directories of overlays and of mount points.
    pub overlays: Vec<PathText>,
    /// Where files without names are kept.
    pub rooms: Vec<RoomRef>,
}

/// Where files without names are kept for a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RoomRef {
    /// The store; `None`: the state directory.
    pub store: Option<Identity>,
    /// The checkpoint.
    pub checkpoint: CheckpointId,
}

/// An image of some store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageRef {
    /// The store.
    pub store: Identity,
    /// Where in the store.
    pub at: Locator,
}

/// A checkpoint from its beginning until it is sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingCheckpoint {
    /// The id that it will have.
    pub id: CheckpointId,
    /// The line of work: a branch, or the volumes themselves.
    pub branch: Option<Name>,
    /// What the user said of it.
    pub message: String,
    /// Tags to be set when it is sealed.
    pub tags: Vec<Name>,
    /// The engine's image directory.
    pub engine: Option<EngineImages>,
    /// The engine's process: while it lives, the checkpoint is its business. `None`: fsnap itself, which holds the
    /// intent's lock.
    pub owner: Option<ProcessId>,
    /// The root of the process tree.
    pub tree: Option<ProcessId>,
    /// The boot during which it began: what was written after that survives in another boot only if it was synced.
    pub boot: String,
    /// What was stopped by fsnap, to be set running again by whoever finds this.
    pub freeze: Option<FreezeRecord>,
    /// Where each member's snapshot will be.
    pub members: Vec<PlannedMember>,
    /// The snapshot is of a past state.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// What is done about what the processes can write to besides.
    #[serde(default)]
    pub audit: AuditRules,
    /// The engine was told to leave files out of its images: what they hold has to be kept, or there is no checkpoint.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub external: bool,
}

impl PendingCheckpoint {
    /// Where files without names may be kept for it.
    pub fn rooms(&self) -> Vec<RoomRef> {
        if self.tree.is_none() && self.freeze.is_none() {
            return Vec::new();
        }
        let stores: std::collections::BTreeSet<_> = self.members.iter().map(|member| &member.store).collect();
        let room = |store| RoomRef { store, checkpoint: self.id };
        stores.into_iter().cloned().map(Some).chain([None]).map(room).collect()
    }
}

/// One volume's part in a checkpoint that was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMember {
    /// The volume's name.
    pub volume: Name,
    /// Where its files are.
    pub path: PathText,
    /// What it is.
    pub identity: Identity,
    /// The backend's name.
    pub backend: String,
    /// The store that will hold the snapshot.
    pub store: Identity,
    /// Where the snapshot will be.
    pub at: Locator,
    /// Images below the snapshot, without which it could not be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<ImageRef>,
}

impl PlannedMember {
    /// The image that it will be.
    pub fn image(&self) -> ImageRef {
        ImageRef { store: self.store.clone(), at: self.at.clone() }
    }

    /// What became of it: its snapshot, of that consistency, and who else was writing.
    pub fn taken(&self, snapshot: Snapshot, consistency: Consistency, writers: OtherWriters) -> Member {
        Member {
            volume: self.volume.clone(),
            path: self.path.clone(),
            identity: self.identity.clone(),
            backend: self.backend.clone(),
            store: self.store.clone(),
            consistency,
            snapshot,
            needs: self.needs.clone(),
            writers: writers.texts,
            seen_writers: writers.seen,
        }
    }
}

/// What the frozen window needs to know, kept beside the catalog so that nothing is asked of a database in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The checkpoint, as its intent has it.
    pub pending: PendingCheckpoint,
    /// The stores of its members.
    pub stores: Vec<StoreRecord>,
}

/// What the frozen window left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// When.
    pub time: jiff::Timestamp,
    /// Every member, with its snapshot.
    pub members: Vec<Member>,
    /// Whether a search for other writers had yet to end. Until its answer is known, no member is a point in time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub searching: bool,
    /// The processes, if they were looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<TreeRecord>,
    /// The files that had no name any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<KeptFile>,
}

impl Taken {
    /// Brings in what the search for writers found; `None` if it ended without an answer.
    pub fn tell(&mut self, answer: Option<SearchAnswer>) {
        let fits = |answer: &SearchAnswer| self.searching && answer.writers.len() == self.members.len();
        let Some(SearchAnswer { writers, tree }) = answer.filter(fits) else { return };
        self.searching = false;
        self.tree = tree;
        for (member, writers) in self.members.iter_mut().zip(writers) {
            if writers.texts.is_empty() {
                member.consistency = Consistency::PointInTime;
            }
            (member.writers, member.seen_writers) = (writers.texts, writers.seen);
        }
    }
}
