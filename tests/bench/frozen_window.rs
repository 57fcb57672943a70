//! What fsnap costs, beside the bare system call or the program that people use today, in one run.
//!
//! `cargo bench --bench frozen-window` prints one table per question. Only ratios mean anything: the machine may be slow or
//! busy, but both sides of a ratio were measured in turns. Requires root, btrfs and a CRIU that works (`FSNAP_CRIU`).

#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr, reason = "a program")]

mod dump;
mod log;
mod measure;
mod site;
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    // `cargo test --benches` runs it too, and asks only whether it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return ExitCode::SUCCESS;
    }
    let done = site::Site::new().and_then(|site| {
        dump::hook(&site)?;
        dump::frozen_by_criu(&site)?;
        dump::branch(&site)?;
        log::ten_thousand(&site)
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark could not run: {error}");
            ExitCode::FAILURE
        }
    }
}
