//! How runs end: killed with what waits for them, or before anybody was told of them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use fsnap_oracle::Kind;
use rustix::process::{Pid, Signal, kill_process};

use crate::Case;
use crate::runs::{Running, Shown, counter};
use crate::site::{Site, Volume, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("how_a_killed_one_ended_is_known", how_a_killed_one_ended_is_known),
    ("an_interrupted_copy_is_undone", an_interrupted_copy_is_undone),
    ("a_killed_copy_is_undone", a_killed_copy_is_undone),
    ("a_killed_copy_is_removed_with_its_branch", a_killed_copy_is_removed_with_its_branch),
    ("a_copy_whose_name_is_taken_takes_nothing_away", a_copy_whose_name_is_taken_takes_nothing_away),
    ("an_interrupted_restore_is_undone", an_interrupted_restore_is_undone),
    ("one_within_another_has_not_ended", one_within_another_has_not_ended),
];

/// What is killed with its init has ended as one that was killed, with a terminal or without; what ended before that, as it did.
fn how_a_killed_one_ended_is_known() {
    let site = Site::new(&[]);
    let running = Running(&site);
    running.start("plain", &[], "exec sleep 1000");
    running.start("daemon", &[], "sleep 1000 & exit 3");
    let mut fronts = Vec::new();
    for (name, script, shows) in [
        ("shell", "tty; exec sleep 1000", "/dev/pts/"),
        ("left", "setsid sleep 1000 & sleep 0.2; tty; exit 4", "/dev/pts/"),
    ] {
        let mut command = site.command(["run", "--tty", "--name", name, "--", "sh", "-c", script]);
        let mut front = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Shown::of(front.stdout.take().unwrap()).until(shows);
        fronts.push(front);
    }
    let noted =
        |name: &str| fs::read(site.path("state/runs").join(name).join("ended")).is_ok_and(|bytes| !bytes.is_empty());
    wait_until("the end of two commands", || noted("daemon") && noted("left"));
    site.ok(["stop", "--time", "0", "plain", "daemon", "shell", "left"]);
    let codes = fronts.into_iter().map(|front| front.wait_with_output().unwrap());
    let codes: Vec<_> = codes.map(|output| (output.status.code(), output.stderr)).collect();
    assert_eq!(codes, [(Some(128 + 9), vec![]), (Some(4), vec![])]);
    let all = site.json(["ps", "--all", "--json"]);
    let ended: Vec<_> = all.as_array().unwrap().iter().map(|run| (&run["name"], run["ended"].to_string())).collect();
    let expected = [("daemon", r#"{"exited":3}"#), ("left", r#"{"exited":4}"#)].into_iter();
    let expected = expected.chain([("plain", r#"{"killed":9}"#), ("shell", r#"{"killed":9}"#)]);
    assert!(ended.iter().map(|(name, how)| (name.as_str().unwrap(), how.as_str())).eq(expected), "{ended:?}");
}

/// Not by the signal of Ctrl-C, which a shell has those ignore that it runs in the background, as it may run these tests.
fn interrupt(command: &Child) {
    kill_process(Pid::from_child(command), Signal::TERM).unwrap();
}

/// A command that was interrupted leaves nothing, and says so.
fn has_undone(site: &Site, copying: Child, what: &str) {
    let output = copying.wait_with_output().unwrap();
    assert_eq!((output.status.signal(), output.stdout.as_slice()), (Some(15), &b""[..]), "{}", said(&output));
    assert!(said(&output).contains(&format!("error: interrupted; {what} was undone\n")), "{}", said(&output));
    assert_eq!(site.ok(["branches", "--json"]), "[]");
    site.holds_nothing_but(1);
}

/// It left a branch and an ended run, of which nobody was told.
fn an_interrupted_copy_is_undone() {
    let site = Site::new(&[Volume::Btrfs]);
    let running = Running::counting(&site);
    let id = site.ok(["checkpoint", "one"]);
    let runs = || fs::read_dir(site.path("state/runs")).unwrap().count();
    let copy = |name: &str, variable: &str, value: &str| {
        let mut command = site.command(["branch", &id, name, "--run"]);
        command.env(variable, value).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // It counts already.
    let copying = copy("early", "FSNAP_FAILPOINT", "restore:reported=sleep:5000");
    wait_until("the run", || site.command(["logs", "early"]).output().is_ok_and(|log| !log.stdout.is_empty()));
    interrupt(&copying);
    has_undone(&site, copying, "the copy early");
    assert_eq!(runs(), 1);
    // Something in the way of the restore never ends.
    let programs = site.volumes[0].join("programs");
    fs::create_dir(&programs).unwrap();
    fs::write(programs.join("tar"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(programs.join("tar"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let copying = copy("late", "PATH", &path);
    wait_until("the init", || site.path("state/runs/late/init").exists());
    interrupt(&copying);
    has_undone(&site, copying, "the copy late");
    assert_eq!(runs(), 1);
    // Before the branch is recorded the next command undoes it.
    let copying = copy("never", "FSNAP_FAILPOINT", "branch:grown=sleep:3600000");
    wait_until("the clone", || fs::read_dir(site.path("state/intents")).is_ok_and(|mut files| files.next().is_some()));
    interrupt(&copying);
    assert_eq!(copying.wait_with_output().unwrap().status.signal(), Some(15));
    assert_eq!(site.ok(["branches", "--json"]), "[]");
    site.holds_nothing_but(1);
    running.counts_on("one");
    // As under nohup, the terminal may go.
    let mut command = site.command_of(Path::new("env"));
    command.args(["--ignore-signal=HUP", env!("CARGO_BIN_EXE_fsnap"), "branch", &id, "copy", "--run"]);
    command.env("FSNAP_FAILPOINT", "restore:reported=sleep:1000").stdout(Stdio::piped()).stderr(Stdio::piped());
    let copying = command.spawn().unwrap();
    wait_until("the run", || site.command(["logs", "copy"]).output().is_ok_and(|log| !log.stdout.is_empty()));
    kill_process(Pid::from_child(&copying), Signal::HUP).unwrap();
    assert!(copying.wait_with_output().unwrap().status.success());
    running.counts_on("copy");
}

/// It left a branch and an ended run as well, and the next copy could not have the name.
fn a_killed_copy_is_undone() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let running = Running(&site);
    running.start("one", &["--volume", "v0", "--volume", "v1"], &counter(&site));
    running.says("one", "3");
    let id = site.ok(["checkpoint", "one"]);
    let left = |of: &str| fs::read_dir(site.path("state").join(of)).into_iter().flatten().count();
    let has_undone = || {
        let text = String::from_utf8(site.command(["log"]).output().unwrap().stderr).unwrap();
        assert_eq!(site.ok(["branches", "--json"]), "[]");
        assert_eq!((left("runs"), left("log")), (1, 0));
        site.holds_nothing_but(1);
        text
    };
    // Another branch of the name is not touched.
    site.ok(["branch", &id, "other"]);
    let refused = site.command(["branch", &id, "other", "--run"]).output().unwrap();
    assert!(said(&refused).contains("the branch other exists already"), "{}", said(&refused));
    site.ok(["rm", "--branch", "other"]);
    let mut place = 1;
    loop {
        let mut command = site.command(["branch", &id, "copy", "--run"]);
        let output = command.env("FSNAP_FAILPOINT", format!("{place}=kill")).output().unwrap();
        if output.status.success() {
            assert!(place > 5, "there were only {} places", place - 1);
            break;
        }
        assert_eq!(output.status.signal(), Some(9), "{}", said(&output));
        has_undone();
        place += 1;
    }
    running.counts_on("copy");
    site.ok(["stop", "--time", "0", "copy"]);
    // One that was told of is nobody's to undo.
    assert_eq!(site.ok(["recover"]), "nothing is half done");
    assert_eq!(left("runs"), 2);
    // Nor is it when the mark is back, as after a power cut.
    let mark = site.path("state/runs/copy/untold");
    fs::write(&mark, r#"{"boot":"another","branch":true}"#).unwrap();
    assert_eq!(site.ok(["recover"]), "nothing is half done");
    assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 1);
    assert!(mark.exists());
    site.ok(["rm", "--branch", "copy"]);
    site.ok(["rm", "--run", "copy"]);
    // The restore goes on without its caller, and something in its way never ends.
    let programs = site.volumes[0].join("programs");
    fs::create_dir(&programs).unwrap();
    fs::write(programs.join("tar"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(programs.join("tar"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut command = site.command(["branch", &id, "late", "--run"]);
    let mut copying = command.env("PATH", path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the init", || site.path("state/runs/late/init").exists());
    // Nobody takes it for abandoned as long as somebody works on it.
    assert_eq!(site.ok(["recover"]), "nothing is half done");
    copying.kill().unwrap();
    copying.wait().unwrap();
    assert_eq!(has_undone(), "fsnap: recovered: the start of the run late was not finished; it is undone\n");
    running.counts_on("one");
}

/// `fsnap rm --run` took the mark away, and left the branch to nobody.
fn a_killed_copy_is_removed_with_its_branch() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running::counting(&site);
    let id = site.ok(["checkpoint", "one"]);
    let kill = || {
        let mut command = site.command(["branch", &id, "copy", "--run"]);
        command.env("FSNAP_FAILPOINT", "restore:reported=sleep:60000").stdout(Stdio::null()).stderr(Stdio::null());
        let (mut copying, mut path) = (command.spawn().unwrap(), None);
        wait_until("the branch", || {
            let branches = site.json(["branches", "--json"]);
            path = branches[0]["members"][0]["path"].as_str().map(str::to_owned);
            path.is_some() && running.names().contains(&"copy".to_owned())
        });
        let user = Command::new("sleep").arg("1000").current_dir(path.unwrap()).spawn().unwrap();
        copying.kill().unwrap();
        copying.wait().unwrap();
        user
    };
    let end = |mut user: Child| {
        user.kill().unwrap();
        user.wait().unwrap();
    };
    let remove = || site.command(["rm", "--run", "copy"]).output().unwrap();
    let is_removed = |removed: Output| {
        let undone = "fsnap: recovered: the start of the run copy was not finished; it is undone\n";
        let told = String::from_utf8_lossy(&removed.stderr).into_owned();
        assert_eq!((removed.status.code(), told), (Some(0), undone.into()));
        assert_eq!(site.ok(["branches", "--json"]), "[]");
        assert_eq!(fs::read_dir(site.path("state/runs")).unwrap().count(), 1);
        site.holds_nothing_but(1);
    };
    end(kill());
    is_removed(remove());
    // With somebody in the branch it cannot be removed, and nothing of the run that knows of it is.
    let user = kill();
    for args in [&["rm", "--run", "copy"][..], &["run", "--name", "copy", "--", "true"]] {
        let refused = site.command(args).output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
        assert!(said(&refused).contains("the branch copy is in use"), "{}", said(&refused));
        assert!(said(&refused).contains("run copy was cut short, and is not undone yet"), "{}", said(&refused));
    }
    assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 1);
    end(user);
    is_removed(remove());
    running.counts_on("one");
}

/// The log of the ended one was gone, or some copies were made and others not.
fn a_copy_whose_name_is_taken_takes_nothing_away() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running::counting(&site);
    let id = site.ok(["checkpoint", "one"]);
    site.ok(["branch", &id, "copy-2", "--run"]);
    running.counts_on("copy-2");
    site.ok(["stop", "copy-2"]);
    let log = running.said("copy-2");
    let refused = |args: &[&str], why: &str| {
        let output = site.command([&["branch", &id], args, &["--run"]].concat()).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]), "{}", said(&output));
        assert!(said(&output).contains(why), "{}", said(&output));
        assert_eq!(running.names(), ["one"]);
        assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 1);
    };
    refused(&["copy-2"], "the branch copy-2 exists already");
    refused(&["copy", "--count", "2"], "the branch copy-2 exists already");
    refused(&["one"], "the run one exists already");
    refused(&["v0"], "the volume v0 exists already: a run of that name");
    assert_eq!(running.said("copy-2"), log);
    site.ok(["rm", "--branch", "copy-2"]);
    site.ok(["branch", &id, "copy", "--run", "--count", "2"]);
    running.counts_on("copy-2");
}

fn an_interrupted_restore_is_undone() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.oracle(&[Kind::Append], 1000);
    let (id, _) = site.checkpoint(oracle.pid);
    // The engine has restored everything when the signal comes.
    let go_on = site.path("go-on");
    let wait = format!(": >'{go_on}.here'\nuntil [ -e '{go_on}' ]; do sleep 0.01; done", go_on = go_on.display());
    let engine = site.engine("", &wait);
    let mut command = site.command(["restore", &id, "--branch", "b"]);
    command.env("FSNAP_CRIU", &engine).stdout(Stdio::piped()).stderr(Stdio::piped());
    let restoring = command.spawn().unwrap();
    wait_until("the restore", || Path::new(&format!("{}.here", go_on.display())).exists());
    interrupt(&restoring);
    // A moment is enough to take the signal.
    std::thread::sleep(Duration::from_millis(300));
    fs::write(go_on, "").unwrap();
    has_undone(&site, restoring, "the branch b");
    oracle.goes_on();
}

/// A run's pids mean nothing outside of the run that started it, and less in one beside that: it was taken for one that has ended.
fn one_within_another_has_not_ended() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    let (state, program) = (site.path("state").display().to_string(), env!("CARGO_BIN_EXE_fsnap"));
    let (programs, others) = (Path::new(program).parent().unwrap().display().to_string(), ["inner", "outer"]);
    let options = ["--volume", "v0", "--rw", &state, "--ro", &programs];
    let start = format!("'{program}' run --name inner --volume v0 -- sleep 1000 && exec sleep 1000");
    running.start("outer", &options, &start);
    running.says("outer", "inner");
    let all = running.all();
    assert_eq!(all.iter().map(|run| run["name"].as_str().unwrap()).collect::<Vec<_>>(), others);
    let command = fs::read_to_string(format!("/proc/{}/cmdline", all[0]["pid"])).unwrap();
    assert_eq!(command, "sleep\x001000\x00", "{}", all[0]);
    // From beside it, it cannot be seen; nor can what waits for a run from within that.
    let look = format!(
        "'{program}' ps; '{program}' stop inner 2>&1; '{program}' rm --run inner 2>&1; '{program}' stop beside 2>&1; echo end"
    );
    running.start("beside", &options, &look);
    running.says("beside", "end");
    let told = running.said("beside");
    assert_eq!(told.matches(" running elsewhere ").count(), 2, "{told}");
    // What it is in itself is one of them.
    let own = told.lines().filter(|line| line.contains(" running (this one) ")).collect::<Vec<_>>();
    assert!(own.len() == 1 && own[0].starts_with("beside "), "{told}");
    assert!(told.contains("the run beside is the one that this command is part of"), "{told}");
    assert!(told.contains("lives in a pid namespace that cannot be seen from here"), "{told}");
    assert!(told.contains("the run inner still runs"), "{told}");
    let taken = site.command(["run", "--name", "inner", "--", "true"]).output().unwrap();
    assert!(said(&taken).contains("the run inner exists already"), "{}", said(&taken));
    site.ok(["stop", "--time", "0", "inner"]);
    assert_eq!(running.names(), ["outer"]);
    site.ok(["rm", "--run", "inner"]);
}
