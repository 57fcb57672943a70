//! A checkpoint: snapshots of several volumes, taken at one instant, with the process image they belong to.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use fsnap_backend::{Consistency, Identity, Snapshot};
use serde::{Deserialize, Serialize};

use crate::catalog::{ImageRef, RoomRef};
use crate::name::Name;
use crate::processes::Via;
use crate::unlinked::KeptFile;

/// Names one checkpoint for ever: 128 random bits, written as 32 hexadecimal digits.
///
/// Random, not ordered by time, so that a prefix of a few digits tells checkpoints of one day apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CheckpointId([u8; 16]);

impl CheckpointId {
    /// Makes an id that no other checkpoint has.
    pub fn random() -> std::io::Result<Self> {
        Ok(Self(crate::random_bytes()?))
    }

    /// The first 12 digits, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl fmt::Debug for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CheckpointId({self})")
    }
}

impl FromStr for CheckpointId {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, hex::FromHexError> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for CheckpointId {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, hex::FromHexError> {
        text.parse()
    }
}

impl From<CheckpointId> for String {
    fn from(id: CheckpointId) -> String {
        id.to_string()
    }
}

/// A sealed checkpoint, as the catalog records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its id.
    pub id: CheckpointId,
    /// The checkpoint before it on the same line of work.
    pub parent: Option<CheckpointId>,
    /// The branch it was taken on; `None` for the volumes themselves.
    pub branch: Option<Name>,
    /// When its snapshots were taken. For people only: order goes by the catalog's sequence, never by time.
    pub time: jiff::Timestamp,
    /// What the user said of it; empty if nothing.
    #[serde(default)]
    pub message: String,
    /// The engine whose process image belongs to it.
    pub engine: Option<EngineImages>,
    /// One snapshot per volume, sorted by the volume's name.
    pub members: Vec<Member>,
    /// It is of a state that was past already when it was recorded: no next checkpoint comes after it, and it is not the
    /// latest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// The files in use that had no name any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<KeptFile>,
}

impl Checkpoint {
    /// Where the contents of files without names are kept.
    pub(crate) fn rooms(&self) -> Vec<RoomRef> {
        let stores: BTreeSet<_> = self.kept.iter().map(|kept| kept.store.clone()).collect();
        stores.into_iter().map(|store| RoomRef { store, checkpoint: self.id }).collect()
    }

    /// What is kept of a file that a process had in use, whose device and inode those are.
    pub fn kept(&self, device: u64, inode: u64) -> Option<&KeptFile> {
        self.kept.iter().find(|kept| (kept.device, kept.inode) == (device, inode))
    }
}

/// Where an engine keeps the process image of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineImages {
    /// The engine's name, such as `criu`.
    pub name: String,
    /// The image directory.
    pub images: PathText,
}

/// One volume's part in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The volume's name.
    pub volume: Name,
    /// Where the volume's files were.
    pub path: PathText,
    /// What the volume was.
    pub identity: Identity,
    /// The backend's name.
    pub backend: String,
    /// The store that holds the snapshot.
    pub store: Identity,
    /// What the snapshot is, seen by those who wrote while it was taken.
    pub consistency: Consistency,
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Images below the snapshot, without which it cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<ImageRef>,
    /// Who had files of the volume open for writing and was not frozen, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub writers: Vec<String>,
    /// The first of them by their parts; none in records of an earlier fsnap, which reads the words only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seen_writers: Vec<SeenWriter>,
}

/// A process that had a file open for writing and was not frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenWriter {
    /// The process.
    pub pid: i32,
    /// Its name.
    pub command: String,
    /// In what way.
    #[serde(flatten)]
    pub via: Via,
    /// The file, in the words of its own mount namespace.
    pub path: PathText,
}

/// The writers found for one volume, in words, and the first of them by their parts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OtherWriters {
    /// All of them.
    pub texts: Vec<String>,
    /// Those that were seen.
    pub seen: Vec<SeenWriter>,
}

impl OtherWriters {
    /// What can be said without having seen one.
    pub fn in_words(text: String) -> Self {
        Self { texts: vec![text], seen: Vec::new() }
    }
}

/// A path of any bytes, kept exactly in JSON: as text where it is UTF-8, as `{"hex": …}` where it is not.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "PathRecord", into = "PathRecord")]
pub struct PathText(pub PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PathRecord {
    Text(String),
    Bytes { hex: HexBytes },
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct HexBytes(Vec<u8>);

impl TryFrom<String> for HexBytes {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, hex::FromHexError> {
        hex::decode(text).map(Self)
    }
}

impl From<HexBytes> for String {
    fn from(bytes: HexBytes) -> String {
        hex::encode(bytes.0)
    }
}

impl From<PathRecord> for PathText {
    fn from(record: PathRecord) -> Self {
        Self(match record {
            PathRecord::Text(text) => text.into(),
            PathRecord::Bytes { hex } => OsString::from_vec(hex.0).into(),
        })
    }
}

impl From<PathText> for PathRecord {
    fn from(path: PathText) -> Self {
        match path.0.into_os_string().into_string() {
            Ok(text) => Self::Text(text),
            Err(bytes) => Self::Bytes { hex: HexBytes(bytes.as_bytes().to_vec()) },
        }
    }
}

impl PathText {
    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for PathText {
    /// Shows the path so that no name in it can speak to a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&crate::printable(self.0.as_os_str()))
    }
}

impl fmt::Debug for PathText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_any_bytes_survives_json() {
        for bytes in [&b"/srv/db"[..], b"/srv/\xff\n", b"/srv/\"q\""] {
            let path = PathText(OsString::from_vec(bytes.to_vec()).into());
            let json = serde_json::to_string(&path).unwrap();
            assert_eq!(serde_json::from_str::<PathText>(&json).unwrap(), path, "{json}");
        }
    }

    #[test]
    fn an_id_is_read_back_and_garbage_is_not() {
        let id = CheckpointId::random().unwrap();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().starts_with(&id.short()));
        for bad in ["", "abcd", "../../etc/passwd", &"g".repeat(32), &"a".repeat(34)] {
            assert!(bad.parse::<CheckpointId>().is_err(), "{bad:?} was accepted");
        }
    }
}
