//! `fsnap branch`, `branches`, `rm` and `restore`.

use insta::{allow_duplicates, assert_snapshot};
use serde_json::Value;

use crate::site::Site;

#[test]
fn branches_are_written_independently() {
    for (site, dir) in [(Site::plain(), "."), (Site::btrfs(), "fs"), (Site::unprivileged(), ".")] {
        let shell = site.in_dir(dir);
        allow_duplicates!(assert_snapshot!(shell.session(
            "fsnap init db >/dev/null 2>&1
             fsnap checkpoint -t base >/dev/null
             echo changed >db/a
             echo x >$(fsnap branch base one)/a
             echo y >$(fsnap branch base two)/sub/b
             cat db/a db/sub/b
             fsnap diff base
             fsnap checkpoint --branch one -m 'on one' >/dev/null
             fsnap checkpoint --branch two -m 'on two' >/dev/null
             fsnap checkpoint --branch one -m 'on one again' >/dev/null
             fsnap checkpoint -m 'on the volume' >/dev/null
             fsnap log --graph
             fsnap diff base @latest~1
             fsnap diff @latest~1 base
             echo more >>$(fsnap branches --json | sed -n 's/ *\"path\": \"\\(.*\\)\",/\\1/p' | head -n 1)/a
             fsnap branch @latest grown >/dev/null
             fsnap branches | cut -d ' ' -f 1
             fsnap verify"
        ), @r#"
        $ fsnap init db >/dev/null 2>&1
        $ fsnap checkpoint -t base >/dev/null
        $ echo changed >db/a
        $ echo x >$(fsnap branch base one)/a
        $ echo y >$(fsnap branch base two)/sub/b
        $ cat db/a db/sub/b
        changed
        two
        $ fsnap diff base
        M db/a
        $ fsnap checkpoint --branch one -m 'on one' >/dev/null
        $ fsnap checkpoint --branch two -m 'on two' >/dev/null
        $ fsnap checkpoint --branch one -m 'on one again' >/dev/null
        $ fsnap checkpoint -m 'on the volume' >/dev/null
        $ fsnap log --graph
        ○  ID1  TIME  on the volume
        │ ○  ID2  TIME  on one  on one again
        │ │ ○  ID3  TIME  on two  on two
        ├───╯
        │ ○  ID4  TIME  on one  on one
        ├─╯
        ○  ID5  TIME  (base) [one,two]
        $ fsnap diff base @latest~1
        $ fsnap diff @latest~1 base
        $ echo more >>$(fsnap branches --json | sed -n 's/ *"path": "\(.*\)",/\1/p' | head -n 1)/a
        $ fsnap branch @latest grown >/dev/null
        $ fsnap branches | cut -d ' ' -f 1
        NAME
        one
        two
        grown
        $ fsnap verify
        verified the catalog and 5 checkpoints: 0 damaged
        "#));
    }
}

#[test]
fn the_fields_that_others_rely_upon() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -t base");
    let made: Value = serde_json::from_str(&site.run("fsnap branch --json base try")).unwrap();
    let listed: Value = serde_json::from_str(&site.run("fsnap branches --json")).unwrap();
    assert_eq!(listed, Value::Array(vec![made.clone()]));
    assert_eq!(
        std::fs::read_to_string(format!("{}/a", made["members"][0]["path"].as_str().unwrap())).unwrap(),
        "one\n"
    );
    assert_snapshot!(site.session("fsnap branches --json"), @r#"
    $ fsnap branches --json
    [
      {
        "checkpoint": "ID1",
        "members": [
          {
            "path": "$T/.fsnap/volumes/v-IMAGE1",
            "volume": "db"
          }
        ],
        "name": "try",
        "time": "TIME"
      }
    ]
    "#);
}

#[test]
fn a_branch_without_a_name_gets_one() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         fsnap checkpoint
         fsnap branch @latest
         fsnap branch @latest
         fsnap branches"
    ), @"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint
    ID1
    $ fsnap branch @latest
    $T/.fsnap/volumes/v-IMAGE1
    $ fsnap branch @latest
    $T/.fsnap/volumes/v-IMAGE2
    $ fsnap branches
    NAME  CHECKPOINT  MADE  VOLUME  PATH
    ID1-1  ID1  TIME  db  $T/.fsnap/volumes/v-IMAGE1
    ID1-2  ID1  TIME  db  $T/.fsnap/volumes/v-IMAGE2
    ");
}

#[test]
fn names_are_taken_once_and_are_plain() {
    let site = Site::plain();
    let long = "x".repeat(64);
    assert_snapshot!(site.session(&format!(
        "fsnap init db >/dev/null 2>&1
         fsnap checkpoint -t base >/dev/null
         fsnap branch base try >/dev/null
         fsnap branch base try
         fsnap branch base ''
         fsnap branch base ..
         fsnap branch base .hidden
         fsnap branch base -- -dash
         fsnap branch base a/b
         fsnap branch base \"$(printf 'a\\nb')\"
         fsnap branch base \"$(printf 'a\\033[2Jb')\"
         fsnap branch base \"$(printf 'a\\377b')\"
         fsnap branch base {long} >/dev/null
         fsnap branch base {long}x
         fsnap branches | wc -l
         fsnap recover"
    )), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint -t base >/dev/null
    $ fsnap branch base try >/dev/null
    $ fsnap branch base try
    ! fsnap: error: the branch try exists already
    ! fsnap: hint: choose another name, or remove the branch: `fsnap rm --branch NAME`
    [exit 1]
    $ fsnap branch base ''
    ! error: invalid value '' for '[NAME]': "" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base ..
    ! error: invalid value '..' for '[NAME]': ".." cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base .hidden
    ! error: invalid value '.hidden' for '[NAME]': ".hidden" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base -- -dash
    ! error: the following required arguments were not provided:
    !  --run
    !
    ! Usage: fsnap branch --run <CKPT> [NAME] -- <ENGINE ARGS>...
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base a/b
    ! error: invalid value 'a/b' for '[NAME]': "a/b" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base "$(printf 'a\nb')"
    ! error: invalid value 'a\nb' for '[NAME]': "a\nb" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base "$(printf 'a\033[2Jb')"
    ! error: invalid value 'a\u{1b}[2Jb' for '[NAME]': "a\u{1b}[2Jb" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base "$(printf 'a\377b')"
    ! error: invalid UTF-8 was detected in one or more arguments
    !
    ! Usage: fsnap branch [OPTIONS] <CKPT> [NAME] [-- <ENGINE ARGS>...]
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branch base xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >/dev/null
    $ fsnap branch base xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
    ! error: invalid value 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' for '[NAME]': "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branches | wc -l
    3
    $ fsnap recover
    nothing is half done
    "#);
}

#[test]
fn what_a_branch_needs_is_not_removed() {
    for (site, dir, store) in [(Site::plain(), ".", ".fsnap"), (Site::btrfs(), "fs", "fs/.fsnap")] {
        let shell = site.in_dir(dir);
        allow_duplicates!(assert_snapshot!(shell.session(
            "fsnap init db >/dev/null 2>&1
             fsnap checkpoint -t base -m first >/dev/null
             fsnap checkpoint -m second >/dev/null
             fsnap branch base one >/dev/null
             fsnap branch base two >/dev/null
             fsnap rm base
             fsnap rm @latest base
             fsnap log --graph
             fsnap rm --branch one
             fsnap rm base
             fsnap rm --branch two
             fsnap rm --branch two
             fsnap rm base nope
             fsnap rm base base @latest
             fsnap log
             fsnap branches
             fsnap recover"
        ), @r#"
        $ fsnap init db >/dev/null 2>&1
        $ fsnap checkpoint -t base -m first >/dev/null
        $ fsnap checkpoint -m second >/dev/null
        $ fsnap branch base one >/dev/null
        $ fsnap branch base two >/dev/null
        $ fsnap rm base
        ! fsnap: error: checkpoint ID1 is needed by the branches one, two
        ! fsnap: hint: remove the branch first: `fsnap rm --branch NAME`
        [exit 1]
        $ fsnap rm @latest base
        ! fsnap: error: checkpoint ID1 is needed by the branches one, two
        ! fsnap: hint: remove the branch first: `fsnap rm --branch NAME`
        [exit 1]
        $ fsnap log --graph
        ○  ID2  TIME  second
        ○  ID1  TIME  (base) [one,two] first
        $ fsnap rm --branch one
        $ fsnap rm base
        ! fsnap: error: checkpoint ID1 is needed by the branch two
        ! fsnap: hint: remove the branch first: `fsnap rm --branch NAME`
        [exit 1]
        $ fsnap rm --branch two
        $ fsnap rm --branch two
        ! fsnap: error: no branch "two"
        ! fsnap: hint: `fsnap branches` lists the branches
        [exit 1]
        $ fsnap rm base nope
        ! fsnap: error: no checkpoint "nope": there is base, ID2 (@latest)
        ! fsnap: hint: `fsnap log` lists the checkpoints
        [exit 1]
        $ fsnap rm base base @latest
        $ fsnap log
        $ fsnap branches
        $ fsnap recover
        nothing is half done
        "#));
        assert_eq!(site.images(store), Vec::<String>::new());
    }
}

/// Checkpoints in the middle of a line go without breaking it.
#[test]
fn a_checkpoint_in_the_middle_can_be_removed() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         fsnap checkpoint -m 1 -t one >/dev/null
         fsnap checkpoint -m 2 -t two >/dev/null
         fsnap checkpoint -m 3 -t three >/dev/null
         fsnap rm two
         fsnap log --graph
         fsnap show three~1 | head -n 1
         fsnap show two
         fsnap rm three
         fsnap checkpoint -m 4 >/dev/null
         fsnap log --graph
         fsnap verify"
    ), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint -m 1 -t one >/dev/null
    $ fsnap checkpoint -m 2 -t two >/dev/null
    $ fsnap checkpoint -m 3 -t three >/dev/null
    $ fsnap rm two
    $ fsnap log --graph
    ○  ID1  TIME  (three) 3
    ○  ID2  TIME  (one) 1
    $ fsnap show three~1 | head -n 1
    checkpoint ID2
    $ fsnap show two
    ! fsnap: error: no checkpoint "two": there is one, three, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap rm three
    $ fsnap checkpoint -m 4 >/dev/null
    $ fsnap log --graph
    ○  ID3  TIME  4
    ○  ID2  TIME  (one) 1
    $ fsnap verify
    verified the catalog and 2 checkpoints: 0 damaged
    "#);
}

#[test]
fn a_branch_in_use_is_not_removed() {
    for (site, dir) in [(Site::plain(), "."), (Site::btrfs(), "fs")] {
        let shell = site.in_dir(dir);
        shell.run("fsnap init db && fsnap checkpoint && fsnap branch @latest used");
        let path = shell.run("fsnap branches --json | sed -n 's/ *\"path\": \"\\(.*\\)\",/\\1/p'");
        let mut user = shell.command(&format!("cd {path} && exec 3>>a && exec sleep 600")).spawn().unwrap();
        let exe = format!("/proc/{}/comm", user.id());
        while std::fs::read_to_string(&exe).unwrap() != "sleep\n" {
            std::thread::yield_now();
        }
        let said = shell.fail("fsnap rm --branch used");
        user.kill().unwrap();
        user.wait().unwrap();
        assert!(said.contains(&format!("the branch used is in use: {} (sleep)", user.id())), "{said}");
        assert!(said.contains("hint: end these processes first"), "{said}");
        assert_eq!(shell.run(&format!("cat {path}/a")), "one");
        // Nor is one in which something is mounted: half of it would be gone before that is met.
        shell.run(&format!("mkdir {path}/in && mount -t tmpfs inside {path}/in"));
        let said = shell.fail("fsnap rm --branch used");
        shell.run(&format!("umount {path}/in"));
        assert!(said.contains(&format!("something is mounted at {path}/in")), "{said}");
        assert_eq!(shell.run(&format!("cat {path}/a")), "one");
        shell.run("fsnap rm --branch used");
        assert!(!std::path::Path::new(&path).exists());
    }
}

#[test]
fn a_restore_needs_a_process_image() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         fsnap checkpoint -t base >/dev/null
         fsnap restore base
         fsnap restore nope
         fsnap restore base --branch ../x
         fsnap restore base extra
         fsnap restore
         fsnap branches
         fsnap recover"
    ), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint -t base >/dev/null
    $ fsnap restore base
    ! fsnap: error: checkpoint ID1 has no process image
    ! fsnap: hint: `fsnap branch` gives you its files
    [exit 1]
    $ fsnap restore nope
    ! fsnap: error: no checkpoint "nope": there is base, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap restore base --branch ../x
    ! error: invalid value '../x' for '--branch <NAME>': "../x" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap restore base extra
    ! error: unexpected argument 'extra' found
    !
    ! Usage: fsnap restore [OPTIONS] <CKPT> [-- <ENGINE ARGS>...]
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap restore
    ! error: the following required arguments were not provided:
    !  <CKPT>
    !
    ! Usage: fsnap restore <CKPT> [-- <ENGINE ARGS>...]
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap branches
    $ fsnap recover
    nothing is half done
    "#);
}
