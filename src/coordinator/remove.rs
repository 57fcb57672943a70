//! Removes checkpoints and branches.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use super::Coordinator;
use crate::catalog::{Doomed, IntentId, IntentLock, Removal};
use crate::checkpoint::{Checkpoint, CheckpointId, PathText};
use crate::failpoint;
use crate::name::Name;
use crate::{Error, Result, mount};

/// What has waited for restored processes lets go of their branch a moment after they have ended.
const LETTING_GO: Duration = Duration::from_secs(2);

impl Coordinator {
    /// Fails with [`Error::Needed`] if branches grew from one of these checkpoints.
    pub fn check_removable(&self, checkpoints: &[Checkpoint]) -> Result<()> {
        let branches = self.catalog.branches()?;
        for Checkpoint { id, .. } in checkpoints {
            let grown = branches.iter().filter(|branch| branch.checkpoint == *id);
            let by: Vec<Name> = grown.map(|branch| branch.name.clone()).collect();
            if !by.is_empty() {
                return Err(Error::Needed { id: *id, by });
            }
        }
        Ok(())
    }

    /// Removes a checkpoint; refused while branches that grew from it exist.
    pub fn remove_checkpoint(&self, id: &CheckpointId) -> Result<()> {
        let engine = self.catalog.checkpoint(id)?.and_then(|checkpoint| checkpoint.engine);
        match self.catalog.remove_checkpoint(id)? {
            Removal::Missing => Err(Error::NoSuchCheckpoint { reference: id.to_string(), near: Vec::new() }),
            Removal::Needed(by) => Err(Error::Needed { id: *id, by }),
            Removal::Begun(intent, lock, doomed) => {
                self.take_off_attached(id);
                self.finish_removal(intent, lock, &doomed)?;
                engine.map_or(Ok(()), |engine| crate::run::remove_images(self.catalog.state(), &engine.images))
            }
        }
    }

    /// Takes off what servers have attached of its snapshots. Who uses it keeps it, as the kernel would decide a moment later: it takes
    /// off by itself what is mounted below a name that is gone.
    fn take_off_attached(&self, id: &CheckpointId) {
        let below = Path::new("ids").join(id.to_string());
        for served in mount::mounts_of(self.catalog.state()).unwrap_or_default() {
            let _ = mount::take_off_attached(&served, &below, UnmountFlags::DETACH);
        }
    }

    /// Removes a branch and its files; refused while processes use them.
    ///
    /// Checkpoints that were taken on it stay.
    pub fn remove_branch(&self, name: &Name) -> Result<()> {
        let branch = self.catalog.branch(name)?.ok_or_else(|| self.no_such_branch(name))?;
        let start = Instant::now();
        loop {
            let users = self.users(&branch)?;
            if users.is_empty() {
                break;
            }
            if start.elapsed() > LETTING_GO {
                return Err(Error::BranchInUse { name: name.clone(), users: users.join(", ") });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(point) = self.mounted_in(&branch)? {
            return Err(Error::MountedInBranch { name: name.clone(), point: PathText(point) });
        }
        self.remove_unchanged_branch(name)
    }

    /// Removes a branch of which nobody would miss anything: who uses it is not asked.
    pub fn remove_unchanged_branch(&self, name: &Name) -> Result<()> {
        match self.catalog.remove_branch(name)? {
            Removal::Begun(intent, lock, doomed) => self.finish_removal(intent, lock, &doomed),
            Removal::Missing | Removal::Needed(_) => Err(self.no_such_branch(name)),
        }
    }

    fn finish_removal(&self, intent: IntentId, lock: IntentLock, doomed: &Doomed) -> Result<()> {
        failpoint::hit("remove:recorded");
        self.delete(doomed)?;
        failpoint::hit("remove:deleted");
        self.catalog.drop_intent(intent)?;
        lock.finish();
        Ok(())
    }

    /// The error for a branch that is not there, naming those that are.
    pub fn no_such_branch(&self, name: &Name) -> Error {
        let near = self.catalog.branches().unwrap_or_default();
        Error::NoSuchBranch {
            name: name.to_string(),
            near: near.iter().map(|branch| branch.name.to_string()).collect(),
        }
    }
}
