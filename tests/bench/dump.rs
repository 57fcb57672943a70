//! What the hook adds to the time in which processes stand, and what a branch costs.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::measure::{Failure, head, in_turns, ms, ratio, row, run, time, times};
use crate::site::{Memory, Site};
use crate::sys;

const ROUNDS: usize = 15;

/// More, where a round takes little: for a snapshot of two milliseconds, the machine's own moods are as large as what is measured.
const MANY_ROUNDS: usize = 41;

/// fsnap under its name as a hook.
const OURS: &str = "fsnap-criu-hook";

/// The post-dump hook as a process, against an empty static program and the bare ioctl.
pub fn hook(site: &Site) -> Result<(), Failure> {
    head(
        "post-dump hook, as CRIU starts it; bare: a static program that only calls BTRFS_IOC_SNAP_CREATE_V2, syncfs at pre-dump",
        &["dirty before the dump", "bare", "hook", "hook / bare", "goal"],
    );
    let mut clean = None;
    for mebibytes in [0, 1, 16, 512] {
        let rounds = if mebibytes > 16 { ROUNDS } else { MANY_ROUNDS };
        let [bare, hook] = in_turns(
            rounds,
            [
                &mut || {
                    site.dirty(mebibytes)?;
                    let images = site.images("images")?;
                    run(&mut call(site, "raw-hook", "pre-dump", &images))?;
                    let time = time(|| run(&mut call(site, "raw-hook", "post-dump", &images)))?;
                    keep_raw(site)?;
                    Ok(time)
                },
                &mut || {
                    site.dirty(mebibytes)?;
                    post_dump(site)
                },
            ],
        )?;
        let clean = *clean.get_or_insert(hook);
        row(&[format!("{mebibytes} MiB"), ms(bare), ms(hook), ratio(hook, bare), goal(times(hook, bare), 1.5, "x")]);
        if mebibytes == 512 {
            let grown = goal(times(hook, clean), 1.3, "x");
            row(&["512 MiB / 0 MiB".into(), String::new(), String::new(), ratio(hook, clean), grown]);
        }
    }
    Ok(())
}

/// A goal, and whether a value that should not be above it reached it.
pub fn goal(value: f64, at_most: f64, unit: &str) -> String {
    format!("<= {at_most} {unit}: {}", if value <= at_most { "met" } else { "missed" })
}

/// One post-dump hook, after a pre-dump hook that is not measured.
pub fn post_dump(site: &Site) -> Result<Duration, Failure> {
    let images = site.images("images")?;
    run(&mut call(site, OURS, "pre-dump", &images))?;
    let time = time(|| run(&mut call(site, OURS, "post-dump", &images)))?;
    Ok(time)
}

/// Makes room for the next snapshot of that name.
///
/// No snapshot is deleted between measurements: for a while afterwards, btrfs does in each commit what is left to do of the
/// deletion.
fn keep_raw(site: &Site) -> Result<(), Failure> {
    static KEPT: AtomicUsize = AtomicUsize::new(0);
    let number = KEPT.fetch_add(1, Ordering::Relaxed);
    Ok(fs::rename(site.path("mnt/raw"), site.path(&format!("mnt/raw.{number}")))?)
}

fn call(site: &Site, hook: &str, action: &str, images: &Path) -> Command {
    let mut command = Command::new(site.path(hook));
    command
        .env("FSNAP_STATE", site.path("state"))
        .env("CRTOOLS_SCRIPT_ACTION", action)
        .env("CRTOOLS_IMAGE_DIR", images)
        .env("CRTOOLS_INIT_PID", site.writer().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// One bare snapshot of the volume that can be written; only the ioctl is measured.
fn bare_snapshot(site: &Site) -> Result<Duration, Failure> {
    let (volume, dir) = (File::open(site.volume())?, File::open(site.path("mnt"))?);
    rustix::fs::syncfs(&volume)?;
    let time = time(|| Ok(sys::snapshot(&volume, &dir, "raw")?))?;
    keep_raw(site)?;
    Ok(time)
}

/// What a hook adds to CRIU's own frozen time, as CRIU's statistics tell it.
pub fn frozen_by_criu(site: &Site) -> Result<(), Failure> {
    let Some(criu) = &site.criu else {
        println!("\nCRIU's own frozen time: left out, for FSNAP_CRIU names no CRIU that works here");
        return Ok(());
    };
    head(
        "frozen time of `criu dump -R` of a small process, by its own statistics",
        &[
            "dirty before the dump",
            "no hook",
            "no-op adds",
            "bare adds",
            "bash adds",
            "fsnap adds",
            "fsnap / bash",
            "goal",
        ],
    );
    for (mebibytes, at_most) in [(0, 0.45), (64, 0.08)] {
        let dump = |hook| dump(site, criu, site.writer(), mebibytes, hook);
        let [none, noop, bare, bash, fsnap] = in_turns(
            ROUNDS,
            [
                &mut || dump(None),
                &mut || dump(Some("noop")),
                &mut || {
                    let time = dump(Some("raw-hook"))?;
                    keep_raw(site)?;
                    Ok(time)
                },
                &mut || dump(Some("btrfs-hook")),
                &mut || dump(Some(OURS)),
            ],
        )?;
        let added = |time: Duration| time.saturating_sub(none);
        row(&[
            format!("{mebibytes} MiB"),
            ms(none),
            ms(added(noop)),
            ms(added(bare)),
            ms(added(bash)),
            ms(added(fsnap)),
            ratio(added(fsnap), added(bash)),
            goal(times(added(fsnap), added(bash)), at_most, "x"),
        ]);
    }
    head(
        "fsnap's share of that frozen time, 1 MiB dirty before the dump",
        &["memory of the process", "no hook", "bare", "with fsnap", "bare's share", "fsnap's share", "goal"],
    );
    let server = Memory::start(site)?;
    for (what, pid) in [("a few pages", site.writer()), (Memory::SIZE, server.pid())] {
        let dump = |hook| dump(site, criu, pid, 1, hook);
        let [none, bare, fsnap] = in_turns(
            MANY_ROUNDS,
            [
                &mut || dump(None),
                &mut || {
                    let time = dump(Some("raw-hook"))?;
                    keep_raw(site)?;
                    Ok(time)
                },
                &mut || dump(Some(OURS)),
            ],
        )?;
        let [least, share] = [bare, fsnap].map(|time| 100.0 * (1.0 - times(none, time)));
        let goal = if pid == server.pid() { goal(share, 15.0, "%") } else { String::new() };
        row(&[what.into(), ms(none), ms(bare), ms(fsnap), format!("{least:.0} %"), format!("{share:.0} %"), goal]);
    }
    Ok(())
}

/// The frozen time of one dump of the process.
fn dump(site: &Site, criu: &Path, pid: u32, mebibytes: usize, hook: Option<&str>) -> Result<Duration, Failure> {
    site.dirty(mebibytes)?;
    let images = site.path("dump");
    if images.exists() {
        fs::remove_dir_all(&images)?;
    }
    fs::create_dir(&images)?;
    let mut command = Command::new(criu);
    command.args(["dump", "-R", "-t", &pid.to_string(), "-D"]).arg(&images);
    if let Some(hook) = hook {
        command.arg("--action-script").arg(site.path(hook));
    }
    run(command.env("FSNAP_STATE", site.path("state")).stdout(Stdio::null()).stderr(Stdio::null()))?;
    frozen_time(&images)
}

/// Field 2 (`frozen_time`, microseconds) of the message in CRIU's `stats-dump` ([protocol buffers' wire format]).
///
/// [protocol buffers' wire format]: https://protobuf.dev/programming-guides/encoding/
pub fn frozen_time(images: &Path) -> Result<Duration, Failure> {
    // Two magic numbers, the length, and then the outer message, whose field 1 is the inner one.
    let bytes = fs::read(images.join("stats-dump"))?;
    let mut rest = bytes.get(12..).ok_or("stats-dump is too short")?;
    let outer = field(&mut rest, 1)?;
    let mut inner = rest.get(..usize::try_from(outer)?).ok_or("stats-dump is cut off")?;
    Ok(Duration::from_micros(field(&mut inner, 2)?))
}

/// Reads fields up to the one with that number, and returns its value or its length.
fn field(bytes: &mut &[u8], wanted: u64) -> Result<u64, Failure> {
    loop {
        let key = varint(bytes)?;
        let value = varint(bytes)?;
        if key >> 3 == wanted {
            return Ok(value);
        }
        if key & 7 == 2 {
            *bytes = bytes.get(usize::try_from(value)?..).ok_or("stats-dump is cut off")?;
        }
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Failure> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().ok_or("stats-dump is cut off")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err("stats-dump is damaged".into())
}

/// `fsnap branch`, against the bare ioctl that makes a writable snapshot.
pub fn branch(site: &Site) -> Result<(), Failure> {
    run(site.fsnap().args(["checkpoint", "--tag", "bench"]).stdout(Stdio::null()))?;
    let mut number = 0;
    let [bare, branch] = in_turns(
        MANY_ROUNDS,
        [&mut || bare_snapshot(site), &mut || {
            number += 1;
            rustix::fs::syncfs(File::open(site.volume())?)?;
            time(|| run(site.fsnap().args(["branch", "bench", &format!("b{number}")]).stdout(Stdio::null())))
        }],
    )?;
    head("fsnap branch, the whole command", &["", "bare ioctl", "fsnap branch", "more", "goal"]);
    let more = branch.saturating_sub(bare);
    row(&["btrfs".into(), ms(bare), ms(branch), ms(more), goal(more.as_secs_f64() * 1e3, 5.0, "ms")]);
    Ok(())
}
