//! `fsnap overlay`

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fsnap::fuse::overlay::Overlay;
use fsnap::fuse::session::{self, Options};

use super::{Failure, Outcome};

/// Write to a directory copy-on-write
///
/// DIR then shows LOWER, and takes writes; LOWER itself is never changed. STORE keeps everything that was written, and must
/// be a directory of its own: mounting with the same LOWER and STORE again shows the same files. `fsnap umount DIR` ends it.
///
/// Mounted by root, every user sees it, and the permissions of its files hold.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory to begin with
    lower: PathBuf,
    /// The directory that keeps the changes; made if it does not exist
    store: PathBuf,
    /// Where to mount
    dir: PathBuf,
    /// Serve in this process, until it is unmounted
    #[arg(long)]
    foreground: bool,
    /// Let other users see it, although it is not root who mounts
    #[arg(long)]
    allow_other: bool,
    /// Let set-id bits have an effect
    #[arg(long)]
    suid: bool,
    /// Let device nodes be opened
    #[arg(long)]
    dev: bool,
    /// Tell on standard output that it is mounted, and detach from the terminal then
    #[arg(long, hide = true)]
    detach: bool,
}

fn io(action: &'static str, object: &Path) -> impl Fn(std::io::Error) -> Failure {
    let object = fsnap::printable(object.as_os_str());
    move |source| fsnap::Error::Io { action, object: object.clone(), source }.into()
}

pub(crate) fn run(args: Args) -> Outcome {
    if args.foreground || args.detach { serve(&args) } else { start_server(&args) }
}

fn serve(args: &Args) -> Outcome {
    let overlay = Overlay::open(&args.lower, &args.store).map_err(session::Error::from)?;
    let options = Options {
        allow_other: args.allow_other || rustix::process::geteuid().is_root(),
        suid: args.suid,
        dev: args.dev,
    };
    let source = std::path::absolute(&args.store).map_err(io("resolve", &args.store))?;
    let ready = || {
        if args.detach {
            let mut out = std::io::stdout();
            let _ = out.write_all(b"1").and_then(|()| out.flush());
            // Whoever waits for the end of our output has waited enough.
            if let Ok(null) = std::fs::File::options().read(true).write(true).open("/dev/null") {
                let _ = rustix::stdio::dup2_stdout(&null);
                let _ = rustix::stdio::dup2_stderr(&null);
            }
        }
    };
    Ok(session::serve(overlay, &source, &args.dir, options, ready)?)
}

/// Starts a server that lives on, and waits until it has mounted.
fn start_server(args: &Args) -> Outcome {
    let program = Path::new("/proc/self/exe");
    let mut command = Command::new(program);
    command.arg("overlay").arg("--detach");
    for (set, option) in [(args.allow_other, "--allow-other"), (args.suid, "--suid"), (args.dev, "--dev")] {
        if set {
            command.arg(option);
        }
    }
    command.arg("--");
    for path in [&args.lower, &args.store, &args.dir] {
        command.arg(std::path::absolute(path).map_err(io("resolve", path))?);
    }
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut server = command.spawn().map_err(io("start", program))?;
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
