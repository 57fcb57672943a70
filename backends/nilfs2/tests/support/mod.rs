//! A small NILFS2 of its own for each volume.
#![allow(dead_code, reason = "every test file uses another part of it")]

pub(crate) mod sys;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use nix::mount::{MntFlags, umount2};

/// Why no NILFS2 can be used here, if so.
///
/// Inside a virtual machine that is made for it there is no such reason: it has to run there.
pub(crate) fn why_not() -> Option<&'static str> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = known.lines().any(|line| line.split_whitespace().next_back() == Some("nilfs2"));
    let in_vm = std::env::var_os("FSNAP_VM").is_some();
    (!has && !in_vm).then_some("this kernel has no NILFS2; `cargo run -p vm-tests` runs this in a machine that has")
}

/// A NILFS2 on a loop device, mounted at a directory; unmounted and gone when dropped.
///
/// The device outlives the mount, as a disk does: its snapshots can be read when nobody has the volume mounted.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) device: PathBuf,
    pub(crate) dir: PathBuf,
    image: PathBuf,
}

/// Loop devices that are detached at the end of the run.
static KEPT: Mutex<Vec<Disk>> = Mutex::new(Vec::new());

impl Disk {
    /// Makes one and mounts it at the empty directory `dir`.
    pub(crate) fn new(dir: &Path) -> io::Result<Self> {
        Self::sized(dir, 256 << 20)
    }

    /// The same, with room for so many bytes.
    pub(crate) fn sized(dir: &Path, bytes: u64) -> io::Result<Self> {
        // Sparse. Small segments, so that the cleaner has something to do.
        let image = tempfile::Builder::new().prefix("nilfs2-").suffix(".image").tempfile()?.into_temp_path().keep()?;
        File::create(&image)?.set_len(bytes)?;
        let out = Command::new("losetup").args(["--find", "--show"]).arg(&image).output()?;
        let device = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
        let disk = Self { device, dir: dir.to_owned(), image };
        if !out.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&out.stderr).into_owned()));
        }
        run(Command::new("mkfs.nilfs2").args(["-q", "-B", "256"]).arg(&disk.device).stdout(Stdio::null()))?;
        disk.mount()?;
        // mkfs leaves it for old tools; a volume that is made is empty.
        fs::remove_file(dir.join(".nilfs"))?;
        Ok(disk)
    }

    /// Mounts it without starting a cleaner.
    pub(crate) fn mount(&self) -> io::Result<()> {
        let flags = rustix::mount::MountFlags::empty();
        Ok(rustix::mount::mount(&self.device, &self.dir, "nilfs2", flags, None)?)
    }

    pub(crate) fn unmount(&self) -> io::Result<()> {
        unmount(&self.dir)
    }

    /// Leaves it there until [`release_disks`].
    pub(crate) fn keep_for_the_run(self) {
        KEPT.lock().expect("no test panics with it").push(self);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        umount2(&self.dir, MntFlags::MNT_DETACH).ok();
        Command::new("losetup").arg("--detach").arg(&self.device).status().ok();
        fs::remove_file(&self.image).ok();
    }
}

/// Drops all disks that were kept.
pub(crate) fn release_disks() {
    KEPT.lock().expect("no test panics with it").clear();
}

/// Unmounts what is mounted at `dir`, though files of it may be open.
pub(crate) fn unmount(dir: &Path) -> io::Result<()> {
    Ok(umount2(dir, MntFlags::MNT_DETACH)?)
}

/// Runs a program, and requires that it succeeds.
pub(crate) fn run(command: &mut Command) -> io::Result<()> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}
