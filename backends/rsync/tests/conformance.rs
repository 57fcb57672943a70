//! The rules of the contract, on every kind of file system that makes a difference, and without privileges.
//!
//! ext4 and tmpfs cannot share blocks between files, btrfs and xfs can; tmpfs is also where nothing is ever written out.

mod common;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use common::Mounted;
use fsnap_backend::{Backend, Capabilities, Consistency, Result};
use fsnap_conformance::{Damage, Fixture, Suite, Unkeepable, Workplace};
use fsnap_rsync::{Options, Store};
use libtest_mimic::{Failed, Trial};

/// Says to a program of this file that it was started without privileges, to run its own suite.
const UNPRIVILEGED: &str = "FSNAP_TEST_UNPRIVILEGED";

/// The user and group that own nothing.
const NOBODY: &str = "65534";

/// A store and volumes in a directory that `workplace` makes.
struct In {
    workplace: fn() -> io::Result<Workplace>,
    histories: u32,
    options: Options,
}

impl In {
    fn new(workplace: fn() -> io::Result<Workplace>, histories: u32) -> Self {
        Self { workplace, histories, options: Options::default() }
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Fixture for In {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            clones: true,
            constant_time_clones: false,
            xattrs: true,
            acls: true,
            ownership: is_root(),
            mountable: false,
            verifies_contents: true,
            live: Consistency::Fuzzy,
        }
    }

    fn ignored(&self) -> &'static [&'static str] {
        // Without privileges nothing can be made that a snapshot does not keep: neither a mount nor a device node.
        // A directory keeps no states by itself.
        const UNPRIVILEGED: &[&str] = &[
            "snapshot_omits_aloud",
            "clone_needs_the_capability",
            "history_is_in_order",
            "pin_is_of_that_state",
            "pin_repeats",
            "pin_is_counted",
            "pin_missing",
            "differences_miss_nothing",
        ];
        if is_root() { &UNPRIVILEGED[1..] } else { UNPRIVILEGED }
    }

    fn workplace(&self) -> io::Result<Workplace> {
        (self.workplace)()
    }

    fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::create_with(place, self.options)?))
    }

    fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::open(place)?))
    }

    fn damage(&self) -> Option<Damage> {
        Some(fsnap_conformance::flip_a_byte_below)
    }

    fn unkeepable(&self) -> Option<Unkeepable> {
        is_root().then_some(fsnap_conformance::mount_below)
    }

    fn histories(&self) -> u32 {
        self.histories
    }
}

fn ext4() -> io::Result<Workplace> {
    Ok(Box::new(Mounted::ext4(512 << 20)))
}

/// XFS allocates more than is written where blocks were shared, unless told otherwise; the suite compares holes.
fn xfs() -> io::Result<Workplace> {
    let mounted = Mounted::xfs();
    common::run("xfs_io", &["-c", "cowextsize 4096", mounted.dir.to_str().unwrap()]);
    Ok(Box::new(mounted))
}

fn temporary() -> io::Result<Workplace> {
    Ok(Box::new(tempfile::tempdir()?))
}

/// Runs this program once more as a user who owns nothing, from a place that this user can reach.
fn without_privileges() -> std::result::Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let program = dir.path().join("conformance");
    fs::copy(std::env::current_exe()?, &program)?;
    let output = Command::new("setpriv")
        .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"])
        .arg(&program)
        .env(UNPRIVILEGED, "yes")
        .current_dir("/")
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(String::from_utf8_lossy(&said).into_owned().into())
}

fn main() -> ExitCode {
    if std::env::var_os(UNPRIVILEGED).is_some() || !is_root() {
        return fsnap_conformance::main(vec![Suite::new("nobody", In::new(temporary, 12))]);
    }
    let suites = vec![
        Suite::new("ext4", In::new(ext4, 16)),
        // Every file that is changed is kept as the difference to its version before, where there is one.
        Suite::new("deltas", In { options: Options { deltas_from: 1 }, ..In::new(ext4, 24) }),
        Suite::new("btrfs", In::new(|| Ok(Box::new(Mounted::btrfs())), 12)),
        Suite::new("xfs", In::new(xfs, 12)),
        Suite::new("tmpfs", In::new(|| Ok(Box::new(Mounted::tmpfs("512m"))), 12)),
    ];
    fsnap_conformance::main_with(suites, |suites| {
        let mut tests: Vec<Trial> = suites.iter().flat_map(fsnap_conformance::as_tests).collect();
        tests.push(Trial::test("nobody::without_privileges", without_privileges));
        tests
    })
}
