//! A catalog with many checkpoints, for tests and benchmarks of what their number must not cost.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use fsnap::catalog::{Access, Catalog, Intent, PendingCheckpoint};
use fsnap::checkpoint::{Checkpoint, CheckpointId, Member};
use fsnap::processes::AuditRules;

/// Records copies of the newest checkpoint, each the parent of the next; `change` may change the members of each.
pub(crate) fn record_copies(
    state: &Path,
    count: usize,
    mut change: impl FnMut(usize, &mut Member) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let catalog = Catalog::open(state, Access::Write, Duration::from_secs(10))?;
    let mut last = catalog.latest()?.ok_or("there is no checkpoint to copy")?;
    for number in 0..count {
        let id = CheckpointId::random()?;
        let pending = PendingCheckpoint {
            id,
            branch: None,
            message: String::new(),
            tags: Vec::new(),
            engine: None,
            owner: None,
            tree: None,
            boot: String::new(),
            freeze: None,
            members: Vec::new(),
            pinned: false,
            audit: AuditRules::default(),
            external: false,
        };
        let (intent, lock) = catalog.begin(&Intent::Checkpoint(Box::new(pending)))?;
        let mut members = last.members.clone();
        members.iter_mut().try_for_each(|member| change(number, member))?;
        last = Checkpoint { id, parent: Some(last.id), members, ..last };
        if !catalog.seal(intent, &last, &[], None)? {
            return Err("somebody else finished the intent".into());
        }
        lock.finish();
    }
    Ok(())
}
