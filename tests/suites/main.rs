//! Suites of others, run on a branch: pjdfstest, fsx, and the file system class of stress-ng.
//!
//! fsstress and the union-mount suite are in neither Debian nor a registry of crates, and are not run here; what the second looks at is in
//! `tests/fuse/union.rs`, and random histories beside a plain directory are in `tests/fuse/differential.rs` and `histories.rs`.
//!
//! `make suites` installs and runs them. Elsewhere their cases are reported as ignored: pjdfstest and fsx take minutes to build.
//! Each runs on `fsnap overlay` as root mounts it, over ext4 (or whatever holds `target`), whose files cannot share blocks, and over btrfs, whose
//! files can; and on a branch below `branches/` of `fsnap mount`. `FSNAP_SUITES` is the directory with the programs; `FSNAP_SUITES_SEED` the number that decides what fsx
//! does, `FSNAP_SUITES_STEPS` how much of it, and `FSNAP_SUITES_SECONDS` how long each of stress-ng's stressors runs.

#![allow(clippy::print_stdout, reason = "what a suite counts is to be seen")]

mod branch;
mod fsx;
mod pjdfstest;
mod stress_ng;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::mount::MountPropagationFlags;

use branch::{Branch, Ground};

/// What a case does on a branch, with the directory of the programs.
type Run = Box<dyn FnOnce(&Branch, &std::path::Path) -> Result<(), String> + Send>;

/// A case: its name, why it is left out if it is, and what it does.
struct Case {
    name: String,
    left_out: Option<&'static str>,
    run: Run,
}

/// A number from the environment.
fn setting(name: &str, usual: u64) -> u64 {
    let named = std::env::var(name).ok();
    named.map_or(usual, |number| number.parse().unwrap_or_else(|error| panic!("{name}: {error}")))
}

/// Runs a program; what it printed, and whether it succeeded.
fn run(command: &mut Command) -> Result<(bool, String), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((output.status.success(), text))
}

fn main() -> ExitCode {
    // There is one thread yet, so that all later ones, and the servers, are in the namespace.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("these cases mount, which takes root");
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).expect("the namespace's mounts can be made private");
    let programs = std::env::var_os("FSNAP_SUITES").map(PathBuf::from);
    let mut trials = Vec::new();
    for ground in [Ground::Plain, Ground::Btrfs, Ground::Checkpoint] {
        let cases = [pjdfstest::cases(), fsx::cases(), stress_ng::cases()];
        for Case { name, left_out, run } in cases.into_iter().flatten() {
            let name = format!("{}::{name}", ground.name());
            let reason = left_out.or(programs.is_none().then_some("`make suites` runs this"));
            let Some(programs) = programs.clone().filter(|_| reason.is_none()) else {
                let name = format!("{name} ({})", reason.unwrap_or_default());
                trials.push(Trial::test(name, || Ok(())).with_ignored_flag(true));
                continue;
            };
            trials.push(Trial::test(name, move || {
                let branch = Branch::new(ground)?;
                run(&branch, &programs)?;
                branch.end().map_err(Failed::from)
            }));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
