//! Thin pools as users see them: making them, volumes and branches in them, and what happens when they are short.
//!
//! Where the kernel has no device-mapper, every case is reported as ignored, with the reason.

#[path = "../support/images.rs"]
mod images;
#[path = "../support/kernel.rs"]
mod kernel;
mod lvm;
mod mixed;
mod pools;
mod site;
mod standing;
#[path = "../support/thin.rs"]
mod thin;
#[cfg(feature = "fuse")]
#[path = "../support/unlinked.rs"]
mod unlinked;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let lacks = "this kernel has no device-mapper; `cargo run -p vm-tests` runs this in a machine that has";
    let cases = pools::CASES.iter().chain(lvm::CASES).chain(standing::CASES).chain(mixed::CASES);
    kernel::run(cases, (!Path::new("/dev/mapper/control").exists()).then_some(lacks))
}
