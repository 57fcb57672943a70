//! A thin pool of its own for each test program, with volumes that are mounted.
#![allow(dead_code, reason = "every test file uses another part of it")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use fsnap_backend::{Backend, Locator, MountSpec, Snapshot, Source, Volume};
use fsnap_dm_thin::{FileSystem, Plan, Store};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// The directory of the pool's own store, in the workplace.
pub(crate) const POOL: &str = "pool-store";

static COUNT: AtomicU64 = AtomicU64::new(0);

/// The reason why nothing of this can run here, if it cannot.
///
/// Inside a virtual machine that is made for it there is no such reason: it has to run there.
pub(crate) fn missing() -> Option<&'static str> {
    let in_vm = std::env::var_os("FSNAP_VM").is_some();
    let there = Path::new("/dev/mapper/control").exists();
    (!there && !in_vm)
        .then_some("this kernel has no device-mapper; `cargo run -p vm-tests` runs this in a machine that has")
}

/// A pool on sparse files; gone with everything in it when dropped.
#[derive(Debug)]
pub(crate) struct TestPool {
    pub(crate) name: String,
    dir: TempDir,
}

impl TestPool {
    /// One with room for so many bytes, if they are ever written.
    pub(crate) fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().expect("make a directory");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("fsnap-test-{}-{number}", std::process::id());
        let plan =
            Plan { name: name.clone(), on: dir.path().join("pool"), size: Some(bytes), place: dir.path().join(POOL) };
        let pool = Self { name, dir };
        Store::create_pool(&plan).expect("make a pool");
        pool
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The pool's own store.
    pub(crate) fn store(&self) -> Store {
        Store::open(&self.dir().join(POOL)).expect("open the store")
    }

    /// Makes a volume and mounts it on the directory of that name.
    pub(crate) fn volume(&self, name: &str, file_system: FileSystem) -> PathBuf {
        let dir = self.dir().join(name);
        make_volume(&dir, file_system).expect("make a volume");
        dir
    }
}

impl AsRef<Path> for TestPool {
    fn as_ref(&self) -> &Path {
        self.dir()
    }
}

impl Drop for TestPool {
    fn drop(&mut self) {
        // Also when a test fails: nothing of it stays mounted or set up.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut points: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new).collect();
        points.retain(|point| point.starts_with(self.dir()));
        for point in points.iter().rev() {
            umount2(*point, MntFlags::MNT_DETACH).ok();
        }
        for _ in 0..2 {
            // Thin devices first, and then what they stand on.
            let list = Command::new("dmsetup").args(["table", "--target", "thin"]).output();
            let list = list.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
            let pool = self.number();
            for line in list.lines().filter(|line| line.split(' ').nth(4) == pool.as_deref()) {
                let Some((name, _)) = line.split_once(": ") else { continue };
                Command::new("dmsetup").args(["remove", "--force", "--retry", name]).output().ok();
            }
        }
        Command::new("dmsetup").args(["remove", "--retry", &self.name]).output().ok();
    }
}

impl TestPool {
    fn number(&self) -> Option<String> {
        let output =
            Command::new("dmsetup").args(["info", "-c", "--noheadings", "-o", "major,minor", &self.name]).output();
        Some(String::from_utf8_lossy(&output.ok()?.stdout).trim().to_owned())
    }
}

/// The store of the pool in whose workplace `dir` lies.
pub(crate) fn pool_above(dir: &Path) -> Store {
    let place = dir.ancestors().map(|above| above.join(POOL)).find(|place| place.exists());
    Store::open(&place.expect("the directory lies in a workplace")).expect("open the store of the pool")
}

pub(crate) fn make_volume(dir: &Path, file_system: FileSystem) -> io::Result<()> {
    let store = pool_above(dir);
    let name = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let megabytes = if file_system == FileSystem::Xfs { 320 } else { 128 };
    let node = store.make_volume(&name, megabytes << 20, file_system).map_err(io::Error::other)?;
    if file_system == FileSystem::Ext4 {
        // With room for large extended attributes.
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-O", "ea_inode"]).arg(&node).status()?;
        assert!(made.success(), "mkfs.ext4: {made}");
    }
    fs::create_dir(dir)?;
    mount(Some(&node), dir, Some(file_system.name()), MsFlags::empty(), None::<&str>)?;
    match fs::remove_dir(dir.join("lost+found")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn remove_volume(dir: &Path) -> io::Result<()> {
    let device = device_of(dir)?;
    let store = pool_above(dir);
    match umount2(dir, MntFlags::empty()) {
        Err(nix::errno::Errno::EBUSY) => {
            // Somebody has its root open: its device goes with the pool.
            umount2(dir, MntFlags::MNT_DETACH)?;
            return fs::remove_dir(dir);
        }
        unmounted => unmounted?,
    }
    let name = device.strip_prefix(&format!("{}-volume-", store.pool_name())).expect("a volume's device");
    store.remove_volume(name).map_err(io::Error::other)?;
    fs::remove_dir(dir)
}

pub(crate) fn move_volume(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    fs::remove_dir(from)
}

/// The device-mapper name of the device that `dir` is mounted from.
pub(crate) fn device_of(dir: &Path) -> io::Result<String> {
    let device = rustix::fs::stat(dir)?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    Ok(fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/name"))?.trim().to_owned())
}

pub(crate) fn is_suspended(device: &str) -> bool {
    let output = Command::new("dmsetup").args(["info", "-c", "--noheadings", "-o", "suspended", device]).output();
    String::from_utf8_lossy(&output.expect("run dmsetup").stdout).trim() == "Suspended"
}

pub(crate) fn dmsetup(arguments: &[&str]) -> String {
    let output = Command::new("dmsetup").args(arguments).output().expect("run dmsetup");
    assert!(output.status.success(), "dmsetup {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Captures `volume` in one go.
pub(crate) fn snapshot(store: &Store, volume: &Volume) -> Snapshot {
    let at = store.reserve(Source::Volume(volume), &Default::default()).expect("reserve");
    store.prime(volume, &at).expect("prime");
    let taken = store.snapshot(volume, &at).expect("snapshot");
    assert_eq!(store.settle(&at).expect("settle"), taken);
    taken
}

/// A mounted image; unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Mounted(pub(crate) TempDir);

impl Mounted {
    pub(crate) fn image(store: &Store, at: &Locator) -> Self {
        let MountSpec::Mount { fstype, source, options, read_only } = store.activate(at).expect("activate") else {
            panic!("the recipe is no mount");
        };
        let dir = tempfile::tempdir().expect("make a directory");
        let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        mount(Some(&source), dir.path(), Some(&*fstype), flags, Some(&*options)).expect("mount");
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(self.0.path(), MntFlags::MNT_DETACH).ok();
    }
}
