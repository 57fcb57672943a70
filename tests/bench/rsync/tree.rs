//! A tree on a loop-mounted btrfs, what changes in it, and the bare walk over it.

use std::cell::Cell;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags};

use crate::measure::{Failure, time};

/// The piece in which the large file changes.
const PIECE: usize = 64 << 10;

/// One file in so many changes, and one piece in so many of the large file.
const PART: usize = 100;

pub struct Tree {
    temp: tempfile::TempDir,
    files: usize,
    round: Cell<usize>,
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
        crate::run(Command::new("mkfs.btrfs").arg("-q").arg(&image).stderr(Stdio::null()))?;
        crate::run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mounted))?;
        let tree = Self { temp, files, round: Cell::new(0) };
        fs::create_dir(tree.volume())?;
        for number in 0..files {
            let path = tree.small(number);
            if number % PART == 0 {
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

    fn small(&self, number: usize) -> PathBuf {
        self.volume().join((number / PART).to_string()).join(number.to_string())
    }

    fn write_small(&self, number: usize, round: usize) -> Result<(), Failure> {
        let seed = (round * self.files + number) as u64;
        Ok(fs::write(self.small(number), noise(seed, 500 + number * 37 % 8000))?)
    }

    /// The files that change in this round: one of each directory.
    fn changing(&self) -> impl Iterator<Item = usize> {
        (self.round.get() % PART..self.files).step_by(PART)
    }

    /// Where the large file changes in this round.
    fn pieces(&self) -> impl Iterator<Item = u64> {
        let piece = PIECE as u64;
        let first = (self.round.get() % PART) as u64 * piece;
        (first..self.large() - piece).step_by(PIECE * PART)
    }

    /// Changes a hundredth of everything, and writes it out.
    pub fn change(&self) -> Result<(), Failure> {
        let round = self.round.get() + 1;
        self.round.set(round);
        self.changing().try_for_each(|number| self.write_small(number, round))?;
        let large = File::options().write(true).open(self.volume().join("large"))?;
        for at in self.pieces() {
            large.write_all_at(&noise(at + round as u64, PIECE), at)?;
        }
        self.flush()
    }

    /// The least that anybody has to do: reads what changed and writes it elsewhere.
    pub fn copy_what_changed(&self) -> Result<Duration, Failure> {
        let to = self.beside("changed");
        fs::create_dir(&to)?;
        let taken = time(|| {
            for number in self.changing() {
                fs::write(to.join(number.to_string()), fs::read(self.small(number))?)?;
            }
            let (from, to) = (File::open(self.volume().join("large"))?, File::create(to.join("large"))?);
            let mut buffer = vec![0; PIECE];
            for at in self.pieces() {
                from.read_exact_at(&mut buffer, at)?;
                to.write_all_at(&buffer, at)?;
            }
            rustix::fs::syncfs(&to)?;
            Ok(())
        })?;
        fs::remove_dir_all(to)?;
        self.flush()?;
        Ok(taken)
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
fn noise(seed: u64, length: usize) -> Vec<u8> {
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

/// How many inodes a directory holds.
pub fn inodes(dir: &Path) -> Result<usize, Failure> {
    walk(dir)
}
