//! An engine that fsnap does not know, in C, without a header of fsnap's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::Case;
use crate::alone::classes;
use crate::hook::is_asleep;
use crate::site::{Site, Volume, id_in, run, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("another_engine_has_its_checkpoints", another_engine_has_its_checkpoints),
    ("an_engine_that_fails_leaves_none", an_engine_that_fails_leaves_none),
    ("steps_out_of_order_take_nothing", steps_out_of_order_take_nothing),
    ("another_tree_than_the_one_begun_is_refused", another_tree_than_the_one_begun_is_refused),
    ("a_dump_that_failed_is_taken_back_from_who_seals_it", a_dump_that_failed_is_taken_back_from_who_seals_it),
    ("the_next_dump_waits_for_who_seals_the_last", the_next_dump_waits_for_who_seals_the_last),
];

fn engine(site: &Site) -> PathBuf {
    let program = site.path("generic");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/engines/generic.c");
    run(Command::new("cc").args(["-O1", "-Wall", "-o"]).arg(&program).arg(source));
    program
}

fn dump(site: &Site, pid: i32, images: &Path, more: &[&str]) -> Output {
    let mut command = site.command_of(&engine(site));
    command.arg(pid.to_string()).arg(images).arg(env!("CARGO_BIN_EXE_fsnap")).args(more).output().unwrap()
}

/// One step, of which this process is the engine.
pub(crate) fn call(site: &Site, step: &str, pid: i32, images: &Path) -> Output {
    let mut command = site.command(["hook", "generic", step, "--tree", &pid.to_string(), "--images"]);
    command.arg(images).output().unwrap()
}

/// A command that is about to seal what was taken, and takes its time.
fn slow_sealer(site: &Site) -> Child {
    let mut sealer = site.command(["log"]);
    let sealer = sealer.env("FSNAP_FAILPOINT", "seal:before=sleep:2000").stdout(Stdio::null()).spawn().unwrap();
    wait_until("the sealer's sleep", || is_asleep(sealer.id().cast_signed()));
    sealer
}

fn answer(images: &Path) -> Value {
    serde_json::from_slice(&fs::read(images.join("fsnap_hook.json")).unwrap()).unwrap()
}

fn another_engine_has_its_checkpoints() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let images = site.images();
    let dumped = dump(&site, oracle.pid, &images, &[]);
    assert!(dumped.status.success(), "{}", said(&dumped));
    let id = id_in(&images);
    assert_eq!(
        answer(&images),
        serde_json::json!({
            "version": 1, "call": "resumed", "ok": true, "checkpoint": null, "error": null
        })
    );
    // It was sealed by the last call, not by this command.
    let shown = site.json(["show", "--json", &id]);
    assert_eq!(classes(&shown), ["point-in-time", "point-in-time"]);
    assert_eq!(shown["engine"]["name"], "generic");
    assert_eq!(site.json(["show", "--processes", "--json", &id])[0]["pid"], oracle.pid);
    oracle.goes_on();
    site.holds_nothing_but(1);
    // The same directory serves for the next.
    let dumped = dump(&site, oracle.pid, &images, &[]);
    assert!(dumped.status.success(), "{}", said(&dumped));
    assert_ne!(id_in(&images), id);
    site.holds_nothing_but(2);
}

fn an_engine_that_fails_leaves_none() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let images = site.images();
    let dumped = dump(&site, oracle.pid, &images, &["fail"]);
    assert!(dumped.status.success(), "{}", said(&dumped));
    assert!(!images.join("fsnap.json").exists());
    oracle.goes_on();
    site.holds_nothing_but(0);
    // A record that names the checkpoint of other images removes nothing.
    let (id, criu) = site.checkpoint(oracle.pid);
    fs::copy(criu.join("fsnap.json"), images.join("fsnap.json")).unwrap();
    let failed = site.command(["hook", "generic", "failed", "--images"]).arg(&images).output().unwrap();
    assert!(failed.status.success(), "{}", said(&failed));
    assert_eq!(site.ids(), [id]);
}

fn steps_out_of_order_take_nothing() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let images = site.images();
    let call = |step: &str| call(&site, step, oracle.pid, &images);
    let early = call("frozen");
    assert_eq!(early.status.code(), Some(1), "{}", said(&early));
    let answered = answer(&images);
    assert_eq!((&answered["call"], &answered["ok"]), (&"frozen".into(), &false.into()));
    assert!(
        answered["error"].as_str().unwrap().contains("no checkpoint was begun by the engine, process "),
        "{answered}"
    );
    for step in ["failed", "resumed", "restoring", "restored"] {
        let done = call(step);
        assert!(done.status.success(), "{step}: {}", said(&done));
    }
    assert_eq!(call("sideways").status.code(), Some(2));
    oracle.goes_on();
    site.holds_nothing_but(0);
}

/// It was taken for the tree of that one, and the checkpoint called the writers of the other nobody.
fn another_tree_than_the_one_begun_is_refused() {
    for site in [Site::new(&[Volume::Rsync]), Site::without_attendant(&[Volume::Rsync])] {
        let (oracle, images) = (site.small_oracle(), site.images());
        let own = std::process::id().cast_signed();
        let call = |step: &str, pid: i32| call(&site, step, pid, &images);
        assert!(call("starting", oracle.pid).status.success());
        let refused = call("frozen", own);
        let reason = format!("was begun for the tree of process {}, and not of {own}", oracle.pid);
        assert!(refused.status.code() == Some(1) && said(&refused).contains(&reason), "{}", said(&refused));
        assert_eq!(answer(&images)["ok"], false);
        // The right one is still to be had.
        for step in ["frozen", "resumed"] {
            let done = call(step, oracle.pid);
            assert!(done.status.success(), "{step}: {}", said(&done));
        }
        site.holds_nothing_but(1);
    }
}

fn a_dump_that_failed_is_taken_back_from_who_seals_it() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let images = site.images();
    for step in ["starting", "frozen"] {
        let done = call(&site, step, oracle.pid, &images);
        assert!(done.status.success(), "{step}: {}", said(&done));
    }
    let mut sealer = slow_sealer(&site);
    let failed = call(&site, "failed", oracle.pid, &images);
    assert!(failed.status.success(), "{}", said(&failed));
    sealer.wait().unwrap();
    assert!(!images.join("fsnap.json").exists());
    site.holds_nothing_but(0);
}

fn the_next_dump_waits_for_who_seals_the_last() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let images = site.images();
    let dump = || {
        for step in ["starting", "frozen"] {
            let done = call(&site, step, oracle.pid, &images);
            assert!(done.status.success(), "{step}: {}", said(&done));
        }
        id_in(&images)
    };
    let first = dump();
    let mut sealer = slow_sealer(&site);
    let second = dump();
    sealer.wait().unwrap();
    // The newest first, and each its own.
    assert_eq!(site.ids(), [second, first]);
    site.holds_nothing_but(2);
}
