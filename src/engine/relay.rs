//! CRIU's action script inside the namespaces of a run: it hands each call on to the fsnap outside.
//!
//! CRIU saves a run from within its namespaces, where a path means what it means to the processes. There the state directory
//! is read-only and pids mean nothing outside, so that the hook cannot work there. This program stands in its place: it connects to
//! a socket in the image directory, says which action is due, and ends as it is told. When nobody listens any more it fails,
//! and so does the dump: the processes run on.
//!
//! While the processes are frozen it saves their scratch places, too, and says so when that is done: beside the snapshots, for which the
//! hook does not say before that everything was taken.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::confine;

/// The variable that makes this program a relay: the scratch places that are to be saved, separated as in a search path.
pub(super) const PLACES: &str = "FSNAP_RELAY";
/// The socket's name in the image directory.
pub(super) const SOCKET: &str = "fsnap-relay";
/// Its path inside a run: what waits for the processes there is fsnap.
pub(super) const PROGRAM: &str = "/proc/1/exe";

/// Whether a program that was called by this name, without arguments, is a relay.
pub fn is_relay(called: &Path, variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> bool {
    called == Path::new(PROGRAM) && variable(PLACES).is_some() && variable("CRTOOLS_SCRIPT_ACTION").is_some()
}

/// What it says when the scratch places are saved.
pub(super) const SAVED: &str = "saved";

/// Asks the fsnap outside to do what CRIU wants done; fails if that does.
pub fn run_relay(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> io::Result<()> {
    let asked = |name: &str| variable(name).ok_or_else(|| io::Error::other(format!("{name} is not set")));
    let (action, images) = (asked("CRTOOLS_SCRIPT_ACTION")?, PathBuf::from(asked("CRTOOLS_IMAGE_DIR")?));
    if action != "post-dump" {
        return answered(&say(&images, &action)?);
    }
    let places: Vec<PathBuf> = std::env::split_paths(&asked(PLACES)?).collect();
    let save = || {
        confine::save_scratch(&places, &images)
            .map_err(|error| io::Error::other(format!("cannot save the files in scratch places: {error}")))
    };
    // The hook has a deadline, which is not to run out because of them.
    let beside = confine::holds_little(&places);
    if !beside {
        save()?;
    }
    let mut stream = say(&images, &action)?;
    if beside {
        save()?;
    }
    writeln!(stream, "{SAVED}")?;
    answered(&stream)
}

fn say(images: &Path, action: &OsStr) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(images.join(SOCKET))?;
    stream.write_all(action.as_encoded_bytes())?;
    stream.write_all(b"\n")?;
    Ok(stream)
}

fn answered(stream: &UnixStream) -> io::Result<()> {
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer == "done\n" { Ok(()) } else { Err(io::Error::other("fsnap did not do its part of the checkpoint")) }
}
