//! What the process finds around it: the only place that reads the environment.

use std::ffi::OsString;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use fsnap::catalog::Access;
use fsnap::config::Config;
use fsnap::coordinator::{Coordinator, Recovered};
use fsnap::engine::criu::{self, Criu};
use fsnap::processes::AuditRules;

use super::output::progress::TerminalProgress;
use super::output::{Failure, say};

/// How long a command waits for another that changes the catalog.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a test makes this process die.
pub(crate) fn armed() -> Option<String> {
    std::env::var("FSNAP_FAILPOINT").ok()
}

/// The settings and places of this run.
#[derive(Debug)]
pub(crate) struct Context {
    /// The merged settings.
    pub(crate) config: Config,
    /// The state directory.
    pub(crate) state: PathBuf,
    /// Whether people may be shown how long work goes on.
    progress: bool,
}

impl Context {
    /// Reads the settings.
    pub(crate) fn load() -> Result<Self, Failure> {
        let config = Config::load(&config_files())?;
        let state = match variable("FSNAP_STATE").or_else(|| config.state.clone()) {
            Some(state) => state,
            None => default_state()?,
        };
        let state = std::path::absolute(&state).map_err(|source| fsnap::Error::Io {
            action: "resolve",
            object: fsnap::printable(state.as_os_str()),
            source,
        })?;
        Ok(Self { config, state, progress: true })
    }

    /// Reads the settings for an engine's hook, which shows nothing to people.
    pub(crate) fn for_hook() -> Result<Self, Failure> {
        Ok(Self { progress: false, ..Self::load()? })
    }

    /// Opens the catalog for a change, and recovers what others left half done.
    pub(crate) fn write(&self) -> Result<Coordinator, Failure> {
        self.recovered(Access::Write)
    }

    /// The same, and makes the catalog if there is none.
    pub(crate) fn create(&self) -> Result<Coordinator, Failure> {
        self.recovered(Access::Create)
    }

    fn recovered(&self, access: Access) -> Result<Coordinator, Failure> {
        let coordinator = self.open(access)?;
        tell(&coordinator.recover()?);
        Ok(coordinator)
    }

    /// Opens the catalog, and recovers nothing.
    pub(crate) fn open(&self, access: Access) -> Result<Coordinator, Failure> {
        let mut coordinator = self.set_up(Coordinator::open(&self.state, access, PATIENCE)?)?;
        if let Some(bar) = TerminalProgress::new().filter(|_| self.progress) {
            coordinator.report_to(Arc::new(bar));
        }
        Ok(coordinator)
    }

    /// Opens the catalog to read it; recovers if the user may write it.
    pub(crate) fn read(&self) -> Result<Coordinator, Failure> {
        let writable = rustix::fs::access(&self.state, rustix::fs::Access::WRITE_OK).is_ok();
        if writable && self.state.join(fsnap::catalog::format::FILE).exists() {
            return self.write();
        }
        self.open(Access::Read)
    }

    /// Opens the catalog to read it, and leaves everything as it is.
    pub(crate) fn look(&self) -> Result<Coordinator, Failure> {
        self.set_up(Coordinator::open(&self.state, Access::Read, self.config.hook.deadline())?)
    }

    fn set_up(&self, mut coordinator: Coordinator) -> Result<Coordinator, Failure> {
        coordinator.open_stores_with(self.config.stores());
        if let Some(dir) = &self.config.branches {
            coordinator.keep_branches_in(dir);
        }
        Ok(coordinator)
    }
}

/// Says what recovery did, for it is more than the user asked for.
pub(crate) fn tell(recovered: &[Recovered]) {
    for one in recovered {
        match one {
            // The ordinary end of a checkpoint that an engine's hook took.
            Recovered::Sealed(_) | Recovered::BranchFinished(_) | Recovered::Removed => {}
            Recovered::Undone(id) => {
                say("recovered", &format!("checkpoint {} was not finished; it is undone", id.short()))
            }
            Recovered::BranchRemoved(name) => {
                say("recovered", &format!("branch {name} was not finished; it is removed"))
            }
            Recovered::RunUndone(name) => {
                say("recovered", &format!("the start of the run {name} was not finished; it is undone"))
            }
            Recovered::RestoreUndone(name) => {
                say("recovered", &format!("the restore onto branch {name} was not finished; it is undone"))
            }
            Recovered::Mounted(name) => say("recovered", &format!("branch {name} is mounted again")),
            Recovered::Forgotten { what } => {
                say("warning", &format!("{what} was done, and its record is lost: {LOST_END}"))
            }
            Recovered::Postponed { what, error } => {
                say("warning", &format!("{what} is half done and stays so: {error}"))
            }
        }
    }
}

/// Why something that was done is known no more.
pub(crate) const LOST_END: &str = "the end of the catalog's log catalog.db-wal is gone; `fsnap recover` names what is left in the \
                                   stores";

/// Where the service manager wants to be told that a server is ready.
#[cfg(feature = "fuse")]
pub(crate) fn notify_socket() -> Option<OsString> {
    std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())
}

/// What an engine tells those that it calls: the library knows the names.
pub(crate) fn of_engine(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Whether this process has root's rights on the machine.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A directory of the XDG base directory specification, which wants relative values ignored.
fn xdg(variable_name: &str, below_home: &str) -> Option<PathBuf> {
    let base = variable(variable_name).filter(|path| path.is_absolute());
    base.or_else(|| Some(variable("HOME")?.join(below_home))).map(|base| base.join("fsnap"))
}

fn default_state() -> Result<PathBuf, Failure> {
    if is_root() {
        return Ok(PathBuf::from("/var/lib/fsnap"));
    }
    xdg("XDG_STATE_HOME", ".local/state").ok_or_else(|| {
        let reason = "neither FSNAP_STATE, XDG_STATE_HOME nor HOME is set".to_owned();
        Failure::from(fsnap::Error::Config { path: PathBuf::from("environment"), reason })
    })
}

fn config_files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/usr/lib/fsnap/config.toml"), PathBuf::from("/etc/fsnap/config.toml")];
    let drop_ins = std::fs::read_dir(Path::new("/etc/fsnap/conf.d")).into_iter().flatten().flatten();
    let mut drop_ins: Vec<PathBuf> =
        drop_ins.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    drop_ins.sort();
    files.extend(drop_ins);
    if !is_root() {
        files.extend(xdg("XDG_CONFIG_HOME", ".config").map(|dir| dir.join("config.toml")));
    }
    files.extend(variable("FSNAP_CONFIG"));
    files
}

/// Where programs are looked for: the search path, and the directories of administrators' programs, which a user's
/// search path lacks.
fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).filter(|dir| dir.is_absolute()).collect();
    dirs.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    let mut seen = std::collections::BTreeSet::new();
    dirs.retain(|dir| seen.insert(dir.clone()));
    dirs
}

/// The program of that name that the kernel would start from the search path.
pub(crate) fn in_search_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|program| rustix::fs::access(program, rustix::fs::Access::EXEC_OK).is_ok())
}

/// The process that started this one.
pub(crate) fn parent() -> i32 {
    rustix::process::Pid::as_raw(rustix::process::getppid())
}

/// Whether the engine was told to leave files without names out of its images: on its command line, or by fsnap, which started it.
pub(crate) fn is_told_to_leave_files_out(engine: i32) -> bool {
    if std::env::var_os(fsnap::run::EXTERNAL).is_some() {
        return true;
    }
    let line = std::fs::read(format!("/proc/{engine}/cmdline")).unwrap_or_default();
    line.split(|&byte| byte == 0)
        .any(|argument| argument.starts_with(b"file[") || argument.starts_with(b"--external=file["))
}

/// Waits until what fsnap does beside a hook is done, if it does anything; fails if it cannot be done.
pub(crate) fn wait_for_the_rest() -> Result<(), fsnap::Error> {
    if std::env::var_os(fsnap::run::REST).is_none() {
        return Ok(());
    }
    let mut heard = vec![0; fsnap::run::IN_ORDER.len()];
    let read = std::io::stdin().read_exact(&mut heard);
    let read =
        read.and_then(|()| if heard == fsnap::run::IN_ORDER { Ok(()) } else { Err(ErrorKind::InvalidData.into()) });
    read.map_err(|source| fsnap::Error::Io { action: "hear of", object: "the rest of the checkpoint".into(), source })
}

/// The volumes that hooks are told to take: `FSNAP_VOLUMES`, or the configuration's.
pub(crate) fn volumes(config: &Config) -> Vec<String> {
    match std::env::var("FSNAP_VOLUMES") {
        Ok(names) if !names.trim().is_empty() => {
            names.split([',', ' ']).filter(|name| !name.is_empty()).map(str::to_owned).collect()
        }
        _ => config.hook.volumes.iter().map(ToString::to_string).collect(),
    }
}

/// Names the image directory of a dump that the caller of the engine takes snapshots for: the hook has no part in it.
pub(crate) const OUTER: &str = "FSNAP_OUTER_IMAGES";

/// Whether that is so for these images.
pub(crate) fn is_outer(images: &Path) -> bool {
    variable(OUTER).is_some_and(|outer| outer == images)
}

/// What hooks are told to say of a checkpoint: `FSNAP_MESSAGE`.
pub(crate) fn message() -> String {
    std::env::var_os("FSNAP_MESSAGE").unwrap_or_default().to_string_lossy().into_owned()
}

/// What hooks do about what lies outside: as fsnap has told them for a run; else the configuration's rules, with the policy of
/// `FSNAP_OUTSIDE`.
pub(crate) fn audit(config: &Config) -> Result<AuditRules, Failure> {
    let bad = |reason: String| fsnap::Error::Config { path: "environment".into(), reason };
    if let Some(rules) = std::env::var_os(fsnap::run::AUDIT) {
        let parsed = serde_json::from_slice(rules.as_encoded_bytes());
        return Ok(parsed.map_err(|error| bad(format!("{} is not fsnap's: {error}", fsnap::run::AUDIT)))?);
    }
    let mut rules = config.audit.rules();
    if let Some(policy) = std::env::var_os("FSNAP_OUTSIDE").filter(|policy| !policy.is_empty()) {
        let known = policy.to_str().and_then(|policy| super::audit::Outside::from_str(policy, false).ok());
        let unknown = || bad(format!("FSNAP_OUTSIDE is {policy:?}, and not refuse, record or ignore"));
        rules.policy = known.ok_or_else(unknown)?.into();
    }
    Ok(rules)
}

/// How long processes may stand in a hook: as fsnap has told it for a run, else what the configuration says.
pub(crate) fn deadline(config: &Config) -> Duration {
    let mut hook = config.hook.clone();
    if let Some(seconds) = std::env::var(fsnap::run::DEADLINE).ok().and_then(|seconds| seconds.parse().ok()) {
        hook.deadline_seconds = seconds;
    }
    hook.deadline()
}

/// CRIU, as configured or as found.
pub(crate) fn find_criu(config: &Config) -> Result<Criu, Failure> {
    let named = variable("FSNAP_CRIU").map(|program| std::path::absolute(&program).unwrap_or(program));
    let configured = named.or_else(|| config.criu.program.clone());
    let search: Vec<PathBuf> = search_path().iter().map(|dir| dir.join(criu::NAME)).collect();
    Ok(Criu::find(configured.as_deref(), &search)?)
}
