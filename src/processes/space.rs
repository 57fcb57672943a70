//! Pid namespaces: which one this is, and how a process of another is called here.

use std::io;

use super::proc_dir::ProcDir;
use super::{ProcessId, all};

/// The pid namespace of the process with that name in `/proc`, by the number of its inode.
pub(crate) fn pid_space(process: &str) -> io::Result<u64> {
    Ok(rustix::fs::stat(format!("/proc/{process}/ns/pid"))?.st_ino)
}

/// The init of a pid namespace, which has the name `id` in `space`, the namespace around it; by the name that it has here.
///
/// `None` if it has ended, or cannot be seen from here.
pub(crate) fn init_seen_from_outside(id: ProcessId, space: u64) -> Option<ProcessId> {
    let started_then = all().ok()?.into_iter().filter(|found| found.start_time == id.start_time);
    let mut inits = started_then.filter(|found| {
        let dir = ProcDir::of(found.pid);
        let status = dir.as_ref().ok().and_then(|dir| dir.read_record("status").ok()).unwrap_or_default();
        // Its parent is not in its own namespace, but in the one around it.
        let parent = dir.ok().and_then(|dir| dir.stat().ok()).map(|stat| stat.parent.to_string());
        is_init_of(&String::from_utf8_lossy(&status), id.pid)
            && parent.is_some_and(|parent| pid_space(&parent).is_ok_and(|around| around == space))
    });
    inits.find(|found| found.is_alive())
}

/// Whether this is the status of an init that has the pid `outer` in the namespace around its own.
fn is_init_of(status: &str, outer: i32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let mut inwards = line.split_whitespace().rev();
    inwards.next() == Some("1") && inwards.next() == Some(outer.to_string().as_str())
}
