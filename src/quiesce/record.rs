//! What a freeze stops, as data: for the guard's pipe, and for the record on disk.

use std::collections::BTreeSet;

use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::freezer::Freezer;
use super::{Error, Result};
use crate::processes::{Cgroup, Member, ProcessId, Tree};

/// What a freeze stops, so that another process can set it running again.
///
/// Recorded before the freeze, it names the tree as it was then; a child that was forked and stopped after that is
/// found through its parents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeRecord {
    /// Names the running of the kernel in which it was made; in any later one there is nothing to thaw.
    pub boot: String,
    /// Processes that are stopped by a signal, and with them their descendants.
    pub processes: BTreeSet<ProcessId>,
    /// Processes among these that others stopped before; they stay stopped.
    pub already_stopped: BTreeSet<ProcessId>,
    /// A control group that is frozen.
    pub cgroup: Option<Cgroup>,
}

impl FreezeRecord {
    /// A record of nothing, made in this running of the kernel.
    pub fn new() -> Self {
        Self { boot: boot(), ..Self::default() }
    }

    /// Adds what another record holds.
    pub fn merge(&mut self, other: Self) {
        self.processes.extend(other.processes);
        self.already_stopped.extend(other.already_stopped);
        self.cgroup = other.cgroup.or(self.cgroup.take());
    }

    /// Whether it stops one of these processes.
    pub(crate) fn concerns(&self, tree: &Tree) -> bool {
        let in_cgroup = self.cgroup.as_ref().and_then(|cgroup| cgroup.pids().ok()).unwrap_or_default();
        tree.members().any(|member| self.processes.contains(&member.id) || in_cgroup.contains(&member.id.pid))
    }

    /// Sets running what stands of it; succeeds if nothing does.
    ///
    /// Repeatable. A process whose pid belongs to another one now is left alone. All are tried before a failure is
    /// returned.
    pub fn thaw(&self) -> Result<()> {
        if self.boot != boot() {
            return Ok(());
        }
        let mut descendants: BTreeSet<ProcessId> = BTreeSet::new();
        for process in self.processes.iter().chain(&self.already_stopped).filter(|process| process.is_alive()) {
            if let Ok(tree) = Tree::of_pid(process.pid)
                && tree.contains(*process)
            {
                descendants.extend(tree.members().map(|member| member.id));
            }
        }
        let stopped = |id: &ProcessId| id.thread_states().is_ok_and(|states| states.any_stopped());
        descendants.retain(|id| !self.already_stopped.contains(id) && stopped(id));
        // The recorded ones are not asked whether they stand: a signal to stop may still be on its way to them.
        let tree = Tree::of_processes(self.processes.union(&descendants).copied());
        let resumed = tree.members().map(resume).fold(Ok(()), Result::and);
        let thawed = self.cgroup.clone().and_then(Freezer::of).map_or(Ok(()), |freezer| freezer.ask(false));
        resumed.and(thawed)
    }
}

fn resume(member: &Member) -> Result<()> {
    match member.id.open().and_then(|process| Ok(pidfd_send_signal(process, Signal::CONT)?)) {
        Err(source) if member.id.is_alive() => {
            Err(Error::Signal { process: member.id, command: member.command.clone(), source })
        }
        _ => Ok(()),
    }
}

/// The kernel's name for the time since it started; start times count within it.
fn boot() -> String {
    crate::boot_id().unwrap_or_default()
}
