//! The JSON that `--json` prints: a promise to programs, so that each field is spelled out here.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fsnap::branch::Branch;
use fsnap::checkpoint::{Checkpoint, SeenWriter};
use fsnap::coordinator::{Audit, Shown};
use fsnap::name::Name;
use fsnap::processes::{FilePlace, OpenFile, Outside, ProcessChange, ProcessRecord, TreeRecord, Via};
use serde_json::{Value, json};

use super::rfc3339;

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
                "writers": writers(&member.writers, &member.seen_writers),
                "omissions": member.snapshot.omissions,
            });
            with_path(object, "path", member.path.as_path())
        }).collect::<Vec<_>>(),
        "unlinked": checkpoint.kept.iter().map(|kept| {
            let object = json!({
                "inode": kept.inode,
                "size": kept.attributes.size,
                "kept": kept.lost.is_none(),
                "reason": kept.lost,
                "external": kept.external,
            });
            with_path(object, "path", kept.place.path.as_path())
        }).collect::<Vec<_>>(),
    })
}

/// Adds what the processes could write to besides, if they were looked at.
pub(crate) fn add_outside(object: &mut Value, tree: Option<&TreeRecord>) {
    if let Some(tree) = tree {
        object["outside"] = tree.outside.iter().map(outside).collect();
        object["ignored"] = json!(tree.ignored);
    }
}

/// Who else wrote to a volume. Of what is known in words only, there is nothing but the words.
fn writers(texts: &[String], seen: &[SeenWriter]) -> Value {
    let writer = |(index, text): (usize, &String)| {
        let Some(seen) = seen.get(index) else { return json!({ "text": text }) };
        let (via, fd) = via(seen.via);
        let object = json!({ "pid": seen.pid, "command": seen.command, "via": via, "fd": fd, "text": text });
        with_path(object, "path", seen.path.as_path())
    };
    texts.iter().enumerate().map(writer).collect()
}

fn via(via: Via) -> (&'static str, Option<i32>) {
    match via {
        Via::Descriptor { fd } => ("descriptor", Some(fd)),
        Via::Mapping => ("mapping", None),
        Via::Socket { fd } => ("socket", Some(fd)),
        Via::Mount => ("mount", None),
    }
}

fn outside(outside: &Outside) -> Value {
    let (via, fd) = via(outside.via);
    let object = json!({
        "pid": outside.pid,
        "command": outside.command,
        "via": via,
        "fd": fd,
        "file_system": outside.file_system,
        "medium": outside.medium,
        "unlinked": outside.unlinked,
    });
    with_path(object, "path", outside.path.as_path())
}

/// What `audit --json` prints.
pub(crate) fn audit(audit: &Audit) -> Value {
    let mut object = json!({
        "volumes": audit.volumes.iter().map(|(target, writers)| {
            let object = json!({ "volume": target.volume, "branch": target.branch, "writers": self::writers(&writers.texts, &writers.seen) });
            with_path(object, "path", target.path.as_path())
        }).collect::<Vec<_>>(),
        "refused": audit.objection.is_some(),
    });
    add_outside(&mut object, Some(&audit.tree));
    object
}

/// The processes of a checkpoint, as `show --processes --json` prints them.
pub(crate) fn processes(tree: &TreeRecord) -> Value {
    tree.processes.iter().map(process).collect()
}

fn process(process: &ProcessRecord) -> Value {
    json!({
        "pid": process.pid,
        "parent": process.parent,
        "command": process.command,
        "arguments": process.arguments.iter().map(|argument| argument.0.to_string_lossy()).collect::<Vec<_>>(),
        "cwd": process.cwd.as_ref().map(|place| with_place(json!({}), place)),
        "root": process.root.as_ref().map(|place| with_place(json!({}), place)),
        "program": process.program.as_ref().map(|place| with_place(json!({}), place)),
        "files": process.files.iter().map(file).collect::<Vec<_>>(),
        "mapped": process.mapped.iter().map(|file| {
            let object = json!({ "shared": file.shared, "writable": file.writable, "inode": file.inode });
            with_place(object, &file.place)
        }).collect::<Vec<_>>(),
        "unread": process.unread,
    })
}

/// One element of what `diff --processes --json` prints.
pub(crate) fn process_change(change: &ProcessChange<'_>) -> Value {
    let (kind, process) = match change {
        ProcessChange::Started(process) => ("started", process),
        ProcessChange::Ended(process) => ("ended", process),
        ProcessChange::Opened(process, _) => ("opened", process),
        ProcessChange::Closed(process, _) => ("closed", process),
        ProcessChange::Moved(process, _) => ("moved", process),
    };
    let mut object = json!({ "change": kind, "pid": process.pid, "command": process.command });
    match change {
        ProcessChange::Opened(_, opened) | ProcessChange::Closed(_, opened) => object["file"] = file(opened),
        ProcessChange::Moved(_, cwd) => object["cwd"] = with_place(json!({}), cwd),
        ProcessChange::Started(_) | ProcessChange::Ended(_) => {}
    }
    object
}

fn file(file: &OpenFile) -> Value {
    let object = json!({
        "fd": file.fd,
        "kind": file.kind,
        "access": file.access(),
        "flags": file.flags,
        "locked": file.locked,
        "offset": file.offset,
        "inode": file.inode,
    });
    with_place(object, &file.place)
}

fn with_place(object: Value, place: &FilePlace) -> Value {
    let mut object = with_path(object, "path", place.path.as_path());
    object["unlinked"] = json!(place.unlinked);
    if let Some(volume) = &place.volume {
        object["volume"] = json!(volume.name);
        object = with_path(object, "path_in_volume", volume.path.as_path());
    }
    object
}

/// A branch, as `branch --json` and each element of `branches --json` print it. What no mount shows has no path.
pub(crate) fn branch(shown: &Shown<'_>, branch: &Branch) -> Value {
    json!({
        "name": branch.name,
        "checkpoint": branch.checkpoint,
        "time": rfc3339(branch.time),
        "members": branch.members.iter().map(|member| {
            let object = json!({ "volume": member.volume, "path": null });
            match shown.files_of(branch, member) {
                Some(files) => with_path(object, "path", &files),
                None => object,
            }
        }).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_in_words_only_is_told_in_words() {
        let texts = ["7 (sh) has descriptor 3 open for writing: /f".to_owned(), "others perhaps".to_owned()];
        let seen: SeenWriter =
            serde_json::from_value(json!({ "pid": 7, "command": "sh", "via": "descriptor", "fd": 3, "path": "/f" }))
                .unwrap();
        let known = json!({ "pid": 7, "command": "sh", "via": "descriptor", "fd": 3, "path": "/f", "text": texts[0] });
        assert_eq!(writers(&texts, &[seen]), json!([known, { "text": texts[1] }]));
        // An earlier fsnap recorded nothing but words.
        assert_eq!(writers(&texts[..1], &[]), json!([{ "text": texts[0] }]));
    }
}
