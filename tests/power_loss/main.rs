//! The power goes while checkpoints are taken, again and again, and whatever was promised is still there.
//!
//! A file system holds everything: the catalog, an rsync volume with its store, the files of a thin pool with a volume and
//! its store, and a btrfs and a NILFS2 in files. It lies on a disk of which every write is kept in order, with every flush
//! (dm-log-writes). Checkpoints of all four are taken, by the command and by the hook, branched and removed in a loop, and each
//! promise that fsnap makes by returning is marked in the same log.
//!
//! Then the power is cut at random places of that log. A disk that loses power keeps what was flushed, and of what was not yet
//! flushed any part: such a disk is put together from the log, and the machine starts from it. Every checkpoint that was
//! promised is there, each that is there reads back equal to what was recorded when it was taken, what was removed is gone, nothing
//! is left half done, and the next checkpoint works.
//!
//! `FSNAP_POWER_CUTS` sets how many cuts there are; `FSNAP_POWER_SEED` repeats a run's choice of places.

mod cut;
mod disk;
mod log;
mod work;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

fn main() -> ExitCode {
    let trials = vec![Trial::ignorable_test("every_promise_outlives_a_power_cut", || match why_not() {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => {
            cut::every_promise_outlives_a_power_cut();
            Ok(Completion::Completed)
        }
    })];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Why it cannot run here, if so; in a virtual machine that is made for it, it has to.
fn why_not() -> Option<&'static str> {
    let in_vm = std::env::var_os("FSNAP_VM").is_some();
    let reason = "it needs dm-log-writes and a machine of its own; `cargo run -p vm-tests` runs it in one that has";
    (!in_vm).then_some(reason)
}
