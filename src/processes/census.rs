//! One look at all processes.

use std::collections::BTreeMap;

use super::proc_dir::{Stat, is_gone, is_idle, numbers_in, open_proc, stat_in};
use super::{Error, Result};

/// What `/proc/PID/stat` said of every process at one time.
///
/// The cheapest question about a process, asked once of all, while other processes may stand frozen: who descends from
/// whom, and who is worth a closer look. Most of the kernel's own threads, and processes that have ended, are not in it.
#[derive(Debug, Clone, Default)]
pub(super) struct Census {
    pub(super) processes: BTreeMap<i32, Stat>,
}

impl Census {
    /// Looks at every process that fsnap can see.
    pub(super) fn take() -> Result<Self> {
        let read = |source| Error::Read { object: "/proc".into(), source };
        let proc = open_proc().map_err(read)?;
        let mut processes = BTreeMap::new();
        for pid in numbers_in(&proc).map_err(read)? {
            if is_idle(&proc, pid) {
                continue;
            }
            match stat_in(&proc, pid) {
                Ok(stat) => drop(processes.insert(pid, stat)),
                Err(error) if is_gone(&error) => {}
                Err(source) => return Err(Error::Read { object: format!("/proc/{pid}/stat").into(), source }),
            }
        }
        Ok(Self { processes })
    }

    /// The pids whose parent had the pid `parent`.
    pub(super) fn children(&self, parent: i32) -> impl Iterator<Item = i32> {
        self.processes.iter().filter(move |(_, stat)| stat.parent == parent).map(|(pid, _)| *pid)
    }
}
