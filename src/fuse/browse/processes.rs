//! The processes of a checkpoint, as `/proc` would show them.
//!
//! What a process had in use is a link to where the file is in the same mount, if a volume has it, and else to what the kernel
//! said: as in `/proc`, a name that leads nowhere for what had none. A descriptor of a file without a name is that file, where its
//! content is kept.

use std::path::{Path, PathBuf};

use super::layout::Place;
use crate::checkpoint::{Checkpoint, CheckpointId};
use crate::processes::{FilePlace, OpenFile, ProcessRecord, TreeRecord};

pub(super) const CMDLINE: &str = "cmdline";

/// One entry for each process.
pub(super) fn all(id: &CheckpointId, tree: &TreeRecord) -> Vec<(String, Place)> {
    tree.processes.iter().map(|process| (process.pid.to_string(), Place::Process(*id, process.pid))).collect()
}

/// What the directory of a process has.
pub(super) fn one(id: &CheckpointId, process: &ProcessRecord) -> Vec<(String, Place)> {
    let mut found = vec![(CMDLINE.to_owned(), Place::CommandLine(*id, process.pid))];
    for (name, place) in [("cwd", &process.cwd), ("exe", &process.program), ("root", &process.root)] {
        found.extend(place.as_ref().map(|place| (name.to_owned(), link(place, "../../.."))));
    }
    found.push(("fd".to_owned(), Place::Descriptors(*id, process.pid)));
    found
}

/// One entry for each descriptor: of a file that had no name the content, if it is kept, as whoever opens such an entry of `/proc` gets it.
pub(super) fn descriptors(checkpoint: &Checkpoint, process: &ProcessRecord) -> Vec<(String, Place)> {
    let shown = |file: &OpenFile| {
        let kept = checkpoint.kept(file.device, file.inode).filter(|kept| file.place.unlinked && kept.lost.is_none());
        match kept {
            Some(kept) => Place::Kept(checkpoint.id, kept.device, kept.inode),
            None => link(&file.place, "../../../.."),
        }
    };
    process.files.iter().map(|file| (file.fd.to_string(), shown(file))).collect()
}

/// Each argument with a zero behind it.
pub(super) fn command_line(process: &ProcessRecord) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let arguments = process.arguments.iter().map(|argument| argument.as_path().as_os_str().as_bytes());
    arguments.flat_map(|argument| argument.iter().copied().chain([0])).collect()
}

/// `up` leads to the directory of the checkpoint.
fn link(place: &FilePlace, up: &str) -> Place {
    Place::Link(match &place.volume {
        Some(volume) if !place.unlinked => {
            let root = Path::new(up).join(volume.name.as_str());
            if volume.path.as_path() == Path::new("") { root } else { root.join(volume.path.as_path()) }
        }
        _ if place.unlinked => {
            let mut text = place.path.as_path().as_os_str().to_owned();
            text.push(" (deleted)");
            PathBuf::from(text)
        }
        _ => place.path.0.clone(),
    })
}
