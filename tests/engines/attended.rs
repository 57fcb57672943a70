//! The process that stands by for the frozen window, and its end: whenever it is killed, stopped or left alone, the hook does what it can no
//! more, or the dump fails; and never is anything left, least of all the process itself.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::Case;
use crate::alone::{Cgroup, classes};
use crate::generic::call;
use crate::hook::{is_asleep, says, untouched};
use crate::site::{Site, Volume, id_in, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("it_takes_what_the_hook_would_take", it_takes_what_the_hook_would_take),
    ("killed_anywhere_it_costs_nothing_but_the_class", killed_anywhere_it_costs_nothing_but_the_class),
    ("a_hook_that_is_killed_has_failed", a_hook_that_is_killed_has_failed),
    ("a_note_that_cannot_appear_fails_the_dump", a_note_that_cannot_appear_fails_the_dump),
    ("stopped_it_is_ended_and_nobody_waits", stopped_it_is_ended_and_nobody_waits),
    ("frozen_it_is_ended_and_nobody_waits", frozen_it_is_ended_and_nobody_waits),
    ("it_ends_with_the_engine", it_ends_with_the_engine),
    ("it_is_sent_away_by_a_second_begin", it_is_sent_away_by_a_second_begin),
    ("it_keeps_no_place_busy", it_keeps_no_place_busy),
];

/// Shell that does something to the process that stands by, whose pid is in `$attendant`.
fn to_the_attendant(site: &Site, what: &str) -> String {
    let state = site.path("state").display().to_string();
    format!(
        "for process in /proc/[0-9]*; do\n\
         case \"$(readlink $process/exe)\" in */fsnap) ;; *) continue ;; esac\n\
         tr '\\0' '\\n' <$process/environ | grep -qxF 'FSNAP_STATE={state}' || continue\n\
         attendant=${{process#/proc/}}; {what}\ndone\n"
    )
}

fn it_takes_what_the_hook_would_take() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    // The hook has nothing to look for: it would say so by its own failure.
    let script = site.hook_after("post-dump", "export FSNAP_FAILPOINT=attendant:told=sleep:1");
    let images = site.images();
    site.dump(oracle.pid, &images, &script).unwrap();
    let checkpoint = site.json(["show", "--json", &id_in(&images)]);
    assert_eq!(classes(&checkpoint), ["point-in-time", "point-in-time"], "{checkpoint}");
    site.holds_nothing_but(1);
    let alone = Site::without_attendant(&[Volume::Btrfs, Volume::Rsync]);
    let other = alone.small_oracle();
    let script = alone.hook_after("post-dump", &to_the_attendant(&alone, "echo $attendant >>found"));
    alone.dump(other.pid, &alone.images(), &script).unwrap();
    assert!(!alone.path("found").exists());
    oracle.goes_on();
}

fn killed_anywhere_it_costs_nothing_but_the_class() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let places = [
        ("attendant:ready", true),
        ("take:opened", true),
        ("take:snapshot", true),
        ("take:all", true),
        ("hook:taken", true),
        ("hook:written", true),
        ("attendant:told", false),
    ];
    for (count, (place, whole)) in places.into_iter().enumerate() {
        // The hook before the freeze comes by none of these places, and its child inherits what it is armed with.
        let script = site.hook_after("pre-dump", &format!("export FSNAP_FAILPOINT={place}=kill"));
        let images = site.images();
        site.dump(oracle.pid, &images, &script).unwrap_or_else(|error| panic!("{place}: {error}"));
        let checkpoint = site.json(["show", "--json", &id_in(&images)]);
        let expected = if whole { ["point-in-time", "point-in-time"] } else { ["crash-consistent", "fuzzy"] };
        assert_eq!(classes(&checkpoint), expected, "{place}: {checkpoint}");
        site.holds_nothing_but(count + 1);
        oracle.goes_on();
    }
}

fn a_hook_that_is_killed_has_failed() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    for (place, signal) in [("take:opened", Signal::TERM), ("take:all", Signal::KILL), ("hook:written", Signal::TERM)] {
        let pid_file = site.new_path("pid");
        let lines = format!("echo $$ >'{}'; export FSNAP_FAILPOINT={place}=sleep:2000", pid_file.display());
        let script = site.hook_after("post-dump", &lines);
        let images = site.images();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_until("the attendant's sleep", || site.fsnaps().into_iter().any(is_asleep));
                let hook: i32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
                kill_process(Pid::from_raw(hook).unwrap(), signal).unwrap();
            });
            site.failing_dump(oracle.pid, &images, &script);
        });
        oracle.goes_on();
        wait_until("what was taken to be taken back", || site.fsnaps().is_empty());
        site.holds_nothing_but(0);
        assert!(!images.join("fsnap.json").exists(), "{place}");
    }
    untouched(&site, &oracle);
}

fn a_note_that_cannot_appear_fails_the_dump() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    // In the way of the rename, for every intent there may be.
    let intents = site.path("state/intents").display().to_string();
    let script = site.hook_after("post-dump", &format!("for n in 1 2 3; do mkdir '{intents}'/$n.taken; done"));
    let log = site.failing_dump(oracle.pid, &site.images(), &script);
    says(&log, &["fsnap: error: cannot write", ".taken"]);
    for number in 1..4 {
        fs::remove_dir(site.path(&format!("state/intents/{number}.taken"))).unwrap();
    }
    untouched(&site, &oracle);
}

/// Before it hears of the freeze, and while it works: the hook ends it, and does all by itself.
fn stopped_it_is_ended_and_nobody_waits() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    for (count, place) in ["attendant:ready", "take:snapshot", "hook:written"].into_iter().enumerate() {
        let script = site.hook_after("pre-dump", &format!("export FSNAP_FAILPOINT={place}=stop"));
        let images = site.images();
        site.dump(oracle.pid, &images, &script).unwrap_or_else(|error| panic!("{place}: {error}"));
        let checkpoint = site.json(["show", "--json", &id_in(&images)]);
        assert_eq!(classes(&checkpoint), ["point-in-time", "point-in-time"], "{place}: {checkpoint}");
        site.holds_nothing_but(count + 1);
        oracle.goes_on();
    }
    wait_until("the end of all", || site.fsnaps().is_empty());
}

/// By a control group: its threads sleep then, and are not stopped.
fn frozen_it_is_ended_and_nobody_waits() {
    let cgroup = Cgroup::of_each_kind().into_iter().find(|cgroup| cgroup.control == "cgroup.freeze");
    let cgroup = cgroup.expect("this machine has no unified hierarchy of control groups");
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let (oracle, images) = (site.small_oracle(), site.images());
    let begun = call(&site, "starting", oracle.pid, &images);
    assert!(begun.status.success(), "{}", said(&begun));
    let attendant = site.fsnaps()[0];
    cgroup.add(attendant);
    let set = |word: &str| fs::write(cgroup.dir.join("cgroup.freeze"), word).unwrap();
    set("1");
    let says = |word: &str| fs::read_to_string(cgroup.dir.join("cgroup.events")).unwrap().contains(word);
    wait_until("the attendant's freeze", || says("frozen 1"));
    // rsync refuses a file that changes all the time while it is read.
    let signal = |signal| kill_process(Pid::from_raw(oracle.pid).unwrap(), signal).unwrap();
    signal(Signal::STOP);
    let taken = call(&site, "frozen", oracle.pid, &images);
    signal(Signal::CONT);
    let is_there = site.fsnaps().contains(&attendant);
    set("0");
    assert!(taken.status.success() && !is_there, "{}", said(&taken));
    let checkpoint = site.json(["show", "--json", &id_in(&images)]);
    assert_eq!(classes(&checkpoint), ["point-in-time", "point-in-time"], "{checkpoint}");
    site.holds_nothing_but(1);
    oracle.goes_on();
}

fn it_ends_with_the_engine() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    // By hand: whoever calls is the engine, and lives on for a while.
    let mut engine = Command::new("sh");
    engine.args(["-c", "\"$0\" && echo begun && exec sleep infinity"]).arg(site.hook());
    let images = site.images();
    let mut engine =
        hook_call(&site, &mut engine, "pre-dump", &images, oracle.pid).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(engine.stdout.take().unwrap()).lines();
    assert_eq!(said.nth(1).unwrap().unwrap(), "begun");
    let attendant = site.fsnaps()[0];
    // Beside it, others work.
    site.ok(["log"]);
    site.ok(["checkpoint"]);
    assert_eq!(site.fsnaps(), [attendant]);
    engine.kill().unwrap();
    engine.wait().unwrap();
    wait_until("its end", || site.fsnaps().is_empty());
    site.holds_nothing_but(1);
    oracle.goes_on();
}

fn it_is_sent_away_by_a_second_begin() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let images = site.images();
    let call = |action| {
        let output = hook_call(&site, &mut Command::new(site.hook()), action, &images, oracle.pid).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let id = call("pre-dump");
    let first = site.fsnaps();
    assert_eq!(call("pre-dump"), id);
    assert_eq!(first.len(), 1);
    wait_until("the other one to be alone", || {
        let second = site.fsnaps();
        second.len() == 1 && second != first
    });
    // Another directory under the same name: what stands by is of no use, and in nobody's way.
    fs::remove_dir(&images).unwrap();
    fs::create_dir(&images).unwrap();
    let inventory = [&0x5831_3116_u32.to_le_bytes()[..], &[4, 0, 0, 0, 8, 2, 16, 1]].concat();
    fs::write(images.join("inventory.img"), inventory).unwrap();
    assert_eq!(call("post-dump"), id);
    assert_eq!(format!("{}\n", id_in(&images)), id);
    site.holds_nothing_but(1);
    wait_until("their end", || site.fsnaps().is_empty());
}

fn it_keeps_no_place_busy() {
    let mut site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let images = site.images();
    site.mount_small(&images, 20_000);
    let script = site.hook_after("post-dump", "export FSNAP_FAILPOINT=search:found=sleep:1500");
    site.dump(oracle.pid, &images, &script).unwrap();
    // Its search goes on, with nothing of the engine's and of the volumes open.
    let searching = site.fsnaps();
    assert_eq!(searching.len(), 1);
    wait_until("it to let go", || {
        let files = fs::read_dir(format!("/proc/{}/fd", searching[0])).into_iter().flatten().flatten();
        let links: Vec<_> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
        let named = |link: &PathBuf| link.ends_with("null") || link.extension().is_some_and(|end| end == "search");
        links.iter().all(named)
    });
    assert_eq!(fs::read_link(format!("/proc/{}/cwd", searching[0])).unwrap().to_str(), Some("/"));
    site.holds_nothing_but(1);
    wait_until("its end", || site.fsnaps().is_empty());
}

/// A call of the hook by hand.
fn hook_call<'a>(site: &Site, command: &'a mut Command, action: &str, images: &Path, tree: i32) -> &'a mut Command {
    let environment = site.command_of(Path::new("true"));
    command.envs(environment.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))));
    command
        .env("CRTOOLS_SCRIPT_ACTION", action)
        .env("CRTOOLS_IMAGE_DIR", images)
        .env("CRTOOLS_INIT_PID", tree.to_string())
        .stdin(Stdio::null())
}
