//! The rules of the contract, on trees that `fsnap overlay` serves: where files can share blocks, where not, and without
//! privileges.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use fsnap::stores::layers;
use fsnap_backend::{Backend, Capabilities, Consistency, Result};
use fsnap_conformance::{Fixture, Suite, Workplace};
use libtest_mimic::{Failed, Trial};
use rustix::mount::{MountFlags, UnmountFlags};

/// Says to a program of this file that it was started without privileges, and where fsnap is.
const UNPRIVILEGED: &str = "FSNAP_TEST_UNPRIVILEGED";

/// The user and group that own nothing.
const NOBODY: &str = "65534";

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn fsnap() -> Command {
    let program = std::env::var_os(UNPRIVILEGED).unwrap_or_else(|| env!("CARGO_BIN_EXE_fsnap").into());
    let mut command = Command::new(program);
    command.env("FSNAP_STATE", "/nonexistent");
    command
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr))))
}

/// Trees over empty directories, in a directory that `workplace` makes.
struct In {
    workplace: fn() -> io::Result<Workplace>,
    histories: u32,
}

fn serve(store: &Path, dir: &Path) -> io::Result<()> {
    let lower = store.with_extension("lower");
    fs::create_dir_all(&lower)?;
    fs::create_dir(dir)?;
    run(fsnap().arg("overlay").args([&lower, store, dir]))
}

/// Takes a tree off its place, whoever has files of it open: they keep it.
fn unserve(dir: &Path) -> io::Result<()> {
    if is_root() {
        rustix::mount::unmount(dir, UnmountFlags::DETACH)?;
    } else {
        run(Command::new("fusermount3").args(["-u", "-z"]).arg(dir))?;
    }
    fs::remove_dir(dir)
}

impl Fixture for In {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            clones: false,
            constant_time_clones: false,
            xattrs: true,
            acls: true,
            ownership: is_root(),
            mountable: false,
            verifies_contents: false,
            live: Consistency::Fuzzy,
        }
    }

    fn ignored(&self) -> &'static [&'static str] {
        &[
            "snapshot_omits_aloud",
            "clone_is_equal",
            "clone_is_isolated",
            "clone_outlives_its_snapshot",
            "clone_can_be_snapshotted",
            "clone_checks_identity",
            "verify_names_damage",
            "history_is_in_order",
            "pin_is_of_that_state",
            "pin_repeats",
            "pin_is_counted",
            "pin_missing",
            "differences_miss_nothing",
        ]
    }

    fn workplace(&self) -> io::Result<Workplace> {
        (self.workplace)()
    }

    fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(layers::Store::create(place)?))
    }

    fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(layers::Store::open(place)?))
    }

    fn make_volume(&self, dir: &Path) -> io::Result<()> {
        // A tree of its own each time, also at a place where one was before.
        let store = (0..).map(|number| dir.with_extension(format!("{number}.store"))).find(|store| !store.exists());
        serve(&store.unwrap(), dir)
    }

    fn remove_volume(&self, dir: &Path) -> io::Result<()> {
        unserve(dir)
    }

    fn move_volume(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::create_dir(to)?;
        // What is served cannot be moved without the privilege: there it is merely gone from its place.
        if !is_root() {
            return unserve(from);
        }
        rustix::mount::mount_move(from, to)?;
        fs::remove_dir(from)
    }

    fn histories(&self) -> u32 {
        self.histories
    }

    fn kills(&self) -> u32 {
        30
    }
}

/// A directory in which trees are served, and perhaps a file system of its own.
struct Mounted {
    base: tempfile::TempDir,
    dir: PathBuf,
}

impl AsRef<Path> for Mounted {
    fn as_ref(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        let ours: Vec<&Path> = points.filter(|point| point.starts_with(self.base.path())).collect();
        for point in ours.into_iter().rev() {
            if is_root() {
                let _ = rustix::mount::unmount(point, UnmountFlags::DETACH);
            } else {
                let _ = fsnap().arg("umount").arg(point).output();
            }
        }
    }
}

fn new_base() -> io::Result<Mounted> {
    let base = tempfile::tempdir()?;
    let dir = base.path().join("fs");
    fs::create_dir(&dir)?;
    Ok(Mounted { base, dir })
}

fn tmpfs() -> io::Result<Workplace> {
    let mounted = new_base()?;
    rustix::mount::mount("layers", &mounted.dir, "tmpfs", MountFlags::empty(), None)?;
    Ok(Box::new(mounted))
}

fn btrfs() -> io::Result<Workplace> {
    let mounted = new_base()?;
    let image = mounted.base.path().join("image");
    fs::File::create(&image)?.set_len(1 << 30)?;
    run(Command::new("mkfs.btrfs").arg("-q").arg(&image))?;
    run(Command::new("mount").args(["-o", "loop"]).args([&image, &mounted.dir]))?;
    Ok(Box::new(mounted))
}

fn plain() -> io::Result<Workplace> {
    Ok(Box::new(new_base()?))
}

/// Runs this program once more as a user who owns nothing, from a place that this user can reach.
fn without_privileges() -> std::result::Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let (program, fsnap) = (dir.path().join("conformance"), dir.path().join("fsnap"));
    fs::copy(std::env::current_exe()?, &program)?;
    fs::copy(env!("CARGO_BIN_EXE_fsnap"), &fsnap)?;
    // The device is for everybody on most machines, and only for root on some. Nobody but that program sees the change.
    let script = "set -e; mount --make-rprivate /; mkdir $D/dev; mount -t tmpfs device $D/dev
        mknod -m 666 $D/dev/fuse c 10 229; mount --bind $D/dev/fuse /dev/fuse
        setpriv --reuid $U --regid $U --clear-groups $D/conformance";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).env("D", dir.path()).env("U", NOBODY).env(UNPRIVILEGED, &fsnap);
    let output = command.current_dir("/").output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(String::from_utf8_lossy(&said).into_owned().into())
}

fn main() -> ExitCode {
    if std::env::var_os(UNPRIVILEGED).is_some() || !is_root() {
        return fsnap_conformance::main(vec![Suite::new("nobody", In { workplace: plain, histories: 4 })]);
    }
    let suites = vec![
        Suite::new("btrfs", In { workplace: btrfs, histories: 8 }),
        Suite::new("tmpfs", In { workplace: tmpfs, histories: 8 }),
    ];
    fsnap_conformance::main_with(suites, |suites| {
        let mut tests: Vec<Trial> = suites.iter().flat_map(fsnap_conformance::as_tests).collect();
        tests.push(Trial::test("nobody::without_privileges", without_privileges));
        tests
    })
}
