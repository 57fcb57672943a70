//! The suite's own test: a correct backend passes it, and every trial fails on some broken one.

#[path = "catches/broken.rs"]
mod broken;
#[path = "catches/copy_store.rs"]
mod copy_store;
#[path = "catches/faults.rs"]
mod faults;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use broken::Broken;
use copy_store::{CAPABILITIES, CopyStore, keeps_history};
use faults::Fault;
use fsnap_backend::{Backend, Capabilities, Result};
use fsnap_conformance::{
    Damage, Fixture, Suite, Unkeepable, Workplace, as_tests, flip_a_byte_below, main_with, mount_below,
};
use libtest_mimic::{Failed, Trial};

/// A store of copies, with or without a fault.
struct Copies {
    capabilities: Capabilities,
    ignored: &'static [&'static str],
    fault: Option<Fault>,
}

impl Copies {
    fn wrap(&self, store: CopyStore, place: &Path) -> Arc<dyn Backend> {
        match self.fault {
            None => Arc::new(store),
            Some(fault) => Arc::new(Broken::new(store, place, fault)),
        }
    }
}

impl Fixture for Copies {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn ignored(&self) -> &'static [&'static str] {
        self.ignored
    }

    fn workplace(&self) -> io::Result<Workplace> {
        Ok(Box::new(tempfile::tempdir()?))
    }

    fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(self.wrap(CopyStore::create(place, self.capabilities)?, place))
    }

    fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(self.wrap(CopyStore::open(place, self.capabilities)?, place))
    }

    fn keeps_history(&self) -> bool {
        keeps_history(self.capabilities)
    }

    fn tells_differences(&self) -> bool {
        keeps_history(self.capabilities)
    }

    fn damage(&self) -> Option<Damage> {
        Some(flip_a_byte_below)
    }

    fn unkeepable(&self) -> Option<Unkeepable> {
        // Without ownership, the suite knows a thing by itself.
        self.capabilities.ownership.then_some(mount_below)
    }
}

/// The correct one, once with all capabilities and once with few, so that no case is ignored in both.
fn correct() -> [Suite; 2] {
    let ignored = &["clone_needs_the_capability", "history_needs_a_keeper"];
    let able = Copies { capabilities: CAPABILITIES, ignored, fault: None };
    let few = Copies {
        capabilities: Capabilities { clones: false, ownership: false, xattrs: false, acls: false, ..CAPABILITIES },
        ignored: &[
            "clone_is_equal",
            "clone_is_isolated",
            "clone_outlives_its_snapshot",
            "clone_can_be_snapshotted",
            "clone_checks_identity",
            "history_is_in_order",
            "pin_is_of_that_state",
            "pin_repeats",
            "pin_is_counted",
            "pin_missing",
            "differences_miss_nothing",
        ],
        fault: None,
    };
    [Suite::new("able", able), Suite::new("few", few)]
}

fn broken(fault: Fault) -> Suite {
    let [able, _] = correct();
    let ignored = if fault == Fault::PinsNothing { &[] } else { able.fixture().ignored() };
    Suite::new(fault.name(), Copies { capabilities: fault.capabilities(), ignored, fault: Some(fault) })
}

/// The trials that must catch a fault fail, and for the right reason.
fn is_caught(suite: &Suite, fault: Fault) -> std::result::Result<(), Failed> {
    for (name, text) in fault.caught_by() {
        let trials = suite.trials();
        let trial = trials.iter().find(|trial| trial.name == *name).ok_or(format!("there is no trial {name}"))?;
        if let Some(reason) = trial.ignored {
            return Err(format!("{name} is ignored: {reason}").into());
        }
        match suite.run(trial) {
            Ok(()) => return Err(format!("{name} passes").into()),
            Err(failure) if failure.to_string().contains(text) => {}
            Err(failure) => return Err(format!("{name} does not say {text:?}, but: {failure}").into()),
        }
    }
    Ok(())
}

fn every_trial_fails_somewhere(suites: &[Arc<Suite>]) -> std::result::Result<(), Failed> {
    let caught: BTreeSet<_> = Fault::ALL.iter().flat_map(|fault| fault.caught_by()).map(|(name, _)| *name).collect();
    let all: BTreeSet<_> = suites[0].trials().iter().map(|trial| trial.name).collect();
    let never: Vec<_> = all.difference(&caught).collect();
    if never.is_empty() { Ok(()) } else { Err(format!("no broken backend fails {never:?}").into()) }
}

fn main() -> ExitCode {
    let suites = correct().into_iter().chain(Fault::ALL.iter().map(|fault| broken(*fault))).collect();
    main_with(suites, |suites| {
        let (correct, faulty) = suites.split_at(2);
        let mut tests: Vec<Trial> = correct.iter().flat_map(as_tests).collect();
        for (suite, fault) in faulty.iter().zip(Fault::ALL) {
            let suite = suite.clone();
            tests.push(Trial::test(format!("catches::{}", fault.name()), move || is_caught(&suite, *fault)));
        }
        let all = suites.to_vec();
        tests.push(Trial::test("every_trial_fails_somewhere", move || every_trial_fails_somewhere(&all)));
        tests
    })
}
