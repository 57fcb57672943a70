//! What one file costs the server in requests and in system calls.
//!
//! Counted by strace while somebody does the same with many files. That makes it slow, but changes nothing of what is counted.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::mount::UnmountFlags;

use crate::measure::{Failure, head, row};

const FILES: usize = 1_000;

/// How often the server did something.
struct Counts {
    /// Each is read by one call of `read(2)`, which the server uses for nothing else.
    requests: usize,
    calls: usize,
}

impl Counts {
    /// What strace has written, as lines of a call's name and a number.
    fn read(log: &Path) -> Result<Self, Failure> {
        let mut counts = Self { requests: 0, calls: 0 };
        for line in fs::read_to_string(log)?.lines() {
            let mut fields = line.split_whitespace();
            let (Some(name), Some(Ok(number))) = (fields.next(), fields.next().map(str::parse::<usize>)) else {
                continue;
            };
            match name {
                "total" => counts.calls = number,
                "read" => counts.requests = number,
                _ => {}
            }
        }
        Ok(counts)
    }
}

fn counted(server: &Child, log: &Path, work: impl FnOnce() -> Result<(), Failure>) -> Result<Counts, Failure> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-U", "name,calls", "-p"]).arg(server.id().to_string()).arg("-o").arg(log);
    let mut strace = strace.stderr(Stdio::piped()).spawn()?;
    // It says something when it has all the threads.
    let mut said = BufReader::new(strace.stderr.take().ok_or("strace has a standard error")?);
    said.read_line(&mut String::new())?;
    work()?;
    // Nobody waits for the last closings.
    std::thread::sleep(Duration::from_millis(200));
    kill(Pid::from_raw(strace.id().try_into()?), Signal::SIGINT)?;
    strace.wait()?;
    Counts::read(log)
}

fn create(dir: &Path) -> Result<(), Failure> {
    (0..FILES).try_for_each(|number| Ok(fs::write(dir.join(format!("new{number}")), "small\n")?))
}

/// As tar(1) does: it looks at each file again when it has read it.
fn read(dir: &Path) -> Result<(), Failure> {
    for number in 0..FILES {
        let mut file = File::open(dir.join(number.to_string()))?;
        file.read_to_end(&mut Vec::new())?;
        file.metadata()?;
    }
    Ok(())
}

pub fn bench() -> Result<(), Failure> {
    let temp = tempfile::tempdir()?;
    let (lower, dir, log) = (temp.path().join("lower"), temp.path().join("mnt"), temp.path().join("log"));
    fs::create_dir(&dir)?;
    fs::create_dir_all(lower.join("d"))?;
    (0..FILES).try_for_each(|number| fs::write(lower.join("d").join(number.to_string()), vec![0xa5; 3000]))?;
    let mut server = Command::new(env!("CARGO_BIN_EXE_fsnap"));
    server.args(["overlay", "--foreground"]).arg(&lower).arg(temp.path().join("store")).arg(&dir);
    let mut server = server.stdout(Stdio::null()).spawn()?;
    let counts = wait_for(&dir.join("d")).and_then(|()| {
        // Here is everything that is done once: the directory is listed and copied up.
        fs::read_dir(dir.join("d"))?.for_each(drop);
        fs::write(dir.join("d/first"), "")?;
        let count = |work: fn(&Path) -> Result<(), Failure>| counted(&server, &log, || work(&dir.join("d")));
        Ok([
            ("made, and 6 bytes written", count(create)?),
            ("opened, read, looked at, closed", count(read)?),
            ("the same again", count(read)?),
        ])
    });
    rustix::mount::unmount(&dir, UnmountFlags::DETACH)?;
    server.wait()?;
    head("what a small file costs the server of a branch", &["", "requests", "system calls"]);
    let each = |number: usize| format!("{:.1}", number as f64 / FILES as f64);
    counts?.iter().for_each(|(name, counts)| row(&[(*name).into(), each(counts.requests), each(counts.calls)]));
    Ok(())
}

fn wait_for(path: &Path) -> Result<(), Failure> {
    let start = Instant::now();
    while !path.exists() {
        if start.elapsed() > Duration::from_secs(20) {
            return Err(format!("{} is not shown", path.display()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
