//! The guard: a second process that thaws when the first one cannot.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};

use serde::{Deserialize, Serialize};

use super::{Error, FreezeRecord, Result};
use crate::processes::ProcessId;

/// How to start the guard: a program that calls [`run_guard`] with its standard input and output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardCommand {
    /// The program, for example `/proc/self/exe`.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// One line on the guard's input.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// This is going to be stopped.
    Stop(FreezeRecord),
    /// This works on what is stopped, and leaves a control group as it found it: frozen.
    Engine(ProcessId),
    /// Everything runs again: go.
    Done,
}

const READY: &[u8] = b"ready\n";

/// A running guard. Dropped without [`Guard::dismiss`], it thaws what it was told of.
#[derive(Debug)]
pub(super) struct Guard {
    program: PathBuf,
    child: Child,
    input: Option<ChildStdin>,
}

impl Guard {
    pub(super) fn start(command: &GuardCommand) -> Result<Self> {
        let program = command.program.clone();
        let spawned = Command::new(&command.program)
            .args(&command.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = spawned.map_err(|source| Error::Guard { program: program.clone(), source })?;
        let input = child.stdin.take();
        Ok(Self { program, child, input })
    }

    /// Waits until the guard has left our session: from then on no signal from a terminal ends both.
    pub(super) fn wait_ready(&mut self) -> Result<()> {
        let mut answer = Vec::new();
        let read = match self.child.stdout.take() {
            Some(output) => BufReader::new(output.take(64)).read_until(b'\n', &mut answer),
            None => Ok(0),
        };
        let ready = read.and_then(|_| match answer == READY {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "it did not say that it is ready")),
        });
        ready.map_err(|source| self.error(source))
    }

    pub(super) fn tell(&mut self, record: &FreezeRecord) -> Result<()> {
        self.send(&Message::Stop(record.clone()))
    }

    pub(super) fn tell_of_engine(&mut self, engine: ProcessId) -> Result<()> {
        self.send(&Message::Engine(engine))
    }

    /// Tells it that everything runs again.
    pub(super) fn dismiss(mut self) -> Result<()> {
        self.send(&Message::Done)
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        let mut line = serde_json::to_vec(message).map_err(|error| self.error(error.into()))?;
        line.push(b'\n');
        let sent = match &mut self.input {
            Some(input) => input.write_all(&line),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        sent.map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> Error {
        Error::Guard { program: self.program.clone(), source }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The end of its input is its sign to act or to go; it does either at once.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// Runs as the guard: waits for the end of `input` and then thaws what it was told of, unless it was told that all runs; once more when an
/// engine that still works on it has ended.
///
/// Requires a process of its own, started by [`Quiesce::prepare`](super::Quiesce::prepare); it leaves the session that it
/// was started in, and says so on `output`.
pub fn run_guard(input: impl Read, mut output: impl Write) -> Result<()> {
    let failed = |source| Error::Guard { program: "/proc/self/exe".into(), source };
    // Fails only for the leader of a process group, and that leads a session or a shell's job of its own.
    let _ = rustix::process::setsid();
    // Not to keep a file system busy that somebody wants to unmount.
    rustix::process::chdir("/").map_err(|error| failed(error.into()))?;
    output.write_all(READY).and_then(|()| output.flush()).map_err(failed)?;
    drop(output);
    let (mut stopped, mut engine) = (FreezeRecord::new(), None);
    for line in BufReader::new(input).lines() {
        // A line cut short by the sender's death was not acted upon yet.
        match line.map(|line| serde_json::from_str(&line)) {
            Ok(Ok(Message::Stop(record))) => stopped.merge(record),
            Ok(Ok(Message::Engine(id))) => engine = Some(id),
            Ok(Ok(Message::Done)) => return Ok(()),
            Ok(Err(_)) | Err(_) => break,
        }
    }
    stopped.thaw()?;
    let Some(engine) = engine.filter(|engine| engine.is_alive()) else { return Ok(()) };
    engine.ends_within(None).map_err(failed)?;
    FreezeRecord { cgroup: stopped.cgroup, ..FreezeRecord::new() }.thaw()
}
