//! `fsnap install-hooks`

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::ValueEnum;
use fsnap::Error;
use fsnap::engine::drop_in::{self, Caller, Change};

use super::{Context, Failure, Outcome, Output, environment};

/// Make CRIU call fsnap, whoever calls CRIU: a user, or a container runtime
///
/// Adds marked lines to a file of CRIU's configuration in /etc/criu, after making sure that the installed versions can
/// do it, and a link to this fsnap in /usr/libexec/fsnap. From then on each checkpoint of a container holds its volumes: those
/// that are registered (`fsnap init`) and that its processes can write to, its root file system and its bind mounts among them. Prints what
/// it changes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Who calls CRIU
    #[arg(value_enum)]
    caller: Name,
    /// Print what would be changed, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Take the lines out again, and the link when nobody needs it any more
    #[arg(long)]
    uninstall: bool,
    /// Change the files below this directory, as for a package
    #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true)]
    root: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// All that read CRIU's default.conf
    Criu,
    /// The container runtime runc
    Runc,
    /// The container runtime crun
    Crun,
    /// Podman: the runtime that it uses
    Podman,
}

pub(crate) fn run(args: Args) -> Outcome {
    let callers = match (args.caller, args.uninstall) {
        (Name::Criu, _) => vec![Caller::Criu],
        (Name::Runc, _) => vec![Caller::Runc],
        (Name::Crun, _) => vec![Caller::Crun],
        // The runtime may be another one by now.
        (Name::Podman, true) => vec![Caller::Runc, Caller::Crun],
        (Name::Podman, false) => vec![runtime_of_podman()?],
    };
    let out = Output::new();
    for caller in callers {
        let changes = match args.uninstall {
            true => drop_in::uninstall(&args.root, caller),
            false => {
                check(caller, args.caller)?;
                let program = std::env::current_exe().map_err(failed("find", Path::new("this program")))?;
                drop_in::install(&args.root, caller, &program)
            }
        };
        for change in changes.map_err(failed("read the configuration in", &args.root))? {
            if !args.dry_run {
                change.make().map_err(failed("change", change.path()))?;
            }
            out.line(told(&change))?;
        }
    }
    Ok(())
}

fn told(change: &Change) -> String {
    let shown = |path: &Path| fsnap::printable(path.as_os_str());
    match change {
        Change::Write(path, content) => {
            let line = content.lines().find(|line| line.starts_with("action-script"));
            format!("write {}{}", shown(path), line.map(|line| format!(": {line}")).unwrap_or_default())
        }
        Change::Link(path, target) => format!("link {} to {}", shown(path), shown(target)),
        Change::Remove(path) => format!("remove {}", shown(path)),
    }
}

/// Whether hooks can be installed for a container runtime, as `fsnap doctor` says it.
pub(super) fn verdict(name: &str, runtime: Caller) -> Result<String, String> {
    let program = environment::in_search_path(name);
    let program = program.ok_or_else(|| format!("no directory of PATH has a program {name}"))?;
    match check(runtime, Name::Criu) {
        Ok(()) => Ok(format!("{} can call hooks: `fsnap install-hooks {name}`", fsnap::printable(program.as_os_str()))),
        Err(Failure::Error(error)) => Err(error.to_string()),
        Err(_) => Err(format!("{name} could not be asked")),
    }
}

/// Makes sure that this caller's CRIU can have a hook.
fn check(caller: Caller, named: Name) -> Result<(), Failure> {
    if caller == Caller::Crun && !said_by("crun", &["--version"])?.contains("+CRIU") {
        let instead = match named {
            Name::Podman => "`runtime = \"runc\"` under [engine] in containers.conf makes podman use runc",
            _ => "use runc",
        };
        return Err(cannot(format!("this crun was built without CRIU, and can save no container: {instead}")));
    }
    if caller == Caller::Runc {
        said_by("runc", &["--version"])?;
    }
    let criu = environment::find_criu(&Context::load()?.config)?;
    let (version, (needed, why)) = (criu.version()?, caller.needs());
    if version >= needed {
        return Ok(());
    }
    let program = fsnap::printable(criu.program().as_os_str());
    Err(cannot(format!("{program} has version {version}, and {needed} is needed: {why}")))
}

fn runtime_of_podman() -> Result<Caller, Failure> {
    let name = said_by("podman", &["info", "--format", "{{.Host.OCIRuntime.Name}}"])?;
    match name.trim() {
        "runc" => Ok(Caller::Runc),
        "crun" => Ok(Caller::Crun),
        other => Err(cannot(format!(
            "podman uses the runtime {}, which fsnap does not know",
            fsnap::printable(other.as_ref())
        ))),
    }
}

fn said_by(program: &str, args: &[&str]) -> Result<String, Failure> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(failed("run", Path::new(program)))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(cannot(format!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())))
}

fn cannot(reason: String) -> Failure {
    Error::NoHooks { reason }.into()
}

fn failed(action: &'static str, object: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let object = fsnap::printable(object.as_os_str());
    move |source| Error::Io { action, object, source }.into()
}
