//! Volumes of each kind, made on files of a test's own directory.
#![allow(dead_code, reason = "every test uses another part of it")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fsnap_dm_thin::{FileSystem, Plan, STORES, Store};

use crate::thin::{devices, remove_devices};

/// What a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Volume {
    /// A subvolume.
    Btrfs,
    /// An ext4 on a thin device.
    DmThin,
    /// A file system of its own.
    Nilfs2,
    /// A plain directory.
    Rsync,
}

impl Volume {
    /// The backend that captures it.
    pub(crate) fn backend(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::DmThin => "dm-thin",
            Self::Nilfs2 => "nilfs2",
            Self::Rsync => "rsync",
        }
    }

    /// Why there can be none here, if so; in a virtual machine that is made for it, there has to be.
    pub(crate) fn why_not(self) -> Option<&'static str> {
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let reason = match self {
            Self::Btrfs | Self::Rsync => return None,
            Self::DmThin if Path::new("/dev/mapper/control").exists() => return None,
            Self::DmThin => "this kernel has no device-mapper; `cargo run -p vm-tests` runs this in a machine that has",
            Self::Nilfs2 if known.lines().any(|line| line.ends_with("\tnilfs2")) => return None,
            Self::Nilfs2 => "this kernel has no NILFS2; `cargo run -p vm-tests` runs this in a machine that has",
        };
        std::env::var_os("FSNAP_VM").is_none().then_some(reason)
    }
}

/// What the volumes of one test lie on.
#[derive(Debug)]
pub(crate) struct Ground {
    dir: PathBuf,
    mounts: Vec<PathBuf>,
    btrfs: bool,
    pool: Option<(Store, PathBuf)>,
}

impl Ground {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), mounts: Vec::new(), btrfs: false, pool: None }
    }

    /// Makes a volume of that name, and tells where.
    pub(crate) fn make(&mut self, volume: Volume, name: &str) -> PathBuf {
        let place = match volume {
            Volume::Btrfs => "mnt",
            Volume::DmThin => "thin",
            Volume::Nilfs2 => "log",
            Volume::Rsync => "dir",
        };
        let path = self.dir.join(place).join(name);
        match volume {
            Volume::Btrfs => {
                if !self.btrfs {
                    self.btrfs = true;
                    let image = self.image("disk", 2 << 30);
                    run(Command::new("mkfs.btrfs").arg("--quiet").arg(&image));
                    self.mount(&image, &self.dir.join(place), &["-o", "loop"]);
                }
                run(Command::new("btrfs").args(["subvolume", "create"]).arg(&path));
            }
            Volume::DmThin => {
                let device = self.thin_device(name);
                self.mount(&device, &path, &[]);
                fs::remove_dir(path.join("lost+found")).unwrap();
            }
            Volume::Nilfs2 => {
                let image = self.image(name, 1 << 30);
                run(Command::new("mkfs.nilfs2").args(["-q", "-B", "512"]).arg(&image));
                self.mount(&image, &path, &["-i", "-t", "nilfs2", "-o", "loop"]);
                // mkfs leaves it for old tools.
                fs::remove_file(path.join(".nilfs")).unwrap();
            }
            Volume::Rsync => fs::create_dir_all(&path).unwrap(),
        }
        path
    }

    fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let image = self.dir.join(name);
        File::create(&image).unwrap().set_len(bytes).unwrap();
        image
    }

    fn thin_device(&mut self, name: &str) -> PathBuf {
        let (pool, _) = self.pool.get_or_insert_with(|| {
            let test = self.dir.file_name().unwrap().to_string_lossy().into_owned();
            let name = format!("fsnap-test-{}-{}", std::process::id(), test.trim_start_matches('.'));
            // Where `fsnap init` looks for it.
            let (place, on) = (Path::new(STORES).join(&name), self.dir.join("pool"));
            (Store::create_pool(&Plan { name, place: place.clone(), on, size: Some(2 << 30) }).unwrap(), place)
        });
        pool.make_volume(name, 512 << 20, FileSystem::Ext4).unwrap()
    }

    /// Where the store of the thin pool is, if there is one.
    pub(crate) fn pool_store(&self) -> Option<&Path> {
        self.pool.as_ref().map(|(_, place)| place.as_path())
    }

    fn mount(&mut self, device: &Path, at: &Path, options: &[&str]) {
        fs::create_dir_all(at).unwrap();
        run(Command::new("mount").args(options).args([device, at]));
        self.mounts.push(at.into());
    }

    /// Mounts a small file system in memory, of so many KiB.
    pub(crate) fn mount_small(&mut self, at: &Path, kib: u32) {
        self.mount(Path::new("small"), at, &["-t", "tmpfs", "-o", &format!("size={kib}k")]);
    }

    /// How many snapshots in the thin pool have a device that is in use, or was; 0 without a pool.
    pub(crate) fn snapshots_in_use(&self) -> usize {
        let devices = self.pool_store().map(devices).unwrap_or_default();
        devices.iter().filter(|device| device.what.starts_with("s-")).count()
    }

    /// Unmounts and removes everything, whoever uses it.
    pub(crate) fn clear(&mut self) {
        for at in self.mounts.drain(..).rev() {
            // What a failed case left running keeps it busy.
            let _ = Command::new("umount").args(["-i", "--lazy"]).arg(at).output();
        }
        if let Some((_, place)) = self.pool.take() {
            remove_devices(&place);
            let _ = fs::remove_dir_all(place);
        }
    }
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}
