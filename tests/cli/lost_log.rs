//! The end of the catalog's log is lost: what is left is a whole earlier state, and nothing is deleted for it.
//!
//! SQLite takes a log that was cut short for a shorter one. So the catalog forgets the last changes, and what they recorded is
//! known to the stores alone: recovery must not take it for half-done work.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::faults::stopped_at;
use crate::site::{Shell, Site};

/// What the catalog says: the checkpoints with their tags, and the branches.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Said {
    checkpoints: BTreeSet<String>,
    tags: BTreeSet<String>,
    branches: BTreeSet<String>,
}

fn json(shell: &Shell<'_>, command: &str) -> Value {
    serde_json::from_str(&shell.run(&format!("fsnap {command} --json"))).unwrap()
}

fn texts(list: &Value, key: &str) -> BTreeSet<String> {
    list.as_array().unwrap().iter().map(|one| one[key].as_str().unwrap().to_owned()).collect()
}

fn said(shell: &Shell<'_>) -> Said {
    let log = json(shell, "log");
    let tags = log.as_array().unwrap().iter().flat_map(|one| one["tags"].as_array().unwrap());
    Said {
        checkpoints: texts(&log, "id"),
        tags: tags.map(|tag| tag.as_str().unwrap().to_owned()).collect(),
        branches: texts(&json(shell, "branches"), "name"),
    }
}

/// The last part of every image's place that is recorded.
fn recorded(shell: &Shell<'_>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (list, key) in [("log", "snapshot"), ("branches", "path")] {
        for one in json(shell, list).as_array().unwrap() {
            let members = one["members"].as_array().unwrap();
            names.extend(
                members.iter().map(|member| member[key].as_str().unwrap().rsplit('/').next().unwrap().to_owned()),
            );
        }
    }
    names
}

fn images(site: &Site, store: &str) -> BTreeSet<String> {
    site.images(store).iter().map(|name| name.rsplit('/').next().unwrap().to_owned()).collect()
}

/// After each of these, what the catalog says, and how long its log is.
const STEPS: &[&str] = &[
    "fsnap checkpoint -t two",
    "fsnap branch one work | xargs -I{} touch {}/mine",
    "fsnap tag one another",
    "fsnap checkpoint -t three",
    "fsnap branch three other",
    "fsnap rm --branch other",
];

/// The lengths that are tried: by default the ends of the steps and what lies around them, and some frames between.
fn lengths(ends: &[u64]) -> BTreeSet<u64> {
    const HEADER: u64 = 32;
    const FRAME: u64 = 24 + 4096;
    let last = *ends.last().unwrap();
    let frames = (last - HEADER) / FRAME;
    let every = if std::env::var_os("FSNAP_TEST_EVERY").is_some() { 1 } else { frames.div_ceil(12) };
    let between = (0..frames).step_by(usize::try_from(every).unwrap()).map(|frame| HEADER + frame * FRAME);
    let around = |end: u64| [end - 1, end, end + 23, end + 1000];
    [0, 1, 31]
        .into_iter()
        .chain(between)
        .chain(ends.iter().copied().flat_map(around))
        .filter(|&at| at <= last)
        .collect()
}

fn cut_short(site: &Site, dir: &str) {
    let shell = site.in_dir(dir);
    shell.run("fsnap init db && fsnap checkpoint -t one");
    // Somebody who reads keeps the log from being put into the catalog.
    let reader = rusqlite::Connection::open(site.path("state/catalog.db")).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM checkpoint").unwrap();
    let log = site.path("state/catalog.db-wal");
    let mut states = vec![(0, said(&shell))];
    for step in STEPS {
        shell.run(&format!("date +%N >>db/a; {step}"));
        states.push((fs::metadata(&log).unwrap().len(), said(&shell)));
    }
    shell.run("cp -a $T/state $T/good && rm -f $T/good/catalog.db-shm");
    drop(reader);
    let (all, whole) = (images(site, &format!("{dir}/.fsnap")), fs::read(site.path("good/catalog.db-wal")).unwrap());
    let ends: Vec<u64> = states.iter().map(|(length, _)| *length).skip(1).collect();
    assert!(ends.is_sorted_by(|a, b| a < b) && whole.len() as u64 == *ends.last().unwrap(), "{ends:?}");

    for length in lengths(&ends) {
        shell.run("rm -rf $T/state && cp -a $T/good $T/state");
        fs::write(&log, &whole[..usize::try_from(length).unwrap()]).unwrap();
        let told = json(&shell, "recover");
        let now = said(&shell);
        // The state after the last step that is there whole, or a step further.
        let step = states.iter().rposition(|(end, _)| *end <= length).unwrap();
        let allowed = &states[step..(step + 2).min(states.len())];
        let is = |part: &dyn Fn(&Said) -> BTreeSet<String>| allowed.iter().any(|(_, state)| part(state) == part(&now));
        assert!(is(&|state| state.checkpoints.clone()), "{length}: {now:?} is none of {allowed:?}: {told}");
        assert!(is(&|state| state.branches.clone()), "{length}: {now:?} is none of {allowed:?}: {told}");
        assert!(is(&|state| state.tags.clone()), "{length}: {now:?} is none of {allowed:?}: {told}");
        // Nothing was deleted; what is not recorded is named, by both, and only what was deleted before is missing.
        assert_eq!(images(site, &format!("{dir}/.fsnap")), all, "{length}: {told}");
        let verified = shell.output("fsnap verify --json");
        let verified: Value = serde_json::from_slice(&verified.stdout).unwrap();
        assert_eq!(verified["damage"], serde_json::json!([]), "{length}");
        let unknown: BTreeSet<String> =
            texts(&verified["unknown"], "image").iter().map(|at| at.rsplit('/').next().unwrap().to_owned()).collect();
        let strays: BTreeSet<String> = all.difference(&recorded(&shell)).cloned().collect();
        assert_eq!(unknown, strays, "{length}");
        let recovered = shell.run("fsnap recover");
        assert_eq!(recovered.lines().filter(|line| line.starts_with("unknown: ")).count(), strays.len(), "{recovered}");
        // And work goes on.
        shell.run("fsnap checkpoint -t next && fsnap diff next && fsnap rm next");
        assert_eq!(shell.run("fsnap diff one"), "M db/a");
        assert_eq!(images(site, &format!("{dir}/.fsnap")), all, "{length}");
    }
}

#[test]
fn of_a_store_of_rsync_nothing_is_deleted() {
    cut_short(&Site::plain(), ".");
}

#[test]
fn of_a_store_of_btrfs_nothing_is_deleted() {
    cut_short(&Site::btrfs(), "fs");
}

#[test]
fn a_checkpoint_is_still_there_if_the_log_was_put_into_the_catalog() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -t one");
    let left = fs::metadata(site.path("state/catalog.db-wal")).unwrap().len();
    assert_eq!(left, 0, "the last to close it puts the log into the catalog");
    for log in ["", "x", "not a log, and longer than the header of one"] {
        fs::write(site.path("state/catalog.db-wal"), log).unwrap();
        assert_eq!(site.run("fsnap verify"), "verified the catalog and 1 checkpoint: 0 damaged");
        assert_eq!(site.run("fsnap diff one"), "");
    }
}

#[test]
fn branches_stay_in_the_log_as_long_as_they_are_alone_there() {
    let site = Site::plain();
    let log = || fs::metadata(site.path("state/catalog.db-wal")).unwrap().len();
    let branches = || site.run("fsnap branches --json | grep -c '\"name\"'");
    site.run("fsnap init db && fsnap checkpoint -t one");
    let mut before = 0;
    let left = (1..).take_while(|number| {
        site.run(&format!("fsnap branch one b{number}"));
        let left = log() > before;
        before = log();
        left
    });
    let left = left.count();
    assert!((3..20).contains(&left), "{left} branches were left in the log");
    assert_eq!(before, 0, "when it is long enough, it is put into the catalog");
    assert_eq!(branches(), (left + 1).to_string());
    site.run("fsnap branch one third");
    assert!(log() > 0);
    assert_eq!(branches(), (left + 2).to_string());
    assert_eq!(log(), 0, "any other command puts it there");
    assert_eq!(branches(), (left + 2).to_string());
    // What a command has left that could not put it there, because somebody read, or because it was killed.
    site.run("fsnap branch one before");
    let reader = rusqlite::Connection::open(site.path("state/catalog.db")).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM checkpoint").unwrap();
    site.run("fsnap checkpoint -t more && cp -a state good");
    drop(reader);
    site.run("rm -r state && mv good state && rm state/catalog.db-shm");
    assert!(log() > 0);
    site.run("fsnap branch one after");
    assert_eq!(log(), 0, "a checkpoint was in it");
    // A checkpoint that is sealed while a branch is made.
    let (branching, pid) = stopped_at("branch:grown", site.top().command("exec fsnap branch one fourth"));
    site.run("fsnap checkpoint -t two");
    assert!(log() > 0, "who stands has it open");
    kill_process(pid, Signal::CONT).unwrap();
    assert!(branching.wait_with_output().unwrap().status.success());
    assert_eq!(log(), 0, "the checkpoint was in it");
}

/// `fsnap branch` does not wait until its record is on the disk: its intent is there, and its clones are.
#[test]
fn a_branch_outlives_a_power_cut_that_takes_its_record() {
    const IN_ANOTHER_BOOT: &str =
        "unshare --mount sh -c 'mount --bind boot /proc/sys/kernel/random/boot_id && exec fsnap recover'";
    for (site, dir) in [(Site::plain(), "."), (Site::btrfs(), "fs")] {
        let shell = site.in_dir(dir);
        shell.run("echo 00000000-0000-4000-8000-000000000000 >boot && fsnap init db && fsnap checkpoint -t one");
        let ended_at = |point: &str| shell.run(&format!("FSNAP_FAILPOINT={point}=kill fsnap branch one work || :"));
        // What a power cut leaves that comes right after the answer.
        ended_at("branch:grown");
        assert_eq!(shell.run(IN_ANOTHER_BOOT), "finished: branch work");
        assert_eq!(texts(&json(&shell, "branches"), "name"), BTreeSet::from(["work".to_owned()]));
        let path = shell.run("fsnap branches --json | sed -n 's/.*\"path\": \"\\(.*\\)\".*/\\1/p'");
        shell.run(&format!("diff -r db {path} && touch {path}/mine && fsnap checkpoint --branch work -t two"));
        assert_eq!(shell.run("fsnap diff one two"), "A db/mine");
        shell.run("fsnap rm two && fsnap rm --branch work");
        // In the boot in which it was begun nothing is lost: there it was not finished.
        ended_at("branch:grown");
        assert_eq!(shell.run("fsnap recover"), "undone: branch work");
        // A clone that had not reached the disk.
        ended_at("branch:recorded");
        assert_eq!(shell.run(IN_ANOTHER_BOOT), "undone: branch work");
        // Somebody wants the checkpoint no more.
        ended_at("branch:grown");
        assert_eq!(shell.run("fsnap branches --json"), "[]");
        assert_eq!(images(&site, &format!("{dir}/.fsnap")).len(), 1, "the checkpoint alone");
    }
}

#[test]
fn a_log_is_read_on_read_only_media_also_without_its_index() {
    let site = Site::plain();
    let line = "mount --bind copy copy && mount -o remount,bind,ro copy && fsnap branches --json";
    site.run("fsnap init db && fsnap checkpoint -t one && fsnap branch one grown && cp -a state copy");
    assert!(fs::metadata(site.path("copy/catalog.db-wal")).unwrap().len() > 0);
    for remove in ["true", "rm copy/catalog.db-shm", "rm copy/catalog.db-wal"] {
        site.run(remove);
        let told = site.run(&format!("FSNAP_STATE=copy unshare --mount sh -c '{line}'"));
        // Without the log there is no branch.
        assert_eq!(told.contains("\"grown\""), !remove.ends_with("-wal"), "{remove}: {told}");
        let refused = line.replace("branches --json", "tag one two");
        let told = site.fail(&format!("FSNAP_STATE=copy unshare --mount sh -c '{refused}'"));
        assert!(told.contains("copy/catalog.db may not be written by this user, or not where it is mounted"), "{told}");
    }
}

#[test]
fn what_is_no_log_is_refused() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -t one");
    let (catalog, log) = (site.path("state/catalog.db"), site.path("state/catalog.db-wal"));
    for make in ["mkfifo", "mkdir", "ln -s /dev/zero"] {
        let line = format!("rm -f {0} && {make} {0}", log.display());
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success());
        for line in ["log", "checkpoint"] {
            let told = site.fail(&format!("fsnap {line}"));
            let expected = format!("fsnap: error: the catalog {} is damaged: it is not a regular file", log.display());
            assert!(told.starts_with(&expected), "{make}: {told}");
        }
        site.run("rm -rf state/catalog.db-wal && fsnap verify");
    }
    // The catalog without its log's base: a new one must not take over the log.
    fs::write(&log, "something").unwrap();
    fs::rename(&catalog, site.path("away")).unwrap();
    let told = site.fail("fsnap init web");
    assert!(told.contains("it is gone, and its log catalog.db-wal is not; remove that, too"), "{told}");
    assert!(!catalog.exists());
    // An empty one has nothing to add: a first command that was cut short has left it.
    fs::write(&log, "").unwrap();
    site.run("mkdir web && fsnap init web");
    assert!(catalog.exists());
    fs::rename(site.path("away"), &catalog).unwrap();
    assert_eq!(site.run("fsnap verify"), "verified the catalog and 1 checkpoint: 0 damaged");
}
