//! Restores processes onto other files than those they were dumped with.
//!
//! ```text
//! fsnap ── stage 1: new session, new mount and pid namespace
//!            └── stage 2: mounts the branch over the volumes' paths, and a /proc of its own
//!                  ├── CRIU, until it has restored
//!                  └── the restored processes, for as long as they live
//! ```
//!
//! A process keeps its pid over a restore, so many live restores of one checkpoint need a pid namespace each; and it keeps its paths,
//! so each needs a mount namespace in which those paths show its own branch. A namespace is entered by whoever is started
//! next, hence two stages; both are this program, started again. The second one is the init of its namespace: it waits for
//! all that ends there, and when it is killed, all processes there are.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use fsnap_backend::MountSpec;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::confine::{Cell, Confinement, LOG};
use super::criu::{self, Criu};
use super::given_back::{GivenBack, PlannedFile};
use super::program::{Program, TerminalId};
use super::stage::{Failure, KEPT, Plan, PlannedMount, Report};
use super::{Error, Images, Result, os_text};
use crate::checkpoint::PathText;
use crate::mount::Restrictions;
use crate::processes::{ProcessId, Tree};

/// How to start a stage: a program that calls [`run_stage`](super::run_stage) with its standard input and output.
///
/// It must call it while it has one thread only. The engine of a restore starts it once more, without arguments, as its action script: then it must
/// call [`run_for_timers`](super::run_for_timers), if [`is_for_timers`](super::is_for_timers) says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageCommand {
    /// The program, for example `/proc/self/exe`.
    #[serde(with = "os_text")]
    pub program: PathBuf,
    /// Its arguments.
    #[serde(with = "os_text::list")]
    pub args: Vec<OsString>,
}

/// What the restored processes shall find at a path.
#[derive(Debug, Clone)]
pub struct MountPlan {
    /// The recipe for the image.
    pub spec: MountSpec,
    /// The volume's path.
    pub at: PathBuf,
    /// What the mount refuses: usually [those of the mount](Restrictions::of) that it takes the place of.
    pub restrictions: Restrictions,
}

/// Where the restored processes' pids are valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PidSpace {
    /// In a pid namespace of their own, so that they never collide with running ones.
    #[default]
    New,
    /// In fsnap's: the original processes must have ended.
    Host,
}

/// A restore to be done.
#[derive(Debug)]
pub struct Restore<'a> {
    /// The engine.
    pub criu: &'a Criu,
    /// The images, complete.
    pub images: &'a Images,
    /// What to mount where, in the new mount namespace only.
    pub mounts: &'a [MountPlan],
    /// The files that the images lack.
    pub returned: &'a [GivenBack],
    /// Further arguments for `criu restore`.
    pub args: &'a [OsString],
    /// Where the pids are valid.
    pub pids: PidSpace,
    /// Where CRIU's log goes; an existing file is replaced.
    pub log: &'a Path,
    /// How to start the stages.
    pub stage: &'a StageCommand,
    /// Where it is noted who waits for the processes.
    pub place: &'a Path,
    /// What the processes are put in, if they shall be a run.
    pub confinement: Option<&'a Confinement>,
    /// The terminal that was saved, and the one that stands in its place.
    pub terminal: Option<(TerminalId, &'a Path)>,
}

/// A program to be started in namespaces of its own, so that it can be saved and restored many times side by side.
#[derive(Debug)]
pub struct Start<'a> {
    /// The program.
    pub program: &'a Program,
    /// What it can write to, apart from `mounts`, and the directory of the run.
    pub cell: (&'a Confinement, &'a Path),
    /// Its volumes.
    pub mounts: &'a [MountPlan],
    /// Where the stages' log goes; an existing file is replaced.
    pub log: &'a Path,
    /// How to start the stages.
    pub stage: &'a StageCommand,
    /// How to start what becomes the program: by a call of [`run_program`](super::run_program).
    pub last_stage: &'a StageCommand,
}

/// How the root of the restored processes ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// It exited with this status.
    Exited(i32),
    /// It was killed by the signal with this number.
    Killed(i32),
    /// Nobody knows any more.
    Unknown,
}

impl Ended {
    /// How every process ends that lives when the init of its pid namespace is killed.
    pub(super) const BY_ITS_INIT: Self = Self::Killed(Signal::KILL.as_raw());
}

/// Processes that were restored and run. Dropped before they are [kept](Self::keep), all of them end, and so they do when fsnap is killed.
#[derive(Debug)]
#[must_use = "the processes end when this is dropped and was not kept"]
pub struct Restored {
    /// The process that waits for them; in a pid namespace of their own, all end with it.
    pub init: ProcessId,
    /// The root of the restored tree, by its pid outside of its namespace; `None` if it has ended already.
    pub root: Option<ProcessId>,
    /// CRIU's log.
    pub log: PathBuf,
    pids: PidSpace,
    reports: BufReader<UnixStream>,
    kept: bool,
}

impl Restore<'_> {
    /// Runs it until the processes are restored.
    ///
    /// On failure nothing that was restored is left.
    pub fn run(&self) -> Result<Restored> {
        criu::complete(self.images)?;
        Launch { stage: self.stage, log: self.log, pids: self.pids }.run(&self.plan()?)
    }

    fn plan(&self) -> Result<Plan> {
        let mounts = self.mounts.iter().map(PlannedMount::new).collect::<Result<Vec<_>>>()?;
        let images = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsFd::as_fd(self.images).as_raw_fd());
        Ok(Plan {
            second: false,
            pids: self.pids,
            criu: self.criu.program().into(),
            images: images.into(),
            root: criu::root_pid(self.images)?,
            mounts,
            returned: self.returned.iter().map(PlannedFile::new).collect(),
            args: self.args.to_vec(),
            stage: self.stage.clone(),
            place: PathText(self.place.into()),
            cell: self.confinement.map(|confinement| cell((confinement, self.place))),
            program: None,
            terminal: self.terminal.map(|(id, path)| (id, path.into())),
        })
    }
}

impl Start<'_> {
    /// Starts it.
    ///
    /// On failure nothing runs.
    pub fn run(&self) -> Result<Restored> {
        let mut program = self.program.clone();
        program.log = self.cell.0.output.as_path().join(LOG);
        let plan = Plan {
            second: false,
            pids: PidSpace::New,
            criu: PathBuf::new(),
            images: PathBuf::new(),
            root: None,
            mounts: self.mounts.iter().map(PlannedMount::new).collect::<Result<Vec<_>>>()?,
            returned: Vec::new(),
            args: Vec::new(),
            stage: self.stage.clone(),
            place: PathText(self.cell.1.into()),
            cell: Some(cell(self.cell)),
            program: Some((program, self.last_stage.clone())),
            terminal: None,
        };
        Launch { stage: self.stage, log: self.log, pids: PidSpace::New }.run(&plan)
    }
}

fn cell((confinement, place): (&Confinement, &Path)) -> Cell {
    Cell { confinement: confinement.clone(), place: PathText(place.into()) }
}

/// The start of the stages, and what they report.
struct Launch<'a> {
    stage: &'a StageCommand,
    log: &'a Path,
    pids: PidSpace,
}

impl Launch<'_> {
    fn run(&self, plan: &Plan) -> Result<Restored> {
        let step = |step: &str, source: io::Error| Error::Restore { step: step.into(), reason: source.to_string() };
        let log = self.create_log().map_err(|error| step(&format!("create the log {:?}", self.log), error))?;
        let (reports, its) = UnixStream::pair().map_err(|error| step("listen to the stages", error))?;
        let mut child = Command::new(&self.stage.program)
            .args(&self.stage.args)
            .stdin(Stdio::piped())
            .stdout(OwnedFd::from(its))
            .stderr(log)
            .spawn()
            .map_err(|source| Error::Run { program: self.stage.program.clone(), source })?;
        let Some(mut stdin) = child.stdin.take() else { unreachable!("it was asked for") };
        let sent = serde_json::to_vec(plan).map_err(io::Error::from).and_then(|plan| stdin.write_all(&plan));
        drop(stdin);
        let restored = match sent {
            Ok(()) => self.follow(BufReader::new(reports)),
            Err(error) => Err(step("start the restore", error)),
        };
        // The first stage ends when the second runs.
        reap(&mut child);
        restored
    }

    fn create_log(&self) -> io::Result<File> {
        match fs::remove_file(self.log) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Appending: CRIU and the stages share it.
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(CWD, self.log, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    fn follow(&self, mut reports: BufReader<UnixStream>) -> Result<Restored> {
        let mut init = None;
        loop {
            match (Report::read(&mut reports), init) {
                (Some(Report::Init { pid }), None) => init = ProcessId::of(pid).ok(),
                (Some(Report::Restored { root }), Some(init)) => {
                    let root = root.and_then(|pid| find_inside(init, pid, self.pids));
                    return Ok(Restored { init, root, log: self.log.into(), pids: self.pids, reports, kept: false });
                }
                (Some(Report::Failed(failure)), init) => {
                    // Until it has ended, it sees what is going to be removed.
                    init.into_iter().for_each(wait_for_end);
                    return Err(self.error(failure));
                }
                (_, init) => {
                    // On the pids of this machine it may go on, to end what it has restored.
                    init.into_iter().filter(|_| self.pids == PidSpace::New).for_each(wait_for_end);
                    let reason = format!("a stage of it ended unexpectedly; see {:?}", self.log);
                    return Err(Error::Restore { step: "restore the processes".into(), reason });
                }
            }
        }
    }

    fn error(&self, failure: Failure) -> Error {
        match failure {
            Failure::Step { step, reason } => Error::Restore { step, reason },
            Failure::Hidden { hidden, by } => Error::Hidden { hidden, by },
            Failure::Directory { directory, reason } => Error::Directory { directory, reason },
            Failure::Engine { status } => {
                let log = fs::read(self.log).unwrap_or_default();
                let tail = criu::tail(&String::from_utf8_lossy(&log), 10);
                Error::EngineFailed { status, log: self.log.into(), tail }
            }
        }
    }
}

/// The process that has this pid in the namespace of `init`.
fn find_inside(init: ProcessId, pid: i32, pids: PidSpace) -> Option<ProcessId> {
    if pids == PidSpace::Host {
        return ProcessId::of(pid).ok();
    }
    let tree = Tree::of_pid(init.pid).ok()?;
    tree.members().map(|member| member.id).find(|id| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        // The pids of one process, from fsnap's namespace inwards: fsnap's, that of `init`, perhaps further ones.
        line.and_then(|line| line.split_whitespace().nth(1)).is_some_and(|inside| inside == pid.to_string())
    })
}

impl Restored {
    /// Lets the processes go on without fsnap: whatever is to be known of them is recorded or said.
    pub fn keep(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.kept, true) {
            let told = self.reports.get_mut().write_all(&[KEPT]);
            let step = || "let the processes go on".into();
            told.map_err(|error| Error::Restore { step: step(), reason: error.to_string() })?;
        }
        Ok(())
    }

    /// Keeps the processes, and waits until all of them have ended; tells how the root did.
    pub fn wait(mut self) -> Ended {
        // Who cannot be told has ended.
        let _ = self.keep();
        let ended = loop {
            match Report::read(&mut self.reports) {
                Some(Report::Ended(ended)) => break ended,
                Some(_) => {}
                // The init was killed, which tells as soon as the root has ended.
                None if self.root.is_some() && self.pids == PidSpace::New => break Ended::BY_ITS_INIT,
                None => break Ended::Unknown,
            }
        };
        wait_for_end(self.init);
        ended
    }

    /// Kills all restored processes, and waits until they have ended.
    pub fn kill(self) -> io::Result<()> {
        let mut tree = Tree::of_processes([self.init]);
        if self.pids == PidSpace::Host
            && let Ok(all) = Tree::of_pid(self.init.pid)
        {
            tree = all;
        }
        for member in tree.members() {
            match member.id.open().and_then(|process| Ok(pidfd_send_signal(process, Signal::KILL)?)) {
                Err(error) if member.id.is_alive() => return Err(error),
                _ => {}
            }
        }
        tree.members().for_each(|member| wait_for_end(member.id));
        Ok(())
    }
}

fn wait_for_end(process: ProcessId) {
    // It fails for nothing that has not ended.
    let _ = process.ends_within(None);
}

fn reap(child: &mut Child) {
    // What counts is what it reported.
    let _ = child.wait();
}

impl Report {
    pub(super) fn read(reports: &mut impl BufRead) -> Option<Self> {
        let mut line = Vec::new();
        reports.read_until(b'\n', &mut line).ok()?;
        serde_json::from_slice(&line).ok()
    }
}
