//! The last stage before a program runs: makes this process what the program expects to be, and becomes it.
//!
//! It is the leader of a session, for the engine restores no other root of a tree; has an IPC namespace of its own, which
//! the engine saves; and adopts what its descendants leave behind, so that they stay in the tree that is saved. It has three
//! open files, all of which it can be given again: the engine finds no other.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::Resource;
use serde::{Deserialize, Serialize};

use super::stage::{Failure, Report, send};
use super::{os_text, sys};

/// A terminal, by the numbers that the engine knows it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalId {
    /// The device number of the terminal.
    pub rdev: u64,
    /// That of the file system it lies in.
    pub dev: u64,
}

impl TerminalId {
    /// The name by which CRIU takes it for something that is not saved, and given again on restore.
    pub fn key(self) -> String {
        format!("tty[{:x}:{:x}]", self.rdev, self.dev)
    }
}

/// A program to be run, and how it begins.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// Its name or path, and its arguments.
    #[serde(with = "os_text::list")]
    pub command: Vec<OsString>,
    /// The directory it begins in.
    #[serde(with = "os_text")]
    pub directory: PathBuf,
    /// How many files it may open; as many as this process, if not told.
    pub open_files: Option<u64>,
    /// The terminal it runs on.
    pub terminal: Option<PathBuf>,
    /// Where its output goes, if it has no terminal.
    #[serde(with = "os_text")]
    pub(super) log: PathBuf,
}

impl Program {
    /// A program that begins in `directory`.
    pub fn new(command: Vec<OsString>, directory: PathBuf) -> Self {
        Self { command, directory, open_files: None, terminal: None, log: PathBuf::new() }
    }
}

/// Becomes the program that `input` tells of; returns only if that fails, with the exit status.
///
/// A failure is reported on standard output, which is closed in silence if there is none. Requires that this process has one
/// thread.
pub fn run_program(mut input: impl Read) -> u8 {
    // Not standard output itself, which becomes the program's before it is known whether that can be run.
    let Ok(output) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3) else { return 1 };
    let mut output = File::from(output);
    let mut text = Vec::new();
    let program = input.read_to_end(&mut text).and_then(|_| Ok(serde_json::from_slice::<Program>(&text)?));
    let failure = match program {
        Ok(program) => become_program(&program),
        Err(error) => Failure::step("understand which program to run")(error),
    };
    let _ = send(&mut output, &Report::Failed(failure));
    1
}

fn become_program(program: &Program) -> Failure {
    match prepare(program) {
        Ok(mut command) => {
            let failed = Failure::step(format!("run {}", crate::printable(command.get_program())));
            failed(command.exec())
        }
        Err(failure) => failure,
    }
}

fn prepare(program: &Program) -> Result<Command, Failure> {
    let errno = |error: nix::errno::Errno| io::Error::from(error);
    // Fails only for the leader of a process group, which this is not.
    let _ = rustix::process::setsid();
    nix::sched::unshare(CloneFlags::CLONE_NEWIPC).map_err(errno).map_err(Failure::step("make an IPC namespace"))?;
    nix::sys::prctl::set_child_subreaper(true)
        .map_err(errno)
        .map_err(Failure::step("adopt what the program leaves behind"))?;
    let directory = || program.directory.clone();
    std::env::set_current_dir(&program.directory)
        .map_err(|error| Failure::Directory { directory: directory(), reason: error.to_string() })?;
    if let Some(open_files) = program.open_files {
        let mut limit = rustix::process::getrlimit(Resource::Nofile);
        limit.current = Some(open_files);
        rustix::process::setrlimit(Resource::Nofile, limit)
            .map_err(io::Error::from)
            .map_err(Failure::step("set the number of open files"))?;
    }
    files(program).map_err(Failure::step("open the program's input and output"))?;
    let (name, args) = program.command.split_first().ok_or_else(|| {
        let reason = "there is none".to_owned();
        Failure::Step { step: "run a program".into(), reason }
    })?;
    let mut command = Command::new(name);
    command.args(args);
    let output = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3).map_err(io::Error::from);
    command.stdout(output.map_err(Failure::step("open the program's output"))?);
    Ok(command)
}

fn files(program: &Program) -> io::Result<()> {
    let terminal = program.terminal.as_ref();
    let input: File = match terminal {
        Some(terminal) => File::options().read(true).write(true).open(terminal)?,
        None => File::open("/dev/null")?,
    };
    if terminal.is_some() {
        rustix::process::ioctl_tiocsctty(&input)?;
    }
    rustix::stdio::dup2_stdin(&input)?;
    match terminal {
        Some(_) => rustix::stdio::dup2_stderr(&input)?,
        None => {
            // The engine does not compare the length of a file that is appended to: each copy has another.
            let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW;
            rustix::stdio::dup2_stderr(rustix::fs::openat(CWD, &program.log, flags, Mode::empty())?)?;
        }
    }
    sys::close_all_by_exec()
}
