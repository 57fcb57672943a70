//! The first process of a machine: sets up a system, runs one program, reports, and turns the machine off.
//!
//! The machine's root is the host's file system, read-only. Over it lies a writable layer on a scratch disk, and that is
//! what the program sees as its root, so that it can do as it likes and leaves nothing. `/tmp` is a directory of the
//! scratch disk itself, because a file system on a layered one would test the layers.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};

use crate::error::Context;
use crate::job::{Job, Report};
use crate::machine::{Kind, qemu, run_quietly};
use crate::modules::Modules;
use crate::{Error, Result};

/// Where the scratch disk is mounted while there is no other place to write to.
const SCRATCH: &str = "/tmp";
/// Where the layered root is put together.
const ROOT: &str = "/tmp/root";

/// Never returns: at its end the machine is off.
pub(crate) fn main(kind: Kind, exchange: &Path) -> ! {
    let code = match prepare(kind, exchange).and_then(|job| run(kind, &job)) {
        Ok(code) => code,
        Err(error) => {
            complain(&error.to_string());
            125
        }
    };
    if let Err(error) = (Report { code }).write(exchange) {
        complain(&error.to_string());
    }
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    complain(&format!("cannot turn the machine off: {errno}"));
    std::process::exit(1)
}

/// Goes on as [`main`] on the host's root; returns only to end the machine, with what went wrong in its log.
pub(crate) fn initramfs(exchange: &Path, guest: &Path) -> std::process::ExitCode {
    let early = fs::create_dir_all("/dev")
        .during("make", "/dev")
        .and_then(|()| mount_at("devtmpfs", "dev", "/dev", ""))
        .and_then(|()| qemu::initramfs(exchange, guest));
    if let Err(error) = early {
        complain(&error.to_string());
    }
    // The first process ends: the kernel panics, and the machine with it.
    std::process::ExitCode::FAILURE
}

/// Runs in a machine that is tried; its end is the machine's.
pub(crate) fn probe() -> std::process::ExitCode {
    let said = fs::create_dir_all("/dev")
        .during("make", "/dev")
        .and_then(|()| mount_at("devtmpfs", "dev", "/dev", ""))
        .and_then(|()| qemu::say_that_it_works());
    // The kernel panics, and the machine ends, when this process does.
    if said.is_ok() { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

/// Says something in the kernel's log, which the host shows when a machine fails.
fn complain(text: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // In one piece, for each is a line of its own.
        let _ = log.write_all(format!("<3>vm-tests: {text}\n").as_bytes());
    }
}

fn prepare(kind: Kind, exchange: &Path) -> Result<Job> {
    mount_at("proc", "proc", "/proc", "")?;
    if !Path::new("/dev/kmsg").exists() {
        mount_at("devtmpfs", "dev", "/dev", "")?;
    }
    let job = Job::read(exchange)?;
    let modules = Modules::open(&job.module_dir)?;
    let mut loaded = BTreeSet::new();
    for name in &job.modules {
        modules.load(name, &mut loaded)?;
    }
    let program = Path::new(&job.command[0]);
    change_root(kind, exchange, &[exchange, &job.module_dir, &job.dir, program])?;
    let modules = Path::new("/lib/modules");
    fs::create_dir_all(modules).during("make", modules)?;
    if let Some(release) = job.module_dir.file_name() {
        let link = modules.join(release);
        if !link.exists() {
            symlink(&job.module_dir, &link).during("make", &link)?;
        }
    }
    // CRIU looks at what the kernel can do by connecting to itself.
    run_quietly(Command::new("/sbin/ip").args(["link", "set", "lo", "up"]))?;
    nix::unistd::sethostname("machine").during("name", "/proc/sys/kernel/hostname")?;
    Ok(job)
}

/// Makes the layered root the root of everything.
fn change_root(kind: Kind, exchange: &Path, needed: &[&Path]) -> Result<()> {
    mount_at("ext4", kind.scratch_device(), SCRATCH, "")?;
    let (upper, work, tmp) = ("/tmp/upper", "/tmp/work", "/tmp/tmp");
    for dir in [upper, work, tmp, ROOT] {
        fs::create_dir(dir).during("make", dir)?;
    }
    set_sticky(tmp)?;
    mount_at("overlay", "root", ROOT, &format!("lowerdir=/,upperdir={upper},workdir={work}"))?;
    let inside = |path: &str| format!("{ROOT}{path}");
    for (kind, path, options) in [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", ""),
        ("tmpfs", "/run", "mode=755"),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ] {
        mount_at(kind, kind, &inside(path), options)?;
    }
    for (kind, path, options) in [("devpts", "/dev/pts", "mode=620,ptmxmode=666"), ("tmpfs", "/dev/shm", "mode=1777")] {
        let at = inside(path);
        if !Path::new(&at).exists() {
            fs::create_dir(&at).during("make", &at)?;
        }
        mount_at(kind, kind, &at, options)?;
    }
    fs::create_dir_all(inside("/run/lock")).during("make", "/run/lock")?;
    // What the job needs may lie in the host's /tmp: so much of that is seen in the new one.
    for name in needed.iter().filter_map(|path| path.strip_prefix(SCRATCH).ok()?.iter().next()) {
        let at = Path::new(tmp).join(name);
        let from = Path::new(ROOT).join("tmp").join(name);
        if !at.exists() && from.is_dir() {
            fs::create_dir(&at).during("make", &at)?;
            bind(&from.to_string_lossy(), &at.to_string_lossy())?;
        }
    }
    bind(tmp, &inside("/tmp"))?;
    let (kind, source, options) = kind.exchange_mount(exchange);
    mount_at(kind, source, &inside(&exchange.to_string_lossy()), &options)?;

    let old = inside("/.old");
    fs::create_dir(&old).during("make", &old)?;
    nix::unistd::pivot_root(ROOT, old.as_str()).during("change the root to", ROOT)?;
    std::env::set_current_dir("/").during("enter", "/")?;
    umount2("/.old", MntFlags::MNT_DETACH).during("unmount", "/.old")?;
    fs::remove_dir("/.old").during("remove", "/.old")
}

fn mount_at(kind: &str, source: &str, at: &str, options: &str) -> Result<()> {
    mount(Some(source), at, Some(kind), MsFlags::empty(), Some(options)).during("mount something at", at)
}

fn bind(from: &str, at: &str) -> Result<()> {
    mount(Some(from), at, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .during("bind something to", at)
}

fn set_sticky(dir: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o1777)).during("change the mode of", dir)
}

/// Runs the program to its end and returns its exit code.
fn run(kind: Kind, job: &Job) -> Result<i32> {
    let path = kind.program_console();
    let console = OpenOptions::new().read(true).write(true).open(path).during("open", path)?;
    if !job.interactive {
        let mut settings = tcgetattr(&console).during("look at", path)?;
        settings.make_raw();
        tcsetattr(&console, OptionalActions::Now, &settings).during("set up", path)?;
    }
    let clone = |console: &File| console.try_clone().during("open", path);
    let mut command = if job.interactive {
        // So that the shell can do job control.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).args(&job.command);
        command.stdin(clone(&console)?);
        command
    } else {
        let mut command = Command::new(&job.command[0]);
        command.args(&job.command[1..]).process_group(0).stdin(Stdio::null());
        command
    };
    command.env_clear().envs(&job.environment).current_dir(&job.dir);
    let mut passing_on = None;
    if job.interactive {
        command.stdout(clone(&console)?).stderr(clone(&console)?);
    } else {
        // A program that writes to a terminal writes otherwise, and a terminal sends signals.
        let (mut from, into) = io::pipe().during("make a pipe to", path)?;
        command.stdout(into.try_clone().during("make a pipe to", path)?).stderr(into);
        let mut out = clone(&console)?;
        passing_on = Some(thread::spawn(move || io::copy(&mut from, &mut out)));
    }
    let program = &job.command[0];
    let spawned = command.spawn();
    let child = spawned.map_err(|error| Error::Command { command: program.clone(), said: error.to_string() })?;
    // With it goes this process's own end of the pipe.
    drop(command);
    let code = wait_for(Pid::from_raw(child.id() as i32))?;
    // What the program left running would hold the pipe, and write while the machine goes.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    // A thread that fell has passed on less; the host sees that there is no result.
    let _ = passing_on.map(JoinHandle::join);
    match tcdrain(&console) {
        // The end of a session hangs its terminal up, and nothing waits there any more.
        Err(rustix::io::Errno::IO) if job.interactive => {}
        drained => drained.during("drain", path)?,
    }
    Ok(code)
}

/// Waits for one process, and buries the others that end meanwhile, whose parents are gone.
fn wait_for(pid: Pid) -> Result<i32> {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(ended, code)) if ended == pid => return Ok(code),
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended == pid => return Ok(128 + signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).during("wait for a process, reading", "/proc"),
        }
    }
}
