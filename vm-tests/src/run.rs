//! The host's side of the commands.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::TERM_SIGNALS;

use crate::error::Context;
use crate::job::Job;
use crate::machine::Machine;
use crate::{Error, Result, kernel_log};

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on, a signal that asks for the end is noted, so that the guards do their work.
pub(crate) fn catch_signals() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in TERM_SIGNALS {
        // The second one ends the runner at once, and the machines with it.
        signal_hook::flag::register_conditional_default(*signal, flag.clone()).during("catch", "a signal")?;
        signal_hook::flag::register(*signal, flag.clone()).during("catch", "a signal")?;
    }
    Ok(())
}

/// Whether a signal has asked for the end.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// Cargo's directory for what is built, in which this program lies.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().during("find", "/proc/self/exe")?;
    // …/target/[triple/]profile/vm-tests
    let found = exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists() || dir.ends_with("target"));
    found
        .map(PathBuf::from)
        .ok_or(Error::Missing { what: format!("the target directory above {}", exe.display()), package: "cargo" })
}

/// What programs inside see of the environment outside.
pub(crate) fn environment() -> BTreeMap<String, String> {
    let passed = |name: &str| {
        ["PATH", "HOME", "TERM", "LANG", "USER", "SHELL"].contains(&name)
            || ["RUST_", "FSNAP_", "PROPTEST_"].iter().any(|prefix| name.starts_with(prefix))
                // The host's knows another kernel.
                && name != "FSNAP_CRIU"
    };
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).filter(|(name, _)| passed(name)).collect()
}

/// A job for a machine of that kind, to be started in this directory.
pub(crate) fn job(machine: &Machine, command: Vec<String>) -> Result<Job> {
    let (module_dir, modules) = machine.kind.modules()?;
    let dir = std::env::current_dir().during("find", ".")?;
    let mut environment = environment();
    for (name, value) in machine.kind.environment()? {
        // What the user has set goes before.
        environment.entry(name.to_owned()).or_insert(value);
    }
    Ok(Job { command, dir, environment, interactive: false, module_dir, modules })
}

/// Runs one program in a machine; its exit code is the program's, if the machine had nothing to complain about.
pub(crate) fn program(machine: &Machine, command: Vec<String>) -> Result<ExitCode> {
    finish(machine, &job(machine, command)?)
}

/// A prompt in a machine.
pub(crate) fn shell(machine: &Machine) -> Result<ExitCode> {
    let mut job = job(machine, vec!["bash".into(), "-i".into()])?;
    job.interactive = true;
    finish(machine, &job)
}

fn finish(machine: &Machine, job: &Job) -> Result<ExitCode> {
    let outcome = machine.run(job, &mut io::stdout().lock())?;
    let complaints = outcome.complaints();
    if complaints.is_empty() {
        let code = outcome.code.unwrap_or(1);
        return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
    }
    let mut err = io::stderr().lock();
    let log = kernel_log::tail(&outcome.kernel_log, 40);
    let written = writeln!(err, "\n{log}")
        .and_then(|()| complaints.iter().try_for_each(|complaint| writeln!(err, "error: {complaint}")));
    written.during("write", "standard error")?;
    Ok(ExitCode::FAILURE)
}
