//! Input that nobody means well by: a catalog that is none, names that speak to the terminal, images in a volume.

use std::fs;

use insta::{allow_duplicates, assert_snapshot};

use crate::site::Site;

#[test]
fn a_catalog_of_a_newer_version_is_left_alone() {
    let site = Site::with_kept_catalog();
    let path = site.path("state/catalog.db");
    let mut bytes = fs::read(&path).unwrap();
    // The user version of an SQLite database.
    bytes[60..64].copy_from_slice(&2_u32.to_be_bytes());
    fs::write(&path, &bytes).unwrap();
    assert_snapshot!(site.session(
        "fsnap log
         fsnap checkpoint
         fsnap init db
         fsnap rm kept
         fsnap verify
         fsnap recover"
    ), @"
    $ fsnap log
    ! fsnap: error: the catalog $T/state/catalog.db has format version 2, and this fsnap reads version 1: use the newer fsnap
    [exit 1]
    $ fsnap checkpoint
    ! fsnap: error: the catalog $T/state/catalog.db has format version 2, and this fsnap reads version 1: use the newer fsnap
    [exit 1]
    $ fsnap init db
    ! fsnap: error: the catalog $T/state/catalog.db has format version 2, and this fsnap reads version 1: use the newer fsnap
    [exit 1]
    $ fsnap rm kept
    ! fsnap: error: the catalog $T/state/catalog.db has format version 2, and this fsnap reads version 1: use the newer fsnap
    [exit 1]
    $ fsnap verify
    ! fsnap: error: the catalog $T/state/catalog.db has format version 2, and this fsnap reads version 1: use the newer fsnap
    [exit 1]
    $ fsnap recover
    ! fsnap: error: the catalog $T/state/catalog.db has format version 2, and this fsnap reads version 1: use the newer fsnap
    [exit 1]
    ");
    assert_eq!(fs::read(&path).unwrap(), bytes);
    site.expect_kept();
}

#[test]
fn a_catalog_that_is_something_else_is_told_and_never_waited_for() {
    for make in ["mkdir", "mkfifo", "touch", "ln -s ../good", "cp /bin/sh"] {
        let site = Site::with_kept_catalog();
        site.run(&format!("rm state/catalog.db && {make} state/catalog.db"));
        for line in ["log", "checkpoint", "init db", "rm kept", "verify", "recover"] {
            let said = site.fail(&format!("timeout 20 fsnap {line}"));
            assert!(said.contains("catalog.db is damaged: "), "{make}: {line}: {said}");
            assert!(said.contains("hint: restore it from a backup"), "{make}: {line}: {said}");
        }
        site.expect_kept();
    }
}

#[test]
fn a_truncated_catalog_is_never_taken_for_a_shorter_one() {
    let site = Site::with_kept_catalog();
    let good = fs::read(site.path("good")).unwrap();
    let pages = (0..good.len()).step_by(4096).flat_map(|at| [at, at + 1, at + 4095]);
    for length in pages.chain([15, 16, 99, 100]).filter(|&length| length < good.len()) {
        fs::write(site.path("state/catalog.db"), &good[..length]).unwrap();
        for line in ["log", "checkpoint"] {
            let said = site.fail(&format!("fsnap {line}"));
            assert!(said.contains("catalog.db is damaged: "), "{length}: {line}: {said}");
        }
        assert_eq!(fs::read(site.path("state/catalog.db")).unwrap(), good[..length]);
    }
    site.expect_kept();
}

#[test]
fn a_flipped_byte_is_an_error_or_changes_nothing() {
    let site = Site::with_kept_catalog();
    let good = fs::read(site.path("good")).unwrap();
    let (log, show) = (site.run("fsnap log"), site.run("fsnap show kept"));
    let used: Vec<usize> = (0..good.len()).filter(|&at| good[at] != 0).collect();
    let mut refused = 0;
    for (round, &at) in used.iter().step_by(used.len() / 150).enumerate() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (round % 8);
        site.run("rm -f state/catalog.db-*");
        fs::write(site.path("state/catalog.db"), &bytes).unwrap();
        let seen = site.shell().output("fsnap log && fsnap show kept");
        match seen.status.code() {
            Some(0) if seen.stdout == format!("{log}\n{show}\n").into_bytes() => {}
            // Tags and tips have no digest; the check of the whole finds what they say wrongly.
            Some(0) => drop(site.fail("fsnap verify")),
            Some(1) => refused += 1,
            _ => panic!("byte {at}: {seen:?}"),
        }
    }
    assert!(refused > 5, "only {refused} were noticed");
    site.expect_kept();
}

#[test]
fn names_do_not_speak_to_the_terminal() {
    for site in [Site::plain(), Site::btrfs()] {
        let shell = site.top();
        shell.run(r#"mv db "$(printf 'v\n\033[31m\377')""#);
        allow_duplicates!(assert_snapshot!(shell.session(
            r#"fsnap init v* 2>/dev/null | sed 's/: .*//; s|/fs/|/|'
             fsnap volumes --json | grep '"path"' | sed 's|/fs/|/|'
             fsnap checkpoint -t one >/dev/null
             echo x >"$(printf 'v\n\033[31m\377/f\n\033[2J\377')"
             fsnap diff one | sed "s|$PWD/||"
             fsnap checkpoint -t two >/dev/null
             fsnap diff one two | sed "s|$PWD/||"
             ls -bA "$(fsnap branch two grown)"
             fsnap init nothing"$(printf '\n\033[31m\377')" 2>&1 | sed "s|$PWD/||"
             fsnap tag two "$(printf 'a\n\033[31m')"
             fsnap branch two "$(printf 'a\nfsnap: error: forged')"
             fsnap verify"#
        ), @r#"
        $ fsnap init v* 2>/dev/null | sed 's/: .*//; s|/fs/|/|'
        volume v---31m- at $T/v\n\u{1b}[31m\xff
        $ fsnap volumes --json | grep '"path"' | sed 's|/fs/|/|'
            "path": "$T/v\n\u001b[31m�",
        $ fsnap checkpoint -t one >/dev/null
        $ echo x >"$(printf 'v\n\033[31m\377/f\n\033[2J\377')"
        $ fsnap diff one | sed "s|$PWD/||"
        A v---31m-/f\n\u{1b}[2J\xff
        $ fsnap checkpoint -t two >/dev/null
        $ fsnap diff one two | sed "s|$PWD/||"
        A v---31m-/f\n\u{1b}[2J\xff
        $ ls -bA "$(fsnap branch two grown)"
        a
        f\n\033[2J\377
        sub
        $ fsnap init nothing"$(printf '\n\033[31m\377')" 2>&1 | sed "s|$PWD/||"
        fsnap: error: cannot open the directory nothing\n\u{1b}[31m\xff: No such file or directory (os error 2)
        $ fsnap tag two "$(printf 'a\n\033[31m')"
        ! error: invalid value 'a\n\u{1b}[31m' for '[NAME]': "a\n\u{1b}[31m" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
        !
        ! For more information, try '--help'.
        [exit 2]
        $ fsnap branch two "$(printf 'a\nfsnap: error: forged')"
        ! error: invalid value 'a\nfsnap: error: forged' for '[NAME]': "a\nfsnap: error: forged" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
        !
        ! For more information, try '--help'.
        [exit 2]
        $ fsnap verify
        verified the catalog and 2 checkpoints: 0 damaged
        "#));
        assert_eq!(site.stored(), 3, "two snapshots and a branch");
    }
}

#[test]
fn an_engine_may_not_write_its_images_into_a_volume() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         mkdir db/images
         export CRTOOLS_SCRIPT_ACTION=pre-dump CRTOOLS_IMAGE_DIR=db/images CRTOOLS_INIT_PID=$$ FSNAP_VOLUMES=db; fsnap hook criu; exit $?
         ls -A db/images
         fsnap recover
         fsnap log
         ls state/intents
         fsnap checkpoint -m after >/dev/null
         fsnap verify"
    ), @"
    $ fsnap init db >/dev/null 2>&1
    $ mkdir db/images
    $ export CRTOOLS_SCRIPT_ACTION=pre-dump CRTOOLS_IMAGE_DIR=db/images CRTOOLS_INIT_PID=$$ FSNAP_VOLUMES=db; fsnap hook criu; exit $?
    ! fsnap: error: the image directory $T/db/images lies inside the volume db at $T/db, so that every snapshot would hold the images
    ! fsnap: hint: let the engine write its images to a directory outside every volume
    [exit 1]
    $ ls -A db/images
    $ fsnap recover
    nothing is half done
    $ fsnap log
    $ ls state/intents
    ! ls: cannot access 'state/intents': No such file or directory
    [exit 2]
    $ fsnap checkpoint -m after >/dev/null
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    ");
    assert_eq!(site.images(".fsnap").len(), 1);
}
