//! fsnap is killed wherever it can be, and nothing is left of it.
//!
//! For N = 1, 2, … it dies at the N-th of the places that `fsnap::failpoint` marks, until it comes through.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use fsnap_oracle::Kind;

use crate::Case;
use crate::oracle::Oracle;
use crate::site::{Site, Volume, id_in, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("the_hook_before_the_freeze", || the_hook("pre-dump", 4)),
    ("the_hook_in_the_frozen_window", || the_hook("post-dump", 6)),
    ("the_hook_by_its_own_commands", the_next_command),
    ("a_checkpoint_without_an_engine", a_checkpoint_without_an_engine),
    ("a_restore", a_restore),
    ("a_restore_on_the_pids_of_this_machine", a_restore_on_the_pids_of_this_machine),
];

/// More places than there ever are.
const MANY: usize = 100;

/// One that has a file without a name, too.
fn oracle(site: &Site) -> Oracle {
    site.oracle(&[Kind::Append, Kind::Overwrite, Kind::Rename, Kind::Unlinked, Kind::Volumes], 1000)
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
    let mut sealed = 0;
    let mut noted = false;
    for place in 1..MANY {
        let mut command = site.command(["checkpoint", "--pid", &oracle.pid.to_string()]);
        let output = command.env("FSNAP_FAILPOINT", format!("{place}=kill")).output().unwrap();
        let done = output.status.success();
        assert!(done || output.status.signal() == Some(9), "{output:?}");
        // Before any other command: the guard has seen to it.
        oracle.goes_on();
        let found = site.ids().len() - sealed;
        // From the place on at which everything is noted, it is there, and before it is not.
        assert!(found == 1 || found == 0 && !noted && !done, "{found} after place {place}");
        noted |= found == 1;
        sealed += found;
        site.holds_nothing_but(sealed);
        if done {
            assert!(place > 10 && sealed > 1, "there were only {} places", place - 1);
            return;
        }
    }
    panic!("it never came through");
}

fn a_restore() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = oracle(&site);
    let (id, _) = site.checkpoint(oracle.pid);
    for place in 1..MANY {
        let mut command = site.command(["restore", &id, "--branch", "b", "--json"]);
        let output = command.env("FSNAP_FAILPOINT", format!("{place}=kill")).output().unwrap();
        if output.status.success() {
            assert!(place > 3, "there were only {} places", place - 1);
            let restored: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            crate::site::end(i32::try_from(restored["init"].as_i64().unwrap()).unwrap());
            return;
        }
        assert_eq!(output.status.signal(), Some(9), "{output:?}");
        // What was recorded as a branch is one; anything else is gone.
        if site.json(["branches", "--json"]).as_array().is_some_and(|branches| !branches.is_empty()) {
            site.ok(["rm", "--branch", "b"]);
        }
        site.holds_nothing_but(1);
    }
    panic!("it never came through");
}

/// No namespace ends the processes of which the killed fsnap never heard, or never told: whoever restored them does.
fn a_restore_on_the_pids_of_this_machine() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = oracle(&site);
    let (pid, (id, _)) = (oracle.pid, site.checkpoint(oracle.pid));
    drop(oracle);
    // An engine that has restored everything when its caller is killed, and ends after that.
    let (engine, caller, restored) = (site.path("engine"), site.path("caller"), site.path("restored"));
    let script = format!(
        "#!/bin/sh\n'{}' \"$@\" || exit 1\n[ \"$1\" = restore ] || exit 0\ncaller=$(cat '{}')\n\
         kill -0 {pid} && : >'{}' && kill -9 $caller\n\
         until ! [ -e /proc/$caller ] || grep -q '^State:.Z' /proc/$caller/status; do sleep 0.01; done\n",
        fsnap_oracle::criu::Criu::find().program().display(),
        caller.display(),
        restored.display()
    );
    fs::write(&engine, script).unwrap();
    fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = site.command_of(Path::new("sh"));
    command.args(["-c", r#"echo $$ >"$0" && exec "$@""#]).arg(&caller).arg(env!("CARGO_BIN_EXE_fsnap"));
    let output = command.args(["restore", &id, "--branch", "b", "--host-pids"]).env("FSNAP_CRIU", &engine).output();
    let output = output.unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    assert!(restored.exists(), "{output:?}");
    let ended = || !Path::new(&format!("/proc/{pid}")).exists();
    wait_until("the end of what was restored", ended);
    site.ok(["rm", "--branch", "b"]);
    let mut command = site.command(["restore", &id, "--branch", "c", "--host-pids"]);
    let output = command.env("FSNAP_FAILPOINT", "restore:reported=kill").output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    wait_until("the end of what was restored", ended);
    site.ok(["rm", "--branch", "c"]);
    site.holds_nothing_but(1);
}
