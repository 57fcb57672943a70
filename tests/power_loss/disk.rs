//! A disk and all that stands on it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use fsnap_dm_thin::{FileSystem, Plan, Store};

/// The size of a disk.
pub(crate) const SIZE: u64 = 640 << 20;
/// What device-mapper calls the pool.
const POOL: &str = "fsnap-power";
/// The volume in the pool.
const THIN: &str = "thin";

/// Where everything is mounted. The same paths before and after each cut, as after a start of a machine.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// The file system on the disk.
    pub(crate) system: PathBuf,
    /// The volume on the thin device.
    pub(crate) thin: PathBuf,
    /// The volume of the rsync backend.
    pub(crate) dir: PathBuf,
    /// A btrfs in a file of the file system, and the volume on it.
    btrfs: PathBuf,
    pub(crate) subvolume: PathBuf,
    /// A NILFS2 in such a file, which is a volume.
    pub(crate) nilfs2: PathBuf,
}

impl Places {
    pub(crate) fn in_dir(dir: &Path) -> Self {
        let [system, thin, btrfs, nilfs2] = ["system", "thin", "btrfs", "nilfs2"].map(|name| {
            let at = dir.join(name);
            fs::create_dir(&at).unwrap();
            at
        });
        Self { dir: system.join("dir"), system, thin, subvolume: btrfs.join("subvolume"), btrfs, nilfs2 }
    }

    /// The file that holds the file system of that name.
    fn image(&self, name: &str) -> PathBuf {
        self.system.join(name).with_extension("image")
    }

    /// Mounts the file systems that lie in files.
    fn mount_images(&self) {
        // The kernel takes a disk of an earlier moment for an old copy of the one that it has seen.
        ok(Command::new("btrfs").args(["device", "scan", "--forget"]));
        ok(Command::new("mount").args(["-o", "loop"]).args([&self.image("btrfs"), &self.btrfs]));
        // Without the cleaner, whose moments nobody could repeat.
        ok(Command::new("mount")
            .args(["-i", "-t", "nilfs2", "-o", "loop"])
            .args([&self.image("nilfs2"), &self.nilfs2]));
    }

    fn tops(&self) -> [&Path; 4] {
        [&self.system, &self.thin, &self.btrfs, &self.nilfs2]
    }

    fn pool_store(&self) -> PathBuf {
        self.system.join("pool-store")
    }

    /// fsnap, with the catalog on the disk.
    pub(crate) fn fsnap(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsnap"));
        command
            .args(args)
            .env("FSNAP_STATE", self.system.join("state"))
            .env("FSNAP_CONFIG", self.system.join("config.toml"));
        command
    }
}

/// What stands on a disk: mounted, with its pool; taken down when dropped.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) places: Places,
    device: PathBuf,
}

impl Standing {
    /// Makes a file system, a pool and two volumes on the device, which is empty.
    pub(crate) fn make(places: &Places, device: &Path) -> Self {
        ok(Command::new("mkfs.ext4")
            .args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"])
            .arg(device));
        ok(Command::new("mount").arg(device).arg(&places.system));
        let standing = Self { places: places.clone(), device: device.into() };
        fs::create_dir(&places.dir).unwrap();
        let on = places.system.join("pool");
        let store =
            Store::create_pool(&Plan { name: POOL.into(), on, size: Some(96 << 20), place: places.pool_store() })
                .unwrap();
        let node = store.make_volume(THIN, 64 << 20, FileSystem::Ext4).unwrap();
        ok(Command::new("mount").arg(node).arg(&places.thin));
        for (name, bytes) in [("btrfs", 120 << 20), ("nilfs2", 64 << 20)] {
            File::create(places.image(name)).unwrap().set_len(bytes).unwrap();
        }
        ok(Command::new("mkfs.btrfs").args(["--quiet", "--metadata", "single"]).arg(places.image("btrfs")));
        ok(Command::new("mkfs.nilfs2").args(["-q", "-B", "128"]).arg(places.image("nilfs2")));
        places.mount_images();
        ok(Command::new("btrfs").args(["subvolume", "create"]).arg(&places.subvolume));
        // What mkfs leaves there for old tools, the backend leaves out of its snapshots.
        fs::remove_file(places.nilfs2.join(".nilfs")).unwrap();
        ok(places.fsnap(&["init", "--backend", "dm-thin", "--store"]).args([&places.pool_store(), &places.thin]));
        ok(places.fsnap(&["init", "--backend", "rsync"]).arg(&places.dir));
        ok(places.fsnap(&["init", "--backend", "btrfs"]).arg(&places.subvolume));
        let beside = places.system.join("nilfs2-store");
        ok(places.fsnap(&["init", "--backend", "nilfs2", "--store"]).args([&beside, &places.nilfs2]));
        // Everything up to here is no matter of this test.
        rustix::fs::sync();
        standing
    }

    /// Starts from a disk as a machine does.
    pub(crate) fn start(places: &Places, disk: &Path) -> Self {
        let device = PathBuf::from(ok(Command::new("losetup").args(["--find", "--show"]).arg(disk)).trim());
        ok(Command::new("mount").arg(&device).arg(&places.system));
        let standing = Self { places: places.clone(), device };
        // Opened, the store sets its pool going and the volumes of it.
        let node = Store::open(&places.pool_store()).unwrap().volume_node(THIN).unwrap();
        ok(Command::new("mount").arg(node).arg(&places.thin));
        places.mount_images();
        standing
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let ours: Vec<_> =
            points.filter(|at| self.places.tops().iter().any(|top| Path::new(at).starts_with(top))).collect();
        for at in ours.iter().rev().filter(|at| **at != self.places.system.to_string_lossy()) {
            let _ = Command::new("umount").arg(at).output();
        }
        if let Ok(store) = Store::open(&self.places.pool_store()) {
            let stopped = store.stop_pool();
            assert!(std::thread::panicking() || stopped.is_ok(), "{stopped:?}");
        }
        let unmounted = Command::new("umount").arg(&self.places.system).output().unwrap();
        assert!(std::thread::panicking() || unmounted.status.success(), "{unmounted:?}");
        if self.device.to_string_lossy().starts_with("/dev/loop") {
            let _ = Command::new("losetup").arg("--detach").arg(&self.device).output();
        }
    }
}

/// A disk of which every write is kept; the log is whole when it is closed.
#[derive(Debug)]
pub(crate) struct Logged {
    pub(crate) device: PathBuf,
    loops: Vec<String>,
}

/// What device-mapper calls it.
const LOGGED: &str = "fsnap-logged";

impl Logged {
    pub(crate) fn new(dir: &Path) -> Self {
        let mut loops = Vec::new();
        for (name, size) in [("disk", SIZE), ("log", 8 * SIZE)] {
            let path = dir.join(name);
            File::create(&path).unwrap().set_len(size).unwrap();
            loops.push(ok(Command::new("losetup").args(["--find", "--show"]).arg(&path)).trim().to_owned());
        }
        let table = format!("0 {} log-writes {} {}", SIZE / 512, loops[0], loops[1]);
        ok(Command::new("dmsetup").args(["create", LOGGED, "--table", &table]));
        // A machine without udev has no other name for it.
        let node = ok(Command::new("dmsetup").args(["info", "-c", "--noheadings", "-o", "blkdevname", LOGGED]));
        Self { device: Path::new("/dev").join(node.trim()), loops }
    }

    /// Ends the log, and returns the file that it is in.
    pub(crate) fn close(self, dir: &Path) -> PathBuf {
        ok(Command::new("dmsetup").args(["remove", "--retry", LOGGED]));
        for device in &self.loops {
            ok(Command::new("losetup").args(["--detach", device]));
        }
        dir.join("log")
    }
}

/// Leaves a mark in the log.
pub(crate) fn mark(text: &str) {
    ok(Command::new("dmsetup").args(["message", LOGGED, "0", "mark", text]));
}

/// Runs a command that must succeed, and returns its output.
pub(crate) fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
