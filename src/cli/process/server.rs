//! Servers of file systems that live on when the command has ended.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::super::internal::OWN_PROGRAM;
use super::super::{Failure, Outcome, environment};

fn io(action: &'static str, object: &Path) -> impl Fn(std::io::Error) -> Failure {
    let object = fsnap::printable(object.as_os_str());
    move |source| fsnap::Error::Io { action, object: object.clone(), source }.into()
}

/// The path from the root: the server leaves its working directory.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(io("resolve", path))
}

/// Starts this program as a server, by the same command with `--detach` and those options that are set, and waits until it has mounted.
pub(crate) fn start(command: &str, options: &[(bool, &str)], paths: &[PathBuf]) -> Outcome {
    let program = Path::new(OWN_PROGRAM);
    let options = options.iter().filter(|(set, _)| *set).map(|(_, option)| option);
    let mut server = Command::new(program);
    server.args([command, "--detach"]).args(options).arg("--").args(paths.iter().map(OsString::from));
    server.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut server = server.spawn().map_err(io("start", program))?;
    let mut said = Vec::new();
    if let Some(mut out) = server.stdout.take() {
        out.read_to_end(&mut said).map_err(io("wait for", program))?;
    }
    if said == b"1" {
        return Ok(());
    }
    // It has said why on standard error.
    server.wait().map_err(io("wait for", program))?;
    Err(Failure::Reported)
}

/// Tells the service manager, if one waits for it, that this server has mounted
/// ([sd_notify(3)](https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html)).
pub(crate) fn notify_ready() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = environment::notify_socket() else { return };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    // A manager that cannot be told gives up waiting by itself.
    let _ = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
}

/// Tells whoever started this server that it has mounted, and lets go of their terminal and directory.
pub(crate) fn ready() {
    let _ = rustix::process::chdir("/");
    let mut out = std::io::stdout();
    let _ = out.write_all(b"1").and_then(|()| out.flush());
    // Whoever waits for the end of our output has waited enough.
    if let Ok(null) = std::fs::File::options().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}
