//! The suite as a test program.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use libtest_mimic::{Arguments, Completion, Failed};

use crate::failure::{During, Failure, Verdict, ensure};
use crate::{CASES, Fixture, Site, Workplace, crash, history, threads, view};

/// A fixture, its name, and the directory in which its stores lie once the first is needed.
pub struct Suite {
    name: &'static str,
    fixture: Box<dyn Fixture>,
    workplace: OnceLock<std::result::Result<Workplace, String>>,
    sites: AtomicU64,
}

/// One thing that a suite runs.
#[derive(Debug, Clone)]
pub struct Trial {
    /// Its name: that of a rule, or of a way of testing them all.
    pub name: &'static str,
    /// Why it is not run, if so.
    pub ignored: Option<&'static str>,
    run: Run,
}

type Run = fn(&mut Site<'_>) -> Verdict;

impl Suite {
    /// Names a fixture. The name stands before the names of the cases: of one word, unlike those of other suites.
    pub fn new(name: &'static str, fixture: impl Fixture + 'static) -> Self {
        Self { name, fixture: Box::new(fixture), workplace: OnceLock::new(), sites: AtomicU64::new(0) }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What it is about.
    pub fn fixture(&self) -> &dyn Fixture {
        &*self.fixture
    }

    /// Everything that it runs, or says that it ignores.
    pub fn trials(&self) -> Vec<Trial> {
        let fixture = &*self.fixture;
        let needs_clones = (!fixture.capabilities().clones).then_some("the store cannot clone");
        let more: [(_, _, Run); 11] = [
            ("capabilities_are_pinned", None, capabilities_are_pinned),
            ("ignored_cases_are_pinned", None, ignored_cases_are_pinned),
            ("histories", None, history::histories),
            ("threads", None, threads::threads),
            ("beside_forks", None, threads::beside_forks),
            ("killed_prime", None, crash::killed_prime),
            ("killed_snapshot", None, crash::killed_snapshot),
            ("killed_settle", None, crash::killed_settle),
            ("killed_clone", needs_clones, crash::killed_clone),
            ("killed_delete", None, crash::killed_delete),
            ("kills_leave_nothing", None, crash::kills_leave_nothing),
        ];
        let cases = CASES.iter().map(|case| (case.name, (case.ignored)(fixture), case.run));
        cases.chain(more).map(|(name, ignored, run)| Trial { name, ignored, run }).collect()
    }

    /// Runs one of its trials on a fresh store.
    pub fn run(&self, trial: &Trial) -> Verdict {
        let made = self.workplace.get_or_init(|| self.fixture.workplace().map_err(|error| error.to_string()));
        let workplace = made.as_ref().map_err(|error| Failure::new(format!("cannot make a workplace: {error}")))?;
        let number = self.sites.fetch_add(1, Ordering::Relaxed);
        let dir = (**workplace).as_ref().join(format!("{number}-{}", trial.name));
        let mut site = Site::new(self, &dir)?;
        (trial.run)(&mut site)
    }
}

fn capabilities_are_pinned(site: &mut Site<'_>) -> Verdict {
    let pinned = site.fixture.capabilities();
    for _ in 0..2 {
        let found = site.capabilities();
        ensure!(found == pinned, "the fixture says {pinned:?}, the store {found:?}");
        site.reopen()?;
    }
    Ok(())
}

fn ignored_cases_are_pinned(site: &mut Site<'_>) -> Verdict {
    let ignored = CASES.iter().filter(|case| (case.ignored)(site.fixture).is_some());
    let mut ignored: Vec<_> = ignored.map(|case| case.name).collect();
    let mut pinned = site.fixture.ignored().to_vec();
    ignored.sort_unstable();
    pinned.sort_unstable();
    ensure!(ignored == pinned, "ignored are {ignored:?}, the fixture pins {pinned:?}");
    Ok(())
}

/// Runs the suites as the test program that this process is; the arguments are those of libtest.
///
/// To be called first in `main`: it gives the process a mount namespace of its own, and serves the child processes.
pub fn main(suites: Vec<Suite>) -> ExitCode {
    main_with(suites, |suites| suites.iter().flat_map(as_tests).collect())
}

/// Like [`main`], but runs the tests that `tests` makes of the suites.
pub fn main_with(suites: Vec<Suite>, tests: impl FnOnce(&[Arc<Suite>]) -> Vec<libtest_mimic::Trial>) -> ExitCode {
    if let Some(status) = crash::serve_child(&suites) {
        return status;
    }
    let arguments = Arguments::from_args();
    if let Err(error) = view::isolate_mounts().during("make a mount namespace") {
        let failed = libtest_mimic::Trial::test("mount_namespace", move || Err(Failed::from(error)));
        return libtest_mimic::run(&arguments, vec![failed]).exit_code();
    }
    let suites: Vec<Arc<Suite>> = suites.into_iter().map(Arc::new).collect();
    let tests = tests(&suites);
    let conclusion = libtest_mimic::run(&arguments, tests);
    // The workplaces go now, while the file systems that their fixtures mounted are still there.
    drop(suites);
    conclusion.exit_code()
}

/// Like [`main`], where this machine cannot run the suites: every trial is ignored, for the reason.
pub fn main_ignoring(suites: Vec<Suite>, reason: &'static str) -> ExitCode {
    let ignored = |suite: &Suite| {
        let ignored = |trial: Trial| {
            let name = format!("{}::{}", suite.name, trial.name);
            libtest_mimic::Trial::ignorable_test(name, move || Ok(Completion::ignored_with(reason)))
        };
        suite.trials().into_iter().map(ignored).collect::<Vec<_>>()
    };
    libtest_mimic::run(&Arguments::from_args(), suites.iter().flat_map(ignored).collect()).exit_code()
}

/// Every trial of a suite, as the test program runs it.
pub fn as_tests(suite: &Arc<Suite>) -> Vec<libtest_mimic::Trial> {
    let as_test = |trial: Trial| {
        let suite = suite.clone();
        libtest_mimic::Trial::ignorable_test(format!("{}::{}", suite.name, trial.name), move || match trial.ignored {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => suite.run(&trial).map(|()| Completion::Completed).map_err(Failed::from),
        })
    };
    suite.trials().into_iter().map(as_test).collect()
}
