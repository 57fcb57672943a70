//! Reads everything again and names what is damaged.

use super::Coordinator;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::failpoint;
use crate::progress::Work;

/// One damaged thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Where: the catalog, or a checkpoint, its volume and the path in it.
    pub place: String,
    /// What is wrong.
    pub what: String,
}

impl Coordinator {
    /// Verifies the catalog itself.
    pub fn verify_catalog(&self) -> Result<Vec<Finding>> {
        let found = self.catalog.verify()?;
        Ok(found.into_iter().map(|what| Finding { place: "the catalog".into(), what }).collect())
    }

    /// Verifies checkpoints, one after the other; one that is removed meanwhile lacks nothing.
    pub fn verify(&self, checkpoints: &[Checkpoint]) -> Vec<Finding> {
        let work = self.begin_work(Work::Verifying, checkpoints.len());
        failpoint::hit("verify:listed");
        let verify = |checkpoint| {
            let mut findings = self.verify_checkpoint(checkpoint);
            if !findings.is_empty() && self.is_removed(checkpoint) {
                findings.clear();
            }
            work.step();
            findings
        };
        checkpoints.iter().flat_map(verify).collect()
    }

    /// Whether the catalog has it no more. A removal leaves the catalog first, and takes away the snapshots then.
    fn is_removed(&self, checkpoint: &Checkpoint) -> bool {
        matches!(self.catalog.checkpoint(&checkpoint.id), Ok(None))
    }

    /// Verifies every member of a checkpoint; a member that cannot be read at all is a finding, too.
    fn verify_checkpoint(&self, checkpoint: &Checkpoint) -> Vec<Finding> {
        let mut findings = Vec::new();
        for member in &checkpoint.members {
            let place = format!("{}:{}", checkpoint.id.short(), member.volume);
            let verified = self.store(&member.store).and_then(|store| Ok(store.verify(&member.snapshot)?));
            match verified {
                Ok(damages) => findings.extend(damages.into_iter().map(|damage| Finding {
                    place: match damage.path.as_os_str() {
                        path if path.is_empty() => place.clone(),
                        path => format!("{place}/{}", crate::printable(path)),
                    },
                    what: damage.what,
                })),
                Err(error) => findings.push(Finding { place, what: error.to_string() }),
            }
        }
        for kept in &checkpoint.kept {
            if let Err(error) = self.read_kept(checkpoint, kept) {
                let place = format!("{}:{} (unlinked)", checkpoint.id.short(), kept.place.path);
                findings.push(Finding { place, what: error.to_string() });
            }
        }
        findings
    }
}
