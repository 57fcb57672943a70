//! What fsnap costs, beside the bare system call or the program that people use today, in one run.
//!
//! `cargo bench --bench frozen-window` prints one table per question: `hook`, `criu`, `pause`, `branch`, `log`; arguments
//! choose among them. Only ratios mean anything: the machine may be slow or
//! busy, but both sides of a ratio were measured in turns. Requires root, btrfs and a CRIU that works (`FSNAP_CRIU`).

#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr, reason = "a program")]

#[path = "../support/copies.rs"]
mod copies;
mod dump;
mod log;
mod measure;
mod pause;
#[path = "../support/postgresql.rs"]
mod postgresql;
mod site;
mod sys;

use std::process::ExitCode;

/// What prints one table.
type Question = fn(&site::Site) -> Result<(), measure::Failure>;

fn main() -> ExitCode {
    // `cargo test --benches` runs it too, and asks only whether it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return ExitCode::SUCCESS;
    }
    let named: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let questions: [(&str, Question); 5] = [
        ("hook", dump::hook),
        ("criu", dump::frozen_by_criu),
        ("pause", pause::of_postgresql),
        ("branch", dump::branch),
        ("log", log::ten_thousand),
    ];
    let wanted = |name: &str| named.is_empty() || named.iter().any(|one| one == name);
    let done = site::Site::new()
        .and_then(|site| questions.into_iter().filter(|(name, _)| wanted(name)).try_for_each(|(_, ask)| ask(&site)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark could not run: {error}");
            ExitCode::FAILURE
        }
    }
}
