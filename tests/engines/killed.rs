//! fsnap is killed wherever it can be, and nothing is left of it.
//!
//! For N = 1, 2, … it dies at the N-th of the places that `fsnap::failpoint` marks, until it comes through.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use fsnap::processes::ProcessId;
use fsnap_oracle::Kind;
use rustix::process::{Pid, Signal, kill_process};

use crate::Case;
use crate::consistency::CaseOn;
use crate::oracle::Oracle;
use crate::site::{Site, Volume, id_in, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("the_hook_before_the_freeze", || the_hook("pre-dump", 4)),
    ("the_hook_in_the_frozen_window", || the_hook("post-dump", 6)),
    ("the_hook_by_its_own_commands", the_next_command),
    ("a_checkpoint_without_an_engine", a_checkpoint_without_an_engine),
    ("a_restore", a_restore),
    ("a_restore_onto_layers", a_restore_onto_layers),
    ("a_restore_on_the_pids_of_this_machine", a_restore_on_the_pids_of_this_machine),
    ("a_restore_whose_engine_goes_on", a_restore_whose_engine_goes_on),
    ("a_restore_and_who_waits_for_it", a_restore_and_who_waits_for_it),
    ("the_engine_of_a_restore", the_engine_of_a_restore),
    ("a_restore_that_failed", a_restore_that_failed),
    ("a_restore_beside_another_branch", a_restore_beside_another_branch),
];

/// Where a branch is mounted, as an overlay or as a file system of its own.
pub(crate) const ON_OTHER_KERNELS: &[CaseOn] = &[
    ("a_restore_onto_dm_thin", &[Volume::DmThin], |volumes| a_restore_at(&Site::new(volumes), 0)),
    ("a_restore_onto_nilfs2", &[Volume::Nilfs2], |volumes| a_restore_at(&Site::new(volumes), 0)),
];

/// More places than there ever are.
const MANY: usize = 100;

/// One that has a file without a name, too.
fn oracle(site: &Site) -> Oracle {
    site.oracle(&[Kind::Append, Kind::Overwrite, Kind::Rename, Kind::Unlinked, Kind::Volumes], 1000)
}

/// The pid of one that was saved and has ended, and the checkpoint.
fn saved(site: &Site) -> (i32, String) {
    let oracle = oracle(site);
    let (id, _) = site.checkpoint(oracle.pid);
    (oracle.pid, id)
}

fn the_hook(action: &str, places: usize) {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = oracle(&site);
    for place in 1..MANY {
        let script = site.hook_after(action, &format!("export FSNAP_FAILPOINT={place}=kill"));
        let images = site.images();
        if site.dump(oracle.pid, &images, &script).is_ok() {
            assert!(place > places, "there were only {} places", place - 1);
            site.holds_nothing_but(1);
            assert_eq!(site.ids(), [id_in(&images)]);
            oracle.goes_on();
            return;
        }
        oracle.goes_on();
        site.holds_nothing_but(0);
    }
    panic!("it never came through");
}

/// The command that seals what a hook took is killed as well, and the one after that.
fn the_next_command() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = oracle(&site);
    let (id, _) = site.checkpoint(oracle.pid);
    for place in 1..MANY {
        let mut command = site.command(["log"]);
        let output = command.env("FSNAP_FAILPOINT", format!("{place}=kill")).output().unwrap();
        if output.status.success() {
            assert!(place > 3, "there were only {} places", place - 1);
            assert_eq!(site.ids(), [id]);
            site.holds_nothing_but(1);
            return;
        }
        assert_eq!(output.status.signal(), Some(9), "{output:?}");
    }
    panic!("it never came through");
}

fn a_checkpoint_without_an_engine() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = oracle(&site);
    // The guard has seen to it.
    let checkpoint = || site.command(["checkpoint", "--pid", &oracle.pid.to_string()]);
    killed_at_each_place(&site, 10, checkpoint, || oracle.goes_on());
}

/// Kills what takes a checkpoint at each of its places, of which there are more than `least`; returns how many checkpoints came of it.
///
/// The processes go on, before any other command, and there is a checkpoint or there is none.
pub(crate) fn killed_at_each_place(
    site: &Site,
    least: usize,
    mut checkpoint: impl FnMut() -> Command,
    goes_on: impl Fn(),
) -> usize {
    let (mut sealed, mut noted) = (0, false);
    for place in 1..MANY {
        let output = checkpoint().env("FSNAP_FAILPOINT", format!("{place}=kill")).output().unwrap();
        let done = output.status.success();
        assert!(done || output.status.signal() == Some(9), "{}", said(&output));
        goes_on();
        let found = site.ids().len() - sealed;
        // From the place on at which everything is noted, it is there, and before it is not.
        assert!(found == 1 || found == 0 && !noted && !done, "{found} after place {place}");
        noted |= found == 1;
        sealed += found;
        site.holds_nothing_but(sealed);
        if done {
            assert!(place > least && sealed > 1, "there were only {} places", place - 1);
            return sealed;
        }
    }
    panic!("it never came through");
}

fn a_restore() {
    a_restore_at(&Site::new(&[Volume::Btrfs, Volume::Rsync]), 0);
}

/// The processes work on a branch in a mount of fsnap, and so does each copy.
fn a_restore_onto_layers() {
    let mut site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    site.go_to_branch("live");
    a_restore_at(&site, 1);
}

/// Where there are so many other branches, each from a checkpoint of its own.
fn a_restore_at(site: &Site, others: usize) {
    let oracle = oracle(site);
    let (id, _) = site.checkpoint(oracle.pid);
    // The first command seals it, which has places of its own.
    assert_eq!(site.ids().len(), others + 1);
    for place in 1..MANY {
        // A mount shows for up to a second what had a name before.
        let mut command = site.command(["restore", &id, "--branch", &format!("b{place}"), "--json"]);
        let output = command.env("FSNAP_FAILPOINT", format!("{place}=kill")).output().unwrap();
        if output.status.success() {
            assert!(place > 3, "there were only {} places", place - 1);
            let restored: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            // One that was told of is nobody's to undo.
            assert_eq!(site.ok(["recover"]), "nothing is half done");
            assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), others + 1);
            assert!(is_alive(restored["pid"].as_i64().unwrap()), "{restored}");
            crate::site::end(i32::try_from(restored["init"].as_i64().unwrap()).unwrap());
            return;
        }
        assert_eq!(output.status.signal(), Some(9), "{output:?}");
        nothing_is_left_beside(site, others);
    }
    panic!("it never came through");
}

/// No namespace ends the processes of which the killed fsnap never heard, or never told: whoever restored them does.
fn a_restore_on_the_pids_of_this_machine() {
    let site = Site::new(&[Volume::Btrfs]);
    let (pid, id) = saved(&site);
    // An engine that has restored everything when its caller is killed, and ends after that.
    let (caller, restored) = (site.path("caller"), site.path("restored"));
    let script = format!(
        "caller=$(cat '{}')\n\
         kill -0 {pid} && : >'{}' && kill -9 $caller\n\
         until ! [ -e /proc/$caller ] || grep -q '^State:.Z' /proc/$caller/status; do sleep 0.01; done",
        caller.display(),
        restored.display()
    );
    let engine = site.engine("", &script);
    let mut command = site.command_of(Path::new("sh"));
    command.args(["-c", r#"echo $$ >"$0" && exec "$@""#]).arg(&caller).arg(env!("CARGO_BIN_EXE_fsnap"));
    let output = command.args(["restore", &id, "--branch", "b", "--host-pids"]).env("FSNAP_CRIU", &engine).output();
    let output = output.unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    assert!(restored.exists(), "{output:?}");
    let ended = || !Path::new(&format!("/proc/{pid}")).exists();
    wait_until("the end of what was restored", ended);
    nothing_is_left_of_it(&site);
    let mut command = site.command(["restore", &id, "--branch", "c", "--host-pids"]);
    let output = command.env("FSNAP_FAILPOINT", "restore:reported=kill").output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    wait_until("the end of what was restored", ended);
    nothing_is_left_of_it(&site);
}

fn is_alive(pid: i64) -> bool {
    ProcessId::of(pid.try_into().unwrap()).is_ok_and(ProcessId::is_alive)
}

/// The branch was, until somebody removed it.
fn nothing_is_left_of_it(site: &Site) {
    nothing_is_left_beside(site, 0);
}

/// The same, where there are so many other branches, each from a checkpoint of its own.
fn nothing_is_left_beside(site: &Site, others: usize) {
    let branches = site.json(["branches", "--json"]);
    assert_eq!(branches.as_array().unwrap().len(), others, "{branches}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let here = site.path("").display().to_string();
    let left: Vec<_> = mounts.lines().filter(|mount| mount.contains(&here) && mount.contains("/branches/b")).collect();
    assert_eq!(left, [""; 0]);
    for dir in ["state/restores", "state/log"] {
        let names = fs::read_dir(site.path(dir)).into_iter().flatten().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.collect::<Vec<_>>(), [""; 0], "{dir}");
    }
    site.holds_nothing_but(others + 1);
}

/// What the next command says of its own accord.
pub(crate) fn told_by_the_next(site: &Site) -> String {
    String::from_utf8(site.command(["log"]).output().unwrap().stderr).unwrap()
}

const UNDONE: &str = "fsnap: recovered: the restore onto branch b was not finished; it is undone\n";

/// Begins a restore onto the branch `b`, and kills it when the engine says that it is `here`; returns the pid of who waits for the processes.
fn restore_and_kill(site: &Site, id: &str, engine: &Path, here: &Path, args: &[&str]) -> i64 {
    let mut command = site.command(["restore", id, "--branch", "b"]);
    command.args(args).env("FSNAP_CRIU", engine).stdout(Stdio::null()).stderr(Stdio::null());
    let mut restoring = command.spawn().unwrap();
    wait_until("the engine", || here.exists());
    let init = fs::read(site.path("state/restores/b/init")).unwrap();
    let init: serde_json::Value = serde_json::from_slice(&init).unwrap();
    // Nobody takes it for abandoned as long as somebody works on it.
    assert_eq!(site.ok(["recover"]), "nothing is half done");
    assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 1);
    restoring.kill().unwrap();
    restoring.wait().unwrap();
    fs::remove_file(here).unwrap();
    init["id"]["pid"].as_i64().unwrap()
}

/// The engine is stuck, before it has restored anything or after that, and would never hear that its caller is gone.
fn a_restore_whose_engine_goes_on() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let (pid, id) = saved(&site);
    let pid = i64::from(pid);
    let here = site.path("here");
    let wait = format!(": >'{}'; sleep 1000", here.display());
    for (engine, has_restored) in [(site.engine(&wait, ""), false), (site.engine("", &wait), true)] {
        for args in [&[][..], &["--host-pids"]] {
            let init = restore_and_kill(&site, &id, &engine, &here, args);
            assert!(is_alive(init), "{args:?}");
            assert_eq!(is_alive(pid), has_restored && !args.is_empty(), "{args:?}");
            assert_eq!(told_by_the_next(&site), UNDONE, "{args:?}");
            assert!(!is_alive(init) && !is_alive(pid), "{args:?}");
            nothing_is_left_of_it(&site);
        }
    }
}

/// Nobody ends what was restored onto the pids of this machine: as long as it lives, its branch stays.
fn a_restore_and_who_waits_for_it() {
    let site = Site::new(&[Volume::Btrfs]);
    let (pid, id) = saved(&site);
    let here = site.path("here");
    let engine = site.engine("", &format!(": >'{}'", here.display()));
    let stuck_pid = site.path("stuck");
    let stuck = format!("echo $$ >'{}'; : >'{}'; exec sleep 1000", stuck_pid.display(), here.display());
    let stuck = site.engine("", &stuck);
    let init = restore_and_kill(&site, &id, &stuck, &here, &["--host-pids"]);
    kill_process(Pid::from_raw(init.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    wait_until("the end of who waits", || !is_alive(init));
    let told = told_by_the_next(&site);
    let half_done = "fsnap: warning: the restore onto branch b is half done and stays so: the branch b is in use";
    assert!(told.starts_with(half_done), "{told}");
    assert!(is_alive(pid.into()));
    assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 1);
    // Nor does another restore take its place.
    let refused = site.command(["restore", &id, "--branch", "b"]).env("FSNAP_CRIU", &engine).output().unwrap();
    assert!(crate::site::said(&refused).contains("the branch b exists already"), "{refused:?}");
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    wait_until("the end of what was restored", || !is_alive(pid.into()));
    crate::site::end(fs::read_to_string(stuck_pid).unwrap().trim().parse().unwrap());
    assert_eq!(told_by_the_next(&site), UNDONE);
    nothing_is_left_of_it(&site);
}

/// What it had restored onto the pids of this machine lived on, on a branch that was removed.
fn the_engine_of_a_restore() {
    let site = Site::new(&[Volume::Btrfs]);
    let (pid, id) = saved(&site);
    let engine = site.engine("", "kill -9 $$");
    let mut command = site.command(["restore", &id, "--branch", "b", "--host-pids"]);
    let output = command.env("FSNAP_CRIU", &engine).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(crate::site::said(&output).contains("signal: 9"), "{output:?}");
    assert!(!is_alive(pid.into()));
    assert_eq!(site.ok(["branches", "--json"]), "[]");
    site.holds_nothing_but(1);
}

/// Its log stayed, of which nobody was told.
fn a_restore_that_failed() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let (_, id) = saved(&site);
    let engine = site.engine("exit 1", "");
    for place in 1..MANY {
        let mut command = site.command(["restore", &id, "--branch", "b"]);
        command.env("FSNAP_CRIU", &engine).env("FSNAP_FAILPOINT", format!("{place}=kill"));
        let output = command.output().unwrap();
        if output.status.code() == Some(1) {
            assert!(place > 5, "there were only {} places", place - 1);
            assert!(said(&output).contains("restore-b.log"), "{}", said(&output));
            return;
        }
        assert_eq!(output.status.signal(), Some(9), "{output:?}");
        nothing_is_left_of_it(&site);
    }
    panic!("it never came through");
}

/// Somebody has made one of the same name, from the same checkpoint, or the restore was of another boot.
fn a_restore_beside_another_branch() {
    let site = Site::new(&[Volume::Rsync]);
    let oracle = site.oracle(&[Kind::Append], 1000);
    let (id, _) = site.checkpoint(oracle.pid);
    site.ok(["branch", &id, "b"]);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let time = site.json(["branches", "--json"])[0]["time"].as_str().unwrap().to_owned();
    for (boot, time, told) in [(boot.trim(), "1970-01-01T00:00:00Z", UNDONE), ("another", time.as_str(), "")] {
        fs::create_dir_all(site.path("state/restores/b")).unwrap();
        let made = serde_json::json!({ "name": "b", "checkpoint": id, "time": time });
        let mark = serde_json::json!({ "boot": boot, "made": made });
        fs::write(site.path("state/restores/b/untold"), mark.to_string()).unwrap();
        assert_eq!(told_by_the_next(&site), told);
        assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 1);
        assert!(!site.path("state/restores/b").exists());
    }
    site.ok(["rm", "--branch", "b"]);
    oracle.goes_on();
}
