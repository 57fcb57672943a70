//! `fsnap checkpoint`, `log` and `show`.

use insta::assert_snapshot;
use serde_json::Value;

use crate::site::Site;

#[test]
fn a_checkpoint_prints_its_id_and_is_listed() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db
         fsnap checkpoint -m first -t base -t v1.0
         echo more >>db/a
         fsnap checkpoint -m 'second: with a longer message'
         fsnap checkpoint
         fsnap log
         fsnap log -n 1
         fsnap log --graph
         fsnap show @latest
         fsnap show base"
    ), @"
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap checkpoint -m first -t base -t v1.0
    ID1
    $ echo more >>db/a
    $ fsnap checkpoint -m 'second: with a longer message'
    ID2
    $ fsnap checkpoint
    ID3
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID3  TIME  ID2  db
    ID2  TIME  ID1  db  second: with a longer message
    ID1  TIME  db  (base,v1.0) first
    $ fsnap log -n 1
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID3  TIME  ID2  db
    $ fsnap log --graph
    ○  ID3  TIME
    ○  ID2  TIME  second: with a longer message
    ○  ID1  TIME  (base,v1.0) first
    $ fsnap show @latest
    checkpoint ID3
    parent  ID2
    time  TIME

    volume db at $T/db
      backend  rsync
      snapshot  s-IMAGE1
      consistency  fuzzy
    $ fsnap show base
    checkpoint ID1
    time  TIME
    tags  base, v1.0
    message  first

    volume db at $T/db
      backend  rsync
      snapshot  s-IMAGE2
      consistency  fuzzy
    ");
}

#[test]
fn on_btrfs_a_live_checkpoint_is_crash_consistent() {
    let site = Site::btrfs();
    assert_snapshot!(site.in_dir("fs").session(
        "fsnap init db
         fsnap checkpoint -m 'on btrfs'
         fsnap show @latest"
    ), @"
    $ fsnap init db
    volume db at $T/fs/db: btrfs snapshots in $T/fs/.fsnap
    $ fsnap checkpoint -m 'on btrfs'
    ID1
    $ fsnap show @latest
    checkpoint ID1
    time  TIME
    message  on btrfs

    volume db at $T/fs/db
      backend  btrfs
      snapshot  s-IMAGE1
      consistency  crash-consistent
    ");
}

#[test]
fn the_fields_that_others_rely_upon() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -m first -t base");
    let taken: Value = serde_json::from_str(&site.run("fsnap checkpoint --json -m second -t a -t b")).unwrap();
    let listed: Value = serde_json::from_str(&site.run("fsnap log --json")).unwrap();
    assert_eq!(listed[0], taken);
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert_eq!(taken["parent"], listed[1]["id"]);
    assert_eq!(listed[1]["parent"], Value::Null);
    assert_eq!(taken["tags"], serde_json::json!(["a", "b"]));
    let shown: Value = serde_json::from_str(&site.run("fsnap show --json a")).unwrap();
    assert_eq!(shown, taken);
    assert_snapshot!(site.session("fsnap log --json -n 1"), @r#"
    $ fsnap log --json -n 1
    [
      {
        "branch": null,
        "engine": null,
        "id": "ID1",
        "members": [
          {
            "backend": "rsync",
            "consistency": "fuzzy",
            "omissions": [],
            "path": "$T/db",
            "snapshot": "s-IMAGE1",
            "volume": "db",
            "writers": []
          }
        ],
        "message": "second",
        "parent": "ID2",
        "tags": [
          "a",
          "b"
        ],
        "time": "TIME",
        "unlinked": []
      }
    ]
    "#);
    let time: jiff::Timestamp = taken["time"].as_str().unwrap().parse().unwrap();
    assert!(time.duration_until(jiff::Timestamp::now()).as_secs().abs() < 60);
}

#[test]
fn every_listing_is_an_array_also_when_it_is_empty() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db --name first && fsnap rm --volume first
         fsnap log
         fsnap log --json
         fsnap log --graph
         fsnap volumes
         fsnap volumes --json
         fsnap branches
         fsnap branches --json
         fsnap recover
         fsnap recover --json
         fsnap verify
         fsnap verify --json
         fsnap show @latest
         fsnap checkpoint"
    ), @r#"
    $ fsnap init db --name first && fsnap rm --volume first
    volume first at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap log
    $ fsnap log --json
    []
    $ fsnap log --graph
    $ fsnap volumes
    $ fsnap volumes --json
    []
    $ fsnap branches
    $ fsnap branches --json
    []
    $ fsnap recover
    nothing is half done
    $ fsnap recover --json
    []
    $ fsnap verify
    verified the catalog and 0 checkpoints: 0 damaged
    $ fsnap verify --json
    {
      "checkpoints": 0,
      "damage": [],
      "unknown": []
    }
    $ fsnap show @latest
    ! fsnap: error: no checkpoint "@latest"
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap checkpoint
    ! fsnap: error: there is no volume to take a snapshot of: register one with `fsnap init DIR`
    [exit 1]
    "#);
}

#[test]
fn only_init_makes_a_catalog() {
    let site = Site::plain();
    for line in [
        "fsnap volumes",
        "fsnap checkpoint",
        "fsnap log",
        "fsnap show @latest",
        "fsnap diff @latest",
        "fsnap branch @latest",
        "fsnap branches",
        "fsnap restore @latest",
        "fsnap rm @latest",
        "fsnap tag @latest x",
        "fsnap verify",
        "fsnap recover",
    ] {
        let said = site.fail(line);
        assert!(said.starts_with("fsnap: error: there is no catalog at "), "{line}: {said}");
        assert!(
            said.ends_with("hint: `fsnap init DIR` makes one; FSNAP_STATE names another state directory"),
            "{said}"
        );
        assert!(!site.path("state").exists(), "{line} made the state directory");
    }
}

#[test]
fn volumes_are_chosen_by_name_or_path() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "mkdir web && echo page >web/index
         fsnap init db
         fsnap init web --name www
         fsnap checkpoint -m both
         fsnap checkpoint -m one www
         fsnap checkpoint -m 'the other' $T/db
         fsnap checkpoint -m 'both again' db web/
         fsnap checkpoint nothing
         fsnap checkpoint web/index
         fsnap checkpoint --branch main
         fsnap log --graph
         fsnap show @latest
         fsnap diff @latest~1 @latest"
    ), @r#"
    $ mkdir web && echo page >web/index
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap init web --name www
    volume www at $T/web: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/web` tells why other backends cannot hold it
    $ fsnap checkpoint -m both
    ID1
    $ fsnap checkpoint -m one www
    ID2
    $ fsnap checkpoint -m 'the other' $T/db
    ID3
    $ fsnap checkpoint -m 'both again' db web/
    ID4
    $ fsnap checkpoint nothing
    ! fsnap: error: no volume "nothing" is registered: there is db, www
    ! fsnap: hint: `fsnap volumes` lists the volumes, `fsnap ps` the runs; `fsnap init DIR` registers a volume
    [exit 1]
    $ fsnap checkpoint web/index
    ! fsnap: error: no volume "web/index" is registered: there is db, www
    ! fsnap: hint: `fsnap volumes` lists the volumes, `fsnap ps` the runs; `fsnap init DIR` registers a volume
    [exit 1]
    $ fsnap checkpoint --branch main
    ! fsnap: error: no branch "main"
    ! fsnap: hint: `fsnap branches` lists the branches
    [exit 1]
    $ fsnap log --graph
    ○  ID4  TIME  both again
    ○  ID3  TIME  the other
    │ ○  ID2  TIME  one
    ├─╯
    ○  ID1  TIME  both
    $ fsnap show @latest
    checkpoint ID4
    parent  ID3
    time  TIME
    message  both again

    volume db at $T/db
      backend  rsync
      snapshot  s-IMAGE1
      consistency  fuzzy

    volume www at $T/web
      backend  rsync
      snapshot  s-IMAGE2
      consistency  fuzzy
    $ fsnap diff @latest~1 @latest
    ! fsnap: note: volume www is in only one of the two checkpoints
    "#);
}

#[test]
fn wrong_usage_is_told_from_failure() {
    let site = Site::plain();
    site.run("fsnap init db");
    assert_snapshot!(site.session(
        "fsnap
         fsnap frobnicate
         fsnap checkpoint --pid x
         fsnap checkpoint --pid 1 --cgroup /x
         fsnap checkpoint --deadline 0
         fsnap checkpoint --deadline NaN
         fsnap checkpoint -t a/b
         fsnap checkpoint --pid 999999999
         fsnap checkpoint --pid 0
         fsnap checkpoint --cgroup $T/db
         fsnap log --json --graph
         fsnap log -n -1
         fsnap rm
         fsnap rm x --branch y
         fsnap log"
    ), @r#"
    $ fsnap
    ! Snapshot the files of processes at their checkpoints, and branch from any of them
    !
    ! Usage: fsnap <COMMAND>
    !
    ! Commands:
    !  init  Begin to track a directory as a volume
    !  volumes  List the volumes: name, path, backend, what the backend can do
    !  checkpoint  Take a snapshot of every volume at one instant, and print the new checkpoint's id
    !  audit  List what processes can write to that a checkpoint of them would not hold
    !  log  List the checkpoints, newest first
    !  show  Show one checkpoint: its volumes, their consistency, and what is not in it
    !  diff  List the files that differ between two checkpoints, or between a checkpoint and now
    !  branch  Make a writable branch from a checkpoint, and print where its files are
    !  branches  List the branches, the checkpoint each grew from, and where its files are
    !  restore  Restore a checkpoint's processes onto a new branch with the files of the same
    !  instant
    !  run  Start a command so that it can be saved and copied live
    !  ps  List the runs: the process, checkpoint and branch of each, and since when it runs
    !  logs  Print what the processes of a run have written to standard output and standard
    !  error
    !  stop  End runs: ask each command to (SIGTERM), and kill what is left after a while
    !  rm  Remove checkpoints, a branch, an ended run, or a volume from fsnap's care
    !  tag  Give a checkpoint a name
    !  mount  Show every checkpoint and branch as files
    !  overlay  Write to a directory copy-on-write
    !  umount  Unmount what fsnap serves
    !  verify  Read checkpoints again and name what is damaged
    !  pool  Make, list, enlarge and remove thin pools of device-mapper, for those who have none
    !  recover  Finish or undo what a killed fsnap or engine left half done
    !  doctor  Tell what this machine can do, and why not: every backend, every engine, fsnap's
    !  own state
    !  install-hooks  Make CRIU call fsnap, whoever calls CRIU: a user, or a container runtime
    !  engine  Save a container from outside, or restore it as a second one on a branch
    !  hook  Be called by a checkpoint engine
    !  criu-args  Print what CRIU is to be told when it dumps a process: one argument a line
    !  completions  Print the completion script for a shell
    !  man  Print the manual page, or write the pages of all commands into a directory
    !  help  Print this message or the help of the given subcommand(s)
    !
    ! Options:
    !  -h, --help  Print help (see more with '--help')
    !  -V, --version  Print version
    !
    ! CKPT is an id, a unique prefix of one (4 digits or more), a tag, @latest, or X~N, the N-th
    ! checkpoint before X.
    !
    ! Exit codes: 0 done, 1 failed, 2 wrong usage.
    [exit 2]
    $ fsnap frobnicate
    ! error: unrecognized subcommand 'frobnicate'
    !
    ! Usage: fsnap <COMMAND>
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap checkpoint --pid x
    ! error: invalid value 'x' for '--pid <PID>': invalid digit found in string
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap checkpoint --pid 1 --cgroup /x
    ! error: the argument '--pid <PID>' cannot be used with '--cgroup <DIR>'
    !
    ! Usage: fsnap checkpoint --pid <PID> [VOLUME|RUN]... [-- <ENGINE ARGS>...]
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap checkpoint --deadline 0
    ! error: invalid value '0' for '--deadline <SECONDS>': a number of seconds from 0.1 to 3600
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap checkpoint --deadline NaN
    ! error: invalid value 'NaN' for '--deadline <SECONDS>': a number of seconds from 0.1 to 3600
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap checkpoint -t a/b
    ! error: invalid value 'a/b' for '--tag <TAG>': "a/b" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap checkpoint --pid 999999999
    ! fsnap: error: there is no process 999999999: it has ended, or was never there
    [exit 1]
    $ fsnap checkpoint --pid 0
    ! fsnap: error: there is no process 0: it has ended, or was never there
    [exit 1]
    $ fsnap checkpoint --cgroup $T/db
    ! fsnap: error: "$T/db" is not a control group: it is neither a directory of a hierarchy nor a name in the unified one
    [exit 1]
    $ fsnap log --json --graph
    ! error: the argument '--json' cannot be used with '--graph'
    !
    ! Usage: fsnap log --json
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap log -n -1
    ! error: unexpected argument '-1' found
    !
    ! Usage: fsnap log [OPTIONS]
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap rm
    ! error: the following required arguments were not provided:
    !  <CKPT|--branch <NAME>|--volume <NAME>|--run <NAME>>
    !
    ! Usage: fsnap rm <CKPT|--branch <NAME>|--volume <NAME>|--run <NAME>>
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap rm x --branch y
    ! error: the argument '[CKPT]...' cannot be used with '--branch <NAME>'
    !
    ! Usage: fsnap rm <CKPT|--branch <NAME>|--volume <NAME>|--run <NAME>>
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap log
    "#);
}

#[test]
fn a_tag_that_is_taken_leaves_no_checkpoint() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db
         fsnap checkpoint -t base
         fsnap checkpoint -t other -t base
         fsnap log
         fsnap recover
         ls .fsnap/snapshots .fsnap/partials state/intents"
    ), @"
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap checkpoint -t base
    ID1
    $ fsnap checkpoint -t other -t base
    ! fsnap: error: the tag base exists already: it names checkpoint ID1; choose another, or free it: `fsnap tag --delete`
    [exit 1]
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db  (base)
    $ fsnap recover
    nothing is half done
    $ ls .fsnap/snapshots .fsnap/partials state/intents
    .fsnap/partials:

    .fsnap/snapshots:
    s-IMAGE1

    state/intents:
    ");
}

#[test]
fn a_message_of_several_lines_is_kept_whole() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        r#"fsnap init db
         fsnap checkpoint -m "$(printf 'first line\nsecond \033[31mline\ttab')"
         fsnap log
         fsnap log --graph
         fsnap show @latest
         fsnap log --json | grep message"#
    ), @r#"
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap checkpoint -m "$(printf 'first line\nsecond \033[31mline\ttab')"
    ID1
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db  first line
    $ fsnap log --graph
    ○  ID1  TIME  first line
    $ fsnap show @latest
    checkpoint ID1
    time  TIME
    message  first line
    message  second \u{1b}[31mline\ttab

    volume db at $T/db
      backend  rsync
      snapshot  s-IMAGE1
      consistency  fuzzy
    $ fsnap log --json | grep message
        "message": "first line\nsecond \u001b[31mline\ttab",
    "#);
}

/// Who has a file of the volume open for writing is named, and the consistency class says so.
#[test]
fn a_writer_is_named() {
    for (mut site, dir, weaker) in [(Site::plain(), ".", "fuzzy"), (Site::btrfs(), "fs", "crash-consistent")] {
        site.set("MINE", "$$");
        let shell = site.in_dir(dir);
        shell.run("fsnap init db");
        // The shell itself holds the file.
        let seen = shell.run("exec 3>>db/a; echo $$; fsnap checkpoint >/dev/null && fsnap show @latest; echo >&3");
        let pid = seen.lines().next().unwrap();
        assert!(seen.contains(&format!("  consistency  {weaker}")), "{seen}");
        assert!(seen.contains(&format!("  also written by {pid} (sh) ")), "{seen}");
        let json = shell.run("fsnap show @latest --json");
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["members"][0]["consistency"], weaker);
        assert_eq!(json["members"][0]["writers"].as_array().unwrap().len(), 1);
        assert_eq!(shell.run("fsnap diff @latest"), "M db/a");
    }
}

#[test]
fn a_frozen_process_gives_a_point_in_time_and_runs_on() {
    for (site, dir, unprivileged) in
        [(Site::plain(), ".", false), (Site::btrfs(), "fs", false), (Site::unprivileged(), ".", true)]
    {
        let shell = site.in_dir(dir);
        shell.run("fsnap init db");
        let mut writer = shell
            .command(
                "exec setsid sh -c 'i=0; exec 3>>db/log; while :; do i=$((i+1)); echo $i >&3; echo $i >db/last; done'",
            )
            .spawn()
            .unwrap();
        let line = format!("fsnap checkpoint --pid {} >/dev/null && fsnap show @latest", writer.id());
        let shown = shell.output(&line);
        let state = std::fs::read_to_string(format!("/proc/{}/stat", writer.id())).unwrap();
        writer.kill().unwrap();
        writer.wait().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        // Without privileges nobody can tell what the processes of others do, and the record claims no more.
        match shown.contains("processes perhaps, whose files this user may not look at") {
            true if unprivileged => assert!(shown.contains("  consistency  fuzzy"), "{shown}"),
            _ => assert!(shown.contains("  consistency  point-in-time"), "{shown}"),
        }
        assert!(!state.contains(") T "), "it was left stopped: {state}");
        let path = shell.run("fsnap branch @latest frozen");
        let read = |name: &str| std::fs::read_to_string(format!("{path}/{name}")).unwrap();
        let logged: u64 = read("log").lines().last().map_or(0, |line| line.parse().unwrap());
        // It was stopped between any two of its system calls, one of which empties the second file.
        let last: u64 = read("last").trim().parse().unwrap_or(logged - 1);
        assert!(last == logged || last + 1 == logged, "{last} in one file and {logged} in the other");
        shell.run("fsnap rm --branch frozen && fsnap verify");
    }
}
