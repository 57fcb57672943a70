//! A branch for one case.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use crate::run;

/// How long a server may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// The volume that a branch of a checkpoint continues.
const VOLUME: &str = "data";

/// What lies below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    /// The file system that tests are on.
    Plain,
    Btrfs,
    /// The same as the first, and the branch is one that `fsnap mount` shows beside others, over a checkpoint.
    Checkpoint,
}

impl Ground {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Btrfs => "btrfs",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// An empty directory, a store, and a server that shows both as one.
pub(crate) struct Branch {
    base: tempfile::TempDir,
    ground: Ground,
    server: Child,
}

impl Branch {
    pub(crate) fn new(ground: Ground) -> Result<Self, String> {
        let io = |error: std::io::Error| error.to_string();
        let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).map_err(io)?;
        let fs = base.path().join("fs");
        for dir in [&fs, &base.path().join("other")] {
            fs::create_dir(dir).map_err(io)?;
        }
        if ground == Ground::Btrfs {
            let image = base.path().join("image");
            File::create(&image).and_then(|file| file.set_len(4 << 30)).map_err(io)?;
            for command in [
                Command::new("mkfs.btrfs").arg("-q").arg(&image),
                Command::new("mount").args(["-o", "loop"]).args([&image, &fs]),
            ] {
                let (done, said) = run(command)?;
                done.then_some(()).ok_or(said)?;
            }
        }
        let [lower, store, mnt] = ["lower", "store", "mnt"].map(|name| fs.join(name));
        for dir in [&lower, &mnt] {
            fs::create_dir(dir).map_err(io)?;
        }
        let fsnap = || {
            let mut fsnap = Command::new(env!("CARGO_BIN_EXE_fsnap"));
            fsnap.env("FSNAP_STATE", base.path().join("state"));
            fsnap
        };
        let mut command = fsnap();
        if ground == Ground::Checkpoint {
            for command in [fsnap().args(["init", "--name", VOLUME]).arg(&lower), fsnap().arg("checkpoint")] {
                let (done, said) = run(command)?;
                done.then_some(()).ok_or(said)?;
            }
            command.args(["mount", "--allow-other"]).arg(mnt);
        } else {
            command.arg("overlay").args([lower, store, mnt]);
        }
        command.args(["--foreground", "--suid", "--dev"]);
        let server = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(io)?;
        let mut branch = Self { base, ground, server };
        let until = Instant::now() + PATIENCE;
        while !branch.is_mounted() {
            if Instant::now() > until || branch.server.try_wait().map_err(io)?.is_some() {
                return Err("the server does not mount".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if ground == Ground::Checkpoint {
            let branches = branch.mount_point().join("branches");
            fs::create_dir(branches.join("new@latest")).and_then(|()| fs::create_dir(branch.dir())).map_err(io)?;
            // Under a short path: sockets are made, whose paths have 107 bytes.
            rustix::mount::mount_bind(branches.join("new").join(VOLUME), branch.dir()).map_err(|e| io(e.into()))?;
        }
        Ok(branch)
    }

    pub(crate) fn ground(&self) -> Ground {
        self.ground
    }

    /// Where its files are.
    pub(crate) fn dir(&self) -> PathBuf {
        match self.ground {
            Ground::Plain | Ground::Btrfs => self.mount_point(),
            Ground::Checkpoint => self.base.path().join("fs/at"),
        }
    }

    /// What is mounted for it, the last first.
    fn mounted(&self) -> Vec<PathBuf> {
        let mut mounted = vec![self.dir(), self.mount_point()];
        mounted.dedup();
        mounted
    }

    fn mount_point(&self) -> PathBuf {
        self.base.path().join("fs/mnt")
    }

    /// A directory on another file system.
    pub(crate) fn other(&self) -> PathBuf {
        self.base.path().join("other")
    }

    /// A file beside it.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn is_mounted(&self) -> bool {
        let point = format!(" {} ", self.mount_point().display());
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        table.lines().any(|line| line.contains(&point) && line.contains(" - fuse.fsnap "))
    }

    /// Unmounts; the server must have lived until now, and end well.
    pub(crate) fn end(mut self) -> Result<(), String> {
        if let Some(status) = self.server.try_wait().map_err(|error| error.to_string())? {
            return Err(format!("the server has died: {status}"));
        }
        // The kernel lets go of watches and leases a little after the process that had them.
        let until = Instant::now() + PATIENCE;
        for point in self.mounted() {
            while let Err(error) = rustix::mount::unmount(&point, UnmountFlags::empty()) {
                if Instant::now() > until {
                    return Err(format!("unmounting {}: {error}", point.display()));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        let status = self.server.wait().map_err(|error| error.to_string())?;
        status.success().then_some(()).ok_or_else(|| format!("the server failed: {status}"))
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        for point in self.mounted().into_iter().chain([self.base.path().join("fs")]) {
            let _ = rustix::mount::unmount(&point, UnmountFlags::DETACH);
        }
    }
}
