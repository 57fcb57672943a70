//! Where output goes: closed, broken and full destinations, terminals, shells' completions, manual pages, help.

use std::fs;
use std::path::Path;

use insta::assert_snapshot;
use rustix::process::{Signal, kill_process};

use crate::faults::stopped_at;
use crate::site::Site;

#[test]
fn whoever_stops_reading_has_seen_enough() {
    let site = Site::plain();
    site.run("fsnap init db");
    for number in 0..20 {
        site.run(&format!("fsnap checkpoint -m {number}"));
    }
    for line in [
        "fsnap log",
        "fsnap log --json",
        "fsnap log --graph",
        "fsnap show @latest",
        "fsnap volumes",
        "fsnap doctor",
        "fsnap verify",
        "fsnap checkpoint",
        "fsnap completions bash",
        "fsnap man",
        "fsnap --help",
        "fsnap --version",
    ] {
        // The reader is gone before anything is written; then one that reads a line; then none at all.
        for reader in ["sleep 0.2; ", "", ""].iter().zip(["| :", "| head -n 1 >/dev/null", ">&-"]) {
            let (pause, reader) = reader;
            let told = site.run(&format!("exec 4>&1; {{ {{ {pause}{line}; echo $? >&3; }} {reader}; }} 3>&1 >&4"));
            assert_eq!(told.lines().last(), Some("0"), "{line} {reader}: {told}");
        }
    }
    let said = site.shell().output("fsnap log 2>&- >&- <&-");
    assert!(said.status.success(), "{said:?}");
}

#[test]
fn no_file_becomes_the_standard_output_of_a_command_without_one() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -t one");
    let (branching, pid) = stopped_at("branch:grown", site.top().command("exec fsnap branch one work <&- >&- 2>&-"));
    for fd in 0..3 {
        let of = |kind: &str| format!("/proc/{}/{kind}/{fd}", pid.as_raw_nonzero());
        assert_eq!(fs::read_link(of("fd")).unwrap(), Path::new("/dev/null"), "{fd}");
        let info = fs::read_to_string(of("fdinfo")).unwrap();
        assert!(info.lines().any(|line| line.starts_with("flags:") && line.ends_with('2')), "{fd}: {info}");
    }
    kill_process(pid, Signal::CONT).unwrap();
    assert!(branching.wait_with_output().unwrap().status.success());
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint");
    assert_snapshot!(site.session(
        "fsnap log >/dev/full
         fsnap log --json >/dev/full
         fsnap log --graph >/dev/full
         fsnap volumes >/dev/full
         fsnap completions bash >/dev/full
         fsnap man >/dev/full
         fsnap man /dev/null/x
         fsnap log 2>/dev/full | wc -l"
    ), @"
    $ fsnap log >/dev/full
    ! fsnap: error: cannot write the output: No space left on device (os error 28)
    [exit 1]
    $ fsnap log --json >/dev/full
    ! fsnap: error: cannot write the output: No space left on device (os error 28)
    [exit 1]
    $ fsnap log --graph >/dev/full
    ! fsnap: error: cannot write the output: No space left on device (os error 28)
    [exit 1]
    $ fsnap volumes >/dev/full
    ! fsnap: error: cannot write the output: No space left on device (os error 28)
    [exit 1]
    $ fsnap completions bash >/dev/full
    ! fsnap: error: cannot write the output: No space left on device (os error 28)
    [exit 1]
    $ fsnap man >/dev/full
    ! fsnap: error: cannot write the output: No space left on device (os error 28)
    [exit 1]
    $ fsnap man /dev/null/x
    ! fsnap: error: cannot write the pages to /dev/null/x: Not a directory (os error 20)
    [exit 1]
    $ fsnap log 2>/dev/full | wc -l
    2
    ");
}

#[test]
fn columns_are_aligned() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -t base && fsnap checkpoint -m second");
    let table = site.run("fsnap log");
    // Columns are two blanks apart at least; an id could hold a short word by chance, or begin with it.
    let at = |line: &str, word: &str| line.find(&format!("  {word}"));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(at(lines[0], "VOLUMES"), at(lines[1], "db "), "{table}");
    assert_eq!(at(lines[0], "VOLUMES"), at(lines[2], "db "), "{table}");
    assert_eq!(at(lines[0], "MESSAGE"), at(lines[1], "second"), "{table}");
    assert_eq!(at(lines[0], "MESSAGE"), at(lines[2], "(base)"), "{table}");
}

/// util-linux's `script` gives a command a terminal.
#[test]
fn people_get_relative_times_and_pipes_do_not() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -m first");
    let seen = site.run("script -qec 'fsnap log' /dev/null");
    assert!(seen.contains("just now"), "{seen:?}");
    assert!(!site.run("fsnap log").contains("just now"));
    let seen = site.run("script -qec 'fsnap frobnicate' /dev/null || :");
    assert!(!seen.contains('\u{1b}'), "NO_COLOR is set: {seen:?}");
}

/// What wipes the line of progress.
const WIPED: &str = "\r\u{1b}[2K";

#[test]
fn long_work_shows_progress_on_a_terminal_and_nothing_in_a_pipe() {
    let site = Site::plain();
    site.run("mkdir web && fsnap init db && fsnap init web && fsnap checkpoint -t first && echo x >db/new");
    for (line, shown, left) in [
        ("fsnap checkpoint -t one", &["copying ahead", "/2", "making durable"][..], ""),
        ("fsnap branch one work", &["cloning", "/2"], ""),
        ("fsnap diff first", &["comparing"], "A db/new"),
        ("fsnap verify", &["verifying", "/2"], "verified the catalog and 2 checkpoints: 0 damaged"),
        ("fsnap rm --branch work", &["deleting", "/2"], ""),
        ("fsnap rm one", &["deleting"], ""),
    ] {
        // On the terminal there is standard error, and nothing else.
        let seen = site.run(&format!("TERM=xterm script -qec '{line} >out' /dev/null"));
        for word in shown {
            assert!(seen.contains(word), "{line}: {word:?} is not in {seen:?}");
        }
        assert!(seen.ends_with(WIPED), "{line} leaves something on the screen: {seen:?}");
        let out = site.run("cat out");
        assert!(out.contains(left) && !out.contains(['\r', '\u{1b}']), "{line}: {out:?}");
    }
    for line in ["checkpoint -t one", "branch one work", "diff first", "verify", "rm --branch work", "rm one"] {
        // Neither if standard output is a terminal: what is read there is the result.
        let seen = site.run(&format!("TERM=xterm script -qec 'fsnap {line} 2>err' /dev/null && cat err"));
        assert!(!seen.contains('\u{1b}'), "{line}: {seen:?}");
        let said = site
            .shell()
            .output(&format!("fsnap tag -h >/dev/null; fsnap {}", line.replace("one", "two").replace("work", "other")));
        assert!(said.stderr.is_empty() && said.status.success(), "{line}: {said:?}");
    }
}

/// A terminal can make whoever writes to it wait for ever.
#[test]
fn nothing_is_shown_while_processes_stand() {
    let site = Site::plain();
    site.run("fsnap init db");
    let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let line = format!("FSNAP_FAILPOINT=take:opened=sleep:5000 exec fsnap checkpoint --pid {} db", sleeper.id());
    let mut watched =
        site.shell().command(&format!("TERM=xterm exec script -qefc '{line} >out' seen >/dev/null")).spawn();
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", sleeper.id())).unwrap_or_default();
    while !state().contains(") T ") {
        let ended = watched.as_mut().unwrap().try_wait().unwrap();
        assert!(ended.is_none(), "it never stood: {ended:?}, {:?}", std::fs::read_to_string(site.path("seen")));
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let first = std::fs::read(site.path("seen")).unwrap();
    let mut last = first.clone();
    loop {
        let now = std::fs::read(site.path("seen")).unwrap();
        // What was read may be of a moment later.
        if !state().contains(") T ") {
            break;
        }
        last = now;
    }
    let ended = watched.unwrap().wait().unwrap();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(ended.success(), "{ended:?}");
    let text = String::from_utf8_lossy(&last);
    assert!(text.contains("copying ahead"), "{text:?}");
    // What was written before may reach the file a little later.
    assert!(last.starts_with(&first) && text.ends_with(WIPED), "{text:?}");
    assert!(!text.contains("making durable"), "{text:?}");
}

#[test]
fn every_shell_gets_its_completions() {
    let site = Site::empty();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = site.run(&format!("fsnap completions {shell}"));
        for command in ["checkpoint", "branches", "completions"] {
            assert!(script.contains(command), "{shell} is not told of {command}");
        }
        assert!(!script.contains("thaw-guard"), "{shell} is told of what is internal");
    }
    site.run("fsnap completions bash >script && bash -n script");
    assert_snapshot!(site.session("fsnap completions tcsh"), @"
    $ fsnap completions tcsh
    ! error: invalid value 'tcsh' for '<SHELL>'
    !  [possible values: bash, elvish, fish, powershell, zsh]
    !
    !  tip: a similar value exists: 'zsh'
    !
    ! For more information, try '--help'.
    [exit 2]
    ");
}

#[test]
fn every_command_has_a_manual_page() {
    let site = Site::empty();
    site.run("fsnap man pages");
    assert_snapshot!(site.session("ls pages"), @"
    $ ls pages
    fsnap-audit.1
    fsnap-branch.1
    fsnap-branches.1
    fsnap-checkpoint.1
    fsnap-completions.1
    fsnap-criu-args.1
    fsnap-diff.1
    fsnap-doctor.1
    fsnap-engine-crun-checkpoint.1
    fsnap-engine-crun-restore.1
    fsnap-engine-crun.1
    fsnap-engine-runc-checkpoint.1
    fsnap-engine-runc-restore.1
    fsnap-engine-runc.1
    fsnap-engine.1
    fsnap-hook-criu.1
    fsnap-hook-generic.1
    fsnap-hook.1
    fsnap-init.1
    fsnap-install-hooks.1
    fsnap-log.1
    fsnap-logs.1
    fsnap-man.1
    fsnap-mount.1
    fsnap-overlay.1
    fsnap-pool-add-volume.1
    fsnap-pool-create.1
    fsnap-pool-grow.1
    fsnap-pool-list.1
    fsnap-pool-remove-volume.1
    fsnap-pool-remove.1
    fsnap-pool-start.1
    fsnap-pool-stop.1
    fsnap-pool.1
    fsnap-ps.1
    fsnap-recover.1
    fsnap-restore.1
    fsnap-rm.1
    fsnap-run.1
    fsnap-show.1
    fsnap-stop.1
    fsnap-tag.1
    fsnap-umount.1
    fsnap-verify.1
    fsnap-volumes.1
    fsnap.1
    ");
    assert!(site.run("fsnap man").starts_with(".ie"));
    for page in std::fs::read_dir(site.path("pages")).unwrap() {
        let text = std::fs::read_to_string(page.unwrap().path()).unwrap();
        assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{text}");
    }
}
