//! Who shows the tree: the file system itself, fsnap, and its peers.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::Value;

use crate::measure::{Failure, run};
use crate::tree::Tree;
use crate::work::Work;

/// How long a server may take to mount, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// btrfs itself: the volume.
    Native,
    /// btrfs itself: the checkpoint's snapshot of it, which is what the mounts of fsnap read. Its pages are others in the page cache.
    Snapshot,
    /// overlayfs of the kernel.
    Overlayfs,
    FuseOverlayfs,
    Unionfs,
    Restic,
    /// A checkpoint below `fsnap mount`.
    Mount,
    /// The same below `fsnap mount --native`.
    Attached,
    /// `fsnap overlay`.
    Overlay,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Native,
        Self::Snapshot,
        Self::Overlayfs,
        Self::FuseOverlayfs,
        Self::Unionfs,
        Self::Restic,
        Self::Mount,
        Self::Attached,
        Self::Overlay,
    ];
    /// Those that are compared with the file system itself.
    pub const PEERS: &[Self] = Self::ALL.split_at(1).1;

    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "btrfs",
            Self::Snapshot => "its snapshot",
            Self::Overlayfs => "kernel overlayfs",
            Self::FuseOverlayfs => "fuse-overlayfs",
            Self::Unionfs => "unionfs-fuse",
            Self::Restic => "restic mount",
            Self::Mount => "fsnap mount",
            Self::Attached => "mount --native",
            Self::Overlay => "fsnap overlay",
        }
    }

    pub fn does(self, work: &Work) -> bool {
        match self {
            // It takes a millisecond for each of the random reads.
            Self::Restic => !work.writes && work.name != "random 4 KiB reads",
            Self::Snapshot | Self::Mount | Self::Attached => !work.writes,
            _ => true,
        }
    }
}

/// The tree, and all that the contenders need beside it.
pub struct Peers {
    pub tree: Tree,
    snapshot: PathBuf,
    mounts: Cell<usize>,
}

impl Peers {
    pub fn new() -> Result<Self, Failure> {
        let mut peers = Self { tree: Tree::new()?, snapshot: PathBuf::new(), mounts: Cell::new(0) };
        fs::create_dir(peers.tree.beside("mounts"))?;
        run(peers.fsnap().args(["init", "--name", "data"]).arg(peers.tree.volume()))?;
        let made: Value = serde_json::from_slice(&peers.fsnap().args(["checkpoint", "--json"]).output()?.stdout)?;
        let name = made["members"][0]["snapshot"].as_str().ok_or("the checkpoint has no snapshot")?;
        peers.snapshot = peers.tree.beside(".fsnap/snapshots").join(name);
        run(peers.restic().arg("init"))?;
        run(peers.restic().arg("backup").arg(peers.tree.volume()))?;
        Ok(peers)
    }

    fn fsnap(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsnap"));
        command.env("FSNAP_STATE", self.tree.beside("state"));
        command
    }

    fn restic(&self) -> Command {
        let mut command = Command::new("restic");
        command.env("RESTIC_PASSWORD", "x").arg("--quiet").arg("--repo").arg(self.tree.beside("restic"));
        command.arg("--cache-dir").arg(self.tree.beside("restic-cache"));
        command
    }

    /// Lets a contender show the tree, with nothing written to it and nothing of its own cached.
    pub fn mount(&self, kind: Kind) -> Result<Mount, Failure> {
        let number = self.mounts.replace(self.mounts.get() + 1);
        let base = self.tree.beside("mounts").join(number.to_string());
        let bare = match kind {
            Kind::Native => Some(self.tree.volume()),
            Kind::Snapshot => Some(self.snapshot.clone()),
            _ => None,
        };
        if let Some(root) = bare {
            fs::create_dir(&base)?;
            return Ok(Mount { root, new: base.clone(), base, server: None, mounted: None });
        }
        let (lower, dir) = (self.tree.volume(), base.join("mnt"));
        for name in ["mnt", "upper", "work"] {
            fs::create_dir_all(base.join(name))?;
        }
        let mut root = dir.clone();
        let server = match kind {
            Kind::Native | Kind::Snapshot => None,
            Kind::Overlayfs => {
                overlayfs(&lower, &base, &dir)?;
                None
            }
            Kind::FuseOverlayfs => {
                let mut command = Command::new("fuse-overlayfs");
                command.arg("-f").arg("-o").arg(options(&lower, &base)).arg(&dir);
                Some(command)
            }
            Kind::Unionfs => {
                let mut command = Command::new("unionfs");
                let branches = format!("{}=RW:{}=RO", base.join("upper").display(), lower.display());
                command.args(["-f", "-o", "cow"]).arg(branches).arg(&dir);
                Some(command)
            }
            Kind::Restic => {
                let mut command = self.restic();
                command.arg("mount").arg(&dir);
                let volume = lower.strip_prefix("/")?;
                root = dir.join("snapshots/latest").join(volume);
                Some(command)
            }
            Kind::Mount | Kind::Attached => {
                let mut command = self.fsnap();
                command.args(["mount", "--foreground"]).args((kind == Kind::Attached).then_some("--native")).arg(&dir);
                root = fs::canonicalize(&dir)?.join("latest/data");
                Some(command)
            }
            Kind::Overlay => {
                let mut command = self.fsnap();
                command.args(["overlay", "--foreground"]).arg(&lower).arg(base.join("upper")).arg(&dir);
                Some(command)
            }
        };
        let server =
            server.map(|mut command| command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()).transpose()?;
        let mut mount = Mount { new: root.clone(), root, base, server, mounted: Some(dir) };
        mount.wait(kind)?;
        Ok(mount)
    }
}

pub fn options(lower: &Path, base: &Path) -> String {
    let (lower, upper, work) = (lower.display(), base.join("upper"), base.join("work"));
    format!("lowerdir={lower},upperdir={},workdir={}", upper.display(), work.display())
}

pub fn overlayfs(lower: &Path, base: &Path, dir: &Path) -> Result<(), Failure> {
    let options = std::ffi::CString::new(options(lower, base))?;
    Ok(rustix::mount::mount("overlay", dir, "overlay", MountFlags::empty(), &*options)?)
}

/// The tree as somebody shows it; gone when dropped.
pub struct Mount {
    /// Where the tree is.
    pub root: PathBuf,
    /// Where new files may be written.
    pub new: PathBuf,
    base: PathBuf,
    server: Option<Child>,
    mounted: Option<PathBuf>,
}

impl Mount {
    /// Waits until the tree is there.
    fn wait(&mut self, kind: Kind) -> Result<(), Failure> {
        let until = Instant::now() + PATIENCE;
        while fs::symlink_metadata(self.root.join("large")).is_err() {
            let ended = self.server.as_mut().map(Child::try_wait).transpose()?.flatten();
            if let Some(status) = ended.filter(|status| !status.success()) {
                return Err(format!("{} has ended: {status}", kind.name()).into());
            }
            if Instant::now() > until {
                return Err(format!("{} does not show {}", kind.name(), self.root.display()).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The processor time that the server has used.
    pub fn served(&self) -> Result<Duration, Failure> {
        let Some(server) = &self.server else { return Ok(Duration::ZERO) };
        let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(server.id().try_into()?))?;
        Ok(clock.now()?.into())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(dir) = &self.mounted {
            let _ = rustix::mount::unmount(dir, UnmountFlags::DETACH);
        }
        if let Some(server) = &mut self.server {
            let until = Instant::now() + PATIENCE;
            while matches!(server.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = fs::remove_dir_all(&self.base);
    }
}
