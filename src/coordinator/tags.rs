//! Names that people give to checkpoints.

use super::Coordinator;
use crate::checkpoint::CheckpointId;
use crate::name::Name;
use crate::{Error, Result};

impl Coordinator {
    /// Fails with [`Error::NameTaken`] if one of the tags names a checkpoint already.
    pub fn refuse_taken(&self, tags: &[Name]) -> Result<()> {
        for tag in tags {
            if let Some(id) = self.catalog.tagged(tag)? {
                let by =
                    format!("it names checkpoint {}; choose another, or free it: `fsnap tag --delete`", id.short());
                return Err(Error::NameTaken { what: "the tag", name: tag.clone(), by: Some(by) });
            }
        }
        Ok(())
    }

    /// Lets the tag name the checkpoint, unless it names another and is not to be `moved`: that one is returned.
    ///
    /// If the checkpoint has been removed meanwhile, the tag stays as it is.
    pub fn tag(&self, tag: &Name, id: &CheckpointId, moved: bool) -> Result<Option<CheckpointId>> {
        match self.catalog.set_tag(tag, id, moved) {
            Err(_) if self.catalog.checkpoint(id)?.is_none() => {
                Err(Error::NoSuchCheckpoint { reference: id.to_string(), near: Vec::new() })
            }
            set => Ok(set?),
        }
    }

    /// Frees the tag; `false` if there was none of that name.
    pub fn untag(&self, tag: &Name) -> Result<bool> {
        Ok(self.catalog.remove_tag(tag)?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::catalog::{Access, Intent, PendingCheckpoint};
    use crate::checkpoint::Checkpoint;
    use crate::processes::AuditRules;

    /// Records a checkpoint of nothing.
    fn recorded(coordinator: &Coordinator) -> CheckpointId {
        let id = CheckpointId::random().unwrap();
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
        let (intent, lock) = coordinator.catalog.begin(&Intent::Checkpoint(Box::new(pending))).unwrap();
        let checkpoint = Checkpoint {
            id,
            parent: None,
            branch: None,
            time: jiff::Timestamp::now(),
            message: String::new(),
            engine: None,
            members: Vec::new(),
            pinned: false,
            kept: Vec::new(),
        };
        assert!(coordinator.catalog.seal(intent, &checkpoint, &[], None).unwrap());
        lock.finish();
        id
    }

    /// To take it from one and to give it to another is one step: who fails at the second has not done the first.
    #[test]
    fn a_tag_that_cannot_be_moved_stays() {
        let state = tempfile::tempdir().unwrap();
        let coordinator = Coordinator::open(state.path(), Access::Create, Duration::ZERO).unwrap();
        let (tag, [first, second]) = ("name".parse().unwrap(), [(), ()].map(|()| recorded(&coordinator)));
        assert_eq!(coordinator.tag(&tag, &first, false).unwrap(), None);
        coordinator.tag(&tag, &CheckpointId::random().unwrap(), true).unwrap_err();
        assert_eq!(coordinator.catalog.tagged(&tag).unwrap(), Some(first));
        assert_eq!(coordinator.tag(&tag, &second, false).unwrap(), Some(first));
        assert_eq!(coordinator.tag(&tag, &second, true).unwrap(), None);
        assert_eq!(coordinator.catalog.tagged(&tag).unwrap(), Some(second));
    }

    /// Somebody removes it between the look for it and this; the catalog said "FOREIGN KEY constraint failed".
    #[test]
    fn a_checkpoint_that_is_gone_is_told_so() {
        let state = tempfile::tempdir().unwrap();
        let coordinator = Coordinator::open(state.path(), Access::Create, Duration::ZERO).unwrap();
        let gone = CheckpointId::random().unwrap();
        for moved in [false, true] {
            let refused = coordinator.tag(&"name".parse().unwrap(), &gone, moved);
            assert!(matches!(refused, Err(Error::NoSuchCheckpoint { .. })), "{refused:?}");
        }
    }
}
