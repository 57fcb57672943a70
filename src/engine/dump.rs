//! Saves the processes of a run with CRIU, which works inside their namespaces, and leaves them running.
//!
//! ```text
//! fsnap ── dump stage: enters the pid and mount namespace
//!   │        └── CRIU, as a process of the run
//!   └◄──socket── relay: CRIU's action script
//! ```
//!
//! The actions come back to the fsnap outside, which does what a hook does, with the pids that are valid there. If it dies, the
//! relay fails, the dump fails, and the processes run on.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use serde::{Deserialize, Serialize};

use super::criu::{self, Criu};
use super::{Error, Images, Reasons, Result, StageCommand, os_text, reasons, relay};
use crate::processes::{FrozenTree, ProcessId};

/// What CRIU's hook is called for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// The action's name; the processes run, or nothing of fsnap's is concerned.
    Running(&'a str),
    /// The processes are frozen, and their images are complete.
    Frozen(&'a str),
}

impl Action<'_> {
    /// CRIU's name for it.
    pub fn name(&self) -> &str {
        match self {
            Self::Running(name) | Self::Frozen(name) => name,
        }
    }
}

/// Waits until all is in order that is done beside the hook, and tells whether it is.
pub type Rest<'a> = &'a mut dyn FnMut() -> bool;

/// A dump to be done.
#[derive(Debug)]
pub struct Dump<'a> {
    /// The engine.
    pub criu: &'a Criu,
    /// What waits for the processes, and is not saved.
    pub init: ProcessId,
    /// The root of what is saved.
    pub root: ProcessId,
    /// An empty directory.
    pub images: &'a Images,
    /// Where the processes have files that belong to them alone.
    pub scratch: &'a [PathBuf],
    /// Further arguments for `criu dump`.
    pub args: &'a [OsString],
    /// How to start the stage: by a call of [`run_dump_stage`].
    pub stage: &'a StageCommand,
}

/// What the stage is told.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    init: ProcessId,
    /// In the pid namespace of the run.
    root: i32,
    #[serde(with = "os_text")]
    criu: PathBuf,
    #[serde(with = "os_text")]
    images: PathBuf,
    #[serde(with = "os_text")]
    places: PathBuf,
    #[serde(with = "os_text::list")]
    args: Vec<OsString>,
}

/// CRIU's log, in the image directory.
const LOG: &str = "dump.log";
/// Longer than a relay takes to say its one line.
const RELAY_PATIENCE: Duration = Duration::from_secs(10);

impl Dump<'_> {
    /// Runs it; `hook` is called for each of CRIU's actions, and its failure is the dump's.
    ///
    /// With it comes what waits until all else that belongs to the images is in order, and tells whether it is: beside that the hook works,
    /// and claims nothing before. However it ends, the processes run.
    pub fn run(&self, mut hook: impl FnMut(Action<'_>, Rest<'_>) -> bool) -> Result<()> {
        let step = |step: &str, source: io::Error| Error::Restore { step: step.into(), reason: source.to_string() };
        let root = pid_inside(self.root).map_err(|error| step("find the processes of the run", error))?;
        self.check_whole()?;
        let listener = self.listen().map_err(|error| step("listen to CRIU", error))?;
        let mut stage = self.start(root).map_err(|error| step("start the dump", error))?;
        let mut strays = None;
        let followed = self.follow(&listener, &stage, |action, saved| match action {
            Action::Running(_) => hook(action, &mut || true),
            Action::Frozen(_) => hook(action, &mut || match self.check_whole() {
                Ok(()) => saved(),
                Err(error) => {
                    strays = Some(error);
                    false
                }
            }),
        });
        // It ends when nobody answers any more.
        drop(listener);
        let said = stage.stderr.take().map(|mut stderr| {
            let mut said = Vec::new();
            let _ = stderr.read_to_end(&mut said);
            String::from_utf8_lossy(&said).into_owned()
        });
        let status = stage.wait().map_err(|error| step("wait for CRIU", error))?;
        let _ = rustix::fs::unlinkat(self.images, relay::SOCKET, AtFlags::empty());
        followed.map_err(|error| step("listen to CRIU", error))?;
        if let Some(strays) = strays {
            return Err(strays);
        }
        if status.success() {
            return criu::complete(self.images);
        }
        Err(Error::DumpFailed { status: status.to_string(), reasons: self.reasons(&said.unwrap_or_default()) })
    }

    /// Makes sure that all processes of the run are in the tree that is saved.
    fn check_whole(&self) -> Result<()> {
        let tree = |pid| {
            FrozenTree::of(pid).map_err(|error| Error::Restore {
                step: "look at the processes of the run".into(),
                reason: error.to_string(),
            })
        };
        let (all, saved) = (tree(self.init.pid)?, tree(self.root.pid)?);
        let left = all.tree().members().filter(|member| member.id != self.init && !saved.tree().contains(member.id));
        let strays: Vec<_> = left
            .filter(|member| member.id.is_alive())
            .map(|member| format!("process {} ({})", member.id, crate::printable(member.command.as_ref())))
            .collect();
        if strays.is_empty() { Ok(()) } else { Err(Error::Strays { root: self.root.pid, strays }) }
    }

    fn listen(&self) -> io::Result<UnixListener> {
        // By the descriptor: a socket's path may not be long.
        let dir = format!("/proc/self/fd/{}", self.images.as_fd().as_raw_fd());
        UnixListener::bind(Path::new(&dir).join(relay::SOCKET))
    }

    fn start(&self, root: i32) -> io::Result<Child> {
        let plan = Plan {
            init: self.init,
            root,
            criu: self.criu.program().into(),
            images: format!("/proc/{}/fd/{}", std::process::id(), self.images.as_fd().as_raw_fd()).into(),
            places: std::env::join_paths(self.scratch).map_err(io::Error::other)?.into(),
            args: self.args.to_vec(),
        };
        let mut child = Command::new(&self.stage.program)
            .args(&self.stage.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().map_or(Ok(()), |mut input| input.write_all(&serde_json::to_vec(&plan)?))?;
        Ok(child)
    }

    /// Answers the relays until the stage has ended.
    fn follow(
        &self,
        listener: &UnixListener,
        stage: &Child,
        mut hook: impl FnMut(Action<'_>, Rest<'_>) -> bool,
    ) -> io::Result<()> {
        let pid = Pid::from_raw(stage.id().cast_signed()).ok_or_else(|| io::Error::other("no process"))?;
        let ended = pidfd_open(pid, PidfdFlags::empty())?;
        loop {
            let mut ready = [PollFd::new(listener, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
            match poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !ready[0].revents().is_empty() {
                answer(listener.accept()?.0, &mut hook)?;
            } else if !ready[1].revents().is_empty() {
                return Ok(());
            }
        }
    }

    fn reasons(&self, said: &str) -> Reasons {
        let mut log = String::new();
        if let Ok(Some(file)) = self.images.file(LOG, u64::MAX) {
            let mut bytes = Vec::new();
            // What was read until an error has reasons, too.
            let _ = file.take(16 << 20).read_to_end(&mut bytes);
            log = String::from_utf8_lossy(&bytes).into_owned();
        }
        let mut reasons = reasons::of(&log);
        if reasons.is_empty() {
            let said = if said.trim().is_empty() { &log } else { said };
            reasons = criu::tail(said, 5).lines().map(str::to_owned).collect();
        }
        Reasons(reasons)
    }
}

fn answer(stream: UnixStream, hook: &mut impl FnMut(Action<'_>, Rest<'_>) -> bool) -> io::Result<()> {
    stream.set_read_timeout(Some(RELAY_PATIENCE))?;
    let mut relay = BufReader::new(&stream).take(64);
    let mut action = String::new();
    relay.read_line(&mut action)?;
    let name = action.trim_end();
    let action = if name == "post-dump" { Action::Frozen(name) } else { Action::Running(name) };
    // It takes as long as it takes to save the scratch places, and ends with the relay.
    stream.set_read_timeout(None)?;
    let mut saved = || {
        let mut said = String::new();
        relay.read_line(&mut said).is_ok() && said.trim_end() == relay::SAVED
    };
    let done = hook(action, &mut saved);
    // A relay that has ended meanwhile has failed, and CRIU knows.
    let _ = (&stream).write_all(if done { b"done\n" } else { b"failed\n" });
    Ok(())
}

/// The pid of a process in its own pid namespace.
fn pid_inside(process: ProcessId) -> io::Result<i32> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let pid = line.and_then(|line| line.split_whitespace().last()).and_then(|pid| pid.parse().ok());
    pid.ok_or_else(|| io::Error::other("the kernel does not tell its pid there"))
}

/// Runs as the stage of a [`Dump`], which started this process; returns its exit status. What goes wrong is said on standard
/// error, and in CRIU's log.
///
/// Requires that this process has one thread.
pub fn run_dump_stage(mut input: impl Read) -> u8 {
    let mut text = Vec::new();
    let plan = input.read_to_end(&mut text).and_then(|_| Ok(serde_json::from_slice::<Plan>(&text)?));
    match plan.and_then(|plan| dump_inside(&plan)) {
        Ok(status) => status,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            1
        }
    }
}

fn dump_inside(plan: &Plan) -> io::Result<u8> {
    let context = |what: &str, error: io::Error| io::Error::other(format!("cannot {what}: {error}"));
    let images = open_images(&plan.images).map_err(|error| context("open the image directory", error))?;
    let criu = |()| rustix::fs::stat(&plan.criu).map(|found| (found.st_dev, found.st_ino));
    let outside = criu(()).map_err(|error| context("find CRIU", error.into()))?;
    let init = plan.init.open().map_err(|error| context("find the processes of the run", error))?;
    let mut kinds = ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::PROCESS_ID;
    let user = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user"));
    if user(&plan.init.to_string())? != user("self")? {
        kinds |= ThreadNameSpaceType::USER;
    }
    move_into_thread_name_spaces(init.as_fd(), kinds)
        .map_err(|error| context("enter the namespaces of the run", error.into()))?;
    if criu(()).ok() != Some(outside) {
        let hidden =
            format!("{:?} cannot be seen inside the run: move it out of its volumes and scratch places", plan.criu);
        return Err(io::Error::other(hidden));
    }
    let status = Command::new(&plan.criu)
        .args(["dump", "--leave-running", "--log-file", LOG, "--images-dir"])
        .arg(format!("/proc/self/fd/{}", images.as_raw_fd()))
        .args(["--action-script", relay::PROGRAM, "--tree", &plan.root.to_string()])
        .args(&plan.args)
        .env(relay::PLACES, &plan.places)
        .stdin(Stdio::null())
        .status()
        .map_err(|error| context("run CRIU", error))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Opens the image directory so that CRIU inherits it: its path means nothing inside.
fn open_images(link: &Path) -> io::Result<OwnedFd> {
    let dir = rustix::fs::openat(CWD, link, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::fcntl_setfd(&dir, FdFlags::empty())?;
    Ok(dir)
}
