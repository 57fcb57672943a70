//! Without an engine: fsnap freezes the processes itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use fsnap_oracle::{Kind, examine};
use serde_json::Value;

use crate::Case;
use crate::oracle::Oracle;
use crate::site::{Site, Volume, end, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("by_pid_files_are_of_one_instant", by_pid_files_are_of_one_instant),
    ("by_cgroup_files_are_of_one_instant", by_cgroup_files_are_of_one_instant),
    ("killed_while_a_process_stands", killed_while_a_process_stands),
    ("killed_while_a_cgroup_stands", killed_while_a_cgroup_stands),
    ("killed_with_its_guard", killed_with_its_guard),
    ("what_fails_lets_the_processes_run", what_fails_lets_the_processes_run),
    ("writers_outside_are_named", writers_outside_are_named),
    ("writers_outside_are_frozen_too", writers_outside_are_frozen_too),
    ("alone_it_claims_less", alone_it_claims_less),
];

const ROUNDS: usize = 8;

/// Takes checkpoints with these arguments, and judges the files of a branch of each.
fn of_one_instant(site: &Site, oracle: &Oracle, arguments: &[&str]) {
    for round in 0..ROUNDS {
        let checkpoint = site.json([&["checkpoint", "--json"], arguments].concat());
        assert_eq!(classes(&checkpoint), ["point-in-time", "point-in-time"], "{checkpoint}");
        let branch = site.json(["branch", checkpoint["id"].as_str().unwrap(), "b", "--json"]);
        let members = branch["members"].as_array().unwrap();
        let dirs: Vec<_> = members.iter().map(|member| PathBuf::from(member["path"].as_str().unwrap())).collect();
        let verdict = examine(&dirs).unwrap();
        assert!(verdict.ok, "round {round} {arguments:?}: {verdict}");
        site.ok(["rm", "--branch", "b"]);
    }
    oracle.goes_on();
}

pub(crate) fn classes(checkpoint: &Value) -> Vec<&str> {
    checkpoint["members"].as_array().unwrap().iter().map(|member| member["consistency"].as_str().unwrap()).collect()
}

fn by_pid_files_are_of_one_instant() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let kinds: Vec<Kind> = Kind::usual().collect();
    let oracle = site.oracle(&kinds, 500);
    of_one_instant(&site, &oracle, &["--pid", &oracle.pid.to_string()]);
    site.holds_nothing_but(ROUNDS);
}

fn by_cgroup_files_are_of_one_instant() {
    for cgroup in Cgroup::of_each_kind() {
        let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
        let kinds: Vec<Kind> = Kind::usual().collect();
        let oracle = site.oracle(&kinds, 500);
        cgroup.add(oracle.pid);
        of_one_instant(&site, &oracle, &["--cgroup", cgroup.dir.to_str().unwrap()]);
        assert!(!cgroup.is_frozen());
        site.holds_nothing_but(ROUNDS);
    }
}

/// A control group of this machine; removed when it is dropped, after the processes in it.
pub(crate) struct Cgroup {
    pub(crate) dir: PathBuf,
    pub(crate) control: &'static str,
}

impl Cgroup {
    /// One in each hierarchy that has a freezer; a case that needs one fails where there is none.
    pub(crate) fn of_each_kind() -> Vec<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut found: Vec<Self> = Vec::new();
        for line in mounts.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let (point, kind) = (left.split(' ').nth(4).unwrap(), right.split(' ').next().unwrap());
            let controllers = right.split([' ', ',']).collect::<Vec<_>>();
            let control = match kind {
                "cgroup2" => "cgroup.freeze",
                "cgroup" if controllers.contains(&"freezer") => "freezer.state",
                _ => continue,
            };
            // The name is that of no other run: this process's pid is that of the sandbox, and its own is not.
            let unique = std::fs::read_link("/proc/self/ns/pid").unwrap();
            let number: String = unique.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
            let thread = format!("{:?}", std::thread::current().id());
            let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
            let dir = Path::new(point).join(format!("fsnap-engines-{number}-{thread}"));
            if found.iter().any(|cgroup| cgroup.control == control) {
                continue;
            }
            // The kernel gives the numbers of namespaces again: what has the name was left by an earlier run that was killed.
            let _ = fs::remove_dir(&dir);
            if fs::create_dir(&dir).is_ok() {
                let cgroup = Self { dir, control };
                if cgroup.dir.join(control).exists() {
                    found.push(cgroup);
                }
            }
        }
        assert!(!found.is_empty(), "this machine has no control groups that can be frozen");
        found
    }

    pub(crate) fn add(&self, pid: i32) {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    fn is_frozen(&self) -> bool {
        let content = fs::read_to_string(self.dir.join(self.control)).unwrap();
        content.trim() == "1" || content.trim() == "FROZEN"
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        wait_until("the removal of the control group", || match fs::remove_dir(&self.dir) {
            Ok(()) => true,
            // A process that was killed leaves it a moment later.
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        });
    }
}

/// A checkpoint that waits for ever with everything taken, and its guard.
struct Waiting {
    fsnap: Child,
    guard: i32,
}

impl Waiting {
    fn start(site: &Site, arguments: &[&str], stands: impl Fn() -> bool) -> Self {
        let mut command = site.command([&["checkpoint"], arguments].concat());
        command.env("FSNAP_FAILPOINT", "take:all=sleep:3600000").stdout(Stdio::null());
        let fsnap = command.spawn().unwrap();
        wait_until("the freeze", stands);
        let mut guard = None;
        wait_until("the guard", || {
            guard = children(fsnap.id())
                .into_iter()
                .find(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"thaw-guard\0")));
            guard.is_some()
        });
        Self { fsnap, guard: guard.unwrap() }
    }

    fn kill(mut self) {
        self.fsnap.kill().unwrap();
        self.fsnap.wait().unwrap();
    }
}

fn children(parent: u32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect()
}

/// Whether every thread is stopped by a signal.
fn is_stopped(pid: i32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.into_iter().all(|task| {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        stat[stat.rfind(')').unwrap()..].starts_with(") T ")
    })
}

fn killed_while_a_process_stands() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let waiting = Waiting::start(&site, &["--pid", &oracle.pid.to_string()], || is_stopped(oracle.pid));
    assert!(is_stopped(oracle.pid));
    waiting.kill();
    // Before any other command.
    oracle.goes_on();
    site.holds_nothing_but(0);
}

fn killed_while_a_cgroup_stands() {
    for cgroup in Cgroup::of_each_kind() {
        let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
        let oracle = site.small_oracle();
        cgroup.add(oracle.pid);
        let arguments = ["--cgroup", cgroup.dir.to_str().unwrap()];
        let waiting = Waiting::start(&site, &arguments, || cgroup.is_frozen());
        waiting.kill();
        oracle.goes_on();
        assert!(!cgroup.is_frozen());
        site.holds_nothing_but(0);
    }
}

fn killed_with_its_guard() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let waiting = Waiting::start(&site, &["--pid", &oracle.pid.to_string()], || is_stopped(oracle.pid));
    // The guard first, or it would do what it is there for.
    end(waiting.guard);
    waiting.kill();
    assert!(is_stopped(oracle.pid));
    site.ok(["log"]);
    oracle.goes_on();
    site.holds_nothing_but(0);
}

fn what_fails_lets_the_processes_run() {
    let site = Site::new(&[Volume::Rsync, Volume::Btrfs]);
    let oracle = site.small_oracle();
    let place = site.path("mnt/.fsnap/snapshots");
    crate::site::run(Command::new("chattr").arg("+i").arg(&place));
    let output = site.command(["checkpoint", "--pid", &oracle.pid.to_string()]).output().unwrap();
    crate::site::run(Command::new("chattr").arg("-i").arg(&place));
    assert_eq!(output.status.code(), Some(1), "{}", crate::site::said(&output));
    oracle.goes_on();
    site.holds_nothing_but(0);
}

/// A process outside of the tree that writes to a file of the volume, for ever.
struct Outsider(Child);

impl Outsider {
    fn start(volume: &Path) -> Self {
        let script = "exec 3>>outside; echo >&3; while :; do sleep 0.01; echo >&3; done";
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(volume).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        wait_until("the writer", || fs::metadata(volume.join("outside")).is_ok_and(|file| file.len() > 0));
        Self(child)
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn writers_outside_are_named() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let outsider = Outsider::start(&site.volumes[0]);
    let named = |checkpoint: &Value| {
        assert_eq!(classes(checkpoint), ["crash-consistent", "point-in-time"], "{checkpoint}");
        let writers: Vec<_> = checkpoint["members"][0]["writers"].as_array().unwrap().iter().collect();
        let text = writers[0]["text"].as_str().unwrap();
        assert_eq!(
            (writers[0]["pid"].to_string(), &writers[0]["command"], &writers[0]["via"]),
            (outsider.pid(), &"sh".into(), &"descriptor".into())
        );
        let fd = writers[0]["fd"].as_i64().unwrap();
        assert!(text.contains(&format!(" descriptor {fd} ")), "{text}");
        let path = site.volumes[0].join("outside");
        assert!(text.starts_with(&format!("{} (sh)", outsider.pid())), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
        assert_eq!(writers[0]["path"], path.to_str().unwrap());
        assert_eq!(checkpoint["members"][1]["writers"].as_array().unwrap().len(), 0);
        let shown = site.ok(["show", checkpoint["id"].as_str().unwrap()]);
        assert!(shown.contains(&format!("also written by {text}")), "{shown}");
        assert!(shown.contains("consistency  crash-consistent"), "{shown}");
    };
    named(&site.json(["checkpoint", "--json", "--pid", &oracle.pid.to_string()]));
    // The hook sees it as well.
    let (id, _) = site.checkpoint(oracle.pid);
    named(&site.json(["show", "--json", &id]));
    oracle.goes_on();
}

fn writers_outside_are_frozen_too() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let outsiders = [Outsider::start(&site.volumes[0]), Outsider::start(&site.volumes[1])];
    let pid = oracle.pid.to_string();
    for arguments in [&["--pid", &pid, "--freeze-writers"][..], &["--freeze-writers"]] {
        let checkpoint = site.json([&["checkpoint", "--json"], arguments].concat());
        assert_eq!(classes(&checkpoint), ["point-in-time", "point-in-time"], "{checkpoint}");
    }
    oracle.goes_on();
    for (outsider, volume) in outsiders.iter().zip(&site.volumes) {
        let len = || fs::metadata(volume.join("outside")).unwrap().len();
        let before = len();
        wait_until(&format!("a step of the writer {}", outsider.pid()), || len() > before);
    }
    site.holds_nothing_but(2);
}

fn alone_it_claims_less() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    fs::write(site.volumes[0].join("file"), "quiet").unwrap();
    fs::write(site.volumes[1].join("file"), "quiet").unwrap();
    // Nobody writes, as far as anybody can see; but nobody was stopped either.
    let checkpoint = site.json(["checkpoint", "--json"]);
    assert_eq!(classes(&checkpoint), ["crash-consistent", "fuzzy"], "{checkpoint}");
    let shown = site.ok(["show", "@latest"]);
    assert!(shown.contains("crash-consistent") && shown.contains("fuzzy"), "{shown}");
    // Somebody who writes is named as well.
    let outsider = Outsider::start(&site.volumes[0]);
    let checkpoint = site.json(["checkpoint", "--json", "v0"]);
    assert_eq!(classes(&checkpoint), ["crash-consistent"], "{checkpoint}");
    let writers = checkpoint["members"][0]["writers"].to_string();
    assert!(writers.contains(&outsider.pid()), "{writers}");
    site.holds_nothing_but(2);
}
