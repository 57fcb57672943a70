//! What everybody does with the tree.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use crate::contender::Mount;
use crate::measure::{Failure, run, times};
use crate::tree;

/// So many directories, of a hundred files each, are put into an archive.
const ARCHIVED: usize = 150;
/// How many small files are made.
const CREATED: usize = 5_000;
/// How many blocks are read in no order.
const RANDOM: u64 = 20_000;
/// How much is written in order.
const WRITTEN: usize = 512 << 20;

pub struct Work {
    pub name: &'static str,
    pub writes: bool,
    run: fn(&Mount) -> Result<(), Failure>,
}

impl Work {
    pub const ALL: &[Self] = &[
        Self { name: "walk", writes: false, run: walk },
        Self { name: "tar of small files", writes: false, run: tar },
        Self { name: "sequential read", writes: false, run: sequential_read },
        Self { name: "random 4 KiB reads", writes: false, run: random_reads },
        Self { name: "sequential write", writes: true, run: sequential_write },
        Self { name: "creation of small files", writes: true, run: create },
    ];

    /// Takes away what the last run has written, which is not measured.
    pub fn prepare(&self, mount: &Mount) -> Result<(), Failure> {
        for name in ["written", "created"] {
            let path = mount.new.join(name);
            if path.is_dir() {
                fs::remove_dir_all(path)?;
            } else if path.exists() {
                fs::remove_file(path)?;
            }
        }
        if self.writes {
            rustix::fs::syncfs(File::open(&mount.new)?)?;
        }
        Ok(())
    }

    /// Does it once.
    pub fn cost(&self, mount: &Mount) -> Result<Cost, Failure> {
        let before = used()? + mount.served()?;
        let start = Instant::now();
        (self.run)(mount)?;
        let wall = start.elapsed();
        Ok(Cost { wall, cpu: used()? + mount.served()? - before })
    }
}

/// What a work took.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// By the clock.
    pub wall: Duration,
    /// Of the processors, in user and kernel mode, for whoever worked and whoever served.
    pub cpu: Duration,
}

impl Cost {
    pub fn wall(&self, of: &Self) -> f64 {
        times(self.wall, of.wall)
    }

    pub fn cpu(&self, of: &Self) -> f64 {
        times(self.cpu, of.cpu)
    }

    pub fn median(costs: Vec<Self>) -> Self {
        let middle = |mut times: Vec<Duration>| {
            times.sort();
            times[times.len() / 2]
        };
        let of = |get: fn(&Self) -> Duration| middle(costs.iter().map(get).collect());
        Self { wall: of(|cost| cost.wall), cpu: of(|cost| cost.cpu) }
    }
}

/// The processor time of this process and of those that it has waited for.
fn used() -> Result<Duration, Failure> {
    let mut sum = Duration::ZERO;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        for time in [usage.user_time(), usage.system_time()] {
            sum += Duration::from_secs(time.tv_sec().try_into()?) + Duration::from_micros(time.tv_usec().try_into()?);
        }
    }
    Ok(sum)
}

fn walk(mount: &Mount) -> Result<(), Failure> {
    tree::walk(&mount.root)?;
    Ok(())
}

/// GNU tar reads nothing if it sees that its archive is /dev/null.
fn tar(mount: &Mount) -> Result<(), Failure> {
    let dirs = (0..ARCHIVED).map(|dir| dir.to_string()).filter(|dir| mount.root.join(dir).exists());
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg("-").arg("-C").arg(&mount.root).args(dirs);
    let mut tar = tar.stdout(Stdio::piped()).spawn()?;
    let mut archive = tar.stdout.take().ok_or("tar has an output")?;
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        match archive.read(&mut buffer)? {
            0 => break,
            read => length += read,
        }
    }
    let status = tar.wait()?;
    if status.success() && length > 0 { Ok(()) } else { Err(format!("tar: {status}, {length} bytes").into()) }
}

fn sequential_read(mount: &Mount) -> Result<(), Failure> {
    let mut file = File::open(mount.root.join("large"))?;
    let mut buffer = vec![0; 128 << 10];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

fn random_reads(mount: &Mount) -> Result<(), Failure> {
    let file = File::open(mount.root.join("large"))?;
    let blocks = file.metadata()?.len() / 4096;
    let mut buffer = [0; 4096];
    // A generator of Lehmer's, so that everybody reads the same blocks.
    let mut random = 1_u64;
    for _ in 0..RANDOM {
        random = random * 48_271 % 0x7fff_ffff;
        file.read_exact_at(&mut buffer, random % blocks * 4096)?;
    }
    Ok(())
}

fn sequential_write(mount: &Mount) -> Result<(), Failure> {
    let mut file = File::create(mount.new.join("written"))?;
    let block = vec![0x5a; 128 << 10];
    for _ in 0..WRITTEN / block.len() {
        file.write_all(&block)?;
    }
    Ok(())
}

fn create(mount: &Mount) -> Result<(), Failure> {
    let dir = mount.new.join("created");
    fs::create_dir(&dir)?;
    for number in 0..CREATED {
        fs::write(dir.join(number.to_string()), "small\n")?;
    }
    Ok(())
}

/// Writes 4 KiB into a file that is there.
pub fn first_write(path: &Path) -> Result<(), Failure> {
    Ok(File::options().write(true).open(path)?.write_all_at(&[0x5a; 4096], 1 << 20)?)
}

/// Makes a file of so many bytes, none of which is a hole.
pub fn dense(path: &Path, length: u64) -> Result<(), Failure> {
    let mut file = File::create(path)?;
    let block = vec![0xa5; 1 << 20];
    (0..length >> 20).try_for_each(|_| file.write_all(&block))?;
    run(Command::new("sync").arg(path))
}
