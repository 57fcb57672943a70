//! The whole of it with the real engine: processes that know what their files must hold are dumped by CRIU, with fsnap as its
//! action script, and restored onto branches; and what happens when any part of that fails.
//!
//! Every case runs the built binary. All of them run in a pid and a mount namespace of their own, so that nothing outlives this
//! program, however it ends; and this program is its own oracle.

mod alone;
mod attended;
mod by_hand;
mod consistency;
mod containers;
mod demo;
mod ends;
mod generic;
mod hook;
mod hostile;
mod identity;
mod killed;
mod oracle;
mod podman;
#[path = "../support/postgresql.rs"]
mod postgresql;
mod runs;
mod sandbox;
mod site;
#[path = "../support/thin.rs"]
mod thin;
mod timers;
mod together;
mod tour;
mod unlinked;
#[path = "../support/volumes.rs"]
mod volumes;
#[path = "../support/waiting.rs"]
mod waiting;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

/// A case of a suite: its name, and what it does.
type Case = (&'static str, fn());

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    match args.get(1).and_then(|arg| arg.to_str()) {
        Some(oracle::ORACLE) => return fsnap_oracle::main(args.into_iter().skip(1)),
        Some(sandbox::INIT) => return sandbox::init(&args[2..]),
        _ => {}
    }
    let arguments = Arguments::from_args();
    if !arguments.list && !sandbox::is_inside() {
        return sandbox::run(&args[1..]);
    }
    let mut trials = Vec::new();
    for (module, cases) in [
        ("consistency", consistency::CASES),
        ("hook", hook::CASES),
        ("generic", generic::CASES),
        ("killed", killed::CASES),
        ("attended", attended::CASES),
        ("by_hand", by_hand::CASES),
        ("identity", identity::CASES),
        ("hostile", hostile::CASES),
        ("alone", alone::CASES),
        ("runs", runs::CASES),
        ("timers", timers::CASES),
        ("together", together::CASES),
        ("ends", ends::CASES),
        ("tour", tour::CASES),
        ("unlinked", unlinked::CASES),
        ("podman", podman::CASES),
        ("demo", demo::CASES),
    ] {
        for &(name, case) in cases {
            trials.push(Trial::test(format!("{module}::{name}"), move || {
                case();
                Ok(())
            }));
        }
    }
    // What the process that stands by does not do, the hook does by itself.
    for &(name, case) in hook::CASES.iter().chain(killed::CASES).chain(&unlinked::CASES[..1]) {
        trials.push(Trial::test(format!("unattended::{name}"), move || {
            site::unattended(case);
            Ok(())
        }));
    }
    let on_other_kernels = [
        ("consistency", consistency::ON_OTHER_KERNELS),
        ("killed", killed::ON_OTHER_KERNELS),
        ("unlinked", unlinked::ON_OTHER_KERNELS),
    ];
    for (module, &(name, volumes, case)) in
        on_other_kernels.iter().flat_map(|(module, cases)| cases.iter().map(move |case| (module, case)))
    {
        trials.push(Trial::ignorable_test(format!("{module}::{name}"), move || {
            match volumes.iter().find_map(|volume| volume.why_not()) {
                Some(reason) => Ok(Completion::ignored_with(reason)),
                None => {
                    case(volumes);
                    Ok(Completion::Completed)
                }
            }
        }));
    }
    for &(name, case) in containers::CASES {
        trials.push(Trial::ignorable_test(format!("containers::{name}"), move || Ok(case())));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
