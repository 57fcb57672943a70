//! `fsnap overlay` and `fsnap mount` as programs see them: a mounted tree beside a plain directory, and what is left when its
//! server is killed.
//!
//! Everything happens in a mount namespace of this program's own.

mod branches;
mod browse;
#[path = "../support/copies.rs"]
mod copies;
mod differential;
mod faults;
mod histories;
mod native;
mod operations;
mod past;
mod programs;
mod semantics;
mod set_ids;
mod site;
mod sys;
#[path = "../support/thin.rs"]
mod thin;
mod tree;
mod union;
#[path = "../support/volumes.rs"]
mod volumes;
#[path = "../support/waiting.rs"]
mod waiting;
mod writers;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use rustix::mount::MountPropagationFlags;

use crate::volumes::Volume;

/// The name of a case, and what it does.
type Case = (&'static str, fn());

fn main() -> ExitCode {
    // There is one thread yet, so that all later ones, and the servers, are in the namespace.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("these cases mount, which takes root");
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).expect("the namespace's mounts can be made private");
    let mut trials = Vec::new();
    let modules = [
        ("branches", branches::CASES),
        ("browse", browse::CASES),
        ("differential", differential::CASES),
        ("faults", faults::CASES),
        ("histories", histories::CASES),
        ("native", native::CASES),
        ("programs", programs::CASES),
        ("semantics", semantics::CASES),
        ("set_ids", set_ids::CASES),
        ("union", union::CASES),
        ("writers", writers::CASES),
    ];
    for (module, cases) in modules {
        for &(name, case) in cases {
            trials.push(Trial::ignorable_test(format!("{module}::{name}"), move || {
                if let Some(reason) = lacks(name) {
                    return Ok(Completion::ignored_with(reason));
                }
                std::panic::catch_unwind(case).map(|()| Completion::Completed).map_err(|panic| {
                    let text = panic.downcast_ref::<String>().cloned();
                    text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.into())).unwrap_or_default().into()
                })
            }));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Why a case cannot run here, if so: by what it is over.
fn lacks(case: &str) -> Option<&'static str> {
    let over = [("over_dm_thin::", Volume::DmThin), ("over_nilfs2::", Volume::Nilfs2)];
    over.into_iter().find(|(prefix, _)| case.starts_with(prefix)).and_then(|(_, volume)| volume.why_not())
}
