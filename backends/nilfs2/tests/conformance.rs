//! The rules of the contract, on NILFS2 file systems of their own.

mod support;

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use fsnap_backend::{Backend, Capabilities, Consistency, Result};
use fsnap_conformance::{Fixture, Suite, Workplace};
use fsnap_nilfs2::Store;
use support::Disk;

struct OnLoop;

impl Fixture for OnLoop {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            clones: false,
            constant_time_clones: false,
            xattrs: false,
            acls: false,
            ownership: true,
            mountable: true,
            verifies_contents: false,
            live: Consistency::CrashConsistent,
        }
    }

    fn ignored(&self) -> &'static [&'static str] {
        // The store cannot clone and has no checksums to compare; a snapshot keeps all that NILFS2 can hold.
        &[
            "history_needs_a_keeper",
            "differences_miss_nothing",
            "clone_can_be_snapshotted",
            "clone_checks_identity",
            "clone_is_equal",
            "clone_is_isolated",
            "clone_outlives_its_snapshot",
            "snapshot_omits_aloud",
            "verify_names_damage",
        ]
    }

    fn keeps_history(&self) -> bool {
        true
    }

    fn workplace(&self) -> io::Result<Workplace> {
        Ok(Box::new(tempfile::tempdir()?))
    }

    fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::create(place)?))
    }

    fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::open(place)?))
    }

    fn make_volume(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir(dir)?;
        Disk::new(dir)?.keep_for_the_run();
        Ok(())
    }

    fn remove_volume(&self, dir: &Path) -> io::Result<()> {
        support::unmount(dir)?;
        fs::remove_dir(dir)
    }

    fn move_volume(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::create_dir(to)?;
        rustix::mount::mount_move(from, to)?;
        fs::remove_dir(from)
    }

    fn reports_holes(&self) -> bool {
        // lseek(2) takes all of a file for data, and fallocate(2) punches none.
        false
    }

    fn histories(&self) -> u32 {
        12
    }
}

fn main() -> ExitCode {
    let suite = Suite::new("nilfs2", OnLoop);
    let code = match support::why_not() {
        None => fsnap_conformance::main(vec![suite]),
        Some(reason) => fsnap_conformance::main_ignoring(vec![suite], reason),
    };
    support::release_disks();
    code
}
