//! Thin pools as users see them: making them, volumes and branches in them, and what happens when they are short.
//!
//! Where the kernel has no device-mapper, every case is reported as ignored, with the reason.

mod lvm;
mod pools;
mod site;
mod standing;

use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

type Done = Result<(), Failed>;

/// A name and what it runs.
type Case = (&'static str, fn() -> Done);

/// Why nothing of this can run here, if so; in a virtual machine that is made for it, it has to.
fn why_not() -> Option<&'static str> {
    let in_vm = std::env::var_os("FSNAP_VM").is_some();
    let reason = "this kernel has no device-mapper; `cargo run -p vm-tests` runs this in a machine that has";
    (!in_vm && !Path::new("/dev/mapper/control").exists()).then_some(reason)
}

fn main() -> ExitCode {
    let trial = |&(name, run): &Case| {
        Trial::ignorable_test(name, move || match why_not() {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => run().map(|()| Completion::Completed),
        })
    };
    let cases = pools::CASES.iter().chain(lvm::CASES).chain(standing::CASES);
    // One after the other: they look at all devices.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, cases.map(trial).collect()).exit_code()
}
