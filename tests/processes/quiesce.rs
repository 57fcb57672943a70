//! Everything stands, everything runs again.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fsnap::processes::{Cgroup, ProcessId, Tree};
use fsnap::quiesce::{Error, FreezeRecord, GuardCommand, Quiesce};

use crate::live::{
    Case, LONG, Live, assert_still, guard, helper_command, signal, skip, states, wait_for_growth, wait_until,
};

pub(crate) const CASES: &[Case] = &[
    ("every_thread_stands_and_runs_again", every_thread_stands_and_runs_again),
    ("a_fork_storm_stands", a_fork_storm_stands),
    ("a_process_that_spawns_all_the_time_stands", a_process_that_spawns_all_the_time_stands),
    ("a_process_whose_first_thread_ended_stands", a_process_whose_first_thread_ended_stands),
    ("what_others_stopped_stays_stopped", what_others_stopped_stays_stopped),
    ("dropping_thaws", dropping_thaws),
    ("a_deadline_names_the_process_and_thaws", a_deadline_names_the_process_and_thaws),
    ("killing_the_freezer_thaws", killing_the_freezer_thaws),
    ("a_record_thaws_when_the_guard_is_killed_too", a_record_thaws_when_the_guard_is_killed_too),
    ("a_record_of_another_boot_thaws_nothing", a_record_of_another_boot_thaws_nothing),
    ("without_a_guard_nothing_is_stopped", without_a_guard_nothing_is_stopped),
    ("a_stranger_who_resumes_is_noticed", a_stranger_who_resumes_is_noticed),
    ("who_ran_and_stands_again_is_noticed", who_ran_and_stands_again_is_noticed),
    ("a_traced_process_stands", a_traced_process_stands),
    ("further_writers_stand_too", further_writers_stand_too),
    ("a_unified_cgroup_is_frozen_by_its_freezer", a_unified_cgroup_is_frozen_by_its_freezer),
    ("an_older_cgroup_is_frozen_by_its_freezer", an_older_cgroup_is_frozen_by_its_freezer),
    ("a_cgroup_of_another_controller_is_stopped_by_signals", a_cgroup_of_another_controller_is_stopped_by_signals),
    ("a_tree_that_is_a_cgroup_is_frozen_by_its_freezer", a_tree_that_is_a_cgroup_is_frozen_by_its_freezer),
    ("a_cgroup_that_others_froze_stays_frozen", a_cgroup_that_others_froze_stays_frozen),
    ("killing_the_freezer_thaws_a_cgroup", killing_the_freezer_thaws_a_cgroup),
    ("a_cgroup_with_fsnap_in_it_is_refused", a_cgroup_with_fsnap_in_it_is_refused),
    ("process_one_is_refused", process_one_is_refused),
];

fn freeze(live: &Live) -> fsnap::quiesce::Frozen {
    Quiesce::prepare(live.tree(), &guard()).unwrap().freeze(LONG).unwrap()
}

fn is_stopped(id: ProcessId) -> bool {
    states(id).chars().all(|state| state == 'T')
}

fn every_thread_stands_and_runs_again() {
    let temp = tempfile::tempdir().unwrap();
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "20"]);
    wait_for_growth(temp.path());
    let frozen = freeze(&live);
    assert_eq!(states(live.id), "T".repeat(21));
    assert_still(temp.path());
    frozen.check().unwrap();
    frozen.thaw().unwrap();
    wait_for_growth(temp.path());
}

fn a_fork_storm_stands() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("file");
    let live = Live::start(&["storm", file.to_str().unwrap()]);
    for _ in 0..20 {
        wait_for_growth(&file);
        let frozen = freeze(&live);
        let found = live.tree();
        // None escaped: a look of our own finds only what the freeze knows, and all of it stopped.
        assert!(found.members().all(|member| frozen.tree().contains(member.id)));
        assert!(found.members().all(|member| is_stopped(member.id)));
        frozen.thaw().unwrap();
    }
    let frozen = freeze(&live);
    // Children whose parent ended before the freeze belong to nobody in the tree and may write their last byte.
    wait_until("the end of the orphans", || !somebody_runs_with(&file));
    assert_still(&file);
    frozen.thaw().unwrap();
    wait_for_growth(&file);
}

/// Whether a process has the file open and is not stopped.
fn somebody_runs_with(file: &Path) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.any(|pid| {
        let mut open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.any(|fd| fs::read_link(fd.path()).is_ok_and(|opened| opened == *file))
            && ProcessId::of(pid).is_ok_and(|id| id.is_alive() && !is_stopped(id))
    })
}

fn a_process_that_spawns_all_the_time_stands() {
    let live = Live::start(&["vforks"]);
    for _ in 0..100 {
        let frozen = freeze(&live);
        assert!(is_stopped(live.id));
        frozen.thaw().unwrap();
    }
}

fn a_process_whose_first_thread_ended_stands() {
    let temp = tempfile::tempdir().unwrap();
    let live = Live::start(&["first-thread-ends", temp.path().to_str().unwrap()]);
    wait_until("the end of the first thread", || states(live.id).contains('Z'));
    wait_for_growth(temp.path());
    let frozen = freeze(&live);
    assert_eq!(states(live.id), "TTZ");
    assert_still(temp.path());
    frozen.thaw().unwrap();
    wait_for_growth(temp.path());
}

fn what_others_stopped_stays_stopped() {
    let live = Live::start(&["stopped-child"]);
    let child = live.tree().members().map(|member| member.id).find(|&id| id != live.id).unwrap();
    let frozen = freeze(&live);
    assert!(!frozen.record().processes.contains(&child));
    assert!(is_stopped(live.id) && is_stopped(child));
    let record = frozen.record().clone();
    frozen.thaw().unwrap();
    assert!(!is_stopped(live.id) && is_stopped(child));
    record.thaw().unwrap();
    assert!(is_stopped(child), "recovery leaves it alone, too");
}

fn dropping_thaws() {
    let temp = tempfile::tempdir().unwrap();
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "2"]);
    drop(freeze(&live));
    wait_for_growth(temp.path());
}

fn a_deadline_names_the_process_and_thaws() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("file");
    let script = format!("'{0}' append '{1}' >/dev/null &", Live::program().display(), file.display());
    let live = Live::start_in_namespace(&script, &["vfork-held"]);
    wait_until("the wait for the child", || states(live.id) == "D");
    wait_for_growth(&file);
    let began = Instant::now();
    let quiesce = Quiesce::prepare(live.tree(), &guard()).unwrap();
    let error = quiesce.freeze(Duration::from_millis(300)).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(5));
    match &error {
        Error::Deadline { process, state: 'D', .. } => assert_eq!(*process, live.id),
        other => panic!("{other:?}"),
    }
    let text = error.to_string();
    assert!(text.contains(&format!("process {} (helper) did not stop within 0.3 s", live.pid())), "{text}");
    wait_for_growth(&file);
}

fn killing_the_freezer_thaws() {
    let temp = tempfile::tempdir().unwrap();
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "2"]);
    let mut freezer = helper_command(&["freeze", &live.pid().to_string()]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(freezer.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(is_stopped(live.id));
    freezer.kill().unwrap();
    freezer.wait().unwrap();
    wait_for_growth(temp.path());
}

fn a_record_thaws_when_the_guard_is_killed_too() {
    let temp = tempfile::tempdir().unwrap();
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "2"]);
    let mut freezer = helper_command(&["freeze", &live.pid().to_string()]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(freezer.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let record: FreezeRecord = serde_json::from_str(&line).unwrap();
    let both = Tree::of_pid(freezer.id().cast_signed()).unwrap();
    assert_eq!(both.members().count(), 2, "the freezer and its guard");
    let guard = both.members().find(|member| member.id.pid != freezer.id().cast_signed()).unwrap();
    signal(guard.id, "KILL");
    freezer.kill().unwrap();
    freezer.wait().unwrap();
    assert_still(temp.path());
    record.thaw().unwrap();
    wait_for_growth(temp.path());
    record.thaw().expect("a second time there is nothing to do");
}

fn a_record_of_another_boot_thaws_nothing() {
    let live = Live::start(&["append", "/dev/null"]);
    signal(live.id, "STOP");
    wait_until("the stop", || is_stopped(live.id));
    let mut record = FreezeRecord::new();
    record.processes.insert(live.id);
    let earlier = FreezeRecord { boot: "0".into(), ..record.clone() };
    earlier.thaw().unwrap();
    assert!(is_stopped(live.id));
    let reused = ProcessId { start_time: live.id.start_time - 1, ..live.id };
    FreezeRecord { processes: [reused].into(), ..FreezeRecord::new() }.thaw().unwrap();
    assert!(is_stopped(live.id));
    record.thaw().unwrap();
    wait_until("the thaw", || !is_stopped(live.id));
}

fn without_a_guard_nothing_is_stopped() {
    let temp = tempfile::tempdir().unwrap();
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "2"]);
    let absent = GuardCommand { program: temp.path().join("absent"), args: vec![] };
    assert!(matches!(Quiesce::prepare(live.tree(), &absent), Err(Error::Guard { .. })));
    let mute = GuardCommand { program: "/bin/true".into(), args: vec![] };
    let error = Quiesce::prepare(live.tree(), &mute).unwrap().freeze(LONG).unwrap_err();
    assert!(matches!(error, Error::Guard { .. }), "{error}");
    wait_for_growth(temp.path());
}

fn a_stranger_who_resumes_is_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "2"]);
    let frozen = freeze(&live);
    frozen.check().unwrap();
    signal(live.id, "CONT");
    wait_for_growth(temp.path());
    assert!(matches!(frozen.check(), Err(Error::Resumed { process, .. }) if process == live.id));
}

/// Whether this kernel counts how often a process has run.
fn runs_are_counted() -> bool {
    let counted = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    !matches!(counted.split_whitespace().last(), None | Some("0"))
}

fn who_ran_and_stands_again_is_noticed() {
    if !runs_are_counted() {
        return skip("this kernel does not count how often a process has run");
    }
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("file");
    let live = Live::start(&["append", file.to_str().unwrap()]);
    for stopped_before in [false, true] {
        if stopped_before {
            signal(live.id, "STOP");
            wait_until("its stop", || is_stopped(live.id));
        }
        let frozen = freeze(&live);
        frozen.check().unwrap();
        signal(live.id, "CONT");
        wait_for_growth(&file);
        signal(live.id, "STOP");
        wait_until("its stop", || is_stopped(live.id));
        assert!(matches!(frozen.check(), Err(Error::Resumed { process, .. }) if process == live.id));
        frozen.thaw().unwrap();
        assert_eq!(is_stopped(live.id), stopped_before);
    }
}

fn a_traced_process_stands() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("file");
    let mut command = Command::new("strace");
    let live = Live::run(command.args(["-o", "/dev/null"]).arg(Live::program()).arg("append").arg(&file));
    let traced = live.tree().members().map(|member| member.id).find(|&id| id != live.id).unwrap();
    // It stands, or that it did not is noticed, and the tracer needs its time for the former.
    wait_until("a freeze that holds", || {
        wait_for_growth(&file);
        let frozen = Quiesce::prepare(Tree::of_processes([traced]), &guard()).unwrap().freeze(LONG).unwrap();
        let before = fs::metadata(&file).unwrap().len();
        std::thread::sleep(Duration::from_millis(5));
        let stood = frozen.check().is_ok();
        if stood {
            assert_eq!(fs::metadata(&file).unwrap().len(), before);
        }
        frozen.thaw().unwrap();
        stood
    });
    wait_for_growth(&file);
}

fn further_writers_stand_too() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("file");
    let (one, other) = (Live::start(&["append", "/dev/null"]), Live::start(&["append", file.to_str().unwrap()]));
    let mut frozen = freeze(&one);
    wait_for_growth(&file);
    frozen.add([other.id, ProcessId { pid: other.pid(), start_time: 1 }]).unwrap();
    assert!(is_stopped(other.id));
    assert_still(&file);
    assert!(frozen.record().processes.contains(&other.id));
    frozen.check().unwrap();
    frozen.thaw().unwrap();
    wait_for_growth(&file);

    let mut quiesce = Quiesce::prepare(one.tree(), &guard()).unwrap();
    quiesce.also([other.id]);
    assert!(quiesce.record().processes.contains(&other.id));
    let frozen = quiesce.freeze(LONG).unwrap();
    assert!(is_stopped(other.id));
    drop(frozen);
    wait_for_growth(&file);
}

/// A control group of a test's own; its processes must have ended when it is dropped.
struct Group(PathBuf);

impl Group {
    fn new(hierarchy: &Path, name: &str) -> Self {
        let dir = hierarchy.join(format!("fsnap-test-{}-{name}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn add(&self, live: &Live) {
        fs::write(self.0.join("cgroup.procs"), live.pid().to_string()).unwrap();
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap()
    }

    fn freeze(&self) -> fsnap::quiesce::Frozen {
        let tree = Tree::of_cgroup(Cgroup::open(&self.0).unwrap()).unwrap();
        Quiesce::prepare(tree, &guard()).unwrap().freeze(LONG).unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A process that was killed leaves its group only when it is reaped.
        let deadline = Instant::now() + LONG;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Where the hierarchy is mounted, told by type and option; `None` skips the case, aloud.
fn hierarchy(fstype: &str, option: &str) -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let found = table.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let (kind, options) = (system.split(' ').next()?, system.split(' ').next_back()?);
        let fits = kind == fstype && (option.is_empty() || options.split(',').any(|have| have == option));
        fits.then(|| mount.split(' ').nth(4).map(PathBuf::from)).flatten()
    });
    if found.is_none() {
        skip(&format!("no {fstype} hierarchy {option} is mounted here"));
    }
    found
}

fn a_unified_cgroup_is_frozen_by_its_freezer() {
    let Some(unified) = hierarchy("cgroup2", "") else { return };
    let temp = tempfile::tempdir().unwrap();
    let group = Group::new(&unified, "v2");
    let inner = Group::new(&group.0, "inner");
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "3"]);
    inner.add(&live);
    let frozen = group.freeze();
    assert!(frozen.tree().contains(live.id), "processes of inner groups belong to it");
    assert!(group.read("cgroup.events").contains("frozen 1"));
    assert!(!is_stopped(live.id), "no signal was sent");
    assert_still(temp.path());
    frozen.check().unwrap();
    let record = frozen.record().clone();
    assert_eq!(record.cgroup.as_ref().map(Cgroup::dir), Some(group.0.as_path()));
    frozen.thaw().unwrap();
    wait_for_growth(temp.path());
    fs::write(group.0.join("cgroup.freeze"), "1").unwrap();
    record.thaw().unwrap();
    wait_for_growth(temp.path());
    // The same group by its name within the hierarchy.
    let name = Path::new("/").join(group.0.strip_prefix(&unified).unwrap());
    assert_eq!(Cgroup::open(&name).unwrap().dir(), group.0);
    assert!(Cgroup::open(Path::new("/fsnap-no-such-group")).is_err());
    assert!(Cgroup::open(Path::new("/tmp")).is_err());
    assert!(Cgroup::open(&group.0.join("../..")).is_err());
    drop(live);
}

fn an_older_cgroup_is_frozen_by_its_freezer() {
    let Some(freezer) = hierarchy("cgroup", "freezer") else { return };
    let temp = tempfile::tempdir().unwrap();
    let group = Group::new(&freezer, "v1");
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "3"]);
    group.add(&live);
    let frozen = group.freeze();
    assert_eq!(group.read("freezer.state"), "FROZEN\n");
    assert_still(temp.path());
    frozen.check().unwrap();
    frozen.thaw().unwrap();
    assert_eq!(group.read("freezer.state"), "THAWED\n");
    wait_for_growth(temp.path());
    drop(live);
}

fn a_cgroup_of_another_controller_is_stopped_by_signals() {
    let Some(pids) = hierarchy("cgroup", "pids") else { return };
    let temp = tempfile::tempdir().unwrap();
    let group = Group::new(&pids, "pids");
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "3"]);
    group.add(&live);
    let frozen = group.freeze();
    assert!(is_stopped(live.id));
    assert_still(temp.path());
    frozen.thaw().unwrap();
    wait_for_growth(temp.path());
    drop(live);
}

fn a_tree_that_is_a_cgroup_is_frozen_by_its_freezer() {
    let Some(unified) = hierarchy("cgroup2", "") else { return };
    let group = Group::new(&unified, "tree");
    let (live, stranger) = (Live::start(&["append", "/dev/null"]), Live::start(&["append", "/dev/null"]));
    group.add(&live);
    let frozen = freeze(&live);
    assert!(frozen.record().cgroup.is_some() && !is_stopped(live.id));
    drop(frozen);
    group.add(&stranger);
    let frozen = freeze(&live);
    assert!(frozen.record().cgroup.is_none() && is_stopped(live.id), "others live there, too");
    drop(frozen);
    drop((live, stranger));
}

fn a_cgroup_that_others_froze_stays_frozen() {
    let Some(unified) = hierarchy("cgroup2", "") else { return };
    let group = Group::new(&unified, "frozen");
    let live = Live::start(&["append", "/dev/null"]);
    group.add(&live);
    fs::write(group.0.join("cgroup.freeze"), "1").unwrap();
    let frozen = group.freeze();
    assert_eq!(frozen.record().cgroup, None);
    frozen.thaw().unwrap();
    assert!(group.read("cgroup.events").contains("frozen 1"));
    fs::write(group.0.join("cgroup.freeze"), "0").unwrap();
    drop(live);
}

fn killing_the_freezer_thaws_a_cgroup() {
    let Some(unified) = hierarchy("cgroup2", "") else { return };
    let temp = tempfile::tempdir().unwrap();
    let group = Group::new(&unified, "killed");
    let live = Live::start(&["threads", temp.path().to_str().unwrap(), "2"]);
    group.add(&live);
    let mut freezer = helper_command(&["freeze", &live.pid().to_string()]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(freezer.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(group.read("cgroup.events").contains("frozen 1"));
    freezer.kill().unwrap();
    freezer.wait().unwrap();
    wait_for_growth(temp.path());
    drop(live);
}

fn a_cgroup_with_fsnap_in_it_is_refused() {
    for (fstype, option) in [("cgroup2", ""), ("cgroup", "freezer"), ("cgroup", "pids")] {
        let Some(hierarchy) = hierarchy(fstype, option) else { continue };
        let group = Group::new(&hierarchy, "inside");
        let live = Live::start(&["append", "/dev/null"]);
        group.add(&live);
        let said = helper_command(&["enter-and-freeze", group.0.to_str().unwrap()]).output().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(said.starts_with("fsnap itself runs in the control group"), "{said:?}");
        assert!(!is_stopped(live.id));
        drop(live);
    }
}

fn process_one_is_refused() {
    let refused = Quiesce::prepare(Tree::of_pid(1).unwrap(), &guard());
    assert!(matches!(refused, Err(Error::Init)), "{refused:?}");
}
