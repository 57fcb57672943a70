//! NILFS2 volumes as users see them: branches that are overlays, and past states that no engine asked for.
//!
//! Where the kernel has no NILFS2, every case is reported as ignored, with the reason.

#[path = "support/kernel.rs"]
mod kernel;
#[cfg(feature = "fuse")]
#[path = "support/unlinked.rs"]
mod unlinked;
#[path = "support/waiting.rs"]
mod waiting;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use kernel::{Case, Done, detach, ensure, failure, is, loop_device, output, unmount_below};
use libtest_mimic::Failed;
use rustix::mount::{MountFlags, UnmountFlags};

/// A NILFS2 on a loop device, and an fsnap with a state of its own.
struct Site {
    dir: PathBuf,
    device: String,
    volume: PathBuf,
}

impl Site {
    fn new() -> Result<Self, Failed> {
        let dir = tempfile::tempdir()?.keep();
        let volume = dir.join("db");
        fs::create_dir(&volume)?;
        let site = Self { device: loop_device(&dir.join("image"), 256 << 20)?, volume, dir };
        output(Command::new("mkfs.nilfs2").args(["-q", "-B", "256"]).arg(&site.device))?;
        // Nothing but what a case writes makes a state.
        rustix::mount::mount(&site.device, &site.volume, "nilfs2", MountFlags::NOATIME, None)?;
        Ok(site)
    }

    /// A site whose volume is registered, with one file in it.
    fn with_volume() -> Result<Self, Failed> {
        let site = Self::new()?;
        fs::write(site.volume.join("file"), "first")?;
        let said = site.fsnap(&["init", &site.volume.to_string_lossy()])?;
        ensure(said.contains("volume db at") && said.contains("nilfs2 snapshots"), &said)?;
        Ok(site)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        kernel::fsnap(&self.dir, arguments)
    }

    fn fsnap(&self, arguments: &[&str]) -> Result<String, Failed> {
        output(&mut self.command(arguments))
    }

    fn fails(&self, arguments: &[&str]) -> Result<String, Failed> {
        failure(&mut self.command(arguments))
    }

    fn branches(&self) -> PathBuf {
        self.dir.join("state/branches")
    }

    fn snapshots(&self) -> Result<usize, Failed> {
        Ok(output(Command::new("lscp").arg("-s").arg(&self.device))?.lines().skip(1).count())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        unmount_below(&self.dir);
        detach(&self.device);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn init_says_the_limits() -> Done {
    let site = Site::new()?;
    let Output { status, stderr, .. } = site.command(&["init", &site.volume.to_string_lossy()]).output()?;
    let said = String::from_utf8_lossy(&stderr);
    ensure(status.success(), &said)?;
    ensure(said.contains("no extended attributes") && said.contains("no ACLs") && said.contains("overlay"), &said)
}

/// A branch is written independently, is captured itself, and branched again.
fn a_branch_is_a_volume() -> Done {
    let site = Site::with_volume()?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    fs::write(site.volume.join("file"), "second")?;
    let files = PathBuf::from(site.fsnap(&["branch", "one", "try"])?.trim());
    is(&files.join("file"), "first")?;
    fs::write(files.join("file"), "on the branch")?;
    fs::create_dir(files.join("dir"))?;
    is(&site.volume.join("file"), "second")?;

    site.fsnap(&["checkpoint", "--branch", "try", "--tag", "two"])?;
    fs::write(files.join("file"), "later")?;
    let again = PathBuf::from(site.fsnap(&["branch", "two", "again"])?.trim());
    is(&again.join("file"), "on the branch")?;
    let other = PathBuf::from(site.fsnap(&["branch", "one", "other"])?.trim());
    is(&other.join("file"), "first")?;
    is(&files.join("file"), "later")?;
    let diff = site.fsnap(&["diff", "one"])?;
    ensure(diff.contains("M  db/file") || diff.contains("M db/file"), &diff)
}

fn a_removed_branch_leaves_nothing() -> Done {
    let site = Site::with_volume()?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    let files = PathBuf::from(site.fsnap(&["branch", "one", "try"])?.trim());
    fs::write(files.join("new"), "x")?;
    let open = File::open(files.join("new"))?;
    let refused = site.fails(&["rm", "one"])?;
    ensure(refused.contains("try"), &refused)?;
    drop(open);
    site.fsnap(&["rm", "--branch", "try"])?;
    ensure(!site.branches().join("try").exists(), "the overlay's directory is still there")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure(!mounts.contains("overlay fsnap"), &mounts)?;
    ensure(site.snapshots()? == 1, "the snapshot is gone")?;
    site.fsnap(&["rm", "one"])?;
    ensure(site.snapshots()? == 0, "the snapshot is still there")
}

/// After a start of the machine nothing is mounted; what was written is there.
fn a_branch_survives_a_restart() -> Done {
    let site = Site::with_volume()?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    let files = PathBuf::from(site.fsnap(&["branch", "one", "try"])?.trim());
    fs::write(files.join("file"), "on the branch")?;
    fs::rename(files.join(".nilfs"), files.join("renamed"))?;
    rustix::mount::unmount(&files, UnmountFlags::empty())?;
    ensure(!files.join("file").exists(), "it is still mounted")?;
    site.fsnap(&["branches"])?;
    is(&files.join("file"), "on the branch")?;
    ensure(files.join("renamed").exists() && !files.join(".nilfs").exists(), "a rename was forgotten")?;
    site.fsnap(&["checkpoint", "--branch", "try"]).map(drop)
}

/// The second of two commands that find a branch unmounted waits for the first, and does not mount over what that has mounted.
fn two_commands_mount_a_branch_once() -> Done {
    let site = Site::with_volume()?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    let files = PathBuf::from(site.fsnap(&["branch", "one", "try"])?.trim());
    rustix::mount::unmount(&files, UnmountFlags::empty())?;
    // This is the first, and takes its time.
    let lock = File::create(site.dir.join("state/mounts.lock"))?;
    lock.lock()?;
    let mut second = site.command(&["branches"]).stdout(Stdio::null()).spawn()?;
    let waits = format!(" {} ", second.id());
    waiting::wait_until("the wait of the second command, or its end", || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        locks.lines().any(|line| line.contains("-> FLOCK") && line.contains(&waits))
            || second.try_wait().unwrap().is_some()
    });
    rustix::mount::mount("fsnap", &files, "tmpfs", MountFlags::empty(), None)?;
    fs::write(files.join("in use"), "by somebody")?;
    drop(lock);
    ensure(second.wait()?.success(), "the second command has failed")?;
    is(&files.join("in use"), "by somebody")?;
    rustix::mount::unmount(&files, UnmountFlags::empty())?;
    ensure(!files.join("file").exists(), "something was mounted below it")
}

/// Killed at every step, the making and the removal of a branch leave nothing.
fn kills_leave_nothing() -> Done {
    let site = Site::with_volume()?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    for point in ["branch:recorded", "branch:cloned", "branch:mounted", "branch:grown"] {
        let status =
            site.command(&["branch", "one", "try"]).env("FSNAP_FAILPOINT", format!("{point}=kill")).status()?;
        ensure(!status.success(), &format!("it was not killed at {point}"))?;
        site.fsnap(&["recover"])?;
        ensure(!site.branches().join("try").exists(), &format!("{point}: the overlay's directory is still there"))?;
        ensure(!fs::read_to_string("/proc/self/mountinfo")?.contains("overlay fsnap"), "it is still mounted")?;
        ensure(site.snapshots()? == 1, &format!("{point}: the snapshot is gone"))?;
    }
    for point in ["remove:recorded", "remove:deleted"] {
        site.fsnap(&["branch", "one", "try"])?;
        let status =
            site.command(&["rm", "--branch", "try"]).env("FSNAP_FAILPOINT", format!("{point}=kill")).status()?;
        ensure(!status.success(), &format!("it was not killed at {point}"))?;
        site.fsnap(&["recover"])?;
        ensure(!site.branches().join("try").exists(), &format!("{point}: the overlay's directory is still there"))?;
    }
    Ok(())
}

/// Every state that the file system keeps by itself is listed, and a branch grows from any of them.
fn the_history_is_listed_and_branched() -> Done {
    let site = Site::with_volume()?;
    let history = || -> Result<Vec<serde_json::Value>, Failed> {
        Ok(serde_json::from_str(&site.fsnap(&["log", "--all", "db", "--json"])?)?)
    };
    let write = |content: &str| -> Result<u64, Failed> {
        fs::write(site.volume.join("file"), content)?;
        rustix::fs::syncfs(File::open(&site.volume)?)?;
        history()?[0]["number"].as_u64().ok_or_else(|| "the newest state has no number".into())
    };
    let first = write("first")?;
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let between = jiff::Timestamp::now();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    write("second")?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    let others = write("of others")?;
    output(Command::new("chcp").arg("ss").arg(&site.device).arg(others.to_string()))?;
    write("last")?;

    let shown = site.fsnap(&["log", "--all", "db"])?;
    let line = |number: u64| shown.lines().find(|line| line.starts_with(&format!("cp:{number} "))).unwrap_or_default();
    ensure(line(others).contains("others") && !line(first).contains("fsnap"), &shown)?;
    ensure(shown.lines().any(|line| line.contains(" fsnap ")), &shown)?;
    ensure(site.fsnap(&["log", "--all", "db", "-n", "2"])?.lines().count() == 3, "the limit does not hold")?;

    // By its number, by a time in UTC, and by a time of this place.
    let by_number = format!("db@cp:{first}");
    let zoned = between.to_zoned_datetime(jiff::tz::TimeZone::system());
    let local = format!("db@{}", zoned.datetime().strftime("%Y-%m-%d %H:%M:%S"));
    for (name, state) in [("a", by_number.clone()), ("b", format!("db@{between}")), ("c", local)] {
        let files = PathBuf::from(site.fsnap(&["branch", &state, name])?.trim());
        is(&files.join("file"), "first")?;
        fs::write(files.join("file"), name)?;
    }
    // What others keep as well is not taken for fsnap's alone, when a branch has grown from it.
    site.fsnap(&["branch", &format!("db@cp:{others}"), "d"])?;
    let shown = site.fsnap(&["log", "--all", "db"])?;
    let marked = shown.lines().find(|line| line.starts_with(&format!("cp:{others} "))).unwrap_or_default();
    ensure(marked.contains(" fsnap and others "), &shown)?;
    let both = history()?.into_iter().find(|one| one["number"] == others).unwrap_or_default();
    ensure(both["kept_by"] == "fsnap and others" && both["checkpoints"][0].is_string(), &both.to_string())?;
    site.fsnap(&["rm", "--branch", "d"])?;
    let pinned = both["checkpoints"][0].as_str().unwrap_or_default().to_owned();
    site.fsnap(&["rm", &pinned])?;
    let log = site.fsnap(&["log"])?;
    ensure(log.matches("db@cp:").count() == 1, &format!("one state has several checkpoints: {log}"))?;
    ensure(site.snapshots()? == 3, "it is not pinned once")?;
    let latest = site.fsnap(&["show", "@latest"])?;
    ensure(!latest.contains("db@cp:"), &latest)?;

    let gone = site.fails(&["branch", "db@cp:1000000", "x"])?;
    ensure(gone.contains("db has no state cp:1000000") && gone.contains("fsnap log --all db"), &gone)?;
    let gone = site.fails(&["branch", "db@1990-01-01 00:00", "x"])?;
    ensure(gone.contains("the states that are left are cp:"), &gone)?;
    // What was pinned for a branch that cannot be made goes again.
    let taken = site.fails(&["branch", &format!("db@cp:{}", first - 1), "a"])?;
    ensure(taken.contains("exists already") && site.snapshots()? == 3, &taken)?;

    for name in ["a", "b", "c"] {
        site.fsnap(&["rm", "--branch", name])?;
    }
    for line in log.lines().skip(1) {
        site.fsnap(&["rm", line.split(' ').next().unwrap_or_default()])?;
    }
    ensure(site.snapshots()? == 1, "what others keep is gone, or what fsnap kept is left")?;
    for point in ["pin:recorded", "pin:pinned"] {
        let mut command = site.command(&["branch", &by_number, "killed"]);
        let status = command.env("FSNAP_FAILPOINT", format!("{point}=kill")).status()?;
        ensure(!status.success(), &format!("it was not killed at {point}"))?;
        site.fsnap(&["recover"])?;
        ensure(site.snapshots()? == 1, &format!("{point}: a snapshot is left"))?;
    }
    Ok(())
}

/// Snapshots that the kernel has to mount are read all the same, and are mounted nowhere that others could see.
#[cfg(feature = "fuse")]
fn checkpoints_are_browsed() -> Done {
    let site = Site::with_volume()?;
    let first = site.fsnap(&["checkpoint", "--tag", "one"])?.trim().to_owned();
    fs::write(site.volume.join("file"), "second")?;
    site.fsnap(&["checkpoint"])?;
    let shown = site.dir.join("past");
    fs::create_dir(&shown)?;
    site.fsnap(&["mount", &shown.to_string_lossy()])?;
    is(&shown.join("tags/one/db/file"), "first")?;
    is(&shown.join("latest/db/file"), "second")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let there = mounts.lines().filter(|line| line.contains(" - nilfs2 ")).count();
    ensure(there == 1, &format!("more than the volume is mounted: {mounts}"))?;
    // What somebody reads cannot be deleted, and it stays readable.
    let mut open = File::open(shown.join("tags/one/db/file"))?;
    let said = site.fails(&["rm", "one"])?;
    ensure(said.contains("in use"), &said)?;
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    ensure(text == "first", &text)?;
    drop(open);
    let gone = fs::symlink_metadata(shown.join("tags/one"));
    ensure(gone.is_err_and(|error| error.kind() == io::ErrorKind::NotFound), "the tag is still there")?;
    site.fsnap(&["umount", &shown.to_string_lossy()])?;
    // With the server, its mounts have gone.
    let until = Instant::now() + Duration::from_secs(20);
    while site.snapshots()? != 1 {
        ensure(Instant::now() < until, &format!("the snapshot of {first} is never deleted"))?;
        site.fsnap(&["recover"])?;
    }
    Ok(())
}

fn an_unfit_place_is_refused() -> Done {
    let site = Site::with_volume()?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    let config = site.dir.join("config.toml");
    // NILFS2 itself takes no attributes, in which overlayfs keeps its notes.
    fs::write(&config, format!("branches = {:?}\n", site.volume.join("below")))?;
    let Output { status, stderr, .. } =
        site.command(&["branch", "one", "try"]).env("FSNAP_CONFIG", &config).output()?;
    let said = String::from_utf8_lossy(&stderr);
    ensure(status.code() == Some(1) && said.contains("an overlay cannot be kept"), &said)?;
    ensure(said.contains("`branches` in the settings"), &said)
}

#[cfg(feature = "fuse")]
fn an_unlinked_file_comes_back() -> Done {
    unlinked::it_comes_back(&Site::with_volume()?.dir)
}

/// Why nothing of this can run here, if so.
fn lacks() -> Option<&'static str> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |name: &str| known.lines().any(|line| line.ends_with(name));
    let reason = "this kernel has no NILFS2; `cargo run -p vm-tests` runs this in a machine that has";
    (!has("\tnilfs2") || !has("\toverlay")).then_some(reason)
}

fn main() -> ExitCode {
    const CASES: &[Case] = &[
        ("init_says_the_limits", init_says_the_limits),
        ("a_branch_is_a_volume", a_branch_is_a_volume),
        ("a_removed_branch_leaves_nothing", a_removed_branch_leaves_nothing),
        ("a_branch_survives_a_restart", a_branch_survives_a_restart),
        ("two_commands_mount_a_branch_once", two_commands_mount_a_branch_once),
        ("kills_leave_nothing", kills_leave_nothing),
        ("the_history_is_listed_and_branched", the_history_is_listed_and_branched),
        #[cfg(feature = "fuse")]
        ("checkpoints_are_browsed", checkpoints_are_browsed),
        ("an_unfit_place_is_refused", an_unfit_place_is_refused),
        #[cfg(feature = "fuse")]
        ("an_unlinked_file_comes_back", an_unlinked_file_comes_back),
    ];
    kernel::run(CASES.iter(), lacks())
}
