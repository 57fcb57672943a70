//! Runs the tests of fsnap on real kernels, in virtual machines: the same programs that run natively.
//!
//! A *machine* is a kernel that starts on this computer's own file system, sees it read-only below a writable layer that
//! is thrown away, runs one program, and ends. There are two. User-mode Linux starts in two seconds and has device mapper and
//! NILFS2, so that a developer runs all that needs those at any time. QEMU with the stock kernel of Debian has all that there
//! is, CRIU too, and takes longer: several times as long where the processor cannot run it itself.
//!
//! The same binary is both sides: [`run`] on the host starts a machine, whose first process is [`guest`]. The two talk
//! through a directory that both see ([`job`]) and one console that carries the program's output.
//!
//! Invariant: nothing outlives the runner. A machine lives in a pid namespace that ends with its parent, and all its
//! files lie in directories that go away with their guards, also on Ctrl-C.
//!
//! Invariant: nothing passes unseen. A machine that cannot start, ends early, hangs past its deadline, or whose kernel
//! complains ([`kernel_log`]) fails.
//!
//! The rest, in reading order: `args`, the command line; [`suites`], which programs run where, and [`bench`](mod@bench), which measurements;
//! [`machine`], from a job to its outcome, on either kernel; [`modules`], what the guest loads; [`error`].

mod args;
mod bench;
mod error;
mod guest;
mod job;
mod kernel_log;
mod machine;
mod modules;
mod run;
mod suites;

use std::process::ExitCode;

use error::{Error, Result};

fn main() -> ExitCode {
    args::main(std::env::args_os())
}
