//! What happens when the disk is full, the store is read-only, limits are low, the clock goes backwards, and two
//! commands want the same.
//!
//! Each session shows the message, and then that nothing was lost and nothing was left: what is listed and verified
//! afterwards, and the images in the store.

use std::process::{Child, Command, Stdio};

use fsnap::processes::Tree;
use insta::{allow_duplicates, assert_snapshot};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, kill_process, prlimit, waitpid};

use crate::site::{Shell, Site};

#[test]
fn a_full_store_fails_one_checkpoint_and_no_other() {
    let mut site = Site::plain();
    site.mount("small", 16 << 20, &["mkfs.ext4", "-q"]);
    assert_snapshot!(site.session(
        "fsnap init --store small/store --backend rsync db
         fsnap checkpoint -m before >/dev/null
         for i in 1 2 3 4 5 6; do head -c 4M /dev/urandom >db/big$i; done
         fsnap checkpoint -m 'too large' 2>&1 | sed 's/big[1-6]/BIG/'
         fsnap log
         fsnap verify
         fsnap recover
         ls small/store/snapshots small/store/partials small/store/doomed small/store/batches
         rm db/big*
         fsnap diff @latest
         fsnap checkpoint -m after >/dev/null
         fsnap log
         fsnap verify"
    ), @"
    $ fsnap init --store small/store --backend rsync db
    volume db at $T/db: rsync snapshots in $T/small/store
    $ fsnap checkpoint -m before >/dev/null
    $ for i in 1 2 3 4 5 6; do head -c 4M /dev/urandom >db/big$i; done
    $ fsnap checkpoint -m 'too large' 2>&1 | sed 's/big[1-6]/BIG/'
    fsnap: error: no snapshot of db: cannot copy $T/db/BIG: No space left on device (os error 28)
    fsnap: hint: free some space, then try again; nothing was left behind
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db  before
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    $ fsnap recover
    nothing is half done
    $ ls small/store/snapshots small/store/partials small/store/doomed small/store/batches
    small/store/batches:
    ID2

    small/store/doomed:

    small/store/partials:

    small/store/snapshots:
    s-IMAGE1
    $ rm db/big*
    $ fsnap diff @latest
    $ fsnap checkpoint -m after >/dev/null
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID3  TIME  ID1  db  after
    ID1  TIME  db  before
    $ fsnap verify
    verified the catalog and 2 checkpoints: 0 damaged
    ");
    assert_eq!(site.images("small/store").len(), 2);
}

#[test]
fn a_full_store_of_btrfs_fails_one_checkpoint_and_no_other() {
    let mut site = Site::empty();
    site.mount("fs", 24 << 20, &["mkfs.btrfs", "-q", "--mixed"]);
    assert_snapshot!(site.in_dir("fs").session(
        "btrfs -q subvolume create db && echo one >db/a
         fsnap init db
         fsnap checkpoint -m before >/dev/null
         cat /dev/zero >db/zero
         fsnap checkpoint -m refused
         fsnap branch @latest refused
         fsnap branches
         fsnap log
         fsnap verify
         fsnap recover
         ls .fsnap/snapshots .fsnap/volumes
         cat db/a
         rm db/zero && sync -f .
         fsnap checkpoint -m after >/dev/null
         fsnap diff @latest~1 @latest
         fsnap verify"
    ), @"
    $ btrfs -q subvolume create db && echo one >db/a
    $ fsnap init db
    volume db at $T/fs/db: btrfs snapshots in $T/fs/.fsnap
    $ fsnap checkpoint -m before >/dev/null
    $ cat /dev/zero >db/zero
    ! cat: write error: No space left on device
    [exit 1]
    $ fsnap checkpoint -m refused
    ! fsnap: error: no snapshot of db: cannot make a snapshot of $T/fs/db: No space left on device (os error 28)
    ! fsnap: hint: free some space, then try again; nothing was left behind
    [exit 1]
    $ fsnap branch @latest refused
    ! fsnap: error: cannot make the clone $T/fs/.fsnap/volumes/v-IMAGE1: No space left on device (os error 28)
    ! fsnap: hint: free some space, then try again; nothing was left behind
    [exit 1]
    $ fsnap branches
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db  before
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    $ fsnap recover
    nothing is half done
    $ ls .fsnap/snapshots .fsnap/volumes
    .fsnap/snapshots:
    s-IMAGE2

    .fsnap/volumes:
    $ cat db/a
    one
    $ rm db/zero && sync -f .
    $ fsnap checkpoint -m after >/dev/null
    $ fsnap diff @latest~1 @latest
    $ fsnap verify
    verified the catalog and 2 checkpoints: 0 damaged
    ");
    assert_eq!(site.images("fs/.fsnap").len(), 2);
}

#[test]
fn a_branch_that_is_too_large_is_told_how_to_do_without_copying() {
    let mut site = Site::plain();
    site.mount("small", 16 << 20, &["mkfs.ext4", "-q"]);
    assert_snapshot!(site.session(
        "head -c 8M /dev/urandom >db/large
         fsnap init --store small/store --backend rsync db
         fsnap checkpoint >/dev/null
         fsnap branch @latest 2>&1 | sed 's/ copy .*large/ copy FILE/; s/v-[0-9a-f]*[.a-z]*/V/'
         fsnap branches
         fsnap recover
         mkdir past && fsnap mount past
         mkdir past/branches/try@latest && cmp db/large past/branches/try/db/large
         fsnap umount past"
    ), @"
    $ head -c 8M /dev/urandom >db/large
    $ fsnap init --store small/store --backend rsync db
    volume db at $T/db: rsync snapshots in $T/small/store
    $ fsnap checkpoint >/dev/null
    $ fsnap branch @latest 2>&1 | sed 's/ copy .*large/ copy FILE/; s/v-[0-9a-f]*[.a-z]*/V/'
    fsnap: error: cannot restore $T/small/store/volumes/V/large: No space left on device (os error 28)
    fsnap: hint: free some space, then try again; nothing was left behind
    fsnap: hint: a branch made in a mount copies nothing: `fsnap mount DIR`, then `mkdir DIR/branches/NAME@CKPT`
    $ fsnap branches
    $ fsnap recover
    nothing is half done
    $ mkdir past && fsnap mount past
    $ mkdir past/branches/try@latest && cmp db/large past/branches/try/db/large
    $ fsnap umount past
    ");
}

#[test]
fn a_read_only_store_of_rsync_can_still_be_read() {
    let mut site = Site::plain();
    site.mount("small", 32 << 20, &["mkfs.ext4", "-q"]);
    assert_snapshot!(site.session(
        "fsnap init --backend rsync --store small/store db
         fsnap checkpoint -m before >/dev/null
         echo changed >db/a
         mount -o remount,ro small
         fsnap checkpoint -m refused
         fsnap branch @latest 2>&1 | sed 's/v-[0-9a-f]*/V/'
         fsnap log
         fsnap show @latest | grep message
         fsnap diff @latest
         fsnap verify
         fsnap recover
         fsnap rm @latest
         fsnap recover
         mount -o remount,rw small
         fsnap recover
         fsnap checkpoint -m after >/dev/null
         fsnap log
         fsnap verify"
    ), @"
    $ fsnap init --backend rsync --store small/store db
    volume db at $T/db: rsync snapshots in $T/small/store
    $ fsnap checkpoint -m before >/dev/null
    $ echo changed >db/a
    $ mount -o remount,ro small
    $ fsnap checkpoint -m refused
    ! fsnap: error: no snapshot of db: cannot make the directory $T/small/store/batches/ID1: Read-only file system (os error 30)
    ! fsnap: hint: mount it writable first
    [exit 1]
    $ fsnap branch @latest 2>&1 | sed 's/v-[0-9a-f]*/V/'
    fsnap: error: cannot make the directory $T/small/store/volumes/V.part: Read-only file system (os error 30)
    fsnap: hint: mount it writable first
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID2  TIME  db  before
    $ fsnap show @latest | grep message
    message  before
    $ fsnap diff @latest
    M db/a
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    $ fsnap recover
    nothing is half done
    $ fsnap rm @latest
    ! fsnap: error: cannot remove $T/small/store/snapshots/s-IMAGE1: Read-only file system (os error 30)
    ! fsnap: hint: mount it writable first
    [exit 1]
    $ fsnap recover
    postponed: the removal of one image: cannot remove $T/small/store/snapshots/s-IMAGE1: Read-only file system (os error 30)
    [exit 1]
    $ mount -o remount,rw small
    $ fsnap recover
    finished: a removal
    $ fsnap checkpoint -m after >/dev/null
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID3  TIME  db  after
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    ");
    assert_eq!(site.images("small/store").len(), 1);
}

#[test]
fn a_read_only_store_of_btrfs_can_still_be_read() {
    let site = Site::btrfs();
    assert_snapshot!(site.in_dir("fs").session(
        "fsnap init db
         fsnap checkpoint -m before >/dev/null
         echo changed >db/a
         mount -o remount,ro $TOP
         fsnap checkpoint -m refused
         fsnap branch @latest
         fsnap log
         fsnap show @latest | grep message
         fsnap diff @latest
         fsnap verify
         fsnap recover
         fsnap rm @latest
         fsnap recover
         mount -o remount,rw $TOP
         fsnap recover
         fsnap checkpoint -m after >/dev/null
         fsnap log
         fsnap verify"
    ), @"
    $ fsnap init db
    volume db at $T/fs/db: btrfs snapshots in $T/fs/.fsnap
    $ fsnap checkpoint -m before >/dev/null
    $ echo changed >db/a
    $ mount -o remount,ro $TOP
    $ fsnap checkpoint -m refused
    ! fsnap: error: no snapshot of db: cannot make a snapshot of $T/fs/db: Read-only file system (os error 30)
    ! fsnap: hint: mount it writable first
    [exit 1]
    $ fsnap branch @latest
    ! fsnap: error: cannot make the clone $T/fs/.fsnap/volumes/v-IMAGE1: Read-only file system (os error 30)
    ! fsnap: hint: mount it writable first
    [exit 1]
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db  before
    $ fsnap show @latest | grep message
    message  before
    $ fsnap diff @latest
    M db/a
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    $ fsnap recover
    nothing is half done
    $ fsnap rm @latest
    ! fsnap: error: cannot remove $T/fs/.fsnap/snapshots/s-IMAGE2: Read-only file system (os error 30)
    ! fsnap: hint: mount it writable first
    [exit 1]
    $ fsnap recover
    postponed: the removal of one image: cannot remove $T/fs/.fsnap/snapshots/s-IMAGE2: Read-only file system (os error 30)
    [exit 1]
    $ mount -o remount,rw $TOP
    $ fsnap recover
    finished: a removal
    $ fsnap checkpoint -m after >/dev/null
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID2  TIME  db  after
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    ");
    assert_eq!(site.images("fs/.fsnap").len(), 1);
}

/// A file system where a full disk is told by an error of a call, and one where it is told by SIGBUS: of blocks smaller
/// than a page, some of a page may be missing.
#[test]
fn the_file_system_of_the_catalog_is_full() {
    for block in ["4096", "1024"] {
        let mut site = Site::plain();
        site.mount("tiny", 4 << 20, &["mkfs.ext4", "-q", "-O", "^has_journal", "-b", block]);
        site.set("FSNAP_STATE", site.path("tiny/state").to_str().unwrap());
        site.run("fsnap init db && fsnap checkpoint -t before");
        // Where there is no room for much, there may be some for a little.
        site.shell().output(&format!(
            "cat /dev/zero >tiny/zero; n=0
             while dd if=/dev/zero of=tiny/zero.$n bs={block} count=1 conv=fsync; do n=$((n+1)); done"
        ));
        for line in ["fsnap checkpoint", "fsnap tag @latest name", "fsnap branch @latest", "fsnap rm @latest"] {
            let output = site.shell().output(line);
            let said = String::from_utf8(output.stderr).unwrap();
            match output.status.code() {
                Some(1) => assert!(said.contains("fsnap: hint: free some space"), "{line}: {said}"),
                // The log of the database may have room for one more small change.
                Some(0) if line.contains("tag") => {}
                _ => panic!("{line}: {}: {said}", output.status),
            }
        }
        site.run("rm tiny/zero*; fsnap tag --delete name 2>/dev/null || true");
        allow_duplicates!(assert_snapshot!(site.session(
            "fsnap recover >/dev/null
             fsnap recover
             fsnap log
             fsnap branches
             fsnap verify
             ls .fsnap/snapshots .fsnap/volumes .fsnap/partials .fsnap/doomed
             fsnap checkpoint -m after >/dev/null
             fsnap verify"
        ), @"
        $ fsnap recover >/dev/null
        $ fsnap recover
        nothing is half done
        $ fsnap log
        ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
        ID1  TIME  db  (before)
        $ fsnap branches
        $ fsnap verify
        verified the catalog and 1 checkpoint: 0 damaged
        $ ls .fsnap/snapshots .fsnap/volumes .fsnap/partials .fsnap/doomed
        .fsnap/doomed:

        .fsnap/partials:

        .fsnap/snapshots:
        s-IMAGE1

        .fsnap/volumes:
        $ fsnap checkpoint -m after >/dev/null
        $ fsnap verify
        verified the catalog and 2 checkpoints: 0 damaged
        "));
        assert_eq!(site.images(".fsnap").len(), 2);
    }
}

#[test]
fn a_full_memory_file_system_is_told_as_such() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "mkdir tiny
         echo 'fsnap init db; fsnap checkpoint -m before; cat /dev/zero >tiny/zero' >script
         echo 'fsnap checkpoint; fsnap branch @latest; rm tiny/zero; fsnap recover; fsnap log; fsnap verify' >>script
         FSNAP_STATE=tiny/state unshare --mount sh -c 'mount -t tmpfs -o size=1m tiny tiny; sh script 2>&1'"
    ), @"
    $ mkdir tiny
    $ echo 'fsnap init db; fsnap checkpoint -m before; cat /dev/zero >tiny/zero' >script
    $ echo 'fsnap checkpoint; fsnap branch @latest; rm tiny/zero; fsnap recover; fsnap log; fsnap verify' >>script
    $ FSNAP_STATE=tiny/state unshare --mount sh -c 'mount -t tmpfs -o size=1m tiny tiny; sh script 2>&1'
    fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ID1
    cat: write error: No space left on device
    fsnap: error: the catalog $T/tiny/state/catalog.db cannot grow: its file system is full, or the size of files is limited
    fsnap: hint: free some space there; `fsnap recover` tells whether anything was begun
    fsnap: error: the catalog $T/tiny/state/catalog.db cannot grow: its file system is full, or the size of files is limited
    fsnap: hint: free some space there; `fsnap recover` tells whether anything was begun
    nothing is half done
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db  before
    verified the catalog and 1 checkpoint: 0 damaged
    ");
    assert_eq!(site.images(".fsnap").len(), 1);
}

#[test]
fn a_file_that_may_not_grow_fails_one_checkpoint_and_no_other() {
    for site in Site::each() {
        let shell = site.top();
        shell.run("fsnap init db && fsnap checkpoint -m before && head -c 200k /dev/urandom >db/big");
        for blocks in [0, 1, 8] {
            let said = shell.fail(&format!("ulimit -f {blocks}; fsnap checkpoint"));
            assert!(said.starts_with("fsnap: error: "), "{blocks}: {said}");
        }
        site.expect_order(&["before"]);
        shell.run("fsnap checkpoint -m after");
        site.expect_order(&["after", "before"]);
    }
}

#[test]
fn too_few_descriptors_fail_one_checkpoint_and_no_other() {
    for site in Site::each() {
        let shell = site.top();
        shell.run("fsnap init db && fsnap checkpoint -m before && echo changed >db/a");
        let mut failed = 0;
        for limit in 4..40 {
            let output = shell.output(&format!("ulimit -n {limit}; fsnap checkpoint"));
            let said = String::from_utf8(output.stderr).unwrap();
            match output.status.code() {
                Some(0) => break,
                // The loader, before fsnap is there.
                Some(127) => assert!(said.contains("shared libraries"), "{limit}: {said}"),
                Some(1) => {
                    assert!(said.contains("fsnap: error: "), "{limit}: {said}");
                    failed += 1;
                }
                _ => panic!("{limit}: {}: {said}", output.status),
            }
        }
        assert!(failed > 3, "only {failed} were refused");
        shell.run("fsnap recover");
        site.expect_order(&["", "before"]);
    }
}

/// Runs the command until it stops itself at that place.
pub(crate) fn stopped_at(place: &str, mut command: Command) -> (Child, Pid) {
    command.env("FSNAP_FAILPOINT", format!("{place}=stop")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = Pid::from_child(&child);
    waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
    (child, pid)
}

/// Everything is taken and noted, and then nothing can be opened any more: it has failed, and stays so.
#[test]
fn what_fails_in_the_end_is_not_there_later() {
    for site in Site::each() {
        let shell = site.top();
        shell.run("fsnap init db && fsnap checkpoint -m before && echo changed >db/a");
        let (failing, pid) = stopped_at("take:recorded", shell.command("exec fsnap checkpoint -m failed"));
        prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(3), maximum: Some(3) }).unwrap();
        kill_process(pid, Signal::CONT).unwrap();
        let output = failing.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("Too many open files"), "{said}");
        shell.run("fsnap recover");
        site.expect_order(&["before"]);
        assert_eq!(site.stored(), 1);
    }
}

/// Who comes second would find the processes stopped, and then running.
#[test]
fn freezes_of_one_tree_take_turns() {
    let site = Site::plain();
    let shell = site.top();
    shell.run("fsnap init db");
    let [mut one, mut other] = ["db/one", "db/other"].map(|file| {
        let child = shell.command(&format!("exec >{file}; echo; exec sleep 1000")).spawn().unwrap();
        shell.run(&format!("until [ -s {file} ]; do sleep 0.01; done"));
        child
    });
    let checkpoint = |child: &Child, options| format!("exec fsnap checkpoint --pid {} {options}", child.id());
    let (first, pid) = stopped_at("take:all", shell.command(&checkpoint(&one, "")));
    let refused = shell.output(&checkpoint(&one, "--deadline 0.1"));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("another fsnap freezes these processes"), "{said}");
    shell.run(&checkpoint(&other, ""));
    let second = shell.command(&checkpoint(&one, "--deadline 3600")).stdout(Stdio::null()).spawn().unwrap();
    kill_process(pid, Signal::CONT).unwrap();
    for taken in [first, second] {
        let output = taken.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    for child in [&mut one, &mut other] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    site.expect_order(&["", "", ""]);
}

/// A process that has a file of the volume open for writing.
fn a_writer(shell: &Shell<'_>) -> Child {
    shell.run("fsnap init db");
    let writer = shell.command("exec >db/file; echo; exec sleep 1000").spawn().unwrap();
    shell.run("until [ -s db/file ]; do sleep 0.01; done");
    writer
}

/// Who is killed leaves it to its guard to set the processes running: until that has, it is nobody else's turn.
#[test]
fn a_freeze_that_is_killed_has_its_turn_until_all_runs() {
    let site = Site::plain();
    let shell = site.top();
    let mut writer = a_writer(&shell);
    let by_pid = format!("exec fsnap checkpoint --pid {}", writer.id());
    for checkpoint in [&by_pid, "exec fsnap checkpoint --freeze-writers"] {
        let (mut killed, pid) = stopped_at("take:all", shell.command(checkpoint));
        let tree = Tree::of_pid(pid.as_raw_pid()).unwrap();
        let guards: Vec<_> = tree.members().map(|member| member.id.pid).filter(|&id| id != pid.as_raw_pid()).collect();
        let [guard] = guards[..] else { panic!("{guards:?}") };
        let guard = Pid::from_raw(guard).unwrap();
        kill_process(guard, Signal::STOP).unwrap();
        killed.kill().unwrap();
        killed.wait().unwrap();
        let next = [&by_pid, "exec fsnap checkpoint --freeze-writers"];
        let refused = next.map(|next| shell.output(&format!("{next} --deadline 0.1")));
        kill_process(guard, Signal::CONT).unwrap();
        for refused in refused {
            let said = String::from_utf8_lossy(&refused.stderr);
            let why = "another fsnap freezes these processes";
            assert!(refused.status.code() == Some(1) && said.contains(why), "{checkpoint}: {said}");
        }
        shell.run(&format!("{by_pid} --deadline 3600"));
    }
    writer.kill().unwrap();
    writer.wait().unwrap();
    site.expect_order(&["", ""]);
}

/// Who waits while another is killed has looked for half done things before: the next command thawed for the killed one what he had frozen.
#[test]
fn who_had_to_wait_for_his_turn_is_not_thawed_by_others() {
    let site = Site::plain();
    let shell = site.top();
    let mut writer = a_writer(&shell);
    let checkpoint = format!("exec fsnap checkpoint --deadline 3600 --pid {}", writer.id());
    let (mut killed, _) = stopped_at("take:all", shell.command(&checkpoint));
    let mut second = shell.command(&checkpoint);
    let second =
        second.env("FSNAP_FAILPOINT", "take:all=stop").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    shell.run(r#"until [ "$(ls "$FSNAP_STATE/intents" | wc -l)" = 2 ]; do sleep 0.01; done"#);
    killed.kill().unwrap();
    killed.wait().unwrap();
    let pid = Pid::from_child(&second);
    waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
    shell.run("fsnap recover");
    kill_process(pid, Signal::CONT).unwrap();
    let output = second.wait_with_output().unwrap();
    writer.kill().unwrap();
    writer.wait().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    site.expect_order(&[""]);
}

#[test]
fn the_order_is_not_the_clocks() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         faketime '2036-01-01 00:00:00' fsnap checkpoint -m first >/dev/null
         faketime '1999-01-01 00:00:00' fsnap checkpoint -m second >/dev/null
         faketime '1960-01-01 00:00:00' fsnap checkpoint -m third >/dev/null
         fsnap checkpoint -m fourth >/dev/null
         fsnap log --graph
         fsnap log --json | grep time | cut -d '\"' -f 4 | cut -c -4 | sed 1d
         fsnap show @latest~3 | grep message
         faketime '1999-01-01 00:00:00' fsnap verify
         faketime '1999-01-01 00:00:00' fsnap rm @latest
         faketime '1999-01-01 00:00:00' fsnap recover
         fsnap show @latest | grep message"
    ), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ faketime '2036-01-01 00:00:00' fsnap checkpoint -m first >/dev/null
    $ faketime '1999-01-01 00:00:00' fsnap checkpoint -m second >/dev/null
    $ faketime '1960-01-01 00:00:00' fsnap checkpoint -m third >/dev/null
    $ fsnap checkpoint -m fourth >/dev/null
    $ fsnap log --graph
    ○  ID1  TIME  fourth
    ○  ID2  TIME  third
    ○  ID3  TIME  second
    ○  ID4  TIME  first
    $ fsnap log --json | grep time | cut -d '"' -f 4 | cut -c -4 | sed 1d
    1960
    1999
    2036
    $ fsnap show @latest~3 | grep message
    message  first
    $ faketime '1999-01-01 00:00:00' fsnap verify
    verified the catalog and 4 checkpoints: 0 damaged
    $ faketime '1999-01-01 00:00:00' fsnap rm @latest
    $ faketime '1999-01-01 00:00:00' fsnap recover
    nothing is half done
    $ fsnap show @latest | grep message
    message  third
    "#);
    assert_eq!(site.images(".fsnap").len(), 3);
}

#[test]
fn two_removals_at_once() {
    for site in Site::each() {
        let shell = site.top();
        let both = |lines: [&str; 2]| {
            let running = lines.map(|line| shell.command(line).stderr(Stdio::piped()).spawn().unwrap());
            running.map(|child| child.wait_with_output().unwrap())
        };
        shell.run("fsnap init db && fsnap checkpoint -t kept");
        for _ in 0..8 {
            shell.run("echo x >>db/a; fsnap checkpoint -t one; fsnap checkpoint -t two; fsnap checkpoint -t three");
            let same = both(["fsnap rm one", "fsnap rm one"]);
            assert_eq!(same.iter().filter(|output| output.status.success()).count(), 1, "{same:?}");
            let lost = same.iter().find(|output| !output.status.success()).unwrap();
            assert_eq!(lost.status.code(), Some(1));
            assert!(String::from_utf8_lossy(&lost.stderr).starts_with("fsnap: error: no checkpoint "), "{lost:?}");
            let other = both(["fsnap rm two", "fsnap rm three"]);
            assert!(other.iter().all(|output| output.status.success() && output.stderr.is_empty()), "{other:?}");
            assert_eq!(site.stored(), 1);
        }
        site.expect_order(&["kept"]);
    }
}

#[test]
fn what_is_removed_while_it_is_verified_is_not_damaged() {
    for site in Site::each() {
        let shell = site.top();
        shell.run("fsnap init db && fsnap checkpoint -t going && fsnap checkpoint -t kept");
        let (verifying, pid) = stopped_at("verify:listed", shell.command("exec fsnap verify"));
        shell.run("fsnap rm going");
        kill_process(pid, Signal::CONT).unwrap();
        let output = verifying.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said, "verified the catalog and 2 checkpoints: 0 damaged\n");
        assert!(output.status.success());
    }
}

#[test]
fn a_store_that_is_away_postpones_the_sealing() {
    let mut site = Site::empty();
    site.mount("fs", 128 << 20, &["mkfs.btrfs", "-q", "--mixed"]);
    assert_snapshot!(site.in_dir("fs").session(
        "btrfs -q subvolume create db && fsnap init db
         mkdir ../images
         for step in starting frozen; do fsnap hook generic $step --tree $$ --images ../images >/dev/null; done; mv .fsnap away
         fsnap log
         fsnap recover
         mv away .fsnap
         fsnap log"
    ), @"
    $ btrfs -q subvolume create db && fsnap init db
    volume db at $T/fs/db: btrfs snapshots in $T/fs/.fsnap
    $ mkdir ../images
    $ for step in starting frozen; do fsnap hook generic $step --tree $$ --images ../images >/dev/null; done; mv .fsnap away
    $ fsnap log
    ! fsnap: warning: checkpoint ID1 is half done and stays so: the snapshots of db are out of reach: the store $T/fs/.fsnap does not exist
    $ fsnap recover
    postponed: checkpoint ID1: the snapshots of db are out of reach: the store $T/fs/.fsnap does not exist
    [exit 1]
    $ mv away .fsnap
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db
    ");
}

/// The path of a store says nothing to whoever knows the volumes by their names.
#[test]
fn a_file_system_that_is_not_mounted_is_told_by_the_volume() {
    let mut site = Site::empty();
    site.mount("fs", 128 << 20, &["mkfs.btrfs", "-q", "--mixed"]);
    assert_snapshot!(site.session(
        "btrfs -q subvolume create fs/db && fsnap init fs/db
         fsnap checkpoint --tag one >/dev/null
         umount fs
         fsnap branch one
         fsnap diff one
         fsnap verify
         fsnap checkpoint
         fsnap rm --volume db
         fsnap branch one
         mount -o loop fs.image fs
         fsnap branch one >/dev/null"
    ), @"
    $ btrfs -q subvolume create fs/db && fsnap init fs/db
    volume db at $T/fs/db: btrfs snapshots in $T/fs/.fsnap
    $ fsnap checkpoint --tag one >/dev/null
    $ umount fs
    $ fsnap branch one
    ! fsnap: error: the snapshots of db are out of reach: the store $T/fs/.fsnap does not exist
    ! fsnap: hint: mount the file system that holds them there again, or move them back
    [exit 1]
    $ fsnap diff one
    ! fsnap: error: the snapshots of db are out of reach: the store $T/fs/.fsnap does not exist
    ! fsnap: hint: mount the file system that holds them there again, or move them back
    [exit 1]
    $ fsnap verify
    ID1:db: the snapshots of db are out of reach: the store $T/fs/.fsnap does not exist
    verified the catalog and 1 checkpoint: 1 damaged
    [exit 1]
    $ fsnap checkpoint
    ! fsnap: error: the snapshots of db are out of reach: the store $T/fs/.fsnap does not exist
    ! fsnap: hint: mount the file system that holds them there again, or move them back
    [exit 1]
    $ fsnap rm --volume db
    $ fsnap branch one
    ! fsnap: error: the snapshots of db are out of reach: the store $T/fs/.fsnap does not exist
    ! fsnap: hint: mount the file system that holds them there again, or move them back
    [exit 1]
    $ mount -o loop fs.image fs
    $ fsnap branch one >/dev/null
    ");
}
