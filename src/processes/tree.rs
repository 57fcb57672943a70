//! Processes that are frozen, examined and checkpointed together.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::cgroup::Cgroup;
use super::proc_dir::{ProcDir, Stat, ended, is_gone, parse};
use super::{Census, Error, ProcessId, Result, process_id, reach};

/// A process with all its descendants, or the processes of a control group.
///
/// fsnap itself is never a member, nor are its descendants where they are found through it: it may well have been started
/// by the tree that it is to look at.
#[derive(Debug, Clone)]
pub struct Tree {
    root: Root,
    members: BTreeMap<i32, Member>,
}

/// A tree whose processes are frozen, each of them opened once: whoever looks at them asks through that.
///
/// Nothing of it can begin or end, so that one look tells all.
#[derive(Debug)]
pub struct FrozenTree {
    tree: Tree,
    dirs: BTreeMap<i32, io::Result<ProcDir>>,
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
        let before: BTreeSet<ProcessId> = self.members.values().map(|member| member.id).collect();
        self.look(None, &mut drop)?;
        Ok(self.members.values().map(|member| member.id).collect::<BTreeSet<_>>() != before)
    }

    /// Looks once, and shows `on_member` every process that belongs to it; `at_hand` was looked at already.
    fn look(&mut self, mut at_hand: Option<Looked>, on_member: &mut dyn FnMut(Looked)) -> Result<()> {
        let own = std::process::id().cast_signed();
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
            let at_hand = at_hand.take_if(|looked| looked.member.id.pid == pid);
            let Some(looked) = at_hand.or_else(|| Looked::at(pid).ok()) else { continue };
            let id = looked.member.id;
            let known = match &self.root {
                // Whoever has a recorded pid now must be the one that was recorded.
                Root::Process(root) if pid == root.pid => id == *root,
                Root::Process(_) | Root::Listed => self.members.get(&pid).is_none_or(|old| old.id == id),
                Root::Cgroup(_) => true,
            };
            if !known {
                continue;
            }
            if matches!(self.root, Root::Process(_)) {
                queue.extend(looked.children(&mut census)?);
            }
            if looked.is_alive() {
                found.insert(pid, looked.member.clone());
                on_member(looked);
            }
        }
        self.members = found;
        Ok(())
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

impl FrozenTree {
    /// The process with this pid and all its descendants.
    pub fn of(pid: i32) -> Result<Self> {
        let root = Looked::at(pid).map_err(|source| process_id::unread(pid, source))?;
        let mut tree = Tree { root: Root::Process(root.member.id), members: BTreeMap::new() };
        let mut dirs = BTreeMap::new();
        tree.look(Some(root), &mut |looked| {
            dirs.insert(looked.member.id.pid, looked.dir.living(looked.stat.state));
        })?;
        Ok(Self { tree, dirs })
    }

    /// Opens those of a tree that was read before. Of one that has ended since there is nothing to look at.
    pub(super) fn open(tree: &Tree) -> Self {
        let dirs = tree.members().map(|member| (member.id.pid, reach::open(member.id)));
        Self { tree: tree.clone(), dirs: dirs.collect() }
    }

    /// Who belongs together.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Hands on each process, by pid, and its directory.
    pub(super) fn for_each(self, mut visit: impl FnMut(&Member, io::Result<ProcDir>)) {
        // Both have the same keys, in the same order.
        self.tree.members().zip(self.dirs.into_values()).for_each(|(member, dir)| visit(member, dir));
    }
}

impl Member {
    pub(super) fn look_up(pid: i32) -> Option<Self> {
        Some(Looked::at(pid).ok()?.member)
    }
}

/// Who descends from this process, which is itself in no tree, and lives.
pub(crate) fn own_descendants() -> Result<Vec<ProcessId>> {
    let own = std::process::id().cast_signed();
    let looked = Looked::at(own).map_err(|source| process_id::unread(own, source))?;
    let mut found = Vec::new();
    for child in looked.children(&mut None)? {
        match Tree::of_pid(child) {
            Ok(tree) => found.extend(tree.members().map(|member| member.id)),
            Err(Error::Gone { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// A process that is being looked at.
struct Looked {
    member: Member,
    dir: ProcDir,
    stat: Stat,
}

impl Looked {
    fn at(pid: i32) -> io::Result<Self> {
        let dir = ProcDir::of(pid)?;
        let stat = dir.stat()?;
        let id = ProcessId { pid, start_time: stat.start_time };
        Ok(Self { member: Member { id, parent: stat.parent, command: stat.command.clone() }, dir, stat })
    }

    /// Its threads. Of the one that most processes have, the number is known.
    fn threads(&self) -> Vec<i32> {
        match self.stat.threads {
            0 | 1 => vec![self.member.id.pid],
            _ => self.dir.numbers("task").unwrap_or_default(),
        }
    }

    /// Whether a thread of it lives. The first may end long before the others.
    fn is_alive(&self) -> bool {
        !ended(self.stat.state)
            || self.stat.threads > 1
                && self
                    .threads()
                    .iter()
                    .any(|&thread| self.dir.thread_stat(thread).is_ok_and(|stat| !ended(stat.state)))
    }

    /// The children of all its threads; none if it has ended.
    ///
    /// `census` is one for the whole reading, taken only where it is needed.
    fn children(&self, census: &mut Option<Census>) -> Result<Vec<i32>> {
        let pid = self.member.id.pid;
        let mut children = Vec::new();
        for thread in self.threads() {
            match self.dir.read(&format!("task/{thread}/children")) {
                Ok(content) => children.extend(content.split(|&byte| byte == b' ').filter_map(parse::<i32>)),
                // A kernel without CONFIG_PROC_CHILDREN: the same, the long way round.
                Err(error) if is_gone(&error) && thread == pid && self.dir.stat().is_ok() => {
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
}
