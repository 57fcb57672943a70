//! Runs: commands in namespaces of their own, saved and copied live.

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fsnap::processes::Tree;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::Case;
use crate::site::{Site, Volume, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("copies_go_on_side_by_side", copies_go_on_side_by_side),
    ("a_copy_is_copied", a_copy_is_copied),
    ("the_settings_name_the_volumes_of_a_run", the_settings_name_the_volumes_of_a_run),
    ("nothing_but_volumes_can_be_written", nothing_but_volumes_can_be_written),
    ("why_it_cannot_be_saved_is_told", why_it_cannot_be_saved_is_told),
    ("a_lock_that_gets_lost_is_told", a_lock_that_gets_lost_is_told),
    ("a_tree_without_its_root_is_refused", a_tree_without_its_root_is_refused),
    ("a_program_that_is_not_there", a_program_that_is_not_there),
    ("names_and_remains", names_and_remains),
    ("killed_while_it_is_saved", killed_while_it_is_saved),
    ("failing_hooks_leave_the_run_alone", failing_hooks_leave_the_run_alone),
    ("scratch_files_come_back_whatever_the_environment", scratch_files_come_back_whatever_the_environment),
    ("a_terminal", a_terminal),
    ("terminals_of_its_own", terminals_of_its_own),
    ("without_privileges", without_privileges),
];

/// Runs of one site; they are ended when it is dropped.
pub(crate) struct Running<'a>(pub(crate) &'a Site);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let names: Vec<String> = self.all().iter().map(|run| run["name"].as_str().unwrap().to_owned()).collect();
        for name in names {
            let _ = self.0.command(["stop", "--time", "0", &name]).output();
        }
    }
}

impl<'a> Running<'a> {
    /// With the run `one` that counts in the first volume, and has begun to.
    pub(crate) fn counting(site: &'a Site) -> Self {
        let running = Self(site);
        running.start("one", &["--volume", "v0"], &counter(site));
        running.says("one", "3");
        running
    }

    pub(crate) fn all(&self) -> Vec<Value> {
        self.0.json(["ps", "--json"]).as_array().unwrap().clone()
    }

    /// Starts a shell with these lines.
    pub(crate) fn start(&self, name: &str, options: &[&str], script: &str) {
        let begin = ["run", "--name", name];
        let shell = ["--", "sh", "-c", script];
        assert_eq!(self.0.ok([&begin, options, &shell].concat()), name);
    }

    /// Everything that a run has said.
    pub(crate) fn said(&self, name: &str) -> String {
        self.0.ok(["logs", name])
    }

    /// Waits until a run has said that line.
    pub(crate) fn says(&self, name: &str, line: &str) {
        wait_until(&format!("{line:?} in the log of {name}"), || self.said(name).lines().any(|said| said == line));
    }

    /// The last number that a run has said.
    fn number(&self, name: &str) -> u64 {
        self.said(name).lines().rev().find_map(|line| line.parse().ok()).unwrap_or(0)
    }

    /// Waits until a run has counted on.
    pub(crate) fn counts_on(&self, name: &str) {
        let before = self.number(name);
        wait_until(&format!("the next number of {name}"), || self.number(name) > before);
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.all().iter().map(|run| run["name"].as_str().unwrap().to_owned()).collect()
    }
}

/// A counter in memory, in each of the volumes, in a scratch place and in what it says.
pub(crate) fn counter(site: &Site) -> String {
    let writes: Vec<_> = site.volumes.iter().map(|dir| format!("echo $i >{}/number", dir.display())).collect();
    format!(
        "i=0; while :; do i=$((i+1)); {}; echo $i >/tmp/number; [ $(cat /tmp/number) = $i ] && echo $i; sleep 0.02; done",
        writes.join("; ")
    )
}

/// Where a branch has the files of volume `index`.
pub(crate) fn branch_path(site: &Site, branch: &str, index: usize) -> PathBuf {
    let branches = site.json(["branches", "--json"]);
    let found = branches.as_array().unwrap().iter().find(|found| found["name"] == branch).unwrap().clone();
    found["members"][index]["path"].as_str().unwrap().into()
}

fn copies_go_on_side_by_side() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let running = Running(&site);
    running.start("one", &["--volume", "v0", "--volume", "v1"], &counter(&site));
    running.says("one", "3");
    let id = site.ok(["checkpoint", "one", "--tag", "saved", "-m", "while it counts"]);
    running.counts_on("one");
    // It has files that only a run has: the engine said that it cannot find them.
    let refused = site.command(["restore", "saved"]).output().unwrap();
    let reason = format!("checkpoint {} holds the run one, which goes on as a run and not otherwise", &id[..12]);
    assert!(refused.status.code() == Some(1) && said(&refused).contains(&reason), "{}", said(&refused));
    assert_eq!(site.ok(["branches", "--json"]), "[]");
    let shown = site.json(["show", "--json", "saved"]);
    assert_eq!(shown["message"], "while it counts");
    let member = &shown["members"];
    assert_eq!(member.as_array().unwrap().len(), 2);
    for member in member.as_array().unwrap() {
        assert_eq!(member["consistency"], "point-in-time", "{member}");
        assert_eq!(member["writers"].as_array().unwrap().len(), 0, "{member}");
    }
    let made = site.ok(["branch", &id, "copy", "--run", "--count", "3"]);
    assert_eq!(made.lines().collect::<Vec<_>>(), ["copy-1", "copy-2", "copy-3"]);
    for name in made.lines() {
        running.counts_on(name);
        // It goes on where it was, in memory, in the scratch place and in its files.
        let first: u64 = running.said(name).lines().next().unwrap().parse().unwrap();
        assert!(first < running.number("one"), "{name} began with {first}");
        site.ok(["audit", name, "--outside", "refuse"]);
    }
    assert_eq!(running.names(), ["copy-1", "copy-2", "copy-3", "one"]);
    // When one ends, the others go on; each has the files that it wrote.
    site.ok(["stop", "copy-2"]);
    let last = running.number("copy-2");
    running.counts_on("copy-1");
    for index in 0..2 {
        let kept = fs::read_to_string(branch_path(&site, "copy-2", index).join("number")).unwrap();
        assert!(kept.trim().parse::<u64>().unwrap() - last <= 1, "{kept} after {last}");
    }
    let all = site.json(["ps", "--all", "--json"]);
    let copy = all.as_array().unwrap().iter().find(|run| run["name"] == "copy-2").unwrap();
    assert_eq!((&copy["state"], &copy["ended"]["killed"]), (&"ended".into(), &15.into()), "{copy}");
    assert_eq!((&copy["checkpoint"], &copy["branch"]), (&id.as_str().into(), &"copy-2".into()));
    // A branch that a run works on is not taken from under it.
    let refused = site.command(["rm", "--branch", "copy-1"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    site.ok(["stop", "copy-1", "copy-3", "one"]);
    for name in ["copy-1", "copy-2", "copy-3"] {
        site.ok(["rm", "--branch", name]);
    }
    site.holds_nothing_but(1);
    // The process image goes with the checkpoint.
    assert_eq!(fs::read_dir(site.path("state/images")).unwrap().count(), 1);
    site.ok(["rm", &id]);
    assert_eq!(fs::read_dir(site.path("state/images")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(site.path("state/log")).unwrap().count(), 0, "logs of restores that went well");
    site.holds_nothing_but(0);
}

/// Only those are taken, and the audit names the other; of that one CRIU saves the files without names.
fn the_settings_name_the_volumes_of_a_run() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let running = Running(&site);
    let open = |fd: u32, dir: &Path| format!("cd {}; exec {fd}>file; rm file; ", dir.display());
    let script = open(8, &site.volumes[0]) + &open(9, &site.volumes[1]) + &counter(&site);
    running.start("one", &["--volume", "v0", "--volume", "v1"], &script);
    running.says("one", "3");
    site.configure("[hook]\nvolumes = ['v0']\n");
    let id = site.ok(["checkpoint", "one"]);
    running.counts_on("one");
    let shown = site.json(["show", &id, "--json"]);
    let volumes: Vec<_> = shown["members"].as_array().unwrap().iter().map(|member| &member["volume"]).collect();
    assert_eq!(volumes, ["v0"], "{shown:#}");
    let left_out: Vec<_> =
        shown["unlinked"].as_array().unwrap().iter().map(|one| one["external"].is_string()).collect();
    assert_eq!(left_out.iter().filter(|left_out| **left_out).count(), 1, "{shown:#}");
    assert_eq!(left_out.len(), 2, "{shown:#}");
    assert!(site.ok(["show", &id]).contains(&site.volumes[1].display().to_string()), "{}", site.ok(["show", &id]));
}

fn a_copy_is_copied() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let running = Running(&site);
    running.start("first", &["--volume", "v0", "--volume", "v1"], &counter(&site));
    running.says("first", "3");
    let mut from = "first".to_owned();
    for name in ["second", "third"] {
        let id = site.ok(["checkpoint", &from]);
        site.ok(["branch", &id, name, "--run"]);
        running.counts_on(name);
        from = name.to_owned();
    }
    site.ok(["stop", "first", "second", "third"]);
    // Each wrote to its own branch, and none to one before it.
    for index in 0..2 {
        let number = |dir: PathBuf| fs::read_to_string(dir.join("number")).unwrap().trim().parse::<u64>().unwrap();
        for name in ["second", "third"] {
            let (kept, last) = (number(branch_path(&site, name, index)), running.number(name));
            assert!(kept == last || kept == last + 1, "{name}: {kept} after {last}");
        }
        let (kept, last) = (number(site.volumes[index].clone()), running.number("first"));
        assert!(kept == last || kept == last + 1, "first: {kept} after {last}");
    }
    let log = site.json(["log", "--json"]);
    assert_eq!(log[0]["branch"], "second", "{log}");
    assert_eq!(log[0]["parent"], log[1]["id"], "{log}");
}

fn nothing_but_volumes_can_be_written() {
    let site = Site::new(&[Volume::Rsync, Volume::Rsync]);
    let running = Running(&site);
    let (shared, shown, own) = (site.path("shared"), site.volumes[0].join("shown"), site.path("own"));
    for dir in [&shared, &shown, &own] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(own.join("hidden"), "").unwrap();
    let attempts = [
        ("volume", site.volumes[0].clone(), true),
        ("other", site.volumes[1].clone(), false),
        ("shown", shown.clone(), false),
        ("shared", shared.clone(), true),
        ("own", own.clone(), true),
        ("tmp", "/tmp".into(), true),
        ("shm", "/dev/shm".into(), true),
        ("etc", "/etc".into(), false),
        ("dev", "/dev".into(), false),
        ("run", "/run".into(), false),
        ("sys", "/proc/sys/kernel/hostname".into(), false),
    ];
    let mut script = String::new();
    for (name, dir, _) in &attempts {
        let file = dir.join("fsnap-test").display().to_string();
        let attempt =
            if *name == "sys" { format!("[ -w {} ]", dir.display()) } else { format!("echo x 2>/dev/null >{file}") };
        script += &format!("if {attempt}; then echo {name} written; else echo {name} refused; fi\n");
    }
    script += &format!("ls {}; echo; ls /proc | grep -c '^[0-9]'; echo end; exec sleep 1000\n", own.display());
    let texts: Vec<String> = [&shared, &shown, &own].iter().map(|dir| dir.display().to_string()).collect();
    let options = ["--volume", "v0", "--rw", &texts[0], "--ro", &texts[1], "--tmp", &texts[2]];
    running.start("cell", &options, &script);
    running.says("cell", "end");
    let told = running.said("cell");
    for (name, _, may) in &attempts {
        let expected = format!("{name} {}", if *may { "written" } else { "refused" });
        assert!(told.lines().any(|line| line == expected), "{expected}: {told}");
    }
    assert!(!told.contains("hidden") && told.contains("fsnap-test"), "{told}");
    // It sees itself, what waits for it, and nobody else.
    let processes = told.lines().rev().nth(1).and_then(|line| line.parse().ok());
    assert!(processes.is_some_and(|number: u32| number <= 4), "{told}");
    // Outside, there is what it wrote where it may, and nothing else.
    assert!(shared.join("fsnap-test").exists() && site.volumes[0].join("fsnap-test").exists());
    for dir in [own.as_path(), Path::new("/tmp"), Path::new("/dev/shm")] {
        assert!(!dir.join("fsnap-test").exists(), "{dir:?}");
    }
    // So a checkpoint holds all that it can change, but what was opened up for all copies.
    let audit = site.json(["audit", "cell", "--json"]);
    let outside: Vec<_> = audit["outside"].as_array().unwrap().iter().map(|one| &one["path"]).collect();
    assert_eq!(outside, [texts[0].as_str()], "{audit:#}");
    let strict = ["checkpoint", "cell", "--outside", "refuse"];
    let refused = site.command(strict).output().unwrap();
    let reason = format!("can write to the mount at {} (", texts[0]);
    assert!(said(&refused).contains("\n    hint: `fsnap audit PID` lists all of it"), "{}", said(&refused));
    assert!(refused.status.code() == Some(1) && said(&refused).contains(&reason), "{}", said(&refused));
    site.holds_nothing_but(0);
    let id = site.ok([&strict[..], &["--ignore", &texts[0]]].concat());
    assert_eq!(site.json(["show", &id, "--json"])["outside"].as_array().unwrap().len(), 0);
}

fn why_it_cannot_be_saved_is_told() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done");
    site.ok(["run", "--name", "client", "--volume", "v0", "--", "bash", "-c", &script]);
    let _peer = listener.accept().unwrap();
    running.says("client", "2");
    let failed = site.command(["checkpoint", "client"]).output().unwrap();
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    let text = String::from_utf8(failed.stderr).unwrap();
    assert!(text.contains("a process has an open TCP connection: close it"), "{text}");
    running.counts_on("client");
    site.holds_nothing_but(0);
    assert_eq!(fs::read_dir(site.path("state/images")).unwrap().count(), 0);
}

/// Two locked files, of which one is mapped as well.
const LOCKS: &str = r#"
import fcntl, mmap, time
files = [open(name, "w+b") for name in ("mapped", "plain")]
for file in files:
    file.truncate(4096)
    fcntl.lockf(file, fcntl.LOCK_EX)
mapping = mmap.mmap(files[0].fileno(), 4096)
print("locked", flush=True)
while True:
    time.sleep(1)
"#;

/// CRIU 4.1.1 and 4.2 lose it; a release that does not would make the last line of this fail, and the warning false.
fn a_lock_that_gets_lost_is_told() {
    let site = Site::new(&[Volume::Btrfs]);
    let running = Running(&site);
    let mut command = site.command(["run", "--name", "locks", "--volume", "v0", "--", "/usr/bin/python3", "-c", LOCKS]);
    let output = command.current_dir(&site.volumes[0]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    running.says("locks", "locked");
    let id = site.ok(["checkpoint", "locks"]);
    let shown = site.ok(["show", &id, "--processes"]);
    for name in ["mapped", "plain"] {
        assert!(shown.contains(&format!("/{name} in v0, locked\n")), "{shown}");
    }
    let made = site.command(["branch", &id, "copy", "--run"]).output().unwrap();
    let told = said(&made);
    let mapped = site.volumes[0].join("mapped");
    assert!(made.status.success() && told.matches("CRIU does not restore the lock of").count() == 1, "{told}");
    assert!(told.contains(&mapped.display().to_string()) && !told.contains("plain"), "{told}");
    let is_free =
        |name: &str| fs::File::open(branch_path(&site, "copy", 0).join(name)).is_ok_and(|file| can_lock(&file));
    assert_eq!([is_free("mapped"), is_free("plain")], [true, false]);
}

/// Whether nobody else has a lock of fcntl(2) on it.
fn can_lock(file: &fs::File) -> bool {
    rustix::fs::fcntl_lock(file, rustix::fs::FlockOperation::NonBlockingLockShared).is_ok()
}

fn a_tree_without_its_root_is_refused() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    // What a living command's children leave behind stays in the tree.
    running.start("shell", &["--volume", "v0"], "(sleep 1000 & exit); echo left; while :; do sleep 0.05; done");
    running.says("shell", "left");
    let id = site.ok(["checkpoint", "shell"]);
    site.ok(["branch", &id, "copy", "--run"]);
    // A command that goes into the background has left everything.
    running.start("daemon", &["--volume", "v0"], "sleep 1000 & echo left");
    running.says("daemon", "left");
    let refused = || {
        let failed = site.command(["checkpoint", "daemon"]).output().unwrap();
        assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
        String::from_utf8(failed.stderr).unwrap()
    };
    wait_until("the end of the command", || refused().contains("has ended and left other processes behind"));
    assert!(refused().contains("servers have an option for the foreground"), "{}", refused());
    let pid = || running.all().iter().find(|run| run["name"] == "daemon").unwrap()["pid"].clone();
    assert_eq!(pid(), Value::Null);
    // What it left behind was started in the same hundredth of a second: it was taken for the command.
    let init: Value = serde_json::from_slice(&fs::read(site.path("state/runs/daemon/init")).unwrap()).unwrap();
    let init = i32::try_from(init["id"]["pid"].as_i64().unwrap()).unwrap();
    let left = Tree::of_pid(init).unwrap().members().find(|member| member.parent == init).unwrap().id;
    let mut root = serde_json::to_value(left).unwrap();
    // More than any process has.
    root["pid"] = i32::MAX.into();
    fs::write(site.path("state/runs/daemon/root"), root.to_string()).unwrap();
    assert_eq!(pid(), Value::Null);
    site.ok(["stop", "daemon"]);
    assert_eq!(running.names(), ["copy", "shell"]);
}

fn a_program_that_is_not_there() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    let failed = site.command(["run", "--name", "none", "--", "/no/such/program"]).output().unwrap();
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    let text = String::from_utf8(failed.stderr).unwrap();
    assert!(text.contains("cannot run /no/such/program: No such file or directory"), "{text}");
    assert_eq!(site.json(["ps", "--all", "--json"]).as_array().unwrap().len(), 0);
    // The directory it would begin in is hidden by a scratch place.
    let mut command = site.command(["run", "--", "true"]);
    let failed = command.current_dir("/tmp/.").output().unwrap();
    assert!(failed.status.success(), "{}", said(&failed));
    wait_until("its end", || running.all().is_empty());
    // One below it is not there.
    let elsewhere = site.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mut command = site.command(["run", "--name", "none", "--", "true"]);
    let failed = command.current_dir(elsewhere).output().unwrap();
    let text = String::from_utf8(failed.stderr).unwrap();
    assert!(failed.status.code() == Some(1) && text.contains("cannot enter the directory"), "{text}");
    assert!(text.contains("hint: show it to the run, by --volume, --rw or --ro"), "{text}");
}

fn names_and_remains() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    running.start("job", &[], "echo first; exit 3");
    let ended = |status: u64| {
        let all = site.json(["ps", "--all", "--json"]);
        all[0]["state"] == "ended" && all[0]["ended"]["exited"] == status
    };
    wait_until("the end of the job", || ended(3));
    assert_eq!(running.said("job"), "first");
    let failed = site.command(["checkpoint", "job"]).output().unwrap();
    assert!(said(&failed).contains("the run job has ended"), "{}", said(&failed));
    // Its name is free, and its log goes with the next of that name.
    running.start("job", &[], "echo second; exec sleep 1000");
    running.says("job", "second");
    assert_eq!(running.said("job"), "second");
    for args in [&["run", "--name", "job", "--", "true"][..], &["rm", "--run", "job"]] {
        let refused = site.command(args).output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{args:?}: {}", said(&refused));
    }
    let two = site.command(["checkpoint", "v0", "job"]).output().unwrap();
    assert!(two.status.code() == Some(2) && said(&two).contains("job is a run"), "{}", said(&two));
    let program = env!("CARGO_BIN_EXE_fsnap");
    for option in ["--ro", "--rw", "--tmp"] {
        let refused = site.command(["run", option, program, "--", "true"]).output().unwrap();
        assert!(
            refused.status.code() == Some(2) && said(&refused).contains("not a directory: name the"),
            "{}",
            said(&refused)
        );
    }
    let volume = site.command(["run", "--name", "v0", "--", "true"]).output().unwrap();
    assert!(
        said(&volume).contains("would make `fsnap checkpoint NAME` mean either; choose another"),
        "{}",
        said(&volume)
    );
    let pid = running.all()[0]["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::STOP).unwrap();
    site.ok(["stop", "--time", "60", "job"]);
    assert_eq!(site.json(["ps", "--all", "--json"])[0]["ended"]["killed"], 15);
    site.ok(["stop", "job"]);
    one_is_unknown_and_one_unreadable(&site, &running);
    site.ok(["rm", "--run", "job"]);
    assert_eq!(fs::read_dir(site.path("state/runs")).unwrap().count(), 0);
    let nobody = site.command(["stop", "job"]).output().unwrap();
    assert!(said(&nobody).contains("no run \"job\""), "{}", said(&nobody));
}

/// What can be done is done for the others.
fn one_is_unknown_and_one_unreadable(site: &Site, running: &Running<'_>) {
    running.start("last", &[], "exec sleep 1000");
    running.start("torn", &[], "exit 0");
    wait_until("the end of the torn one", || running.all().len() == 1);
    fs::write(site.path("state/runs/torn/run.json"), "{").unwrap();
    let listed = site.command(["ps"]).output().unwrap();
    assert_eq!(listed.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&listed.stdout).contains("sleep 1000"), "{listed:?}");
    assert!(said(&listed).contains("runs/torn/run.json") && said(&listed).contains("rm --run"), "{}", said(&listed));
    let stopped = site.command(["stop", "-t", "0", "nobody", "torn", "last"]).output().unwrap();
    assert_eq!(stopped.status.code(), Some(1));
    assert!(said(&stopped).contains("no run \"nobody\"") && said(&stopped).contains("torn"), "{}", said(&stopped));
    site.ok(["rm", "--run", "torn"]);
    assert!(running.all().is_empty());
    site.ok(["rm", "--run", "last"]);
}

fn killed_while_it_is_saved() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let running = Running(&site);
    running.start("one", &["--volume", "v0", "--volume", "v1"], &counter(&site));
    running.says("one", "2");
    // The hook waits in the frozen window; then the fsnap that called it is killed.
    let mut command = site.command(["checkpoint", "one"]);
    command.env("FSNAP_FAILPOINT", "hook:frozen=sleep:3600000").stdout(Stdio::null()).stderr(Stdio::null());
    let mut fsnap = command.spawn().unwrap();
    let pid = running.all()[0]["pid"].as_i64().unwrap();
    let stands = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") t ");
    wait_until("the freeze", || stands() && fs::read_dir(site.path("state/images")).unwrap().count() > 0);
    fsnap.kill().unwrap();
    fsnap.wait().unwrap();
    running.counts_on("one");
    site.holds_nothing_but(0);
    killed_before_scratch_places_are_saved(&site, &running);
    // What it left goes when it is undone.
    let images = || fs::read_dir(site.path("state/images")).unwrap().count();
    assert_eq!(images(), 0);
    // Of what was killed before there was anything to undo, `recover` tells.
    fs::create_dir(site.path("state/images/0123456789abcdef")).unwrap();
    assert_eq!(site.ok(["recover"]), "removed: a process image that no checkpoint needs");
    assert_eq!((images(), site.ok(["recover"])), (0, "nothing is half done".into()));
    let id = site.ok(["checkpoint", "one"]);
    assert_eq!((site.ok(["recover"]), images()), ("nothing is half done".into(), 1));
    site.holds_nothing_but(1);
    site.ok(["branch", &id, "copy", "--run"]);
    running.counts_on("copy");
}

/// The snapshots are taken beside that, and count for nothing before it is done.
fn killed_before_scratch_places_are_saved(site: &Site, running: &Running<'_>) {
    // The run sees the volume, and nothing of the site besides.
    let (programs, go_on) = (site.volumes[1].join("programs"), site.volumes[1].join("go-on"));
    fs::create_dir(&programs).unwrap();
    let script = format!("#!/bin/sh\nuntil [ -e {} ]; do sleep 0.01; done\nexec /bin/tar \"$@\"\n", go_on.display());
    fs::write(programs.join("tar"), script).unwrap();
    fs::set_permissions(programs.join("tar"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = site.command(["checkpoint", "one"]);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", programs.display())).stdout(Stdio::null()).stderr(Stdio::null());
    let mut fsnap = command.spawn().unwrap();
    let in_images =
        || fs::read_dir(site.path("state/images")).unwrap().map(|dir| dir.unwrap().path().join("fsnap.json"));
    wait_until("the snapshots", || in_images().any(|record| record.exists()));
    for _ in 0..20 {
        let mut intents = fs::read_dir(site.path("state/intents")).unwrap().map(|file| file.unwrap().path());
        assert!(!intents.any(|file| file.extension().is_some_and(|end| end == "taken")), "it is noted too early");
        std::thread::sleep(Duration::from_millis(10));
    }
    fsnap.kill().unwrap();
    fsnap.wait().unwrap();
    fs::write(go_on, "").unwrap();
    running.counts_on("one");
    site.holds_nothing_but(0);
}

fn failing_hooks_leave_the_run_alone() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let running = Running(&site);
    running.start("one", &["--volume", "v0", "--volume", "v1"], &counter(&site));
    running.says("one", "2");
    for place in ["begin:recorded", "hook:taken", "hook:written"] {
        let mut command = site.command(["checkpoint", "one"]);
        let failed = command.env("FSNAP_FAILPOINT", format!("{place}=kill")).output().unwrap();
        assert_eq!(failed.status.code(), Some(1), "{place}: {}", said(&failed));
        running.counts_on("one");
        site.holds_nothing_but(0);
        assert_eq!(fs::read_dir(site.path("state/images")).unwrap().count(), 0, "{place}");
    }
    // The hook's deadline was the settings', whatever was asked for.
    let mut command = site.command(["checkpoint", "one", "--deadline", "0.3"]);
    let failed = command.env("FSNAP_FAILPOINT", "hook:frozen=sleep:3600000").output().unwrap();
    assert!(said(&failed).contains("taking the snapshots took longer than 0.3 s"), "{}", said(&failed));
    running.counts_on("one");
    site.holds_nothing_but(0);
    // What lies in its scratch places cannot be saved, for there is no tar(1).
    let failed = site.command(["checkpoint", "one"]).env("PATH", "/usr/sbin:/sbin").output().unwrap();
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    assert!(said(&failed).contains("scratch places"), "{}", said(&failed));
    running.counts_on("one");
    site.holds_nothing_but(0);
    // A run without volumes has nothing that could be kept with it.
    running.start("none", &[], "exec sleep 1000");
    let failed = site.command(["checkpoint", "none"]).output().unwrap();
    let reason = "can write to no registered volume: start it with `--volume`";
    assert!(said(&failed).contains(reason), "{}", said(&failed));
    // One whose volumes were forgotten need not be started anew.
    for volume in ["v0", "v1"] {
        site.command(["rm", "--volume", volume]).output().unwrap();
    }
    let failed = site.command(["checkpoint", "one"]).output().unwrap();
    let reason = format!("can write to no registered volume: `fsnap init {}`", site.volumes[0].display());
    assert!(said(&failed).contains(&reason), "{}", said(&failed));
    site.ok(["init".as_ref(), site.volumes[0].as_os_str()]);
    site.ok(["checkpoint", "one"]);
}

/// `TAR_OPTIONS` of whoever takes the checkpoint left files out, and nobody was told.
fn scratch_files_come_back_whatever_the_environment() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    let script = "mkdir /tmp/dir; echo 1 >/tmp/dir/kept; ln /tmp/dir/kept /tmp/same; ln -s same /tmp/link; mkfifo -m 640 /tmp/fifo; \
                  i=0; while :; do i=$((i+$(cat /tmp/link))); [ /tmp/same -ef /tmp/dir/kept ] && [ -p /tmp/fifo ] && echo $i; sleep 0.02; done";
    running.start("one", &["--volume", "v0"], script);
    running.says("one", "3");
    let taken = site.command(["checkpoint", "one"]).env("TAR_OPTIONS", "--exclude=kept").output().unwrap();
    assert!(taken.status.success(), "{}", said(&taken));
    let made =
        site.command(["branch", "@latest", "copy", "--run"]).env("TAR_OPTIONS", "--exclude=fifo").output().unwrap();
    assert!(made.status.success(), "{}", said(&made));
    running.counts_on("copy");
}

fn a_terminal() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    let script = "tty; stty -echo; while read line; do echo \"got $line\"; last=$line; done; [ $last = four ] && exit 5; kill -9 $$";
    let mut command = site.command(["run", "--tty", "--name", "shell", "--volume", "v0", "--", "sh", "-c", script]);
    let mut front = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let output = front.stdout.take().unwrap();
    let mut shown = Shown::of(output);
    shown.until("/dev/pts/");
    let mut keys = front.stdin.take().unwrap();
    keys.write_all(b"one\n").unwrap();
    shown.until("got one");
    let id = site.ok(["checkpoint", "shell"]);
    keys.write_all(b"two\n").unwrap();
    shown.until("got two");
    let refused = site.command(["branch", &id, "copy", "--run"]).output().unwrap();
    assert!(said(&refused).contains("--tty"), "{}", said(&refused));
    let mut command = site.command(["branch", &id, "copy", "--run", "--tty"]);
    let mut other = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut typed = other.stdin.take().unwrap();
    let mut seen = Shown::of(other.stdout.take().unwrap());
    typed.write_all(b"three\n").unwrap();
    seen.until("got three");
    assert!(!seen.text.contains("two"), "{}", seen.text);
    keys.write_all(b"four\n").unwrap();
    shown.until("got four");
    // The end of the input is a key, too.
    for (keys, front, code) in [(&mut keys, &mut front, 5), (&mut typed, &mut other, 128 + 9)] {
        keys.write_all(b"\x04").unwrap();
        assert_eq!(front.wait().unwrap().code(), Some(code));
    }
    assert!(running.all().is_empty());
}

/// Counts through a terminal that it made, as tmux and ssh do.
const TERMINAL: &str = "
import os, pty, sys, time
child, end = pty.fork()
if child == 0:
    os.execvp('cat', ['cat'])
n = 0
while True:
    n += 1
    os.write(end, b'%d\\n' % n)
    shown = b''
    # What was typed, and what cat says.
    while shown.count(b'\\n') < 2:
        shown += os.read(end, 99)
    assert shown == b'%d\\r\\n' % n * 2, shown
    print(n, flush=True)
    # What is on its way within a terminal is not saved.
    while n == 3 and os.path.exists(sys.argv[1]):
        time.sleep(0.02)
";

/// Each copy has one of the same number.
fn terminals_of_its_own() {
    let site = Site::new(&[Volume::Rsync]);
    let running = Running(&site);
    let pause = site.volumes[0].join("pause");
    fs::write(&pause, "").unwrap();
    let program = ["/usr/bin/python3", "-c", TERMINAL, pause.to_str().unwrap()];
    site.ok([&["run", "--name", "one", "--volume", "v0", "--"], &program[..]].concat());
    running.says("one", "3");
    let id = site.ok(["checkpoint", "one"]);
    let made = site.ok(["branch", &id, "copy", "--run", "--count", "2"]);
    for name in made.lines() {
        fs::remove_file(branch_path(&site, name, 0).join("pause")).unwrap();
    }
    fs::remove_file(pause).unwrap();
    for name in made.lines().chain(["one"]) {
        running.counts_on(name);
    }
    // They are the run's own, and no files.
    site.ok(["audit", "copy-1", "--outside", "refuse"]);
    let asked = site.command(["branch", &id, "other", "--run", "--tty"]).output().unwrap();
    assert!(asked.status.code() == Some(2) && said(&asked).contains("leave --tty out"), "{}", said(&asked));
}

/// What a terminal shows.
pub(crate) struct Shown {
    from: std::process::ChildStdout,
    text: String,
}

impl Shown {
    pub(crate) fn of(from: std::process::ChildStdout) -> Self {
        Self { from, text: String::new() }
    }

    /// Reads on until it shows that.
    pub(crate) fn until(&mut self, wanted: &str) {
        use std::io::Read as _;
        let mut buffer = [0; 256];
        while !self.text.contains(wanted) {
            let length = self.from.read(&mut buffer).unwrap();
            assert!(length > 0, "{wanted:?} is not in {:?}", self.text);
            self.text += &String::from_utf8_lossy(&buffer[..length]);
        }
    }
}

/// Counts in everything that a process can have and needs no rights.
const COUNTER: &str = "
import mmap, os, tempfile, time
file, memory, ends = tempfile.TemporaryFile(dir='.'), mmap.mmap(-1, 8), os.pipe()
if os.fork() == 0:
    while True:
        os.write(ends[1], b'!')
        time.sleep(0.02)
n = 0
while os.read(ends[0], 1):
    assert n == 0 or os.pread(file.fileno(), 9, 0) == memory[:] == b'%08d' % n
    n += 1
    memory[:] = b'%08d' % n
    os.pwrite(file.fileno(), memory[:], 0)
    assert os.fstat(file.fileno()).st_nlink == 0
    print(n, flush=True)
";

/// Has mapped a file without a name.
const MAPPED: &str = "
import itertools, mmap, tempfile, time
file = tempfile.TemporaryFile(dir='.')
file.truncate(4096)
memory = mmap.mmap(file.fileno(), 4096)
for n in itertools.count():
    print(n, flush=True)
    time.sleep(0.02)
";

fn without_privileges() {
    const NOBODY: u32 = 65_534;
    let site = Site::new(&[]);
    let home = site.path("home");
    for dir in ["home", "home/volume", "home/state"] {
        fs::create_dir(site.path(dir)).unwrap();
        std::os::unix::fs::chown(site.path(dir), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    // Of a group that means nothing in the runs: it was saved with the scratch place that it is mounted in, and could not be given back.
    std::os::unix::fs::chown(home.join("volume"), None, Some(0)).unwrap();
    let fsnap = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsnap"));
        command.args(args).env("FSNAP_STATE", home.join("state")).uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
        command.env("HOME", &home).env("FSNAP_CRIU", fsnap_oracle::criu::Criu::find().program()).current_dir("/");
        command.output().unwrap()
    };
    let ok = |args: &[&str]| {
        let output = fsnap(args);
        assert!(output.status.success(), "{args:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let volume = home.join("volume").display().to_string();
    ok(&["init", &volume]);
    fs::write(home.join("secret"), "").unwrap();
    let script = format!("cd {volume}; echo x >file; echo x >../other; ls ..; echo said; exec sleep 1000");
    ok(&["run", "--name", "own", "--volume", "volume", "--", "sh", "-c", &script]);
    wait_until("its word", || ok(&["logs", "own"]).contains("said"));
    // Below /tmp it sees its volume, and nothing else.
    assert!(!ok(&["logs", "own"]).contains("secret"), "{}", ok(&["logs", "own"]));
    assert!(home.join("volume/file").exists() && !home.join("other").exists());
    ok(&["stop", "-t", "0", "own"]);
    // It counts in a file that has no name, in shared memory and through a pipe; and so do its copies, and theirs.
    let start = |name: &str, program: &str| {
        ok(&[
            "run",
            "--name",
            name,
            "--volume",
            "volume",
            "--",
            "sh",
            "-c",
            &format!("cd {volume}; exec python3 -c \"$0\""),
            program,
        ]);
    };
    let number = |name: &str| ok(&["logs", name]).lines().last().and_then(|line| line.parse::<u64>().ok());
    let counts_on = |name: &str| {
        let before = number(name);
        wait_until(&format!("the next number of {name}"), || number(name) > before);
    };
    start("counter", COUNTER);
    counts_on("counter");
    ok(&["checkpoint", "counter"]);
    ok(&["branch", "@latest", "copy", "--run", "--count", "2"]);
    ["counter", "copy-1", "copy-2"].iter().for_each(|name| counts_on(name));
    ok(&["checkpoint", "copy-1"]);
    ok(&["branch", "@latest", "grandchild", "--run"]);
    counts_on("grandchild");
    assert!(number("grandchild") > Some(2) && !ok(&["logs", "grandchild"]).contains("Error"));
    ok(&["stop", "-t", "0", "counter", "copy-1", "copy-2", "grandchild"]);
    // What cannot be saved without root is told, and goes on.
    start("mapped", MAPPED);
    counts_on("mapped");
    let failed = fsnap(&["checkpoint", "mapped"]);
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    // By a look at it, before the engine is started.
    assert!(said(&failed).contains("the engine cannot save it"), "{}", said(&failed));
    counts_on("mapped");
    let all = serde_json::from_str::<Value>(&ok(&["ps", "--json"])).unwrap();
    assert_eq!(all.as_array().unwrap().iter().map(|run| &run["name"]).collect::<Vec<_>>(), ["mapped"], "{all}");
    // Its files can be saved without an engine.
    ok(&["checkpoint", "--pid", &all[0]["pid"].to_string(), "volume"]);
    ok(&["stop", "-t", "0", "mapped"]);
}
