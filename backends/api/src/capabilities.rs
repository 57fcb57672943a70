//! What an opened store can do, as data.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an opened store can do.
///
/// Callers and tests choose by these, never by a backend's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `clone_snapshot` works.
    pub clones: bool,
    /// A clone costs the same whatever the size of its snapshot.
    pub constant_time_clones: bool,
    /// Extended attributes are kept.
    pub xattrs: bool,
    /// POSIX ACLs are kept.
    pub acls: bool,
    /// Device nodes and other users' files are kept with their owners.
    pub ownership: bool,
    /// The kernel can mount a snapshot; without it, a snapshot is read through [`Dir`](crate::Dir) alone.
    pub mountable: bool,
    /// `verify` finds every changed byte of a file's content.
    pub verifies_contents: bool,
    /// The consistency of a snapshot that is taken while processes write to the volume.
    pub live: Consistency,
}

/// What a snapshot is, seen by those who wrote to the volume while it was taken. Ordered from weak to strong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// Each file is whole, but two files may be of different moments.
    Fuzzy,
    /// What a power cut at that instant could have left: buffered writes of running writers may be there in another
    /// order than they were made.
    CrashConsistent,
    /// One instant for all writers of the volume.
    PointInTime,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fuzzy => "fuzzy",
            Self::CrashConsistent => "crash-consistent",
            Self::PointInTime => "point-in-time",
        })
    }
}
