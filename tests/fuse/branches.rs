//! Branches that are written through `fsnap mount`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;

use crate::Case;
use crate::past::{Past, names, until};
use crate::site::is_mounted;
use crate::sys::Mapping;
use crate::tree;

pub(crate) const CASES: &[Case] = &[
    ("made_and_written_over_btrfs", || made_and_written("btrfs")),
    ("made_and_written_over_rsync", || made_and_written("rsync")),
    ("named_by_prefix_tag_and_latest", named_by_prefix_tag_and_latest),
    ("removed_while_nothing_was_written", removed_while_nothing_was_written),
    ("one_made_again_is_the_new_one_at_once", one_made_again_is_the_new_one_at_once),
    ("who_watches_is_told_of_a_removal", who_watches_is_told_of_a_removal),
    ("a_first_write_and_a_removal_exclude_each_other", a_first_write_and_a_removal_exclude_each_other),
    ("one_server_has_a_branch", one_server_has_a_branch),
    ("numbers_are_the_same_in_every_mount", numbers_are_the_same_in_every_mount),
    ("both_kinds_live_together", both_kinds_live_together),
    ("checkpoints_of_a_branch_over_btrfs", || checkpoints_of_a_branch("btrfs")),
    ("checkpoints_of_a_branch_over_rsync", || checkpoints_of_a_branch("rsync")),
    ("a_mapping_outlives_the_closing_of_its_file", a_mapping_outlives_the_closing_of_its_file),
    ("over_dm_thin::made_and_written", || made_and_written("dm-thin")),
    ("over_dm_thin::checkpoints_of_a_branch", || checkpoints_of_a_branch("dm-thin")),
    ("over_nilfs2::made_and_written", || made_and_written("nilfs2")),
    ("over_nilfs2::checkpoints_of_a_branch", || checkpoints_of_a_branch("nilfs2")),
    ("over_dm_thin::removed_while_browsed", || removed_while_browsed("dm-thin")),
    ("over_nilfs2::removed_while_browsed", || removed_while_browsed("nilfs2")),
    ("used_where_another_namespace_shows_it", used_where_another_namespace_shows_it),
    ("set_user_id_and_devices_mean_nothing_to_others", set_user_id_and_devices_mean_nothing_to_others),
    ("what_was_sealed_outlives_everything_else", what_was_sealed_outlives_everything_else),
    ("old_checkpoints_of_a_branch_give_their_room_back", old_checkpoints_of_a_branch_give_their_room_back),
    ("a_chain_of_branches_takes_a_few_descriptors_for_each", a_chain_of_branches_takes_a_few_descriptors_for_each),
    ("a_chain_that_is_too_long_leaves_the_others_readable", a_chain_that_is_too_long_leaves_the_others_readable),
];

/// Two of so many want the same part of the space of numbers, but in one of two hundred runs. Whoever is asked for first must not get it.
fn numbers_are_the_same_in_every_mount() {
    const BRANCHES: usize = 150;
    let past = Past::new();
    past.volume("db", "rsync");
    past.checkpoint();
    past.mount();
    let root = |number: usize| past.at(&format!("branches/b{number}/db"));
    for number in 0..BRANCHES {
        fs::create_dir(past.at(&format!("branches/b{number}@latest"))).unwrap();
    }
    let numbers = |order: &mut dyn Iterator<Item = usize>| -> BTreeMap<usize, u64> {
        order.map(|number| (number, fs::metadata(root(number)).unwrap().ino())).collect()
    };
    let first = numbers(&mut (0..BRANCHES));
    assert_eq!(first.values().collect::<BTreeSet<_>>().len(), BRANCHES);
    past.unmount();
    past.mount();
    assert_eq!(numbers(&mut (0..BRANCHES).rev()), first);
}

fn read(path: impl AsRef<std::path::Path>) -> String {
    fs::read_to_string(path).unwrap()
}

fn number(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap()
}

fn made_and_written(backend: &str) {
    let past = Past::new();
    let db = past.volume("db", backend);
    fs::create_dir(db.join("sub")).unwrap();
    fs::write(db.join("file"), "one").unwrap();
    fs::write(db.join("sub/deep"), "deep").unwrap();
    fs::hard_link(db.join("file"), db.join("second")).unwrap();
    let large: Vec<u8> = (0..600_000_u32).map(|at| (at / 11) as u8).collect();
    fs::write(db.join("large"), &large).unwrap();
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    assert_eq!(names(past.at("branches")), ["try"]);
    assert_eq!(names(past.at("branches/try")), ["db"]);
    assert_eq!(names(past.at("branches/try/db")), ["file", "large", "second", "sub"]);
    assert_eq!(read(past.at("branches/try/db/file")), "one");

    fs::write(past.at("branches/try/db/file"), "two").unwrap();
    assert_eq!(read(past.at("branches/try/db/second")), "two", "they are one file");
    fs::write(past.at("branches/try/db/sub/new"), "new").unwrap();
    fs::rename(past.at("branches/try/db/sub"), past.at("branches/try/db/moved")).unwrap();
    let file = fs::File::options().write(true).open(past.at("branches/try/db/large")).unwrap();
    file.write_all_at(b"changed", 300_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let mut changed = large.clone();
    changed[300_000..300_007].copy_from_slice(b"changed");

    let holds = || {
        assert_eq!(names(past.at("branches/try/db")), ["file", "large", "moved", "second"]);
        assert_eq!(names(past.at("branches/try/db/moved")), ["deep", "new"]);
        assert_eq!(read(past.at("branches/try/db/moved/deep")), "deep");
        assert_eq!(read(past.at("branches/try/db/second")), "two");
        assert!(fs::read(past.at("branches/try/db/large")).unwrap() == changed, "the large file is another one");
        // Nothing below has changed.
        assert_eq!(names(past.at("latest/db")), ["file", "large", "second", "sub"]);
        assert_eq!(read(past.at("latest/db/file")), "one");
        assert!(fs::read(past.at("latest/db/large")).unwrap() == large, "the snapshot has changed");
        assert_eq!(read(db.join("file")), "one");
    };
    holds();
    let before: Vec<u64> = ["file", "moved", "moved/new", "large"]
        .map(|name| fs::metadata(past.at(&format!("branches/try/db/{name}"))).unwrap().ino())
        .into();
    past.unmount();
    past.mount();
    let after: Vec<u64> = ["file", "moved", "moved/new", "large"]
        .map(|name| fs::metadata(past.at(&format!("branches/try/db/{name}"))).unwrap().ino())
        .into();
    assert_eq!(before, after, "the numbers are others");
    holds();
    // What was synced is there, whatever becomes of the server.
    past.kill();
    past.mount();
    holds();

    let listed: serde_json::Value = serde_json::from_str(&past.fsnap(["branches", "--json"])).unwrap();
    assert_eq!(listed[0]["members"][0]["path"], past.at("branches/try/db").to_str().unwrap());
    past.unmount();
    let listed: serde_json::Value = serde_json::from_str(&past.fsnap(["branches", "--json"])).unwrap();
    assert_eq!(listed[0]["members"][0]["path"], serde_json::Value::Null);
    assert!(past.fsnap(["branches"]).contains("(not mounted)"));
}

fn named_by_prefix_tag_and_latest() {
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    past.mount();
    let error = fs::create_dir(past.at("branches/early@latest")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "there is no checkpoint yet");
    fs::write(db.join("file"), "first").unwrap();
    let first = past.fsnap(["checkpoint", "-t", "kept"]);
    fs::write(db.join("file"), "second").unwrap();
    past.checkpoint();
    for (name, from, expected) in
        [("a", "kept", "first"), ("b", "latest", "second"), ("c", &first[..8], "first"), ("d", "latest~1", "first")]
    {
        fs::create_dir(past.at(&format!("branches/{name}@{from}"))).unwrap();
        assert_eq!(read(past.at(&format!("branches/{name}/db/file"))), expected, "{name}@{from}");
        fs::write(past.at(&format!("branches/{name}/db/file")), name).unwrap();
    }
    for name in ["a", "b", "c", "d"] {
        assert_eq!(read(past.at(&format!("branches/{name}/db/file"))), name, "branches are independent");
    }
    assert_eq!(names(past.at("branches")), ["a", "b", "c", "d"]);
    for (name, expected) in [
        ("a@latest", Errno::EXIST),
        ("new@none", Errno::NOENT),
        ("new@", Errno::NOENT),
        ("plain", Errno::INVAL),
        ("-x@latest", Errno::INVAL),
        (".x@latest", Errno::INVAL),
        ("@latest", Errno::INVAL),
    ] {
        let error = fs::create_dir(past.at(&format!("branches/{name}"))).unwrap_err();
        assert_eq!(number(&error), expected, "{name}");
    }
    assert_eq!(number(&fs::create_dir(past.at("branches/a/new")).unwrap_err()), Errno::ROFS);
    let between = fs::rename(past.at("branches/a/db/file"), past.at("branches/b/db/other")).unwrap_err();
    assert_eq!(number(&between), Errno::XDEV);
    // It is no volume besides: what lies below it would not be held.
    let refused = past.command().arg("init").arg(past.at("branches/a/db")).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("checkpoint --branch"), "{refused:?}");
    // The checkpoint below is needed.
    let refused = past.command().args(["rm", "kept"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains('a'), "{refused:?}");
    past.unmount();
}

fn removed_while_nothing_was_written() {
    let past = Past::new();
    let db = past.volume("db", "rsync");
    fs::write(db.join("file"), "one").unwrap();
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/unused@latest")).unwrap();
    fs::create_dir(past.at("branches/used@latest")).unwrap();
    assert_eq!(read(past.at("branches/unused/db/file")), "one");
    fs::write(past.at("branches/used/db/new"), "new").unwrap();
    assert_eq!(number(&fs::remove_dir(past.at("branches/used")).unwrap_err()), Errno::NOTEMPTY);
    fs::remove_dir(past.at("branches/unused")).unwrap();
    assert_eq!(names(past.at("branches")), ["used"]);
    assert_eq!(fs::metadata(past.at("branches/unused")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(read(past.at("branches/used/db/new")), "new");

    // Its users are named.
    let open = fs::File::options().append(true).open(past.at("branches/used/db/new")).unwrap();
    let refused = past.command().args(["rm", "--branch", "used"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains(&std::process::id().to_string()), "{refused:?}");
    drop(open);
    // A program that another case starts has our descriptors for a moment.
    until("nobody uses it", || past.command().args(["rm", "--branch", "used"]).output().unwrap().status.success());
    until("it is gone", || fs::metadata(past.at("branches/used/db/new")).is_err());
    assert_eq!(names(past.at("branches")), [""; 0]);
    assert_eq!(names(past.state().join("branches")), [".layers"], "nothing is left");
    // A new one of that name has nothing of it.
    fs::create_dir(past.at("branches/used@latest")).unwrap();
    assert_eq!(names(past.at("branches/used/db")), ["file"]);
    past.unmount();
}

/// Whatever the kernel remembered of the old one.
fn one_made_again_is_the_new_one_at_once() {
    let past = Past::new();
    let db = past.volume("db", "rsync");
    fs::write(db.join("file"), "one").unwrap();
    fs::write(db.join("old"), "old").unwrap();
    let first = past.checkpoint();
    fs::write(db.join("file"), "another").unwrap();
    fs::rename(db.join("old"), db.join("new")).unwrap();
    let second = past.checkpoint();
    past.mount();
    type Look = fn(&Path) -> std::io::Result<String>;
    let looks: [(&str, Look, &str, &str); 8] = [
        ("list", |branch| Ok(names(branch.join("db")).join(" ")), "file old", "file new"),
        ("volumes", |branch| Ok(names(branch).join(" ")), "db", "db"),
        ("read", |branch| fs::read_to_string(branch.join("db/file")), "one", "another"),
        ("length", |branch| Ok(fs::metadata(branch.join("db/file"))?.len().to_string()), "3", "7"),
        ("there before", |branch| fs::read_to_string(branch.join("db/old")), "old", "not found"),
        ("there since", |branch| fs::read_to_string(branch.join("db/new")), "not found", "old"),
        ("write", |branch| fs::write(branch.join("db/made"), "").map(|()| "done".into()), "done", "done"),
        (
            "rename",
            |branch| fs::rename(branch.join("db/file"), branch.join("db/f")).map(|()| "done".into()),
            "done",
            "done",
        ),
    ];
    let told = |look: Look| match look(&past.at("branches/try")) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => "not found".into(),
        Err(error) => error.to_string(),
    };
    for (name, look, before, after) in looks {
        fs::create_dir(past.at(&format!("branches/try@{first}"))).unwrap();
        assert_eq!(told(look), before, "{name}");
        let remove = || past.command().args(["rm", "--branch", "try"]).output().unwrap().status.success();
        // The kernel lets go of a file a little after the process that had it.
        until("nobody uses it", remove);
        fs::create_dir(past.at(&format!("branches/try@{second}"))).unwrap();
        assert_eq!(told(look), after, "{name}");
        until("nobody uses it", remove);
    }
    past.unmount();
}

/// And so is the kernel, which remembers names.
fn who_watches_is_told_of_a_removal() {
    use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
    let past = Past::new();
    fs::write(past.volume("db", "rsync").join("file"), "one").unwrap();
    let dir = past.at(&format!("ids/{}", past.checkpoint()));
    past.checkpoint();
    past.mount();
    let watches = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    assert_eq!(names(&dir), ["db"]);
    let watch = add_watch(&watches, &dir, WatchFlags::DELETE_SELF).unwrap();
    past.fsnap(["rm".as_ref(), dir.file_name().unwrap()]);
    let mut buffer = [std::mem::MaybeUninit::uninit(); 1024];
    let mut reader = Reader::new(&watches, &mut buffer);
    until("it is told", || {
        reader.next().is_ok_and(|event| event.wd() == watch && event.events().contains(ReadFlags::DELETE_SELF))
    });
    assert_eq!(fs::metadata(&dir).unwrap_err().kind(), ErrorKind::NotFound);
    past.unmount();
}

/// Whoever comes first, it is never so that both succeed: what was written would be gone.
fn a_first_write_and_a_removal_exclude_each_other() {
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    past.checkpoint();
    // Between the look and the removal there is time to write in.
    past.mount_armed("rmdir:unchanged=sleep:400");
    type Write = fn(&Path) -> std::io::Result<()>;
    let writes: [(&str, Write); 4] = [
        ("create", |db| fs::write(db.join("new"), "two")),
        ("change", |db| fs::write(db.join("file"), "two")),
        ("rename", |db| fs::rename(db.join("file"), db.join("moved"))),
        ("attributes", |db| fs::set_permissions(db, fs::Permissions::from_mode(0o700))),
    ];
    for (name, write) in writes {
        let (branch, db) = (past.at(&format!("branches/{name}")), past.at(&format!("branches/{name}/db")));
        fs::create_dir(past.at(&format!("branches/{name}@latest"))).unwrap();
        assert_eq!(read(db.join("file")), "one");
        let removing = std::thread::spawn({
            let branch = branch.clone();
            move || fs::remove_dir(branch)
        });
        std::thread::sleep(Duration::from_millis(100));
        let written = write(&db);
        match removing.join().unwrap() {
            Ok(()) => assert!(written.is_err(), "{name}: what was written is gone"),
            Err(error) => assert_eq!((number(&error), written.is_ok()), (Errno::NOTEMPTY, true), "{name}"),
        }
        // Written to, it stays.
        if fs::create_dir(past.at(&format!("branches/{name}@latest"))).is_ok() {
            write(&db).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert_eq!(number(&fs::remove_dir(&branch).unwrap_err()), Errno::NOTEMPTY, "{name}");
    }
    past.unmount();
}

fn one_server_has_a_branch() {
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    fs::write(past.at("branches/try/db/file"), "two").unwrap();
    let second = past.path("second");
    fs::create_dir(&second).unwrap();
    let started = past.command().arg("mount").arg(&second).stdin(Stdio::null()).status().unwrap();
    assert!(started.success());
    assert_eq!(read(second.join("latest/db/file")), "one");
    assert_eq!(names(second.join("branches/try")), ["db"]);
    assert_eq!(number(&fs::read_dir(second.join("branches/try/db")).unwrap_err()), Errno::BUSY);
    assert_eq!(number(&fs::remove_dir(second.join("branches/try")).unwrap_err()), Errno::BUSY);
    past.unmount();
    assert_eq!(read(second.join("branches/try/db/file")), "two", "it is free now");
    until("it is unmounted", || past.command().arg("umount").arg(&second).output().unwrap().status.success());
    assert!(!is_mounted(&second));
}

fn checkpoints_of_a_branch(backend: &str) {
    let past = Past::new();
    let db = past.volume("db", backend);
    fs::write(db.join("below"), "of the volume").unwrap();
    fs::write(db.join("open"), "0".repeat(10_000)).unwrap();
    fs::hard_link(db.join("open"), db.join("linked")).unwrap();
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    let at = |name: &str| past.at(&format!("branches/try/db/{name}"));
    fs::write(at("new"), "first").unwrap();
    // Writers hold files open, and have changed pages in memory that nobody has written yet.
    let open = fs::File::options().read(true).write(true).open(at("open")).unwrap();
    let fresh = fs::File::options().read(true).write(true).create_new(true).open(at("fresh")).unwrap();
    fresh.set_len(10_000).unwrap();
    let reader = fs::File::open(at("below")).unwrap();
    let before: Vec<u64> = ["new", "open", "fresh", "below"].map(|name| fs::metadata(at(name)).unwrap().ino()).into();
    let mut ids = Vec::new();
    for round in 1..=3_u8 {
        store_mapped(&open, 5_000, round);
        store_mapped(&fresh, 5_000, round);
        fs::write(at("new"), round.to_string()).unwrap();
        fs::write(at(&format!("only{round}")), "").unwrap();
        ids.push(past.fsnap(["checkpoint", "--branch", "try"]));
        // What comes afterwards is in the next one.
        open.write_all_at(&[round + 100], 20).unwrap();
        fresh.write_all_at(&[round + 100], 20).unwrap();
        store_mapped(&fresh, 6_000, round + 100);
    }
    let after: Vec<u64> = ["new", "open", "fresh", "below"].map(|name| fs::metadata(at(name)).unwrap().ino()).into();
    assert_eq!(before, after, "the numbers are others");
    fs::write(at("below"), "changed").unwrap();
    assert_eq!(std::io::read_to_string(&reader).unwrap(), "changed", "an open file shows what is written now");
    fs::rename(at("linked"), at("renamed")).unwrap();
    let live = fs::read(at("open")).unwrap();
    assert_eq!((live[20], live[5_000]), (103, 3));
    assert!(fs::read(at("renamed")).unwrap() == live, "they are one file");
    assert_eq!(fs::metadata(at("open")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(at("fresh")).unwrap().nlink(), 1);

    let holds = || {
        for (id, round) in ids.iter().zip(1_u8..) {
            let then = |name: &str| fs::read(past.at(&format!("ids/{id}/db/{name}"))).unwrap();
            assert_eq!(then("new"), round.to_string().as_bytes(), "{round}");
            assert_eq!(then("below"), b"of the volume");
            for name in ["open", "linked", "fresh"] {
                let content = then(name);
                let expected = match (round, name) {
                    (1, "fresh") => (0, 1, 0),
                    (1, _) => (b'0', 1, b'0'),
                    (_, "fresh") => (round + 99, round, round + 99),
                    _ => (round + 99, round, b'0'),
                };
                assert_eq!((content[20], content[5_000], content[6_000]), expected, "{name} of {round}");
            }
            let dir = past.at(&format!("ids/{id}/db"));
            let only = names(&dir).into_iter().filter(|name| name.starts_with("only")).count();
            assert_eq!(only, usize::from(round));
            assert_eq!(fs::metadata(dir.join("open")).unwrap().nlink(), 2);
            assert_eq!(fs::metadata(dir.join("fresh")).unwrap().nlink(), 1);
        }
    };
    holds();
    // Such a checkpoint is branched again, and that branch is taken, too.
    fs::create_dir(past.at(&format!("branches/again@{}", &ids[1][..10]))).unwrap();
    let again = |name: &str| past.at(&format!("branches/again/db/{name}"));
    assert_eq!(read(again("new")), "2");
    fs::write(again("new"), "again").unwrap();
    fs::write(again("fresh"), "again").unwrap();
    let taken = past.fsnap(["checkpoint", "--branch", "again"]);
    fs::write(again("new"), "later").unwrap();
    assert_eq!(read(past.at(&format!("ids/{taken}/db/new"))), "again");
    assert_eq!(fs::read(past.at(&format!("ids/{taken}/db/open"))).unwrap()[5_000], 2);
    holds();
    assert_eq!(past.fsnap(["verify", &taken]), past.fsnap(["verify", &ids[0]]));
    drop((open, fresh, reader));
    past.unmount();
    past.mount();
    holds();
    assert_eq!(fs::read(at("open")).unwrap(), live);
    assert_eq!(read(again("new")), "later");
    let again: Vec<u64> = ["new", "open", "fresh", "below"].map(|name| fs::metadata(at(name)).unwrap().ino()).into();
    assert_eq!(before, again, "the numbers are others after a remount");
    past.unmount();
}

/// Changes a byte through a shared mapping that is given up at once; nothing is synced.
fn store_mapped(file: &fs::File, offset: usize, byte: u8) {
    Mapping::new(file).unwrap().store(offset, byte);
}

/// The kernel tells nobody that a file is mapped which it passes through, nor that it is no more.
fn a_mapping_outlives_the_closing_of_its_file() {
    const LENGTH: usize = 10_000;
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    fs::write(db.join("below"), [0; LENGTH]).unwrap();
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    let at = |name: &str| past.at(&format!("branches/try/db/{name}"));
    let mut states = Vec::new();
    for name in ["new", "below"] {
        let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(at(name)).unwrap();
        file.set_len(LENGTH as u64).unwrap();
        let mapping = Mapping::new(&file).unwrap();
        drop(file);
        for round in 1..=3_u8 {
            mapping.store(5_000, round);
            assert_eq!(fs::read(at(name)).unwrap()[5_000], round, "{name}: what is stored is read");
            states.push((name, round, past.fsnap(["checkpoint", "--branch", "try"])));
            mapping.store(5_000, round + 100);
            assert_eq!(fs::read(at(name)).unwrap()[5_000], round + 100, "{name}: and after a checkpoint");
            let file = fs::File::options().write(true).open(at(name)).unwrap();
            file.write_all_at(&[round + 200], 20).unwrap();
            assert_eq!(mapping.load(20), round + 200, "{name}: what is written is mapped");
        }
    }
    let holds = || {
        for (name, round, id) in &states {
            let content = fs::read(past.at(&format!("ids/{id}/db/{name}"))).unwrap();
            let written = if *round == 1 { 0 } else { round + 199 };
            assert_eq!((content[20], content[5_000]), (written, *round), "{name} of {round}");
        }
        for name in ["new", "below"] {
            let content = fs::read(at(name)).unwrap();
            assert_eq!((content[20], content[5_000]), (203, 103), "{name}");
        }
    };
    holds();
    past.unmount();
    past.mount();
    holds();
    past.unmount();
}

fn what_was_sealed_outlives_everything_else() {
    let past = Past::new();
    let db = past.volume("db", "rsync");
    fs::write(db.join("below"), "of the volume").unwrap();
    let base = past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    fs::write(past.at("branches/try/db/new"), "one").unwrap();
    let first = past.fsnap(["checkpoint", "--branch", "try"]);
    fs::write(past.at("branches/try/db/new"), "two").unwrap();
    let second = past.fsnap(["checkpoint", "--branch", "try"]);
    let remove = |arguments: &[&str]| {
        // A program that another case starts has our descriptors for a moment.
        let gone = || past.command().args(arguments).output().unwrap().status.success();
        until("it is removed", gone);
    };
    remove(&["rm", "--branch", "try"]);
    remove(&["rm", &base]);
    assert_eq!(read(past.at(&format!("ids/{first}/db/below"))), "of the volume");
    past.unmount();
    past.mount();
    for (id, content) in [(&first, "one"), (&second, "two")] {
        assert_eq!(read(past.at(&format!("ids/{id}/db/new"))), content);
        assert_eq!(read(past.at(&format!("ids/{id}/db/below"))), "of the volume");
    }
    fs::create_dir(past.at(&format!("branches/next@{second}"))).unwrap();
    assert_eq!(read(past.at("branches/next/db/below")), "of the volume");
    fs::write(past.at("branches/next/db/below"), "on it").unwrap();
    let third = past.fsnap(["checkpoint", "--branch", "next"]);
    past.unmount();
    remove(&["rm", &first]);
    remove(&["rm", "--branch", "next"]);
    remove(&["rm", &second]);
    past.mount();
    assert_eq!(read(past.at(&format!("ids/{third}/db/below"))), "on it");
    assert_eq!(read(past.at(&format!("ids/{third}/db/new"))), "two");
    past.unmount();
    remove(&["rm", &third]);
    assert_eq!(names(past.state().join("branches")), [".layers"], "nothing is left");
    assert_eq!(names(past.state().join("branches/.layers/images")), [""; 0]);
    assert_eq!(past.fsnap(["recover"]), "nothing is half done");
}

/// What somebody reads stays readable and cannot be deleted; when nobody does any more, nothing is left in use, and all of it can be.
fn removed_while_browsed(backend: &str) {
    let past = Past::new();
    let db = past.volume("db", backend);
    fs::write(db.join("below"), "of the volume").unwrap();
    let base = past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    fs::write(past.at("branches/try/db/new"), "one").unwrap();
    let sealed = past.fsnap(["checkpoint", "--branch", "try"]);
    // A program that another case starts has our descriptors for a moment.
    until("it is removed", || past.command().args(["rm", "--branch", "try"]).output().unwrap().status.success());
    past.unmount();
    assert_eq!(past.ground().snapshots_in_use(), 0, "after the branch");
    past.fsnap(["verify"]);
    assert_eq!(past.ground().snapshots_in_use(), 0, "after a verification");

    past.mount();
    let mut open = fs::File::open(past.at(&format!("ids/{sealed}/db/below"))).unwrap();
    assert_eq!(read(past.at(&format!("ids/{base}/db/below"))), "of the volume");
    past.fsnap(["diff", &base, &sealed]);
    let refused = past.command().args(["rm", &base, &sealed]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("in use"), "{refused:?}");
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "of the volume");
    drop(open);
    past.unmount();
    assert_eq!(past.ground().snapshots_in_use(), 0, "after browsing");
    assert!(past.fsnap(["recover"]).contains("finished: a removal"));
    assert_eq!(past.fsnap(["recover"]), "nothing is half done");
    assert_eq!(past.fsnap(["log"]), "");
}

/// As restored processes do, whose server goes on: when the mount had been taken off here, it was removed from under them.
fn used_where_another_namespace_shows_it() {
    // The mounts of other cases would be kept by this namespace.
    const SCRIPT: &str = "mount --bind \"$1\" \"$2\" && cp /proc/self/mounts \"$3\" &&
        while read -r _ point type _; do
            [ $type != fuse.fsnap ] || [ \"$point\" = \"$2\" ] || umount -l \"$point\" || exit
        done <\"$3\"
        echo ready && exec sleep 1000 >/dev/null";
    let past = Past::new();
    past.volume("db", "rsync");
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    fs::write(past.at("branches/try/db/new"), "one").unwrap();
    let (point, mounts) = (past.path("point"), past.path("mounts"));
    fs::create_dir(&point).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(past.at("branches/try/db")).arg(&point).arg(mounts);
    let mut user = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 6];
    user.stdout.take().unwrap().read_exact(&mut said).unwrap();
    let inside = std::path::PathBuf::from(format!("/proc/{}/root{}/new", user.id(), point.display()));
    past.fsnap(["umount".as_ref(), past.path("mnt").as_os_str()]);
    let refused = past.command().args(["rm", "--branch", "try"]).output().unwrap();
    let seen = fs::read_to_string(&inside);
    user.kill().unwrap();
    user.wait().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    let named = format!("the branch try is in use: {} (sleep)", user.id());
    assert!(refused.status.code() == Some(1) && said.contains(&named), "{said}");
    assert_eq!(seen.unwrap(), "one");
    until("it is removed", || past.command().args(["rm", "--branch", "try"]).output().unwrap().status.success());
}

/// A branch goes on for ever if old checkpoints are removed: it takes the room of those that are kept.
fn old_checkpoints_of_a_branch_give_their_room_back() {
    const LARGE: u64 = 1 << 20;
    let past = Past::new();
    let db = past.volume("db", "rsync");
    fs::write(db.join("below"), "of the volume").unwrap();
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    let home = past.state().join("branches/try");
    let store = || home.join(&names(&home)[0]);
    let layers = || names(store().join("layers")).len();
    let mut kept = std::collections::VecDeque::new();
    let open = fs::File::create(past.at("branches/try/db/open")).unwrap();
    for round in 0..6_u8 {
        fs::write(past.at("branches/try/db/large"), vec![round; LARGE as usize]).unwrap();
        fs::write(past.at(&format!("branches/try/db/round.{round}")), [round]).unwrap();
        open.write_all_at(&[round], 0).unwrap();
        kept.push_back((round, past.fsnap(["checkpoint", "--branch", "try"])));
        if kept.len() > 2 {
            past.fsnap(["rm", &kept.pop_front().unwrap().1]);
        }
    }
    // The server merges before each checkpoint; the last one removed waits.
    assert!(layers() <= 4, "{} layers", layers());
    for (round, id) in &kept {
        assert_eq!(fs::read(past.at(&format!("ids/{id}/db/large"))).unwrap(), vec![*round; LARGE as usize]);
        assert_eq!(fs::read(past.at(&format!("ids/{id}/db/open"))).unwrap(), [*round]);
    }
    drop(open);
    past.unmount();
    // Without a server, they are merged when the last one goes.
    for (_, id) in kept {
        past.fsnap(["rm", &id]);
    }
    assert_eq!(layers(), 1, "only the one that is written is left");
    let room = tree::room(&store());
    assert!(room < 2 * LARGE, "{room} bytes are taken");
    past.mount();
    assert_eq!(fs::read(past.at("branches/try/db/large")).unwrap(), vec![5; LARGE as usize]);
    assert_eq!(fs::read(past.at("branches/try/db/open")).unwrap(), [5]);
    assert_eq!(read(past.at("branches/try/db/below")), "of the volume");
    assert_eq!(names(past.at("branches/try/db")).len(), 9);
    past.unmount();
}

fn both_kinds_live_together() {
    let past = Past::new();
    let (db, home) = (past.volume("db", "btrfs"), past.volume("home", "rsync"));
    fs::write(db.join("file"), "of db").unwrap();
    fs::write(home.join("file"), "of home").unwrap();
    past.checkpoint();
    past.fsnap(["branch", "latest", "native"].map(|word| if word == "latest" { "@latest" } else { word }));
    past.mount();
    fs::create_dir(past.at("branches/written@latest")).unwrap();
    assert_eq!(names(past.at("branches")), ["native", "written"]);
    for branch in ["native", "written"] {
        let is_link = fs::symlink_metadata(past.at(&format!("branches/{branch}/db"))).unwrap().is_symlink();
        assert_eq!(is_link, branch == "native");
        for (volume, content) in [("db", "of db"), ("home", "of home")] {
            let file = past.at(&format!("branches/{branch}/{volume}/file"));
            assert_eq!(read(&file), content);
            fs::write(&file, branch).unwrap();
        }
    }
    for branch in ["native", "written"] {
        for volume in ["db", "home"] {
            assert_eq!(read(past.at(&format!("branches/{branch}/{volume}/file"))), branch);
        }
    }
    past.unmount();
}

/// A file that gives whoever starts it root's rights, and the node of a device: on the volume they work, and nowhere that a stranger can get to.
fn set_user_id_and_devices_mean_nothing_to_others() {
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    fs::copy("/usr/bin/id", db.join("id")).unwrap();
    fs::set_permissions(db.join("id"), fs::Permissions::from_mode(0o4755)).unwrap();
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(CWD, db.join("null"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), null).unwrap();
    fs::set_permissions(db.join("null"), fs::Permissions::from_mode(0o666)).unwrap();
    past.checkpoint();
    past.fsnap(["branch", "@latest", "native"]);
    past.mount_for_others();
    fs::create_dir(past.at("branches/try@latest")).unwrap();
    // Where it is entered through a directory that is open already, no directory above is in the way.
    let as_stranger = |dir: &Path, line: &str| {
        let enter = format!("cd \"$1\" && exec setpriv --reuid 65534 --regid 65534 --clear-groups sh -c '{line}'");
        let output = Command::new("bash").args(["-c", &enter, "bash"]).arg(dir).stdin(Stdio::null()).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap().trim().to_owned())
    };
    // On the volume itself they are what they are, unless this program was forbidden to gain any rights.
    let forbidden = read("/proc/self/status").contains("NoNewPrivs:\t1");
    assert_eq!(as_stranger(&db, "./id -u"), (true, if forbidden { "65534" } else { "0" }.into()));
    for shown in ["latest/db", "branches/try/db"] {
        assert_eq!(as_stranger(&past.at(shown), "./id -u"), (true, "65534".into()), "{shown}");
        assert!(!as_stranger(&past.at(shown), "exec <null").0, "{shown}: a device can be opened");
        assert_eq!(fs::File::open(past.at(shown).join("null")).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    // A branch of the file system's own lies where no stranger gets in.
    let native = past.fsnap(["branches", "--json"]);
    let branches: serde_json::Value = serde_json::from_str(&native).unwrap();
    let branch = branches.as_array().unwrap().iter().find(|branch| branch["name"] == "native").unwrap();
    let store = Path::new(branch["members"][0]["path"].as_str().unwrap()).parent().unwrap().parent().unwrap();
    assert_eq!(fs::metadata(store).unwrap().permissions().mode() & 0o077, 0, "{store:?}");
    past.unmount();
}

/// Each branch is of the checkpoint of the one before: if each opened all that lies below it for itself, ten would use up what is allowed.
fn a_chain_of_branches_takes_a_few_descriptors_for_each() {
    const LEVELS: usize = 16;
    let past = Past::new();
    let db = past.volume("db", "rsync");
    fs::write(db.join("file"), "z0").unwrap();
    for dir in 0..LEVELS {
        fs::create_dir(db.join(format!("d{dir}"))).unwrap();
    }
    past.checkpoint();
    past.mount();
    past.allow_descriptors(400);
    let mut roots = Vec::new();
    for level in 1..=LEVELS {
        fs::create_dir(past.at(&format!("branches/z{level}@latest"))).unwrap();
        let root = past.at(&format!("branches/z{level}/db"));
        assert_eq!(read(root.join("file")), format!("z{}", level - 1));
        fs::write(root.join("file"), format!("z{level}")).unwrap();
        for dir in 0..LEVELS {
            fs::write(root.join(format!("d{dir}/of-z{level}")), format!("{dir} in z{level}")).unwrap();
        }
        let id = past.fsnap(["checkpoint", "--branch", &format!("z{level}")]);
        roots.push((level, root));
        roots.push((level, past.at(&format!("ids/{id}/db"))));
    }
    for (level, root) in &roots {
        assert_eq!(read(root.join("file")), format!("z{level}"), "{root:?}");
        for dir in 0..LEVELS {
            let mut found = names(root.join(format!("d{dir}")));
            found.sort_by_key(|name| name.len());
            assert_eq!(found, (1..=*level).map(|level| format!("of-z{level}")).collect::<Vec<_>>(), "{root:?}");
            assert_eq!(read(root.join(format!("d{dir}/of-z{level}"))), format!("{dir} in z{level}"));
            assert_eq!(read(root.join(format!("d{dir}/of-z1"))), format!("{dir} in z1"));
        }
    }
    past.unmount();
}

/// SQLite says of no descriptor only that it cannot open its file, so that nothing was let go of for that.
fn a_chain_that_is_too_long_leaves_the_others_readable() {
    const LEVELS: usize = 24;
    let past = Past::new();
    let db = past.volume("db", "rsync");
    fs::write(db.join("file"), "z0").unwrap();
    let mut checkpoints = vec![past.checkpoint()];
    past.mount();
    for level in 1..=LEVELS {
        fs::create_dir(past.at(&format!("branches/z{level}@latest"))).unwrap();
        fs::write(past.at(&format!("branches/z{level}/db/file")), format!("z{level}")).unwrap();
        checkpoints.push(past.fsnap(["checkpoint", "--branch", &format!("z{level}")]));
    }
    past.unmount();
    past.mount();
    past.allow_descriptors(50);
    let mut refused = 0;
    for (level, id) in checkpoints.iter().enumerate() {
        match fs::read_to_string(past.at(&format!("ids/{id}/db/file"))) {
            Ok(read) => assert_eq!(read, format!("z{level}")),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(Errno::MFILE.raw_os_error()), "{level}: {error}");
                refused += 1;
            }
        }
        assert_eq!(names(past.at("tags")), [""; 0], "{level}");
    }
    assert!((1..LEVELS).contains(&refused), "{refused}");
    let said = past.unmount();
    assert!(said.contains("no descriptor is left") && said.contains("ulimit -n"), "{said}");
}
