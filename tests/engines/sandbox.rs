//! The namespaces in which the cases run.
//!
//! Their first process waits for all that ends there, as an init does, and dies with the program outside; with it die all
//! others, and their mounts and loop devices are gone. What the cases write lies in memory: nothing of it is left either, and
//! other programs that keep the disk busy do not slow them down.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::sched::CloneFlags;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Signal, WaitOptions};

/// The first argument of the namespaces' first process.
pub(crate) const INIT: &str = "sandbox-init";

/// Names the directory for scratch; set inside only.
const SCRATCH: &str = "FSNAP_ENGINES_SCRATCH";

/// The directory that the cases write to.
pub(crate) fn scratch() -> PathBuf {
    std::env::var_os(SCRATCH).expect("cases run inside the sandbox").into()
}

/// Whether this process runs in the namespaces.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(SCRATCH).is_some()
}

/// Runs this program again in new namespaces.
pub(crate) fn run(args: &[OsString]) -> ExitCode {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let ran = enter(scratch.path()).and_then(|()| start(INIT, args, scratch.path())?.wait());
    // A mount point cannot be removed.
    let _ = rustix::mount::unmount(scratch.path(), UnmountFlags::DETACH);
    exit_code(ran.expect("these tests need root: they mount, and make namespaces"))
}

/// Runs a case in a mount namespace of its own: what it mounts over the machine's directories, other cases do not see.
pub(crate) fn apart<T: Send>(case: impl FnOnce() -> T + Send) -> T {
    let own = || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        case()
    };
    // Of a thread of its own, since others of this program stay where they are.
    std::thread::scope(|scope| scope.spawn(own).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn enter(scratch: &Path) -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    Ok(rustix::mount::mount("fsnap-engines", scratch, "tmpfs", MountFlags::empty(), Some(c"mode=0755"))?)
}

fn start(first: &str, args: &[OsString], scratch: &Path) -> io::Result<std::process::Child> {
    let mut command = Command::new(std::env::current_exe()?);
    if !first.is_empty() {
        command.arg(first);
    }
    command.args(args).env(SCRATCH, scratch).spawn()
}

/// Runs as the first process of the namespaces.
#[expect(clippy::zombie_processes, reason = "it waits for every process there is")]
pub(crate) fn init(args: &[OsString]) -> ExitCode {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let prepared = rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .and_then(|()| rustix::mount::mount("proc", "/proc", "proc", flags, None));
    prepared.expect("a /proc of the new namespace");
    let worker = start("", args, &scratch()).expect("this program");
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_pid() == worker.id().cast_signed() => {
                return ExitCode::from(status.exit_status().map_or(101, |status| status as u8));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("no child to wait for: {error}"),
        }
    }
}

fn exit_code(status: std::process::ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
