//! Stops processes while their files are snapshotted, and sets them running again, come what may.
//!
//! [`Quiesce`] prepares while the processes run, [`Quiesce::freeze`] stops them, and the [`Frozen`] that it returns sets them running when
//! it is thawed or dropped. A control group is frozen by its freezer: no process of it notices. Other trees are stopped by `SIGSTOP`,
//! which their parents and shells can see. Both are complete only when the kernel says of every thread that it stands.
//!
//! Invariants:
//!
//! * Nothing is stopped that a second process, the guard, has not been told of. If fsnap ends in any way without
//!   having thawed, the guard reads the end of its pipe and thaws instead. If that is killed too,
//!   [`FreezeRecord::thaw`] does the same from a record on disk, during recovery.
//! * What others stopped before stays stopped: it is neither signalled nor recorded as ours. A tracer may let run what it holds, so
//!   that is stopped as well.
//! * Whatever fails, and whenever the deadline passes, all that was stopped until then runs again.
//! * A process is stopped only after its parent stands. Then a parent that waits inside `vfork(2)` for its child to exec, and
//!   cannot be stopped before it does, gets its child's help.

mod freezer;
mod guard;
mod record;
mod stop;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use guard::{GuardCommand, run_guard};
pub use record::FreezeRecord;

use crate::processes::{self, Cgroup, ProcessId, Tree};
use freezer::Freezer;
use guard::Guard;

/// The result of stopping or thawing.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why processes could not be stopped, or not be set running again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A process did not stop in time; all the others run again.
    #[error("process {process} ({command}) did not stop within {}: its state is {state}", Seconds(*within))]
    Deadline {
        /// The process that kept running.
        process: ProcessId,
        /// Its name.
        command: String,
        /// Its state's letter in `/proc/PID/stat`: `D` waits in the kernel for a device or a server.
        state: char,
        /// The time that it had.
        within: Duration,
    },
    /// A control group did not freeze in time; it runs again.
    #[error("the control group {cgroup} did not freeze within {}", Seconds(*within))]
    CgroupDeadline {
        /// The control group.
        cgroup: Cgroup,
        /// The time that it had.
        within: Duration,
    },
    /// Freezing these processes would stop fsnap, too.
    #[error("fsnap itself runs in the control group {cgroup}: start it from outside")]
    Inside {
        /// The control group that was to be frozen.
        cgroup: Cgroup,
    },
    /// The first process of the machine or container can not be stopped.
    #[error("process 1 cannot be stopped: name the processes that belong together, or their control group")]
    Init,
    /// All the processes that were to be stopped have ended.
    #[error("there is nothing to stop: the processes have ended")]
    Empty,
    /// A process that was stopped was set running by somebody else, so files may have changed meanwhile.
    #[error("process {process} ({command}) was set running while it should stand: its files may have changed")]
    Resumed {
        /// The process.
        process: ProcessId,
        /// Its name.
        command: String,
    },
    /// A process may not be signalled.
    #[error("cannot signal process {process} ({command}): {source}")]
    Signal {
        /// The process.
        process: ProcessId,
        /// Its name.
        command: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The control file of a freezer could not be used.
    #[error("cannot use {path:?}: {source}")]
    Freezer {
        /// The control file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The guard process does not run; nothing is stopped without it.
    #[error("the guard process {program:?}, which thaws if fsnap is killed, failed: {source}")]
    Guard {
        /// The program that was started.
        program: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// The processes could not be looked at.
    #[error(transparent)]
    Processes(#[from] processes::Error),
    /// Something failed, and so did setting the processes running again.
    #[error("{cause}; and setting the processes running again failed: {undo}")]
    NotUndone {
        /// The first failure.
        #[source]
        cause: Box<Error>,
        /// The failure to thaw.
        undo: Box<Error>,
    },
}

impl Error {
    fn and_undo(self, undone: Result<()>) -> Self {
        match undone {
            Ok(()) => self,
            Err(undo) => Self::NotUndone { cause: Box::new(self), undo: Box::new(undo) },
        }
    }
}

struct Seconds(Duration);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} s", self.0.as_secs_f32())
    }
}

/// A point in time at which the processes must stand.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    within: Duration,
}

impl Deadline {
    fn new(within: Duration) -> Self {
        Self { at: Instant::now() + within, within }
    }

    fn left(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

/// A tree about to be frozen: everything that can be done while it still runs is done.
#[derive(Debug)]
pub struct Quiesce {
    tree: Tree,
    freezer: Option<Freezer>,
    guard: Guard,
    record: FreezeRecord,
}

impl Quiesce {
    /// Chooses how the tree will be stopped, and starts the guard.
    ///
    /// A tree that is one control group, or that holds exactly the processes of one in the unified hierarchy, is frozen by
    /// the freezer; any other by `SIGSTOP`.
    pub fn prepare(tree: Tree, guard: &GuardCommand) -> Result<Self> {
        if tree.members().any(|member| member.id.pid == 1) {
            return Err(Error::Init);
        }
        let own = std::process::id().cast_signed();
        let cgroup = tree.own_cgroup();
        if let Some(cgroup) = &cgroup
            && cgroup.pids()?.contains(&own)
        {
            return Err(Error::Inside { cgroup: cgroup.clone() });
        }
        let freezer = cgroup.and_then(Freezer::of);
        let mut record = FreezeRecord::new();
        match &freezer {
            // What was frozen before is not for us to thaw.
            Some(freezer) if freezer.is_asked_for()? => {}
            Some(freezer) => record.cgroup = Some(freezer.cgroup().clone()),
            None => {
                for member in tree.members() {
                    let standing = member.id.thread_states().is_ok_and(|states| states.all_stopped());
                    if standing { &mut record.already_stopped } else { &mut record.processes }.insert(member.id);
                }
            }
        }
        Ok(Self { tree, freezer, guard: Guard::start(guard)?, record })
    }

    /// Adds processes that do not belong to the tree, such as other writers of its volumes; descendants are not included.
    pub fn also(&mut self, processes: impl IntoIterator<Item = ProcessId>) {
        self.record.processes.extend(processes);
    }

    /// The processes that are going to be stopped.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What is going to be stopped, to be recorded durably before [`Quiesce::freeze`].
    pub fn record(&self) -> &FreezeRecord {
        &self.record
    }

    /// Stops the tree and what was [added](Self::also), children forked meanwhile included.
    ///
    /// On failure everything runs again. A tree of which nothing is left is a failure; one that was empty from the start, beside
    /// which others may be stopped, is not.
    pub fn freeze(mut self, within: Duration) -> Result<Frozen> {
        self.guard.wait_ready()?;
        let deadline = Deadline::new(within);
        let outsiders: Vec<ProcessId> =
            self.record.processes.iter().copied().filter(|process| !self.tree.contains(*process)).collect();
        let mut frozen = Frozen {
            tree: self.tree,
            others: Tree::of_processes([]),
            freezer: self.freezer,
            guard: Some(self.guard),
            ours: FreezeRecord::new(),
            deadline,
            stopped: Vec::new(),
            standing: Vec::new(),
        };
        match frozen.freeze_tree(self.record.cgroup).and_then(|()| frozen.add(outsiders)) {
            Ok(()) => Ok(frozen),
            Err(error) => Err(error.and_undo(frozen.undo())),
        }
    }
}

/// Processes that stand still; dropped, it sets them running again.
#[derive(Debug)]
#[must_use = "the processes run again when this is dropped"]
pub struct Frozen {
    tree: Tree,
    others: Tree,
    freezer: Option<Freezer>,
    /// `None` once everything runs again.
    guard: Option<Guard>,
    ours: FreezeRecord,
    deadline: Deadline,
    stopped: Vec<stop::Stopped>,
    /// These, and who others had stopped before.
    standing: Vec<stop::Standing>,
}

impl Frozen {
    /// The tree, complete: no process of it can fork.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What was stopped by this freeze, and not by others before.
    pub fn record(&self) -> &FreezeRecord {
        &self.ours
    }

    /// Stops further processes, without their descendants, before the same deadline; those that have ended are passed over.
    ///
    /// On failure they run again, and the others still stand.
    pub fn add(&mut self, processes: impl IntoIterator<Item = ProcessId>) -> Result<()> {
        let mut added = Tree::of_processes(processes.into_iter().filter(|id| !self.tree.contains(*id)));
        let known: BTreeSet<ProcessId> = self.others.members().map(|member| member.id).collect();
        let first = self.stopped.len();
        match self.stop(&mut added) {
            Ok(()) => {
                let all = known.into_iter().chain(added.members().map(|member| member.id));
                self.others = Tree::of_processes(all);
                Ok(())
            }
            Err(error) => {
                let added = self.stopped.split_off(first);
                Err(error.and_undo(stop::resume_all(&added)))
            }
        }
    }

    /// An engine has begun to work on the tree: CRIU freezes a control group that it found frozen once more when it is done, and does not
    /// end with this process. If that is killed, the guard waits for it.
    pub fn engine_works(&mut self, engine: ProcessId) -> Result<()> {
        self.guard.as_mut().map_or(Ok(()), |guard| guard.tell_of_engine(engine))
    }

    /// Checks that every process still stands, whoever stopped it: nobody else has set one running meanwhile, not for a moment either, where
    /// the kernel counts that.
    ///
    /// To be asked after the snapshot and before it is called consistent. Processes that were killed meanwhile pass.
    pub fn check(&self) -> Result<()> {
        if let Some(freezer) = &self.freezer {
            freezer.check()?;
        }
        self.standing.iter().try_for_each(stop::Standing::check)
    }

    /// Sets everything running that this freeze stopped.
    pub fn thaw(mut self) -> Result<()> {
        self.undo()
    }

    fn freeze_tree(&mut self, cgroup: Option<Cgroup>) -> Result<()> {
        let Some(freezer) = self.freezer.clone() else {
            let mut tree = self.tree.clone();
            let was_empty = tree.is_empty();
            let stopped = self.stop(&mut tree);
            self.tree = tree;
            stopped?;
            return if self.tree.is_empty() && !was_empty { Err(Error::Empty) } else { Ok(()) };
        };
        if cgroup.is_some() {
            self.tell(FreezeRecord { cgroup, ..FreezeRecord::new() })?;
            freezer.ask(true)?;
        }
        freezer.wait_frozen(self.deadline)?;
        self.tree.rescan_once()?;
        Ok(())
    }

    fn stop(&mut self, tree: &mut Tree) -> Result<()> {
        let mut stopped = std::mem::take(&mut self.stopped);
        let done = stop::stop_all(tree, &mut stopped, self.deadline, &mut |record| self.tell(record));
        self.stopped = stopped;
        self.standing.extend(done?);
        Ok(())
    }

    /// Tells the guard, before it is done, what is going to be stopped.
    fn tell(&mut self, record: FreezeRecord) -> Result<()> {
        if let Some(guard) = &mut self.guard {
            guard.tell(&record)?;
        }
        self.ours.merge(record);
        Ok(())
    }

    fn undo(&mut self) -> Result<()> {
        let Some(guard) = self.guard.take() else { return Ok(()) };
        let resumed = stop::resume_all(&self.stopped);
        let thawed = match (&self.freezer, &self.ours.cgroup) {
            (Some(freezer), Some(_)) => freezer.ask(false),
            _ => Ok(()),
        };
        resumed.and(thawed)?;
        // Only now: had one of them failed, the guard, dropped without this word, would try once more.
        guard.dismiss()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // On failure the guard has been dropped, and thaws.
        let _ = self.undo();
    }
}
