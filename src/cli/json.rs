//! The JSON that `--json` prints: a promise to programs, so that each field is spelled out here.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fsnap::branch::Branch;
use fsnap::checkpoint::Checkpoint;
use fsnap::coordinator::Coordinator;
use fsnap::name::Name;
use serde_json::{Value, json};

use super::output::rfc3339;

/// Puts a path into an object under `key`; a path that is not UTF-8 is exact only under `key_hex`.
pub(crate) fn with_path(mut object: Value, key: &str, path: &Path) -> Value {
    object[key] = json!(path.to_string_lossy());
    if path.to_str().is_none() {
        object[format!("{key}_hex")] = json!(hex::encode(path.as_os_str().as_bytes()));
    }
    object
}

/// A checkpoint, as `checkpoint --json`, `show --json` and each element of `log --json` print it.
pub(crate) fn checkpoint(checkpoint: &Checkpoint, tags: &[Name]) -> Value {
    json!({
        "id": checkpoint.id,
        "parent": checkpoint.parent,
        "branch": checkpoint.branch,
        "time": rfc3339(checkpoint.time),
        "message": checkpoint.message,
        "tags": tags,
        "engine": checkpoint.engine.as_ref().map(|engine| {
            with_path(json!({ "name": engine.name }), "images", engine.images.as_path())
        }),
        "members": checkpoint.members.iter().map(|member| {
            let object = json!({
                "volume": member.volume,
                "backend": member.backend,
                "consistency": member.consistency,
                "snapshot": member.snapshot.at,
                "writers": member.writers,
                "omissions": member.snapshot.omissions,
            });
            with_path(object, "path", member.path.as_path())
        }).collect::<Vec<_>>(),
    })
}

/// A branch, as `branch --json` and each element of `branches --json` print it. What no mount shows has no path.
pub(crate) fn branch(coordinator: &Coordinator, branch: &Branch) -> Value {
    json!({
        "name": branch.name,
        "checkpoint": branch.checkpoint,
        "time": rfc3339(branch.time),
        "members": branch.members.iter().map(|member| {
            let object = json!({ "volume": member.volume, "path": null });
            match coordinator.files_of(branch, member) {
                Some(files) => with_path(object, "path", &files),
                None => object,
            }
        }).collect::<Vec<_>>(),
    })
}
