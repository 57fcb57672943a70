//! A volume never stands for longer than the fsnap that stopped it.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

use crate::kernel::{Case, Done, detach, ensure, is, loop_device, output};
use crate::site::Site;

pub(crate) const CASES: &[Case] = &[
    ("killed_while_it_stands", killed_while_it_stands),
    ("killed_with_its_guard", killed_with_its_guard),
    ("a_hook_killed_while_it_stands", a_hook_killed_while_it_stands),
    ("the_deadline_ends_the_standing", the_deadline_ends_the_standing),
    ("a_failing_pool_ends_the_standing", a_failing_pool_ends_the_standing),
];

/// A device for a pool, or for a file system, that can be made slow, or fail; detached when dropped.
pub(crate) struct Base {
    name: String,
    lower: String,
}

/// The sectors of the metadata, which come first.
const METADATA: u64 = (32 << 20) / 512;
const ALL: u64 = (1 << 30) / 512;

impl Base {
    fn new(dir: &Path, name: &str) -> Result<Self, Failed> {
        let lower = loop_device(&dir.join(name), ALL * 512)?;
        let base = Self { name: name.to_owned(), lower };
        output(Command::new("dmsetup").args(["create", name, "--table", &base.plain()]))?;
        Ok(base)
    }

    /// One of that name for a site, and its node.
    pub(crate) fn of(site: &Site, name: &str) -> Result<(Self, PathBuf), Failed> {
        let base = Self::new(&site.dir, &format!("{}-{name}", site.pool))?;
        let node = site.node(&base.name)?;
        Ok((base, node))
    }

    /// The name that the device has after a restart as well.
    fn named(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    pub(crate) fn plain(&self) -> String {
        format!("0 {ALL} linear {} 0", self.lower)
    }

    /// A table of which the metadata, or the data, have another target.
    pub(crate) fn with(&self, metadata: Option<&str>, data: Option<&str>) -> String {
        let rest = ALL - METADATA;
        let linear = |from: u64| format!("linear {} {from}", self.lower);
        format!(
            "0 {METADATA} {}\n{METADATA} {rest} {}",
            metadata.map_or_else(|| linear(0), str::to_owned),
            data.map_or_else(|| linear(METADATA), str::to_owned)
        )
    }

    /// A table by which all can be read, and nothing written.
    pub(crate) fn unwritable(&self) -> String {
        format!("0 {ALL} {}", self.flaky())
    }

    fn flaky(&self) -> String {
        format!("flakey {} 0 0 1000 1 error_writes", self.lower)
    }

    /// Metadata of which each write takes so many milliseconds.
    fn slow(&self, each: u32) -> String {
        self.with(Some(&format!("delay {0} 0 0 {0} 0 {each}", self.lower)), None)
    }

    pub(crate) fn switch(&self, table: &str) -> Done {
        for arguments in [
            &["suspend", "--noflush", "--nolockfs", &self.name][..],
            &["load", &self.name, "--table", table],
            &["resume", &self.name],
        ] {
            output(Command::new("dmsetup").args(arguments))?;
        }
        Ok(())
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        let _ = Command::new("dmsetup").args(["remove", "--force", "--retry", &self.name]).output();
        // dmsetup or udev may have done so.
        let _ = fs::remove_file(self.named());
        detach(&self.lower);
    }
}

/// Long enough to be seen: a snapshot waits for several such writes.
const SLOW: u32 = 300;

/// A registered volume in a pool on such a device.
pub(crate) fn on_base() -> Result<(Base, Site), Failed> {
    let site = Site::without_pool()?;
    let (base, device) = Base::of(&site, "base")?;
    // As udev has it, where there is one; a pool is to be found again by this name.
    if !base.named().exists() {
        std::os::unix::fs::symlink(&device, base.named())?;
    }
    site.fsnap(&["pool", "create", &device.to_string_lossy(), "--name", &site.pool])?;
    let settings = fs::read_to_string(Path::new("/var/lib/fsnap/dm-thin").join(&site.pool).join("fsnap-store"))?;
    ensure(settings.contains(&*base.named().to_string_lossy()), &settings)?;
    site.add_volume("db", "ext4")?;
    fs::write(site.db().join("file"), "first")?;
    site.fsnap(&["init", &site.path("db")])?;
    Ok((base, site))
}

/// Waits until the volume stands.
fn until_it_stands(site: &Site, by: &mut Child) -> Done {
    let node = site.node(&format!("{}-volume-db", site.pool))?;
    let suspended = Path::new("/sys/block").join(node.strip_prefix("/dev")?).join("dm/suspended");
    for _ in 0..20_000 {
        if fs::read_to_string(&suspended)?.trim() == "1" {
            return Ok(());
        }
        if let Some(status) = by.try_wait()? {
            let mut said = String::new();
            if let Some(mut from) = by.stderr.take() {
                from.read_to_string(&mut said)?;
            }
            return Err(format!("it ended before the volume stood: {status}: {said}").into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Err("the volume never stood".into())
}

/// The volume takes writes, and nothing of a checkpoint is left.
fn goes_on(site: &Site) -> Done {
    goes_on_after(site, &[])
}

/// The volume takes writes, and of checkpoints there are no more than those with the given tags.
fn goes_on_after(site: &Site, checkpoints: &[&str]) -> Done {
    ensure(!site.devices()?.1, "the volume stands")?;
    fs::write(site.db().join("file"), "later")?;
    File::open(site.db().join("file"))?.sync_all()?;
    is(&site.db().join("file"), "later")?;
    let log = site.fsnap(&["log"])?;
    ensure(log.lines().skip(1).count() == checkpoints.len(), &log)?;
    ensure(checkpoints.iter().all(|tag| log.contains(tag)), &log)?;
    let said = site.fsnap(&["recover"])?;
    ensure(said.trim() == "nothing is half done", &said)?;
    site.fsnap(&["checkpoint"]).map(drop)
}

/// Waits until the volume runs.
fn until_it_runs(site: &Site) -> Done {
    for _ in 0..2000 {
        if !site.devices()?.1 {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err("nobody but the next command resumes the volume".into())
}

/// Nobody needs to call fsnap again: a process that stands by sees to it.
fn killed_while_it_stands() -> Done {
    let (base, site) = on_base()?;
    base.switch(&base.slow(SLOW))?;
    let mut taking = site.command(&["checkpoint"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    until_it_stands(&site, &mut taking)?;
    // It dies when the kernel has done what it was asked for, and never comes to the resumption.
    taking.kill()?;
    taking.wait()?;
    until_it_runs(&site)?;
    fs::write(site.db().join("file"), "before the next command")?;
    base.switch(&base.plain())?;
    site.fsnap(&["recover"])?;
    goes_on(&site)
}

/// The children of a process that are guards: they have no file open but two, the lowest of which is no standard input.
fn guards_of(parent: u32) -> Result<Vec<i32>, Failed> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let dir = entry?.path();
        // Any may end meanwhile.
        let Ok(stat) = fs::read_to_string(dir.join("stat")) else { continue };
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let is_child = after_name.split(' ').nth(1) == Some(&parent.to_string());
        if is_child && fs::read_dir(dir.join("fd")).is_ok_and(|files| files.count() == 2) {
            found.extend(dir.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok()));
        }
    }
    Ok(found)
}

/// Even if whoever stands by is killed before, the next command resumes the volume.
fn killed_with_its_guard() -> Done {
    let (base, site) = on_base()?;
    base.switch(&base.slow(SLOW))?;
    let mut taking = site.command(&["checkpoint"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    until_it_stands(&site, &mut taking)?;
    let guards = guards_of(taking.id())?;
    ensure(guards.len() == 1, &format!("there is not one guard: {guards:?}"))?;
    for guard in guards {
        let pid = Pid::from_raw(guard).ok_or("a guard without a pid")?;
        rustix::process::kill_process(pid, Signal::KILL)?;
    }
    taking.kill()?;
    taking.wait()?;
    ensure(site.devices()?.1, "something else than the next command has resumed it")?;
    base.switch(&base.plain())?;
    site.fsnap(&["recover"])?;
    goes_on(&site)
}

/// So it is with a hook, for which the engine's processes wait.
fn a_hook_killed_while_it_stands() -> Done {
    let (base, site) = on_base()?;
    let images = images(&site)?;
    let mut tree = Command::new("sleep").arg("1000").spawn()?;
    let tried = || -> Done {
        output(&mut hook(&site, &images, "pre-dump", tree.id())?)?;
        base.switch(&base.slow(SLOW))?;
        let mut taking = hook(&site, &images, "post-dump", tree.id())?;
        let mut taking = taking.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        until_it_stands(&site, &mut taking)?;
        taking.kill()?;
        taking.wait()?;
        until_it_runs(&site)?;
        base.switch(&base.plain())
    };
    let done = tried();
    tree.kill()?;
    tree.wait()?;
    done?;
    site.fsnap(&["recover"])?;
    goes_on(&site)
}

/// Has a hook called as CRIU calls it.
fn hook(site: &Site, images: &Path, action: &str, tree: u32) -> Result<Command, Failed> {
    let link = site.dir.join("fsnap-criu-hook");
    if !link.exists() {
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fsnap"), &link)?;
    }
    let mut command = Command::new(link);
    command.env("FSNAP_STATE", site.dir.join("state")).env("FSNAP_CONFIG", site.dir.join("config.toml"));
    command.env("FSNAP_VOLUMES", "db").env_remove("FSNAP_FAILPOINT");
    command.env("CRTOOLS_SCRIPT_ACTION", action).env("CRTOOLS_IMAGE_DIR", images);
    command.env("CRTOOLS_INIT_PID", tree.to_string()).stdin(Stdio::null());
    Ok(command)
}

/// An image directory that looks complete.
fn images(site: &Site) -> Result<PathBuf, Failed> {
    let images = site.dir.join("images");
    fs::create_dir(&images)?;
    crate::images::pretend(&images)?;
    Ok(images)
}

/// A hook that is late ends without leaving the volume as it is.
fn the_deadline_ends_the_standing() -> Done {
    let (base, site) = on_base()?;
    fs::write(site.dir.join("config.toml"), "[hook]\ndeadline_seconds = 2\n")?;
    let images = images(&site)?;
    let mut tree = Command::new("sleep").arg("1000").spawn()?;
    let tried = || -> Done {
        output(&mut hook(&site, &images, "pre-dump", tree.id())?)?;
        base.switch(&base.slow(1000))?;
        // The time is over while the kernel suspends it, or makes the snapshot: both take longer than the deadline, and none
        // of them can be cut short. Whoever just ends then leaves it suspended.
        let ended = hook(&site, &images, "post-dump", tree.id())?.output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure(ended.status.code() == Some(1) && said.contains("took longer than 2 s"), &said)?;
        // Nobody has called fsnap since.
        ensure(!site.devices()?.1, "the volume still stands")?;
        fs::write(site.db().join("file"), "while it is slow")?;
        base.switch(&base.plain())
    };
    let done = tried();
    tree.kill()?;
    tree.wait()?;
    done?;
    site.fsnap(&["recover"])?;
    goes_on(&site)
}

/// Metadata, or data, that cannot be written any more, in the middle of a checkpoint.
fn a_failing_pool_ends_the_standing() -> Done {
    for (metadata, reads) in [(true, false), (true, true), (false, false)] {
        let (base, site) = on_base()?;
        site.fsnap(&["checkpoint", "--tag", "before"])?;
        let error = match (metadata, reads) {
            (true, false) => base.with(Some("error"), None),
            (true, true) => base.with(Some(&base.flaky()), None),
            (false, _) => base.with(None, Some("error")),
        };
        let said = fails_in_the_window(&site, || {
            fs::write(site.db().join("dirty"), vec![7; 1 << 20])?;
            base.switch(&error)
        })?;
        ensure(!site.devices()?.1, &format!("metadata {metadata}: the volume stands: {said}"))?;
        base.switch(&base.plain())?;
        let log = site.fsnap(&["log"])?;
        ensure(log.contains("before") && !log.contains("meanwhile"), &log)?;
        site.unmount("db")?;
        if metadata {
            let said = site.fails(&["pool", "add-volume", &site.pool, "other", "--size", "16M"])?;
            ensure(said.contains("unmount what lies in it") && said.contains("`fsnap pool stop`"), &said)?;
            ensure(said.contains("run `thin_check --clear-needs-check-flag` on what its metadata lie on"), &said)?;
            site.fsnap(&["pool", "stop", &site.pool])?;
            output(Command::new("thin_check").arg("--clear-needs-check-flag").arg(base.named()))?;
            site.fsnap(&["pool", "start", &site.pool])?;
        }
        site.mount("db", "ext4")?;
        goes_on_after(&site, &["before"])?;
    }
    Ok(())
}

/// What a checkpoint with the tag `meanwhile` says that fails by what happens in the frozen window.
///
/// That is after all that is done ahead, so that what is dirty has to be written then.
pub(crate) fn fails_in_the_window(site: &Site, happens: impl FnOnce() -> Done) -> Result<String, Failed> {
    let mut taking = site
        .command(&["checkpoint", "--tag", "meanwhile"])
        .env("FSNAP_FAILPOINT", "take:opened=stop")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = Pid::from_child(&taking);
    let (stopped, stay) = (WaitIdOptions::STOPPED | WaitIdOptions::EXITED, WaitIdOptions::NOWAIT);
    rustix::process::waitid(WaitId::Pid(pid), stopped | stay)?;
    let happened = happens();
    rustix::process::kill_process(pid, Signal::CONT)?;
    let ended = taking.wait_with_output_within(Duration::from_secs(120))?;
    happened?;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    ensure(ended.status.code() == Some(1), &format!("{}: {said}", ended.status))?;
    Ok(said)
}

/// Waiting that ends.
trait Patient {
    fn wait_with_output_within(&mut self, time: Duration) -> Result<std::process::Output, Failed>;
}

impl Patient for Child {
    fn wait_with_output_within(&mut self, time: Duration) -> Result<std::process::Output, Failed> {
        let begun = std::time::Instant::now();
        while self.try_wait()?.is_none() {
            if begun.elapsed() > time {
                self.kill()?;
                return Err("it hangs".into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        let mut stderr = Vec::new();
        if let Some(mut from) = self.stderr.take() {
            from.read_to_end(&mut stderr)?;
        }
        Ok(std::process::Output { status: self.wait()?, stdout: Vec::new(), stderr })
    }
}
