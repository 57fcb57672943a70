//! A tree on a loop-mounted btrfs, and the bare walk over it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags};

use crate::measure::{Failure, run};

/// So many small files lie in one directory.
pub const PER_DIRECTORY: usize = 100;

pub struct Tree {
    temp: tempfile::TempDir,
    files: usize,
}

impl Tree {
    pub fn new() -> Result<Self, Failure> {
        let files = match std::env::var("FSNAP_BENCH_FILES") {
            Ok(files) => files.parse()?,
            Err(_) => 100_000,
        };
        let temp = tempfile::tempdir()?;
        let image = temp.path().join("image");
        File::create(&image)?.set_len(32 << 30)?;
        let mounted = temp.path().join("mnt");
        fs::create_dir(&mounted)?;
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image).stderr(Stdio::null()))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mounted))?;
        let tree = Self { temp, files };
        run(Command::new("btrfs").args(["subvolume", "create"]).arg(tree.volume()))?;
        for number in 0..files {
            let path = tree.small(number);
            if number % PER_DIRECTORY == 0 {
                fs::create_dir(path.parent().ok_or("a file lies in a directory")?)?;
            }
            tree.write_small(number, 0)?;
        }
        let large = File::create(tree.volume().join("large"))?;
        for at in (0..tree.large()).step_by(1 << 20) {
            large.write_all_at(&noise(at, 1 << 20), at)?;
        }
        tree.flush()?;
        Ok(tree)
    }

    pub fn files(&self) -> usize {
        self.files
    }

    /// The length of the large file.
    pub fn large(&self) -> u64 {
        ((self.files as u64 * (1 << 30)) / 100_000).next_multiple_of(1 << 20)
    }

    pub fn beside(&self, name: &str) -> PathBuf {
        self.temp.path().join("mnt").join(name)
    }

    pub fn volume(&self) -> PathBuf {
        self.beside("volume")
    }

    pub fn small(&self, number: usize) -> PathBuf {
        self.volume().join((number / PER_DIRECTORY).to_string()).join(number.to_string())
    }

    pub fn write_small(&self, number: usize, round: usize) -> Result<(), Failure> {
        let seed = (round * self.files + number) as u64;
        Ok(fs::write(self.small(number), noise(seed, 500 + number * 37 % 8000))?)
    }

    /// Writes out what is dirty, so that nobody pays for another.
    pub fn flush(&self) -> Result<(), Failure> {
        Ok(rustix::fs::syncfs(File::open(self.volume())?)?)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.temp.path().join("mnt")).status();
    }
}

/// Bytes that no compressor makes smaller.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Calls `statx(2)` for everything below `dir`, on one thread; returns for how much.
pub fn walk(dir: &Path) -> Result<usize, Failure> {
    fn below(dir: impl AsFd) -> rustix::io::Result<usize> {
        let mut seen = 0;
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let found = rustix::fs::statx(&dir, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
            seen += 1;
            if FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory {
                seen += below(rustix::fs::openat(&dir, name, DIRECTORY, Mode::empty())?)?;
            }
        }
        Ok(seen)
    }
    Ok(below(rustix::fs::openat(CWD, dir, DIRECTORY, Mode::empty())?)?)
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
