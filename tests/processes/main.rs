//! Real processes: which volumes they can write to, how they are stopped, how they are restored.
//!
//! This program is its own helper: started with `helper NAME …` it behaves as fsnap's hidden commands do. What other
//! processes do is in `helper.c`, since much of it is beyond safe Rust.

mod live;
mod mounts;
mod quiesce;
mod reach;
mod record;
mod restore;
#[path = "../support/waiting.rs"]
mod waiting;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|arg| arg == "helper") {
        return live::helper(&args[2..]);
    }
    let variable = |name: &str| std::env::var_os(name);
    if args.len() == 1 && fsnap::engine::is_for_timers(variable) {
        fsnap::engine::run_for_timers(variable).unwrap();
        return ExitCode::SUCCESS;
    }
    let mut trials = Vec::new();
    for (module, cases) in [
        ("mounts", mounts::CASES),
        ("quiesce", quiesce::CASES),
        ("reach", reach::CASES),
        ("record", record::CASES),
        ("restore", restore::CASES),
    ] {
        for (name, case) in cases {
            trials.push(Trial::test(format!("{module}::{name}"), move || {
                // A thread of its own: a case may enter a mount namespace, and must not leave the next one in it.
                let ended = std::thread::spawn(case).join();
                ended.map_err(|panic| {
                    let text = panic.downcast_ref::<String>().cloned();
                    text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.into())).unwrap_or_default().into()
                })
            }));
        }
    }
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    live::clean_up();
    conclusion.exit_code()
}
