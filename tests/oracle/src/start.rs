//! Starting an oracle as a process of its own.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why an oracle did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program cannot be run.
    #[error("cannot run {}: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It ran and ended before its writers did anything.
    #[error("the oracle ended at once: {said}")]
    Ended {
        /// What it wrote on standard error.
        said: String,
    },
}

/// What a started oracle says on its standard output when all writers run.
pub(crate) const READY: &[u8] = b"ready\n";

/// Starts `program` with `args`, which make it an oracle (`run …`), and returns its process id when all writers run.
///
/// It leads a session of its own and holds no descriptor of this process, as engines want it. It is this process's
/// child: who ends it should wait for it.
pub fn start(program: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<i32, StartError> {
    let spawn = |source| StartError::Spawn { program: program.to_owned(), source };
    crate::sys::close_on_exec().map_err(spawn)?;
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(spawn)?;
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let mut said = Vec::new();
    // Ends when the oracle lets go of its standard output, which it does when it is ready, or when it is dead.
    stdout.as_mut().map_or(Ok(0), |pipe| pipe.read_to_end(&mut said)).map_err(spawn)?;
    if said == READY {
        return Ok(child.id() as i32);
    }
    let mut said = String::new();
    stderr.as_mut().map_or(Ok(0), |pipe| pipe.read_to_string(&mut said)).map_err(spawn)?;
    let status = child.wait().map_err(spawn)?;
    Err(StartError::Ended { said: format!("{status}: {}", said.trim_end()) })
}
