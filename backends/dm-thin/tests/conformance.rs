//! The rules of the contract, on a thin pool of its own, for each file system that a volume may have.

mod support;

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use fsnap_backend::{Backend, Capabilities, Consistency, Result};
use fsnap_conformance::{Fixture, Suite, Workplace, as_tests};
use fsnap_dm_thin::{FileSystem, Store};
use libtest_mimic::{Completion, Trial};
use support::{TestPool, pool_above};

struct OnPool(FileSystem);

impl OnPool {
    /// What a file system changes is how it is made, mounted and suspended: the other steps are killed enough on ext4.
    fn fewer(&self, usual: u32) -> u32 {
        if self.0 == FileSystem::Ext4 { usual } else { usual / 2 }
    }
}

impl Fixture for OnPool {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            clones: true,
            constant_time_clones: true,
            xattrs: true,
            acls: true,
            ownership: true,
            mountable: true,
            verifies_contents: false,
            live: Consistency::PointInTime,
        }
    }

    fn ignored(&self) -> &'static [&'static str] {
        // The store can clone; it has no checksums; and there is nothing in a file system that its copy does not keep.
        // No pool keeps states by itself.
        &[
            "clone_needs_the_capability",
            "snapshot_omits_aloud",
            "verify_names_damage",
            "history_is_in_order",
            "pin_is_of_that_state",
            "pin_repeats",
            "pin_is_counted",
            "pin_missing",
        ]
    }

    fn tells_differences(&self) -> bool {
        true
    }

    fn histories(&self) -> u32 {
        self.fewer(12)
    }

    fn kills(&self) -> u32 {
        self.fewer(60)
    }

    fn workplace(&self) -> io::Result<Workplace> {
        Ok(Box::new(TestPool::new(32 << 30)))
    }

    fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::create_for(place, pool_above(place).pool_name())?))
    }

    fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::open(place)?))
    }

    fn make_volume(&self, dir: &Path) -> io::Result<()> {
        support::make_volume(dir, self.0)
    }

    fn remove_volume(&self, dir: &Path) -> io::Result<()> {
        support::remove_volume(dir)
    }

    fn move_volume(&self, from: &Path, to: &Path) -> io::Result<()> {
        support::move_volume(from, to)
    }
}

fn main() -> ExitCode {
    let suites = vec![Suite::new("ext4", OnPool(FileSystem::Ext4)), Suite::new("xfs", OnPool(FileSystem::Xfs))];
    fsnap_conformance::main_with(suites, |suites| match support::missing() {
        None => suites.iter().flat_map(as_tests).collect(),
        Some(reason) => {
            let named = |suite: &Arc<Suite>| {
                suite.trials().into_iter().map(|trial| format!("{}::{}", suite.name(), trial.name)).collect::<Vec<_>>()
            };
            let ignored = |name| Trial::ignorable_test(name, move || Ok(Completion::ignored_with(reason)));
            suites.iter().flat_map(named).map(ignored).collect()
        }
    })
}
