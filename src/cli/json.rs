//! The JSON that `--json` prints: a promise to programs, so that each field is spelled out here.

use fsnap::branch::Branch;
use fsnap::checkpoint::Checkpoint;
use fsnap::name::Name;
use serde_json::{Value, json};

use super::output::rfc3339;

/// A checkpoint, as `checkpoint --json`, `show --json` and each element of `log --json` print it.
pub(crate) fn checkpoint(checkpoint: &Checkpoint, tags: &[Name]) -> Value {
    json!({
        "id": checkpoint.id,
        "parent": checkpoint.parent,
        "branch": checkpoint.branch,
        "time": rfc3339(checkpoint.time),
        "message": checkpoint.message,
        "tags": tags,
        "engine": checkpoint.engine.as_ref().map(|engine| json!({
            "name": engine.name,
            "images": engine.images.as_path().to_string_lossy(),
        })),
        "members": checkpoint.members.iter().map(|member| json!({
            "volume": member.volume,
            "backend": member.backend,
            "consistency": member.consistency,
            "snapshot": member.snapshot.at,
            "path": member.path.as_path().to_string_lossy(),
            "writers": member.writers,
            "omissions": member.snapshot.omissions,
        })).collect::<Vec<_>>(),
    })
}

/// A branch, as `branch --json` and each element of `branches --json` print it.
pub(crate) fn branch(branch: &Branch) -> Value {
    json!({
        "name": branch.name,
        "checkpoint": branch.checkpoint,
        "time": rfc3339(branch.time),
        "members": branch.members.iter().map(|member| json!({
            "volume": member.volume,
            "path": member.path.as_path().to_string_lossy(),
        })).collect::<Vec<_>>(),
    })
}
