//! fsnap is killed at every step, and each of its steps fails: what is left must be one of the states that are allowed.
//!
//! A step is a place that `FSNAP_FAILPOINT` names, or, finer, a system call that changes something. After each kill and
//! each failure the next command must find every earlier checkpoint whole and equal to what it was, the new one wholly
//! there or wholly absent, and nothing else in the stores.
//!
//! Processes that fsnap froze run again after each kill, before any other command of fsnap.
//!
//! There are hundreds of system calls, so that by default a few of them are tried, evenly spread; the variable
//! `FSNAP_TEST_STEPS` sets how many of each operation, and `FSNAP_TEST_EVERY` has all of them tried.

mod companion;
#[path = "../support/images.rs"]
mod images;
mod operations;
#[path = "../cli/redact.rs"]
#[allow(dead_code, reason = "the sessions of another test use the rest")]
mod redact;
#[path = "../cli/site.rs"]
#[allow(dead_code, reason = "the sessions of another test use the rest")]
mod site;
#[path = "../support/thin.rs"]
mod thin;
#[cfg(target_arch = "x86_64")]
mod tracer;
#[path = "../support/volumes.rs"]
mod volumes;
#[path = "../support/waiting.rs"]
mod waiting;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

use operations::{OPERATIONS, Operation, PLACES, Scene};

fn main() -> ExitCode {
    #[cfg(target_arch = "x86_64")]
    if std::env::args().nth(1).is_some_and(|first| first == tracer::HELPER) {
        return tracer::become_traced(std::env::args_os().skip(2));
    }
    let mut trials = Vec::new();
    for &(volume, place) in PLACES {
        if let Some(reason) = volume.why_not() {
            trials.push(Trial::ignorable_test(place, move || Ok(Completion::ignored_with(reason))));
            continue;
        }
        for operation in OPERATIONS {
            let name = |how: &str| format!("{place}::{}::{how}", operation.name);
            for action in ["kill", "exit"] {
                trials.push(Trial::test(name(&format!("{action}_at_failpoints")), move || {
                    at_failpoints(&mut Scene::new(volume, operation), action);
                    Ok(())
                }));
            }
            for (how, fault) in at_calls() {
                trials.push(Trial::test(name(how), move || {
                    fault(&mut Scene::new(volume, operation), operation);
                    Ok(())
                }));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Ends fsnap at its first place, at its second, and so on until it comes through.
fn at_failpoints(scene: &mut Scene, action: &str) {
    for number in 1.. {
        assert!(number < 100, "it never comes through");
        let output = scene.shell().command(&scene.line()).env("FSNAP_FAILPOINT", format!("{number}={action}")).output();
        let through = output.expect("run a shell").status.success();
        scene.check(&format!("{action} at place {number}"), through.then_some(true));
        if through {
            return;
        }
    }
}

type Faulty = fn(&mut Scene, &Operation);

#[cfg(not(target_arch = "x86_64"))]
fn at_calls() -> Vec<(&'static str, Faulty)> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn at_calls() -> Vec<(&'static str, Faulty)> {
    use nix::errno::Errno;
    use tracer::Fault;
    vec![
        ("killed_at_calls", |scene, operation| each_call(scene, operation, Fault::Kill)),
        ("a_call_fails", |scene, operation| each_call(scene, operation, |number| Fault::Fail(number, Errno::EIO))),
        ("the_disk_is_full", |scene, operation| {
            each_call(scene, operation, |number| Fault::FailForGood(number, Errno::ENOSPC))
        }),
    ]
}

/// Lets `fault` happen at system calls, evenly spread over those that the operation makes.
#[cfg(target_arch = "x86_64")]
fn each_call(scene: &mut Scene, operation: &Operation, fault: impl Fn(u32) -> tracer::Fault) {
    use tracer::End;
    let limit = match std::env::var("FSNAP_TEST_STEPS") {
        _ if std::env::var_os("FSNAP_TEST_EVERY").is_some() => u32::MAX,
        Ok(text) => text.parse().expect("a number"),
        Err(_) => 5,
    };
    // A fault that never comes counts the calls.
    let End::Exited { code: 0, changes: total, .. } = tracer::run(&scene.fsnap(), fault(u32::MAX)) else {
        panic!("it does not even come through by itself");
    };
    scene.check("without a fault", Some(true));
    let tried = total.min(limit);
    for number in (0..tried)
        .map(|index| 1 + u32::try_from(u64::from(index) * u64::from(total) / u64::from(tried)).expect("less than all"))
    {
        let fault = fault(number);
        let what = format!("{fault:?} of {total}");
        match tracer::run(&scene.fsnap(), fault) {
            End::Killed => scene.check(&what, None),
            End::Exited { code: 0, .. } => scene.check(&what, Some(true)),
            End::Exited { code, stderr, .. } => {
                assert_eq!(code, 1, "{what}: {stderr}");
                // `recover` tells on standard output what it had to leave half done.
                let told = stderr.contains("fsnap: error: ") || operation.name.starts_with("recover");
                assert!(told && !stderr.contains("panicked"), "{what}: {stderr}");
                scene.check(&format!("{what}: {stderr}"), None);
            }
        }
    }
}
