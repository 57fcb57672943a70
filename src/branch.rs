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
    /// Where that lives in the store: the clone, or the snapshot below.
    pub at: Locator,
    /// Where its files can be read and written.
    pub path: PathText,
    /// What it is, for comparison before each use.
    pub identity: Identity,
    /// Where the volume's files were when the checkpoint was taken: a restored process finds the branch there.
    pub origin: PathText,
    /// What it is made of.
    #[serde(flatten)]
    pub form: Form,
    /// Images below the snapshot that it is laid over, without which it cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<ImageRef>,
}

/// What a writable volume of a branch is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredForm", into = "StoredForm")]
pub enum Form {
    /// A clone that is a directory of its store: nothing has to be done for it to be seen.
    Clone,
    /// A clone that is a file system of its own; the directory holds its mount point.
    MountedClone(PathText),
    /// The kernel's overlay over a snapshot, for a store that cannot clone.
    Overlay(Difference),
    /// Layers over a snapshot, written through `fsnap mount`.
    Layers(Difference),
}

/// How a [`Form`] stands in the record: at most one of these is there.
#[derive(Default, Serialize, Deserialize)]
struct StoredForm {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    overlay: Option<Difference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layers: Option<Difference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    home: Option<PathText>,
}

impl TryFrom<StoredForm> for Form {
    type Error = &'static str;

    fn try_from(stored: StoredForm) -> Result<Self, Self::Error> {
        match (stored.overlay, stored.layers, stored.home) {
            (None, None, None) => Ok(Self::Clone),
            (None, None, Some(home)) => Ok(Self::MountedClone(home)),
            (Some(overlay), None, None) => Ok(Self::Overlay(overlay)),
            (None, Some(layers), None) => Ok(Self::Layers(layers)),
            _ => Err("a volume of a branch is made in one way: by an overlay, by layers, or as a clone with a home"),
        }
    }
}

impl From<Form> for StoredForm {
    fn from(form: Form) -> Self {
        let mut stored = Self::default();
        match form {
            Form::Clone => {}
            Form::MountedClone(home) => stored.home = Some(home),
            Form::Overlay(overlay) => stored.overlay = Some(overlay),
            Form::Layers(layers) => stored.layers = Some(layers),
        }
        stored
    }
}

/// What differs from a snapshot that is not written, and is kept beside it: the two make one writable volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
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
    /// The directories of what is kept or mounted for it: of its overlays and layers, and of the mount points of its clones.
    pub fn homes(&self) -> Vec<PathText> {
        self.members.iter().filter_map(|member| member.form.home().cloned()).collect()
    }
}

impl Form {
    /// The directory of what is kept beside the snapshot, or of the mount point, if there is either.
    fn home(&self) -> Option<&PathText> {
        match self {
            Self::Clone => None,
            Self::MountedClone(home) => Some(home),
            Self::Overlay(kept) | Self::Layers(kept) => Some(&kept.dir),
        }
    }

    /// What is kept beside a snapshot that the volume is laid over, in either way; `None` for a clone.
    pub fn over_snapshot(&self) -> Option<&Difference> {
        match self {
            Self::Clone | Self::MountedClone(_) => None,
            Self::Overlay(kept) | Self::Layers(kept) => Some(kept),
        }
    }

    /// The kernel's overlay, if it is one.
    pub fn overlay(&self) -> Option<&Difference> {
        match self {
            Self::Overlay(overlay) => Some(overlay),
            Self::Clone | Self::MountedClone(_) | Self::Layers(_) => None,
        }
    }

    /// The layers, if it is written through `fsnap mount`.
    pub fn layers(&self) -> Option<&Difference> {
        match self {
            Self::Layers(layers) => Some(layers),
            Self::Clone | Self::MountedClone(_) | Self::Overlay(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The record of a member of that form, as catalogs hold it: `form` is a part of its JSON.
    fn stored(form: &str) -> String {
        let common = r#""volume":"data","backend":"btrfs","store":"btrfs:5c7e","at":"data-0e25","path":"/v/files","identity":"btrfs:5c7e:257","origin":"/v""#;
        format!("{{{common}{form}}}")
    }

    const KEPT: &str = r#"{"dir":"/b/try/data","keeper":{"backend":"rsync","store":"rsync:77"}}"#;

    #[test]
    fn records_of_every_form_are_read_and_written_as_they_stand_in_catalogs() {
        let kept = || {
            let keeper = Keeper { backend: "rsync".into(), store: Identity::new("rsync:77") };
            Difference { dir: PathText("/b/try/data".into()), keeper: Some(keeper) }
        };
        let unkept = Difference { keeper: None, ..kept() };
        for (text, form, needs) in [
            (String::new(), Form::Clone, 0),
            (r#","home":"/b/try/data""#.into(), Form::MountedClone(PathText("/b/try/data".into())), 0),
            (format!(r#","overlay":{KEPT}"#), Form::Overlay(kept()), 0),
            (format!(r#","layers":{KEPT},"needs":[{{"store":"rsync:77","at":"12"}}]"#), Form::Layers(kept()), 1),
            (r#","layers":{"dir":"/b/try/data","keeper":null}"#.into(), Form::Layers(unkept), 0),
        ] {
            let text = stored(&text);
            let member: BranchMember = serde_json::from_str(&text).unwrap();
            assert_eq!((&member.form, member.needs.len()), (&form, needs), "{text}");
            assert_eq!(serde_json::to_string(&member).unwrap(), text);
        }
    }

    #[test]
    fn a_record_of_two_forms_is_refused() {
        for form in [format!(r#","overlay":{KEPT},"layers":{KEPT}"#), format!(r#","overlay":{KEPT},"home":"/b""#)] {
            let error = serde_json::from_str::<BranchMember>(&stored(&form)).unwrap_err();
            assert!(error.to_string().contains("made in one way"), "{error}");
        }
    }
}
