//! Where output goes: closed, broken and full destinations, terminals, shells' completions, manual pages, help.

use insta::assert_snapshot;

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
    let at = |line: &str, word: &str| line.find(word);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(at(lines[0], "VOLUMES"), at(lines[1], "db"), "{table}");
    assert_eq!(at(lines[0], "VOLUMES"), at(lines[2], "db"), "{table}");
    assert_eq!(at(lines[0], "MESSAGE"), at(lines[1], "second"), "{table}");
    assert_eq!(at(lines[0], "MESSAGE"), at(lines[2], "(base)"), "{table}");
}

/// util-linux's `script` gives a command a terminal.
#[test]
fn people_get_relative_times_and_progress_and_pipes_do_not() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -m first");
    let seen = site.run("script -qec 'fsnap log' /dev/null");
    assert!(seen.contains("just now"), "{seen:?}");
    assert!(!site.run("fsnap log").contains("just now"));
    let seen = site.run("TERM=xterm script -qec 'fsnap verify' /dev/null");
    assert!(seen.contains("verifying"), "{seen:?}");
    assert_eq!(site.run("fsnap verify 2>&1"), "verified the catalog and 1 checkpoint: 0 damaged");
    let seen = site.run("script -qec 'fsnap frobnicate' /dev/null || :");
    assert!(!seen.contains('\u{1b}'), "NO_COLOR is set: {seen:?}");
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
    fsnap-branch.1
    fsnap-branches.1
    fsnap-checkpoint.1
    fsnap-completions.1
    fsnap-diff.1
    fsnap-doctor.1
    fsnap-hook-criu.1
    fsnap-hook.1
    fsnap-init.1
    fsnap-log.1
    fsnap-man.1
    fsnap-overlay.1
    fsnap-pool-add-volume.1
    fsnap-pool-create.1
    fsnap-pool-list.1
    fsnap-pool-remove-volume.1
    fsnap-pool-remove.1
    fsnap-pool-start.1
    fsnap-pool-stop.1
    fsnap-pool.1
    fsnap-recover.1
    fsnap-restore.1
    fsnap-rm.1
    fsnap-show.1
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
