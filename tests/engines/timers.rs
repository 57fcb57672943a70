//! Periodic timers that had expired when the processes were saved go on.

use std::fs;
use std::process::{Command, Stdio};

use crate::Case;
use crate::runs::{Running, branch_path};
use crate::site::{Site, Volume, wait_until};

pub(crate) const CASES: &[Case] = &[("a_copy_of_a_run", a_copy_of_a_run), ("a_restore_by_others", a_restore_by_others)];

/// Periodic timers, none of which it reads before the file in its directory is gone: two that have expired by then, one that has not, and one that is off.
const TIMERS: &str = r#"
import ctypes, os, select, time
libc = ctypes.CDLL(None)
TICK = 20_000_000
def timer(first, flags, interval=TICK):
    fd = libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
    when = (ctypes.c_long * 4)(interval // 10**9, interval % 10**9, first // 10**9, first % 10**9)
    assert libc.timerfd_settime(fd, flags, when, None) == 0
    return fd
def read(fd):
    if not select.select([fd], [], [], 2)[0]:
        return "still"
    ticks = int.from_bytes(os.read(fd, 8), "little")
    return "goes" if 0 < ticks < 10_000 else ticks
now = time.monotonic_ns()
timers = [timer(TICK, 0), timer(now + TICK, 1), timer(now + 10**12, 1, 10**12), timer(0, 0)]
time.sleep(0.1)
print("ready", flush=True)
while os.path.exists("hold"):
    time.sleep(0.01)
print(*[read(fd) for fd in timers[:2] for time in range(3)], read(timers[2]), read(timers[3]), flush=True)
time.sleep(1000)
"#;

/// CRIU takes one that has expired for one that is off.
fn a_copy_of_a_run() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    let volume = &site.volumes[0];
    fs::write(volume.join("hold"), "").unwrap();
    let script = format!("cd {} && exec /usr/bin/python3 -c \"$0\"", volume.display());
    site.ok(["run", "--name", "one", "--volume", "v0", "--", "sh", "-c", &script, TIMERS]);
    running.says("one", "ready");
    site.ok(["checkpoint", "one"]);
    site.ok(["branch", "@latest", "copy", "--run"]);
    fs::remove_file(branch_path(&site, "copy", 0).join("hold")).unwrap();
    running.says("copy", "goes goes goes goes goes goes still still");
}

/// CRIU takes a periodic timer that has expired for one that is off.
fn a_restore_by_others() {
    let site = Site::new(&[Volume::Rsync]);
    let volume = &site.volumes[0];
    let (hold, said) = (volume.join("hold"), volume.join("said"));
    fs::write(&hold, "").unwrap();
    let mut command = Command::new("setsid");
    // What this program was started with lies on mounts that CRIU does not see.
    let program = format!("import os; os.closerange(3, 100)\n{TIMERS}");
    command.args(["/usr/bin/python3", "-c", &program]).current_dir(volume).stdin(Stdio::null()).stderr(Stdio::null());
    let mut process =
        command.stdout(fs::File::options().append(true).create(true).open(&said).unwrap()).spawn().unwrap();
    let has_said = |line: &str| fs::read_to_string(&said).unwrap().lines().any(|said| said == line);
    wait_until("the timers", || has_said("ready"));
    let pid = process.id().cast_signed();
    let (_, images) = site.checkpoint(pid);
    process.kill().unwrap();
    process.wait().unwrap();
    fs::remove_file(hold).unwrap();
    let hook = ["--action-script".into(), site.hook().into_os_string()];
    let _restored = site.criu().restore(pid, &images, &[], hook).unwrap();
    wait_until("what it reads", || has_said("goes goes goes goes goes goes still still"));
}
