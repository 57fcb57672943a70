//! Branches that are written through `fsnap mount`, copy-on-write, whatever keeps the snapshots below.
//!
//! Such a branch is a record and nothing else until somebody first looks at its files: the server that does it then makes the
//! directory that keeps what differs. So making one takes one transaction, on a tree of any size, and needs no intent: nothing
//! outside of the catalog has changed. The directory's name is never used twice, so that the removal of an earlier branch of the
//! same name, should it be finished late, cannot hit it.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use fsnap_backend::Identity;

use super::Coordinator;
use crate::branch::{Branch, BranchMember, Difference, Form, Keeper};
use crate::checkpoint::{Checkpoint, PathText};
use crate::name::Name;
use crate::stores::Kind;
use crate::volume::StoreRecord;
use crate::{Error, Result, failpoint};

/// What the mount calls the directory of branches.
const DIR: &str = "branches";

/// The backend that seals what is written to such a branch.
const LAYERS: &str = "layers";
const LAYERS_STORE: &str = ".layers";

impl Coordinator {
    /// Records the branch `name` of `checkpoint`, to be written through `fsnap mount`.
    pub fn branch_to_write(&self, checkpoint: &Checkpoint, name: &Name) -> Result<Branch> {
        self.branch_to_write_and_tell(checkpoint, name, &|_| {})
    }

    /// The same, and calls `on_record` when nothing is left to do but to record it.
    pub(super) fn branch_to_write_and_tell(
        &self,
        checkpoint: &Checkpoint,
        name: &Name,
        on_record: &dyn Fn(&Branch),
    ) -> Result<Branch> {
        if self.catalog.branch(name)?.is_some() {
            return Err(Error::NameTaken { what: "the branch", name: name.clone(), by: None });
        }
        let suffix = hex::encode(crate::random_bytes::<4>().map_err(|source| Error::Io {
            action: "make up a name for",
            object: name.to_string(),
            source,
        })?);
        let home = self.homes.join(name.as_str());
        let keeper = self.keeper_of_layers()?;
        let member = |member: &crate::checkpoint::Member| {
            let dir = home.join(format!("{}.{suffix}", member.volume));
            BranchMember {
                volume: member.volume.clone(),
                backend: member.backend.clone(),
                store: member.store.clone(),
                at: member.snapshot.at.clone(),
                path: PathText(dir.join("files")),
                identity: Identity::new(format!("{LAYERS}:{suffix}-{}", member.volume)),
                origin: member.path.clone(),
                form: Form::Layers(Difference { dir: PathText(dir), keeper: keeper.clone() }),
                needs: member.needs.clone(),
            }
        };
        let members = checkpoint.members.iter().map(member).collect();
        let branch = Branch { name: name.clone(), checkpoint: checkpoint.id, time: jiff::Timestamp::now(), members };
        on_record(&branch);
        failpoint::hit("branch:named");
        let added = self.catalog.add_unmade_branch(&branch)?;
        failpoint::hit("branch:recorded");
        if added { Ok(branch) } else { Err(self.why_no_branch(name, checkpoint)?) }
    }

    /// Makes the store for checkpoints of such branches, or opens it.
    fn keeper_of_layers(&self) -> Result<Option<Keeper>> {
        let Ok(kind) = Kind::named(LAYERS) else { return Ok(None) };
        let place = self.homes.join(LAYERS_STORE);
        let identity = match kind.open(&place) {
            Ok(store) => store.store().identity.clone(),
            Err(_) => kind.create(&place)?.store().identity.clone(),
        };
        let record = StoreRecord { identity, backend: LAYERS.to_owned(), place: PathText(place) };
        if self.catalog.store(&record.identity)?.as_ref() != Some(&record) {
            self.catalog.add_store(&record)?;
        }
        Ok(Some(Keeper { backend: record.backend, store: record.identity }))
    }

    /// What shows branches now.
    pub fn shown(&self) -> Shown<'_> {
        Shown { state: self.catalog.state(), mounts: OnceCell::new() }
    }
}

/// The mounts that show branches; looked up once, when a branch is asked for that only a mount can show.
#[derive(Debug)]
pub struct Shown<'a> {
    state: &'a Path,
    mounts: OnceCell<Vec<PathBuf>>,
}

impl Shown<'_> {
    /// Where the files of a branch's volume are: its own path, or below a mount.
    pub fn files_of(&self, branch: &Branch, member: &BranchMember) -> Option<PathBuf> {
        if member.form.layers().is_none() {
            return Some(member.path.0.clone());
        }
        let mounts = self.mounts.get_or_init(|| crate::mount::served(self.state).unwrap_or_default());
        let below = Self::in_mount(branch, member);
        mounts.last().map(|mount| mount.join(below.strip_prefix("/").unwrap_or(&below)))
    }

    /// The same within each mount, from its root on.
    pub(super) fn in_mount(branch: &Branch, member: &BranchMember) -> PathBuf {
        Path::new("/").join(DIR).join(branch.name.as_str()).join(member.volume.as_str())
    }
}
