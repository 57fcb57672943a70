//! What was seen of the processes of a checkpoint, in a table of its own: listings need not read it.

use rusqlite::{OptionalExtension, Transaction, params};

use super::query::encode;
use super::{Catalog, Result, format};
use crate::checkpoint::CheckpointId;
use crate::processes::TreeRecord;

impl Catalog {
    /// The processes of a checkpoint; `None` if nobody looked at them.
    pub fn tree(&self, id: &CheckpointId) -> Result<Option<TreeRecord>> {
        if !self.has_trees()? {
            return Ok(None);
        }
        let what = format!("the processes of checkpoint {id}");
        let query = "SELECT body, digest FROM tree WHERE checkpoint = ?1";
        let tree: Option<TreeRecord> = self.one(&what, query, [id.to_string()])?;
        match tree {
            Some(tree) if !tree.is_sound() => Err(self.damaged(format!(
                "the record of {what} leads out of a volume, or is of a later release: use the newer fsnap"
            ))),
            tree => Ok(tree),
        }
    }

    pub(super) fn add_tree_in(&self, tx: &Transaction<'_>, id: &CheckpointId, tree: &TreeRecord) -> Result<()> {
        // A catalog of an earlier release has no such table.
        tx.execute_batch(format::TREE_TABLE).map_err(|e| self.failed(e))?;
        let (body, digest) = encode(tree);
        tx.execute("INSERT INTO tree VALUES (?1, ?2, ?3)", params![id.to_string(), body, digest])
            .map_err(|e| self.failed(e))
            .map(drop)
    }

    pub(super) fn has_trees(&self) -> Result<bool> {
        let query = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'tree'";
        let found: Option<i64> =
            self.db.query_row(query, [], |row| row.get(0)).optional().map_err(|e| self.failed(e))?;
        Ok(found.is_some())
    }
}
