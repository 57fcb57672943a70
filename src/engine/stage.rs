//! The stages of a restore, or of a run's start: what runs in the new namespaces.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fsnap_backend::MountSpec;
use nix::sched::CloneFlags;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::FdFlags;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::confine::{self, Cell, ENDED};
use super::given_back::{self, PlannedFile};
use super::program::{Program, TerminalId};
use super::restore::{Ended, MountPlan, PidSpace, StageCommand};
use super::{Error, Images, Result, os_text, timers};
use crate::checkpoint::PathText;
use crate::mount::{Prepared, Restrictions};
use crate::processes::{ProcessId, own_descendants};

/// What the stages are told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) second: bool,
    pub(super) pids: PidSpace,
    #[serde(with = "os_text")]
    pub(super) criu: PathBuf,
    /// A link to the descriptor of fsnap, which lives until the processes are restored.
    #[serde(with = "os_text")]
    pub(super) images: PathBuf,
    pub(super) root: Option<i32>,
    pub(super) mounts: Vec<PlannedMount>,
    /// Files that the images lack.
    pub(super) returned: Vec<PlannedFile>,
    #[serde(with = "os_text::list")]
    pub(super) args: Vec<OsString>,
    pub(super) stage: StageCommand,
    /// Where it is noted who waits for the processes.
    pub(super) place: PathText,
    /// What the processes are put in, if they are a run.
    pub(super) cell: Option<Cell>,
    /// A program to start, in the place of CRIU, and what becomes it.
    pub(super) program: Option<(Program, StageCommand)>,
    /// The terminal that was saved, and the one that stands in its place.
    pub(super) terminal: Option<(TerminalId, PathBuf)>,
}

/// A [`MountPlan`] that can be sent to another process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PlannedMount {
    recipe: Recipe,
    #[serde(with = "os_text")]
    at: PathBuf,
    restrictions: Restrictions,
}

#[derive(Debug, Serialize, Deserialize)]
enum Recipe {
    Bind {
        #[serde(with = "os_text")]
        dir: PathBuf,
        read_only: bool,
    },
    Mount {
        fstype: String,
        #[serde(with = "os_text")]
        source: PathBuf,
        options: String,
        read_only: bool,
    },
}

impl PlannedMount {
    pub(super) fn new(plan: &MountPlan) -> Result<Self> {
        let recipe = match plan.spec.clone() {
            MountSpec::Bind { dir, read_only } => Recipe::Bind { dir, read_only },
            MountSpec::Mount { fstype, source, options, read_only } => {
                Recipe::Mount { fstype, source, options, read_only }
            }
            MountSpec::Tree(_) => {
                let step = format!("mount on {:?}", plan.at);
                return Err(Error::Restore { step, reason: crate::mount::Error::NotMountable.to_string() });
            }
        };
        Ok(Self { recipe, at: plan.at.clone(), restrictions: plan.restrictions })
    }

    fn prepare_at(&self) -> Result<(PathBuf, Prepared), Failure> {
        let prepared = self.prepare().map_err(Failure::in_step(format!("prepare what {:?} shall show", self.at)))?;
        Ok((self.at.clone(), prepared))
    }

    fn prepare(&self) -> crate::mount::Result<Prepared> {
        let spec = match &self.recipe {
            Recipe::Bind { dir, read_only } => MountSpec::Bind { dir: dir.clone(), read_only: *read_only },
            Recipe::Mount { fstype, source, options, read_only } => MountSpec::Mount {
                fstype: fstype.clone(),
                source: source.clone(),
                options: options.clone(),
                read_only: *read_only,
            },
        };
        Prepared::new(&spec, self.restrictions)
    }
}

/// What the stages answer: one line each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// The second stage runs.
    Init { pid: i32 },
    /// The processes run; `root` is a pid within their namespace.
    Restored { root: Option<i32> },
    /// Nothing was restored.
    Failed(Failure),
    /// The root has ended.
    Ended(Ended),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    Step {
        step: String,
        reason: String,
    },
    Hidden {
        #[serde(with = "os_text")]
        hidden: PathBuf,
        #[serde(with = "os_text")]
        by: PathBuf,
    },
    Directory {
        #[serde(with = "os_text")]
        directory: PathBuf,
        reason: String,
    },
    Engine {
        status: String,
    },
}

impl Failure {
    /// A call of the kernel that failed in this step.
    pub(super) fn step(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        Self::in_step(step)
    }

    /// Whatever failed in this step.
    pub(super) fn in_step<E: fmt::Display>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        let step = step.into();
        move |error| Self::Step { step, reason: error.to_string() }
    }
}

/// The answer to [`Report::Restored`].
pub(super) const KEPT: u8 = b'k';

/// Runs as a stage of a [`Restore`](super::Restore) or a [`Start`](super::Start), which started this process; returns its
/// exit status.
///
/// Requires that this process has one thread. The first stage returns soon; the second stays until all restored processes have
/// ended, or the restore has failed.
pub fn run_stage(mut input: impl Read, mut connection: &UnixStream) -> u8 {
    let mut text = Vec::new();
    let plan = input.read_to_end(&mut text).and_then(|_| Ok(serde_json::from_slice::<Plan>(&text)?));
    let done = match plan {
        Ok(plan) if plan.second => second_stage(&plan, connection),
        Ok(plan) => first_stage(plan, &mut connection),
        Err(error) => Err(Failure::step("understand the plan of a restore")(error)),
    };
    match done {
        Ok(()) => 0,
        Err(failure) => {
            // If nobody listens any more, the exit status says enough.
            let _ = send(&mut connection, &Report::Failed(failure));
            1
        }
    }
}

pub(super) fn send(output: &mut impl Write, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    output.write_all(&line)?;
    output.flush()
}

fn first_stage(mut plan: Plan, output: &mut impl Write) -> Result<(), Failure> {
    // Fails only for the leader of a process group, which a stage is not.
    let _ = rustix::process::setsid();
    let mut namespaces = CloneFlags::CLONE_NEWNS;
    namespaces.set(CloneFlags::CLONE_NEWPID, plan.pids == PidSpace::New);
    let privileged = rustix::process::geteuid().is_root();
    namespaces.set(CloneFlags::CLONE_NEWUSER, plan.cell.is_some() && !privileged);
    let user = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut kept = Vec::new();
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) && plan.program.is_none() {
        // From within, the files of fsnap cannot be looked at.
        let images = open_images(&plan.images).map_err(Failure::step("open the images"))?;
        plan.images = format!("/proc/self/fd/{}", images.as_raw_fd()).into();
        kept.push(images);
        for file in &mut plan.returned {
            kept.push(file.open_for_heir().map_err(Failure::step("open what was kept of files without names"))?.into());
        }
    }
    nix::sched::unshare(namespaces).map_err(|error| Failure::step("make namespaces")(error.into()))?;
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        map_user(user).map_err(Failure::step("keep the user in the new user namespace"))?;
    }
    // Else the mounts of the second stage would show up outside.
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|error| Failure::step("make the mounts private")(error.into()))?;
    plan.second = true;
    let started = start_second_stage(&plan, output);
    drop(kept);
    started.map_err(Failure::step("start the second stage of the restore"))
}

/// Makes the user root in the new user namespace, for whoever is not loses the right to mount with the next program.
fn map_user((user, group): (u32, u32)) -> io::Result<()> {
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))
}

fn start_second_stage(plan: &Plan, output: &mut impl Write) -> io::Result<()> {
    let mut child = Command::new(&plan.stage.program).args(&plan.stage.args).stdin(Stdio::piped()).spawn()?;
    // Before any other process exists: the second stage waits for its plan.
    confine::note_init(plan.place.as_path(), ProcessId::of(child.id().cast_signed()).map_err(io::Error::other)?)?;
    // Before the second stage has its plan, so that this report comes first.
    send(output, &Report::Init { pid: child.id().cast_signed() })?;
    let plan = serde_json::to_vec(plan)?;
    child.stdin.take().map_or(Ok(()), |mut input| input.write_all(&plan))
}

fn second_stage(plan: &Plan, mut connection: &UnixStream) -> Result<(), Failure> {
    let images = match &plan.program {
        None => Some(open_images(&plan.images).map_err(Failure::step("open the images"))?),
        Some(_) => None,
    };
    // What is mounted may cover it.
    let contents = given_back::open_all(&plan.returned)?;
    let _life = confine::show_life(plan.place.as_path()).map_err(Failure::step("lock the record of the restore"))?;
    let place = set_up(plan, images.as_ref())?;
    let root = match (&plan.program, images) {
        (Some((program, stage)), _) => {
            keep_low_pids()?;
            confine::protect_settings()?;
            Some(start_program(program, stage)?)
        }
        (None, Some(images)) => {
            let root = restore(plan, images, contents).inspect_err(|_| {
                // An engine that was killed leaves behind what it has forked; in a namespace the kernel ends it.
                if plan.pids == PidSpace::Host {
                    end_descendants();
                }
            })?;
            if plan.cell.is_some() {
                keep_low_pids()?;
                confine::protect_settings()?;
            }
            root
        }
        (None, None) => None,
    };
    // Nobody knows of the processes if this cannot be said, or whoever was told has ended before it was recorded: they end with this one. In
    // namespaces of their own the kernel sees to that.
    let kept = send(&mut connection, &Report::Restored { root }).and_then(|()| connection.read_exact(&mut [0]));
    kept.map_err(|error| {
        end_descendants();
        Failure::step("report the restore")(error)
    })?;
    reap_all(root, |ended| {
        // In the meantime the one who asked for the restore has usually ended.
        let _ = send(&mut connection, &Report::Ended(ended));
        if let Some(place) = &place {
            // If it cannot be written, an empty file says that nobody knows.
            let _ = fsnap_backend::beneath::create_file(place, ENDED.as_ref(), 0o600)
                .and_then(|mut file| file.write_all(&serde_json::to_vec(&ended)?));
        }
    });
    Ok(())
}

/// Ends all that descends from this process, which is given every orphan among them.
fn end_descendants() {
    // What is forked meanwhile is found by the next look.
    while let Ok(descendants) = own_descendants()
        && !descendants.is_empty()
    {
        for id in descendants {
            let _ = id.open().and_then(|process| Ok(pidfd_send_signal(process, Signal::KILL)?));
        }
    }
}

/// Makes the namespaces what the processes shall see; returns the directory of the run, if it is one.
fn set_up(plan: &Plan, images: Option<&OwnedFd>) -> Result<Option<OwnedFd>, Failure> {
    let criu = match plan.program {
        None => Some(identity(&plan.criu).map_err(Failure::step(format!("find {:?}", plan.criu)))?),
        Some(_) => None,
    };
    let mut prepared = plan.mounts.iter().map(PlannedMount::prepare_at).collect::<Result<Vec<_>, Failure>>()?;
    let mut place = None;
    // A terminal of this machine, which is looked for among the machine's.
    let given = plan.terminal.is_some() || plan.program.as_ref().is_some_and(|(program, _)| program.terminal.is_some());
    if let Some(cell) = &plan.cell {
        let saved = images.map(saved_scratch).transpose()?.flatten();
        let (mounts, directory) = cell.open(given)?.into_parts();
        let volumes: Vec<&Path> = plan.mounts.iter().map(|mount| mount.at.as_path()).collect();
        cell.close(&volumes, saved)?;
        prepared.extend(mounts);
        place = Some(directory);
    }
    match plan.pids {
        PidSpace::New => mount_proc().map_err(Failure::step("mount /proc"))?,
        // Restored processes become children of this one when CRIU ends, as in a namespace.
        PidSpace::Host => rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|error| Failure::step("adopt the restored processes")(error.into()))?,
    }
    attach_mounts(plan, prepared, criu)?;
    if plan.cell.is_some() && !given {
        confine::make_own_terminals()?;
    }
    Ok(place)
}

/// The pids below belong to the stages, the engine and what they start: a process that took one could not be restored.
///
/// The kernel keeps the same away from processes when it begins again at the lowest.
const FIRST_PID: i32 = 300;

/// Makes all new processes have pids that no stage of a later restore has.
fn keep_low_pids() -> Result<(), Failure> {
    let keep = || {
        let names = std::fs::read_dir("/proc")?.flatten().map(|entry| entry.file_name());
        let last = names.filter_map(|name| name.to_str()?.parse::<i32>().ok()).max();
        std::fs::write("/proc/sys/kernel/ns_last_pid", last.unwrap_or(0).max(FIRST_PID - 1).to_string())
    };
    keep().map_err(Failure::step("keep pids for later restores"))
}

/// What was saved of the scratch places, opened before anything covers it.
fn saved_scratch(images: &OwnedFd) -> Result<Option<std::fs::File>, Failure> {
    let dir = images.try_clone().map_err(Failure::step("open the images"))?;
    let images = Images::new(dir, "of the checkpoint".into());
    images.file(confine::SAVED_SCRATCH, u64::MAX).map_err(Failure::in_step("open the saved scratch files"))
}

fn restore(plan: &Plan, images: OwnedFd, contents: Vec<File>) -> Result<Option<i32>, Failure> {
    let mut command = Command::new(&plan.criu);
    command.args(["restore", "--restore-detached", "--images-dir"]);
    command.arg(format!("/proc/self/fd/{}", images.as_raw_fd()));
    let terminal = plan.terminal.as_ref().map(|(id, path)| Ok((id, open_terminal(path)?)));
    let terminal = terminal.transpose().map_err(Failure::step("open the terminal"))?;
    if let Some((id, terminal)) = &terminal {
        command.arg("--inherit-fd").arg(format!("fd[{}]:{}", terminal.as_raw_fd(), id.key()));
    }
    let returned = given_back::make_all(&plan.returned, contents)?;
    for (file, given) in returned.iter().zip(&plan.returned) {
        command.arg("--inherit-fd").arg(format!("fd[{}]:{}", file.as_raw_fd(), given.external));
    }
    // It is seen there whatever covers the program: the first process of the namespace, if there is one, is this one.
    command.args(["--action-script", &format!("/proc/{}/exe", std::process::id())]).env(timers::VARIABLE, "1");
    let status = command
        .args(&plan.args)
        .stdin(Stdio::null())
        .stdout(io::stderr().as_fd().try_clone_to_owned().map_err(Failure::step("open the log"))?)
        .status()
        .map_err(Failure::step(format!("run {:?}", plan.criu)))?;
    drop(images);
    if !status.success() {
        return Err(Failure::Engine { status: status.to_string() });
    }
    Ok(restored_root(plan.root))
}

/// Opens the terminal so that CRIU inherits it.
fn open_terminal(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    rustix::io::fcntl_setfd(&terminal, FdFlags::empty())?;
    Ok(terminal)
}

/// Starts the program; returns its pid here.
fn start_program(program: &Program, stage: &StageCommand) -> Result<i32, Failure> {
    let start = || {
        let mut child =
            Command::new(&stage.program).args(&stage.args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let plan = serde_json::to_vec(program)?;
        child.stdin.take().map_or(Ok(()), |mut input| input.write_all(&plan))?;
        let mut said = Vec::new();
        child.stdout.take().map_or(Ok(0), |mut output| output.read_to_end(&mut said))?;
        Ok((child.id().cast_signed(), said))
    };
    let (pid, said) = start().map_err(Failure::step("start the program"))?;
    // It is closed in silence when the program has taken the place of the stage.
    match Report::read(&mut said.as_slice()) {
        Some(Report::Failed(failure)) => Err(failure),
        _ => Ok(pid),
    }
}

/// Opens the image directory so that CRIU inherits it: its path may be hidden by the time that CRIU looks.
fn open_images(link: &Path) -> io::Result<OwnedFd> {
    let dir = rustix::fs::openat(CWD, link, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::fcntl_setfd(&dir, FdFlags::empty())?;
    Ok(dir)
}

fn mount_proc() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount("proc", "/proc", "proc", flags, None)?)
}

/// Mounts what was prepared, none of which is looked up behind another.
fn attach_mounts(
    plan: &Plan,
    mut prepared: Vec<(PathBuf, Prepared)>,
    criu: Option<(u32, u32, u64)>,
) -> Result<(), Failure> {
    let is_hidden = || criu.is_some() && identity(&plan.criu).ok() != criu;
    if is_hidden() {
        return Err(Failure::Hidden { hidden: plan.criu.clone(), by: "a scratch place".into() });
    }
    // The outer ones first: a volume within another would be covered.
    prepared.sort_by_key(|(at, _)| at.components().count());
    for (at, mount) in prepared {
        if plan.cell.is_some() {
            confine::make_mount_point(&at).map_err(Failure::step(format!("make the directory {at:?}")))?;
        }
        mount.attach(&at).map_err(Failure::in_step(format!("mount on {at:?}")))?.keep();
        if is_hidden() {
            return Err(Failure::Hidden { hidden: plan.criu.clone(), by: at });
        }
    }
    Ok(())
}

fn identity(path: &Path) -> io::Result<(u32, u32, u64)> {
    let found = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::INO)?;
    Ok((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
}

/// The root of the restored tree: the child of this process that the images name, or the only one there is.
fn restored_root(named: Option<i32>) -> Option<i32> {
    let own = std::process::id();
    let children = std::fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap_or_default();
    let children: Vec<i32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
    named.filter(|pid| children.contains(pid)).or(match children[..] {
        [only] => Some(only),
        _ => None,
    })
}

/// Waits for every process that this one has to wait for, until there is none; tells once how the root ended, as soon as it has.
fn reap_all(root: Option<i32>, tell: impl FnOnce(Ended)) {
    let mut tell = Some(tell);
    let mut end_is = |ended| tell.take().map_or((), |tell| tell(ended));
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == root.and_then(Pid::from_raw) => end_is(ended_by(status)),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // No children any more.
            Err(_) => return end_is(Ended::Unknown),
        }
    }
}

fn ended_by(status: WaitStatus) -> Ended {
    let exited = status.exit_status().map(Ended::Exited);
    exited.or(status.terminating_signal().map(Ended::Killed)).unwrap_or(Ended::Unknown)
}
