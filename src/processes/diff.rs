//! What changed between two looks at a tree.

use std::collections::BTreeMap;

use super::{FilePlace, OpenFile, ProcessRecord, TreeRecord};

/// One change from an older record to a newer one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessChange<'a> {
    /// A process began.
    Started(&'a ProcessRecord),
    /// A process ended.
    Ended(&'a ProcessRecord),
    /// A process opened a file.
    Opened(&'a ProcessRecord, &'a OpenFile),
    /// A process closed a file.
    Closed(&'a ProcessRecord, &'a OpenFile),
    /// A process went to another working directory.
    Moved(&'a ProcessRecord, &'a FilePlace),
}

/// Every change, by process.
///
/// A process is the same in both if its pid is, and when it started, or, for one that was restored meanwhile, its name: a pid that was
/// used again by another program makes a process that ended and one that started. A descriptor is the same if its number
/// is, and what it is of.
pub fn process_changes<'a>(old: &'a TreeRecord, new: &'a TreeRecord) -> Vec<ProcessChange<'a>> {
    let by_pid = |tree: &'a TreeRecord| -> BTreeMap<i32, &'a ProcessRecord> {
        tree.processes.iter().map(|process| (process.pid, process)).collect()
    };
    let (old, new) = (by_pid(old), by_pid(new));
    let pids: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let mut changes = Vec::new();
    for pid in pids {
        match (old.get(pid), new.get(pid)) {
            (Some(old), Some(new)) if is_same(old, new) => between(old, new, &mut changes),
            (old, new) => {
                changes.extend(old.map(|old| ProcessChange::Ended(old)));
                changes.extend(new.map(|new| ProcessChange::Started(new)));
            }
        }
    }
    changes
}

fn is_same(old: &ProcessRecord, new: &ProcessRecord) -> bool {
    old.start_time == new.start_time || old.command == new.command && old.program == new.program
}

fn between<'a>(old: &'a ProcessRecord, new: &'a ProcessRecord, changes: &mut Vec<ProcessChange<'a>>) {
    if let (Some(from), Some(to)) = (&old.cwd, &new.cwd)
        && from.path != to.path
    {
        changes.push(ProcessChange::Moved(new, to));
    }
    let by_number = |process: &'a ProcessRecord| -> BTreeMap<i32, &'a OpenFile> {
        process.files.iter().map(|file| (file.fd, file)).collect()
    };
    let went_on = old.start_time == new.start_time;
    let (before, after) = (by_number(old), by_number(new));
    for (fd, file) in &before {
        if !after.get(fd).is_some_and(|now| is_same_file(file, now, went_on)) {
            changes.push(ProcessChange::Closed(new, file));
        }
    }
    for (fd, file) in &after {
        if !before.get(fd).is_some_and(|then| is_same_file(then, file, went_on)) {
            changes.push(ProcessChange::Opened(new, file));
        }
    }
}

/// That a file lost its name does not make it another. A restore gives pipes and sockets other numbers, and files other inodes:
/// of a process that went on, and only of one, they tell files apart.
fn is_same_file(old: &OpenFile, new: &OpenFile, went_on: bool) -> bool {
    let nameless = |file: &OpenFile| !file.place.path.as_path().is_absolute();
    let same_file = (old.device, old.inode) == (new.device, new.inode);
    old.kind == new.kind
        && match went_on {
            true => same_file && (nameless(old) || old.place.path == new.place.path),
            false => nameless(old) && nameless(new) || old.place.path == new.place.path,
        }
}
