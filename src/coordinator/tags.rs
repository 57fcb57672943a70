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

    /// Lets the tag name the checkpoint, unless it names another: that one is returned.
    pub fn tag(&self, tag: &Name, id: &CheckpointId) -> Result<Option<CheckpointId>> {
        Ok(self.catalog.set_tag(tag, id)?)
    }

    /// Frees the tag; `false` if there was none of that name.
    pub fn untag(&self, tag: &Name) -> Result<bool> {
        Ok(self.catalog.remove_tag(tag)?)
    }
}
