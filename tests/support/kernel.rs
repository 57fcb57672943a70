//! What the tests share that need a kernel with more than most have: cases, programs, and what is mounted.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitCode, Output};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

pub(crate) type Done = Result<(), Failed>;

/// A name and what it runs.
pub(crate) type Case = (&'static str, fn() -> Done);

/// Runs the cases, or reports each as ignored if the kernel `lacks` something; in a virtual machine that is made for them it
/// may not.
pub(crate) fn run(cases: impl Iterator<Item = &'static Case>, lacks: Option<&'static str>) -> ExitCode {
    let lacks = lacks.filter(|_| std::env::var_os("FSNAP_VM").is_none());
    let trial = |&(name, case): &'static Case| {
        Trial::ignorable_test(name, move || match lacks {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => case().map(|()| Completion::Completed),
        })
    };
    // One after the other: they look at all mounts and devices.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, cases.map(trial).collect()).exit_code()
}

/// fsnap with a state of its own, in that directory.
pub(crate) fn fsnap(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsnap"));
    command.args(arguments).env("FSNAP_STATE", dir.join("state")).env_remove("FSNAP_FAILPOINT");
    command
}

/// What a program prints that must succeed.
pub(crate) fn output(command: &mut Command) -> Result<String, Failed> {
    let Output { status, stdout, stderr } = command.output()?;
    let stderr = String::from_utf8_lossy(&stderr);
    ensure(status.success(), &format!("{command:?} ended with {status}: {stderr}"))?;
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// What fsnap says that must fail.
pub(crate) fn failure(command: &mut Command) -> Result<String, Failed> {
    let Output { status, stderr, .. } = command.output()?;
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    ensure(status.code() == Some(1), &format!("{command:?} ended with {status}: {stderr}"))?;
    Ok(stderr)
}

pub(crate) fn ensure(holds: bool, what: &str) -> Done {
    if holds { Ok(()) } else { Err(what.to_owned().into()) }
}

pub(crate) fn is(path: &Path, expected: &str) -> Done {
    let found = fs::read_to_string(path)?;
    ensure(found == expected, &format!("{} holds {found:?} instead of {expected:?}", path.display()))
}

/// A loop device on a new, sparse file of so many bytes.
pub(crate) fn loop_device(image: &Path, bytes: u64) -> Result<String, Failed> {
    File::create(image)?.set_len(bytes)?;
    Ok(output(Command::new("losetup").args(["--find", "--show"]).arg(image))?.trim().to_owned())
}

pub(crate) fn detach(device: &str) {
    let _ = Command::new("losetup").args(["--detach", device]).output();
}

/// Unmounts all that is mounted below a directory, whoever uses it: also when a case fails, nothing of it stays.
pub(crate) fn unmount_below(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
        if Path::new(point).starts_with(dir) {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
