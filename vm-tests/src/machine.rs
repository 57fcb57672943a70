//! A machine: from a job to its outcome.

mod initramfs;
pub(crate) mod qemu;
mod uml;

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::Context;
use crate::job::{Job, Report};
use crate::{Error, Result, kernel_log};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// User-mode Linux.
    Uml,
    /// QEMU with Debian's kernel.
    Qemu,
}

impl Kind {
    /// The scratch disk, inside.
    pub(crate) fn scratch_device(self) -> &'static str {
        match self {
            Self::Uml => "/dev/ubda",
            Self::Qemu => "/dev/vda",
        }
    }

    /// The console that carries the program's output, inside.
    pub(crate) fn program_console(self) -> &'static str {
        match self {
            Self::Uml => "/dev/tty0",
            Self::Qemu => "/dev/hvc0",
        }
    }

    /// The type, source and options of the mount of the host's directory `exchange`, to be writable inside.
    pub(crate) fn exchange_mount(self, exchange: &Path) -> (&'static str, &'static str, String) {
        match self {
            Self::Uml => ("hostfs", "exchange", exchange.display().to_string()),
            Self::Qemu => ("9p", qemu::EXCHANGE_TAG, "trans=virtio,version=9p2000.L".into()),
        }
    }

    /// Where the modules of its kernel are, and which are loaded.
    pub(crate) fn modules(self) -> Result<(PathBuf, Vec<String>)> {
        let (dir, names) = match self {
            Self::Uml => (uml::module_dir()?, uml::TO_LOAD),
            Self::Qemu => (qemu::module_dir()?, qemu::TO_LOAD),
        };
        Ok((dir, names.iter().map(|name| (*name).to_owned()).collect()))
    }

    /// What programs inside find in their environment beside what the host passes on.
    pub(crate) fn environment(self) -> Result<Vec<(&'static str, String)>> {
        match self {
            Self::Uml => Ok(Vec::new()),
            Self::Qemu => qemu::environment(),
        }
    }

    /// What runs it, for people.
    pub(crate) fn shown(self) -> String {
        match self {
            Self::Uml => "user-mode Linux".to_owned(),
            Self::Qemu => match qemu::Accelerator::here() {
                qemu::Accelerator::Kvm => "QEMU with KVM".to_owned(),
                qemu::Accelerator::Played(why) => format!("QEMU without KVM, because {why},"),
            },
        }
    }

    /// What begins the names of its results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Uml => "uml",
            Self::Qemu => "qemu",
        }
    }
}

/// How a machine is built.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Which.
    pub(crate) kind: Kind,
    /// Its memory.
    pub(crate) memory_mib: u32,
    /// The size of its scratch disk, of which only what is written takes room.
    pub(crate) scratch_gib: u64,
    /// When it is given up.
    pub(crate) deadline: Option<Duration>,
}

/// What a machine is started with.
struct Plan<'a> {
    memory_mib: u32,
    /// For what else it needs while it runs.
    dir: &'a Path,
    scratch: &'a Path,
    exchange: &'a Path,
}

/// How a machine ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The exit code of the program, or why there is none.
    pub(crate) code: std::result::Result<i32, String>,
    /// All that the kernel said.
    pub(crate) kernel_log: String,
}

impl Outcome {
    /// Why this is a failure although the program may have said otherwise.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let kernel =
            kernel_log::complaints(&self.kernel_log).into_iter().map(|line| format!("the kernel said: {line}"));
        self.code.as_ref().err().cloned().into_iter().chain(kernel).collect()
    }
}

impl Machine {
    /// One that is enough for most.
    pub(crate) fn new(kind: Kind) -> Self {
        let memory_mib = match kind {
            Kind::Uml => 1024,
            Kind::Qemu => 3072,
        };
        Self { kind, memory_mib, scratch_gib: 16, deadline: None }
    }

    /// Starts, runs the job, and ends; what the program writes goes to `out` as it comes.
    pub(crate) fn run(&self, job: &Job, out: &mut dyn Write) -> Result<Outcome> {
        let place = place()?;
        let dir =
            tempfile::Builder::new().prefix("machine-").tempdir_in(&place).during("make a directory in", &place)?;
        let (exchange, scratch, log) =
            (dir.path().join("exchange"), dir.path().join("scratch"), dir.path().join("log"));
        fs::create_dir(&exchange).during("make", &exchange)?;
        job.write(&exchange)?;
        make_scratch(&scratch, self.scratch_gib)?;
        let plan = Plan { memory_mib: self.memory_mib, dir: dir.path(), scratch: &scratch, exchange: &exchange };
        let ended = self.start(&plan, &log, job.interactive)?.wait(out, self.deadline)?;
        let kernel_log = fs::read(&log).during("read", &log)?;
        let kernel_log = String::from_utf8_lossy(&kernel_log).replace('\r', "");
        let code = match (ended, Report::read(&exchange)?) {
            (Ended::Off(_), Some(report)) => Ok(report.code),
            (Ended::Off(status), None) => Err(format!("the machine ended without a report: {status}")),
            (Ended::Panicked, _) => Err("the machine's kernel panicked".to_owned()),
            (Ended::Late(deadline), _) => Err(format!("the machine did not end within {} s", deadline.as_secs())),
        };
        Ok(Outcome { code, kernel_log })
    }

    fn start(&self, plan: &Plan<'_>, log: &Path, interactive: bool) -> Result<Running> {
        let guest = std::env::current_exe().during("find", "/proc/self/exe")?;
        // The machine ends with its pid namespace, that with `unshare`, and `unshare` with the runner.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL"]);
        if !nix::unistd::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        match self.kind {
            Kind::Uml => uml::start(&mut command, plan, &guest)?,
            Kind::Qemu => qemu::start(&mut command, plan, &guest)?,
        }
        command.stderr(Stdio::piped());
        if !interactive {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        }
        let log_file = File::create(log).during("make", log)?;
        let mut child = command.spawn().during("run", "setpriv")?;
        let panicked = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&panicked);
        let logger = child.stderr.take().map(|from| thread::spawn(move || keep_log(from, log_file, &seen)));
        Ok(Running { child, logger, panicked })
    }
}

/// The directory for what machines need while they run.
fn place() -> Result<PathBuf> {
    let place = crate::run::target_dir()?.join("vm");
    fs::create_dir_all(&place).during("make", &place)?;
    Ok(place)
}

fn make_scratch(path: &Path, gib: u64) -> Result<()> {
    File::create(path).and_then(|file| file.set_len(gib << 30)).during("make", path)?;
    let mut command = blind_to_mounts("mkfs.ext4");
    // It is thrown away: no journal to lose, nothing to initialise ahead.
    command.args(["-q", "-F", "-E", "lazy_itable_init=1,nodiscard"]).arg(path);
    run_quietly(&mut command)
}

/// A program that does not find out what is mounted.
///
/// Even for a plain file, mke2fs(8) looks at the source of every mount, and waits for ever where that is a file system that a
/// hung server should serve. Nothing of what it makes a disk of is mounted here.
fn blind_to_mounts(program: &str) -> Command {
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    // Where that mount is not allowed, it looks.
    command.args(["--mount", "sh", "-c", "mount -t tmpfs none /proc 2>/dev/null; exec \"$0\" \"$@\"", program]);
    command.env("EXT2FS_NO_MTAB_OK", "1");
    command
}

/// Runs a program that has nothing to say if all is well.
pub(crate) fn run_quietly(command: &mut Command) -> Result<()> {
    let said = match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => error.to_string(),
    };
    Err(Error::Command { command: format!("{command:?}"), said })
}

/// How a machine came to its end.
enum Ended {
    /// It is off.
    Off(ExitStatus),
    /// It was given up.
    Late(Duration),
    /// It was ended after its kernel had stopped.
    Panicked,
}

/// A machine that is on; off when dropped.
struct Running {
    child: Child,
    /// Keeps what the kernel says.
    logger: Option<JoinHandle<io::Result<()>>>,
    /// The kernel has said that it stops.
    panicked: Arc<AtomicBool>,
}

/// How long a kernel that panicked may take to say the rest, and to end by itself.
const LAST_WORDS: Duration = Duration::from_secs(3);

impl Running {
    /// Waits for its end, and passes on what it writes.
    fn wait(mut self, out: &mut dyn Write, deadline: Option<Duration>) -> Result<Ended> {
        let started = Instant::now();
        let output = self.child.stdout.take().map(read_in_background);
        let mut at_end = output.is_none();
        let mut stopped = None;
        loop {
            if let Some(output) = &output
                && !at_end
            {
                match output.recv_timeout(Duration::from_millis(100)) {
                    Ok(bytes) => out.write_all(&bytes).and_then(|()| out.flush()).during("write", "the output")?,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => at_end = true,
                }
            } else {
                thread::sleep(Duration::from_millis(20));
            }
            if at_end && let Some(status) = self.child.try_wait().during("wait for", "the machine")? {
                return Ok(Ended::Off(status));
            }
            if crate::run::interrupted() {
                return Err(Error::Interrupted);
            }
            if self.panicked.load(Ordering::Relaxed) && stopped.get_or_insert_with(Instant::now).elapsed() > LAST_WORDS
            {
                return Ok(Ended::Panicked);
            }
            if let Some(deadline) = deadline.filter(|deadline| started.elapsed() > *deadline) {
                return Ok(Ended::Late(deadline));
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing to do if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Whoever reads the log next finds all of it.
        self.logger.take().map(JoinHandle::join);
    }
}

/// Keeps what the kernel says, and notes when it stops.
fn keep_log(from: impl Read, mut log: impl Write, panicked: &AtomicBool) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line)? > 0 {
        log.write_all(&line)?;
        if String::from_utf8_lossy(&line).contains(kernel_log::PANIC) {
            panicked.store(true, Ordering::Relaxed);
        }
        line.clear();
    }
    Ok(())
}

fn read_in_background(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_kernel_that_stops_is_noticed() {
        let said = |log: &str| {
            let (mut kept, panicked) = (Vec::new(), AtomicBool::new(false));
            keep_log(log.as_bytes(), &mut kept, &panicked).unwrap();
            assert_eq!(kept, log.as_bytes());
            panicked.into_inner()
        };
        assert!(!said("<6>all is well\nand no line end"));
        assert!(said("<0>Kernel panic - not syncing: sysrq triggered crash\n<4>CPU: 0\n"));
    }

    #[test]
    fn a_disk_is_made_without_a_look_at_what_is_mounted() {
        run_quietly(blind_to_mounts("sh").args(["-c", "! test -e /proc/mounts"])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        make_scratch(&disk, 1).unwrap();
        let mut magic = [0; 2];
        File::open(disk).unwrap().read_exact_at(&mut magic, 1080).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
    }
}
