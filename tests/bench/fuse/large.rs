//! The first write into a large file, on a file system that cannot share blocks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use crate::contender::{options, overlayfs};
use crate::measure::{Failure, head, in_turns, ms, ratio, row, run, time, times};
use crate::work::{dense, first_write};

const GIB: u64 = 1 << 30;
const ROUNDS: usize = 3;

/// An ext4 with two large files: one of data, and one of ten times the size that is mostly a hole.
struct Site(tempfile::TempDir);

impl Site {
    fn new() -> Result<Self, Failure> {
        let site = Self(tempfile::tempdir()?);
        File::create(site.path("image"))?.set_len(8 * GIB)?;
        fs::create_dir(site.path("fs"))?;
        run(Command::new("mkfs.ext4").arg("-q").arg(site.path("image")))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(site.path("image")).arg(site.path("fs")))?;
        fs::create_dir(site.lower())?;
        dense(&site.lower().join("dense"), GIB)?;
        File::create(site.lower().join("sparse"))?.set_len(10 * GIB)?;
        Ok(site)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn lower(&self) -> PathBuf {
        self.path("fs/lower")
    }

    /// How long the first write takes on a fresh mount.
    fn first(
        &self,
        name: &str,
        mount: fn(&Path, &Path) -> Result<Option<Command>, Failure>,
    ) -> Result<Duration, Failure> {
        let base = self.path("fs/base");
        for dir in ["mnt", "upper", "work"] {
            fs::create_dir_all(base.join(dir))?;
        }
        let server = mount(&self.lower(), &base)?;
        let server =
            server.map(|mut command| command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()).transpose()?;
        let (path, start) = (base.join("mnt").join(name), Instant::now());
        while !path.exists() {
            if start.elapsed() > Duration::from_secs(20) {
                return Err(format!("{} is not shown", path.display()).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let taken = time(|| first_write(&path))?;
        rustix::mount::unmount(base.join("mnt"), UnmountFlags::DETACH)?;
        server.map(|mut server| server.wait()).transpose()?;
        fs::remove_dir_all(base)?;
        Ok(taken)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path("fs"), UnmountFlags::DETACH);
    }
}

fn ours(lower: &Path, base: &Path) -> Result<Option<Command>, Failure> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsnap"));
    command.args(["overlay", "--foreground"]).arg(lower).arg(base.join("upper")).arg(base.join("mnt"));
    Ok(Some(command))
}

fn theirs(lower: &Path, base: &Path) -> Result<Option<Command>, Failure> {
    let mut command = Command::new("fuse-overlayfs");
    command.arg("-f").arg("-o").arg(options(lower, base)).arg(base.join("mnt"));
    Ok(Some(command))
}

fn kernels(lower: &Path, base: &Path) -> Result<Option<Command>, Failure> {
    overlayfs(lower, base, &base.join("mnt"))?;
    Ok(None)
}

pub fn bench() -> Result<(), Failure> {
    let site = Site::new()?;
    let [kernels, theirs, dense, sparse] = in_turns(
        ROUNDS,
        [
            &mut || site.first("dense", kernels),
            &mut || site.first("dense", theirs),
            &mut || site.first("dense", ours),
            &mut || site.first("sparse", ours),
        ],
    )?;
    head("the first 4 KiB into a large file on ext4", &["", "time", "kernel overlayfs / it", "goal"]);
    let rows = [
        ("kernel overlayfs, 1 GiB", kernels, None),
        ("fuse-overlayfs, 1 GiB", theirs, None),
        ("fsnap overlay, 1 GiB", dense, Some(200.0)),
        ("fsnap overlay, 10 GiB, sparse", sparse, Some(200.0)),
    ];
    for (name, taken, least) in rows {
        let met = |least| if times(kernels, taken) >= least { "met" } else { "missed" };
        let goal = least.map(|least| format!(">= {least} x: {}", met(least)));
        row(&[name.into(), ms(taken), ratio(kernels, taken), goal.unwrap_or_default()]);
    }
    Ok(())
}
