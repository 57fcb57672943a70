//! Runs that several have to do with at once.

use std::fs;
use std::process::Stdio;

use crate::Case;
use crate::runs::Running;
use crate::site::{Site, Volume, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("saved_by_several_at_once", saved_by_several_at_once),
    ("saved_while_others_freeze_it", saved_while_others_freeze_it),
    ("a_tag_that_is_taken_meanwhile_stays", a_tag_that_is_taken_meanwhile_stays),
];

/// The engine can trace a process for one dump at a time: others wait for their turn.
fn saved_by_several_at_once() {
    let site = Site::new(&[Volume::Btrfs]);
    let running = Running::counting(&site);
    let savers: Vec<_> = (0..4)
        .map(|_| site.command(["checkpoint", "one"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
        .collect();
    for saver in savers {
        let output = saver.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
    running.counts_on("one");
    assert_eq!(site.json(["log", "--json"]).as_array().unwrap().len(), 4);
    site.ok(["branch", "@latest", "copy", "--run"]);
    running.counts_on("copy");
}

/// Both failed, and the processes were left stopped: a signal stops them for one, and the engine traces them for the other.
fn saved_while_others_freeze_it() {
    let site = Site::new(&[Volume::Btrfs]);
    let running = Running::counting(&site);
    let pid = running.all()[0]["pid"].to_string();
    let (by_signal, by_engine) = (["checkpoint", "--deadline", "60", "--pid", &pid], ["checkpoint", "one"]);
    let stands = |states: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        states.chars().any(|state| stat.contains(&format!(") {state} ")))
    };
    for (first, place, states, second) in
        [(&by_signal[..], "take:all", "T", &by_engine[..]), (&by_engine[..], "hook:frozen", "t", &by_signal[..])]
    {
        let mut command = site.command(first);
        command.env("FSNAP_FAILPOINT", format!("{place}=sleep:2000")).stdout(Stdio::piped()).stderr(Stdio::piped());
        let first = command.spawn().unwrap();
        // As long as it is looked at, it stands all the time.
        wait_until("the freeze", || (0..10).all(|_| stands(states)));
        let second = site.command(second).output().unwrap();
        let first = first.wait_with_output().unwrap();
        assert!(first.status.success(), "{}", said(&first));
        assert!(second.status.success(), "{}", said(&second));
        running.counts_on("one");
    }
    site.holds_nothing_but(4);
    let log = site.json(["log", "--json"]);
    let saved = log.as_array().unwrap().iter().find(|one| !one["engine"].is_null()).unwrap();
    site.ok(["branch", saved["id"].as_str().unwrap(), "copy", "--run"]);
    running.counts_on("copy");
}

/// The checkpoint is worth more than its name.
fn a_tag_that_is_taken_meanwhile_stays() {
    let site = Site::new(&[Volume::Btrfs]);
    let _running = Running::counting(&site);
    let first = site.ok(["checkpoint", "one"]);
    let mut command = site.command(["checkpoint", "one", "--tag", "mine", "--tag", "taken"]);
    command.env("FSNAP_FAILPOINT", "hook:frozen=sleep:4000").stdout(Stdio::piped()).stderr(Stdio::piped());
    let images = || fs::read_dir(site.path("state/images")).unwrap().count();
    let saving = command.spawn().unwrap();
    // By now it has seen that the tags are free.
    wait_until("the dump", || images() == 2);
    site.ok(["tag", &first, "taken"]);
    let saved = saving.wait_with_output().unwrap();
    assert!(saved.status.success(), "{}", said(&saved));
    let second = String::from_utf8(saved.stdout).unwrap().trim_end().to_owned();
    let warning = format!(
        "fsnap: warning: the checkpoint has no tag taken: it names checkpoint {} since this one was begun\n",
        &first[..12]
    );
    assert_eq!(String::from_utf8(saved.stderr).unwrap(), warning);
    for (tag, id) in [("mine", &second), ("taken", &first)] {
        assert_eq!(site.json(["show", tag, "--json"])["id"], id.as_str());
    }
    site.holds_nothing_but(2);
}
