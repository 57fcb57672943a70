//! Processes that are frozen, examined and checkpointed together.

use std::collections::{BTreeMap, BTreeSet};

use super::cgroup::Cgroup;
use super::proc_dir::{ProcDir, Stat, is_gone, parse};
use super::{Census, Error, ProcessId, Result};

/// A process with all its descendants, or the processes of a control group.
///
/// fsnap itself is never a member, nor are its descendants where they are found through it: it may well have been started
/// by the tree that it is to look at.
#[derive(Debug, Clone)]
pub struct Tree {
    root: Root,
    members: BTreeMap<i32, Member>,
}

/// One process of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Which process.
    pub id: ProcessId,
    /// The pid of its parent when it was last looked at.
    pub parent: i32,
    /// The name it gave itself (`comm`), with control characters replaced: for messages only.
    pub command: String,
}

#[derive(Debug, Clone)]
enum Root {
    Process(ProcessId),
    Cgroup(Cgroup),
    Listed,
}

/// How often a tree is read until two readings agree.
///
/// A tree that forks all the time never stands still; freezing it goes on looking until it does.
const READINGS: usize = 8;

impl Tree {
    /// The process with this pid and all its descendants.
    pub fn of_pid(pid: i32) -> Result<Self> {
        let root = ProcessId::of(pid)?;
        if !root.is_alive() {
            return Err(Error::Gone { pid });
        }
        Self::read(Root::Process(root))
    }

    /// The same of a tree that stands: nothing of it can begin or end, and one look is enough.
    pub fn of_standing(pid: i32) -> Result<Self> {
        let root = ProcessId::of(pid)?;
        let mut tree = Self { root: Root::Process(root), members: BTreeMap::new() };
        tree.rescan_once()?;
        Ok(tree)
    }

    /// The processes of the control group and of those below it.
    pub fn of_cgroup(cgroup: Cgroup) -> Result<Self> {
        Self::read(Root::Cgroup(cgroup))
    }

    /// Exactly these processes, without their descendants.
    pub fn of_processes(processes: impl IntoIterator<Item = ProcessId>) -> Self {
        let members = processes.into_iter().filter_map(|id| Member::look_up(id.pid).filter(|found| found.id == id));
        Self { root: Root::Listed, members: members.map(|member| (member.id.pid, member)).collect() }
    }

    fn read(root: Root) -> Result<Self> {
        let mut tree = Self { root, members: BTreeMap::new() };
        tree.rescan()?;
        Ok(tree)
    }

    /// Its processes, by pid. Those that have ended since the last look are still among them.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// Whether it has no process.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Whether the process is one of its members.
    pub fn contains(&self, id: ProcessId) -> bool {
        self.members.get(&id.pid).is_some_and(|member| member.id == id)
    }

    /// Looks again, until two looks agree: adds processes that were forked, drops those that have ended.
    ///
    /// A process once seen stays a member, also when its parent has ended and another adopted it.
    pub fn rescan(&mut self) -> Result<()> {
        for _ in 0..READINGS {
            if !self.rescan_once()? {
                break;
            }
        }
        Ok(())
    }

    /// Looks once; says whether anything changed.
    pub(crate) fn rescan_once(&mut self) -> Result<bool> {
        let own = std::process::id().cast_signed();
        let before: BTreeSet<ProcessId> = self.members.values().map(|member| member.id).collect();
        let mut found = BTreeMap::new();
        let mut census = None;
        let mut queue: Vec<i32> = match &self.root {
            Root::Process(root) => std::iter::once(root.pid).chain(self.members.keys().copied()).collect(),
            Root::Cgroup(cgroup) => cgroup.pids()?.into_iter().collect(),
            Root::Listed => self.members.keys().copied().collect(),
        };
        while let Some(pid) = queue.pop() {
            if pid == own || found.contains_key(&pid) {
                continue;
            }
            let Some(member) = Member::look_up(pid) else { continue };
            let known = match &self.root {
                // Whoever has a recorded pid now must be the one that was recorded.
                Root::Process(root) if pid == root.pid => member.id == *root,
                Root::Process(_) | Root::Listed => self.members.get(&pid).is_none_or(|old| old.id == member.id),
                Root::Cgroup(_) => true,
            };
            if !known {
                continue;
            }
            if matches!(self.root, Root::Process(_)) {
                queue.extend(children(pid, &mut census)?);
            }
            if member.id.is_alive() {
                found.insert(pid, member);
            }
        }
        self.members = found;
        Ok(self.members.values().map(|member| member.id).collect::<BTreeSet<_>>() != before)
    }

    /// The control group that was named, or one of the unified hierarchy that holds these processes and no others.
    pub(crate) fn own_cgroup(&self) -> Option<Cgroup> {
        match &self.root {
            Root::Cgroup(cgroup) => Some(cgroup.clone()),
            Root::Listed => None,
            Root::Process(root) => {
                let cgroup = Cgroup::of_process(root.pid)?;
                let pids = cgroup.pids().ok()?;
                pids.iter().eq(self.members.keys()).then_some(cgroup)
            }
        }
    }
}

impl Member {
    pub(super) fn look_up(pid: i32) -> Option<Self> {
        let stat = ProcDir::of(pid).and_then(|dir| dir.stat()).ok()?;
        let Stat { command, parent, start_time, .. } = stat;
        Some(Self { id: ProcessId { pid, start_time }, parent, command })
    }
}

/// The children of all threads of a process; none if it has ended.
///
/// `census` is one for the whole reading, taken only where it is needed.
fn children(pid: i32, census: &mut Option<Census>) -> Result<Vec<i32>> {
    let Ok(dir) = ProcDir::of(pid) else { return Ok(Vec::new()) };
    let mut children = Vec::new();
    for thread in dir.numbers("task").unwrap_or_default() {
        match dir.read(&format!("task/{thread}/children")) {
            Ok(content) => children.extend(content.split(|&byte| byte == b' ').filter_map(parse::<i32>)),
            // A kernel without CONFIG_PROC_CHILDREN: the same, the long way round.
            Err(error) if is_gone(&error) && thread == pid && dir.stat().is_ok() => {
                let census = match census {
                    Some(census) => census,
                    none => none.insert(Census::take()?),
                };
                return Ok(census.children(pid).collect());
            }
            Err(_) => {}
        }
    }
    Ok(children)
}
