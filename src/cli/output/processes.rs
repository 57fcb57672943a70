//! The processes of a checkpoint, for people.

use std::collections::BTreeMap;

use fsnap::Error;
use fsnap::checkpoint::Checkpoint;
use fsnap::coordinator::Coordinator;
use fsnap::processes::{FilePlace, OpenFile, OpenKind, ProcessChange, ProcessRecord, TreeRecord};

use super::{Outcome, Output, say};

/// Prints every process with what it had in use, children below their parents.
pub(crate) fn print(out: &Output, tree: &TreeRecord) -> Outcome {
    let mut children: BTreeMap<i32, Vec<&ProcessRecord>> = BTreeMap::new();
    let mut pending: Vec<(usize, &ProcessRecord)> = Vec::new();
    for process in &tree.processes {
        match tree.process(process.parent).filter(|parent| parent.pid != process.pid) {
            Some(parent) => children.entry(parent.pid).or_default().push(process),
            None => pending.push((0, process)),
        }
    }
    pending.reverse();
    while let Some((depth, process)) = pending.pop() {
        one(out, depth, process)?;
        // Taken out, so that a record in which processes are each other's parents comes to an end.
        let below = children.remove(&process.pid).unwrap_or_default();
        pending.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
    }
    Ok(())
}

fn one(out: &Output, depth: usize, process: &ProcessRecord) -> Outcome {
    // A record can claim any depth.
    let margin = "  ".repeat(depth.min(20));
    out.line(format_args!("{margin}{} {}", process.pid, command_line(process)))?;
    let line = |what: &str, text: String| out.line(format_args!("{margin}    {what:<5}{text}"));
    if let Some(reason) = &process.unread {
        line("", format!("not looked at: {}", fsnap::printable(reason.as_ref())))?;
    }
    if let Some(cwd) = &process.cwd {
        line("cwd", place(cwd))?;
    }
    if let Some(root) = process.root.as_ref().filter(|root| root.path.as_path() != std::path::Path::new("/")) {
        line("root", place(root))?;
    }
    for file in &process.files {
        line(&format!("{:>3}", file.fd), opened(file))?;
    }
    for file in process.mapped.iter().filter(|file| file.writable || file.place.volume.is_some() || file.place.unlinked)
    {
        line("map", format!("{:<3}{}", if file.writable { "rw" } else { "r" }, place(&file.place)))?;
    }
    Ok(())
}

/// Says which locks the processes of the checkpoint do not have any more, now that they are restored.
pub(crate) fn tell_lost_locks(coordinator: &Coordinator, checkpoint: &Checkpoint) -> Result<(), Error> {
    let tree = coordinator.catalog().tree(&checkpoint.id)?;
    for process in tree.iter().flat_map(|tree| &tree.processes) {
        for file in process.locks_that_get_lost() {
            say(
                "warning",
                &format!(
                    "CRIU does not restore the lock of {} ({}) on {}, which it has mapped as well: let no program but those that were \
                     restored open that file in the branch",
                    process.pid,
                    fsnap::printable(process.command.as_ref()),
                    file.path
                ),
            );
        }
    }
    Ok(())
}

/// What changed, one line each: `+` and `-` for processes, `o` and `c` for files that were opened and closed, `d` for
/// a working directory.
pub(crate) fn change(change: &ProcessChange<'_>) -> String {
    match change {
        ProcessChange::Started(process) => format!("+ {} {}", process.pid, command_line(process)),
        ProcessChange::Ended(process) => format!("- {} {}", process.pid, command_line(process)),
        ProcessChange::Opened(process, file) => format!("o {} {} {}", process.pid, file.fd, opened(file)),
        ProcessChange::Closed(process, file) => format!("c {} {} {}", process.pid, file.fd, opened(file)),
        ProcessChange::Moved(process, cwd) => format!("d {} {}", process.pid, place(cwd)),
    }
}

/// The command line, or the name where that could not be read.
fn command_line(process: &ProcessRecord) -> String {
    if process.arguments.is_empty() {
        return format!("({})", fsnap::printable(process.command.as_ref()));
    }
    let arguments: Vec<String> = process.arguments.iter().map(ToString::to_string).collect();
    // Servers that write their state there leave blanks behind it.
    let line = arguments.join(" ").trim_end().to_owned();
    match line.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

fn opened(file: &OpenFile) -> String {
    let offset = match file.kind {
        OpenKind::File if file.offset > 0 => format!(" at {}", file.offset),
        _ => String::new(),
    };
    let locked = if file.locked { ", locked" } else { "" };
    format!("{:<3}{}{offset}{locked}", file.access(), place(&file.place))
}

fn place(place: &FilePlace) -> String {
    let unlinked = if place.unlinked { " (unlinked)" } else { "" };
    match &place.volume {
        Some(volume) => format!("{}{unlinked} in {}", place.path, volume.name),
        None => format!("{}{unlinked}", place.path),
    }
}
