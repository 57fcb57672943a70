//! Snapshots that are attached to a mount: the first look finds them, they are what FUSE would show, and they go.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fsnap_conformance::{Listing, Model, samples};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use crate::Case;
use crate::browse::everything;
use crate::copies::record_copies;
use crate::past::{Past, names, until};
use crate::site::is_mounted;
use crate::tree;

pub(crate) const CASES: &[Case] = &[
    ("what_is_attached_is_what_fuse_shows", what_is_attached_is_what_fuse_shows),
    ("every_way_of_looking_finds_it", every_way_of_looking_finds_it),
    ("what_was_attached_too_soon_is_attached_again", what_was_attached_too_soon_is_attached_again),
    ("all_at_once", all_at_once),
    ("others_see_it_if_they_may", others_see_it_if_they_may),
    ("what_is_removed_is_taken_off", what_is_removed_is_taken_off),
    ("what_nobody_uses_is_taken_off", what_nobody_uses_is_taken_off),
    ("a_killed_server_leaves_one_mount", a_killed_server_leaves_one_mount),
    ("over_dm_thin::attached", || attached_over("dm-thin")),
    ("over_nilfs2::attached", || attached_over("nilfs2")),
];

/// What is mounted below the mount, with its options.
fn attached(past: &Past) -> BTreeMap<PathBuf, String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let below = fields.filter(|fields| Path::new(fields[4]).starts_with(past.at("ids")));
    below.map(|fields| (fields[4].into(), fields[5].into())).collect()
}

/// Waits until exactly these are attached: the kernel's table may miss some while others mount.
fn shows(past: &Past, points: &[&Path]) {
    let expected = points.iter().map(|&point| (point.to_owned(), "ro,nosuid,nodev,relatime".to_owned())).collect();
    until("these are attached, and no others", || attached(past) == expected);
}

fn device(path: impl AsRef<Path>) -> u64 {
    rustix::fs::lstat(path.as_ref()).unwrap().st_dev
}

fn birth(path: impl AsRef<Path>) -> Option<std::time::SystemTime> {
    fs::symlink_metadata(path).unwrap().created().ok()
}

fn umount(past: &Past) -> Output {
    past.command().arg("umount").arg(past.path("mnt")).output().unwrap()
}

fn what_is_attached_is_what_fuse_shows() {
    let past = Past::new();
    let (db, plain) = (past.volume("db", "btrfs"), past.volume("plain", "rsync"));
    Model::of_empty(&db).unwrap().apply_all(&samples::rich(&everything())).unwrap();
    let nested = Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(db.join("nested")).status();
    assert!(nested.unwrap().success());
    for dir in [db.join("nested"), plain] {
        fs::write(dir.join("file"), "one").unwrap();
    }
    let before = Listing::of(&db).unwrap();
    let id = past.checkpoint();
    let shown = past.at(&format!("ids/{id}/db"));
    past.mount();
    let through_fuse = Listing::of(&shown).unwrap();
    assert_eq!(birth(shown.join("nested/file")), None);
    assert!(attached(&past).is_empty());
    past.unmount();

    past.mount_with(&["--native"]);
    // The links, and what is above a volume, are FUSE's; and so is a volume that the kernel cannot mount.
    let root = device(past.at(""));
    assert_eq!(names(past.at("latest")), ["db", "plain"]);
    assert!(attached(&past).is_empty(), "names attach nothing");
    let attached_to_it = Listing::of(&shown).unwrap();
    through_fuse.expect(&attached_to_it, &everything(), "through FUSE").unwrap();
    before.expect(&attached_to_it, &everything(), "the volume").unwrap();
    if birth(shown.join("nested/file")).is_none() {
        panic!("it is not seen to be attached, among {:?}; the server said: {}", attached(&past), past.unmount());
    }
    assert_eq!(birth(shown.join("nested/file")), birth(db.join("nested/file")));
    assert_eq!(fs::read_to_string(past.at("latest/plain/file")).unwrap(), "one");
    assert_eq!((device(past.at("latest/plain/file")), device(past.at("ids"))), (root, root));
    assert_ne!(device(&shown), root);
    shows(&past, &[&shown]);
    assert_eq!(names(past.at("latest/.fsnap")), ["meta.json"]);
    let error = fs::write(shown.join("new"), "two").unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::ROFS));
    past.unmount();
    assert!(attached(&past).is_empty());
}

/// Whichever system call looks first, it sees the snapshot itself and no error.
fn every_way_of_looking_finds_it() {
    look_in_every_way("");
}

/// The kernel drops the name that it was told to look up again, and with it what was attached there in the meantime.
fn what_was_attached_too_soon_is_attached_again() {
    look_in_every_way("native:again=sleep:100");
}

fn look_in_every_way(failpoint: &str) {
    type Look = fn(&Past, &str) -> u64;
    fn opened(file: OwnedFd) -> u64 {
        rustix::fs::fstat(file).unwrap().st_dev
    }
    fn handle(dir: impl std::os::fd::AsFd, path: impl AsRef<Path>) -> OwnedFd {
        rustix::fs::openat(dir, path.as_ref(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }
    let looks: &[(&str, Look)] = &[
        ("stat", |past, id| device(past.at(id).join("db"))),
        ("stat, when it was listed", |past, id| {
            assert_eq!(names(past.at(id)), ["db"]);
            device(past.at(id).join("db"))
        }),
        ("open", |past, id| opened(File::open(past.at(id).join("db/dir/file")).unwrap().into())),
        ("a handle", |past, id| opened(handle(CWD, past.at(id).join("db")))),
        ("from the directory above", |past, id| opened(handle(File::open(past.at(id)).unwrap(), "db"))),
        ("from the working directory", |past, id| {
            let stat = Command::new("sh").args(["-c", "cd db && stat -c %d ."]).current_dir(past.at(id)).output();
            String::from_utf8(stat.unwrap().stdout).unwrap().trim().parse().unwrap()
        }),
        ("through a link", |past, id| {
            past.fsnap(["tag", id.trim_start_matches("ids/"), "this"]);
            device(past.at("tags/this/db/dir"))
        }),
        ("from a mount", |past, id| {
            let tree = rustix::mount::open_tree(
                CWD,
                past.at(id).join("db"),
                rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE | rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC,
            );
            opened(tree.unwrap())
        }),
    ];
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    fs::create_dir(db.join("dir")).unwrap();
    fs::write(db.join("dir/file"), "one").unwrap();
    let ids: Vec<_> = looks.iter().map(|_| past.checkpoint()).collect();
    past.mount_by(&["--native"], failpoint);
    for ((name, look), id) in looks.iter().zip(&ids) {
        let dir = format!("ids/{id}");
        let first = look(&past, &dir);
        assert_ne!(first, device(past.at("")), "{name}");
        assert_eq!(first, device(past.at(&dir).join("db")), "{name}");
    }
    assert_eq!(past.unmount(), "");
}

/// First looks from many sides, while somebody holds the locks of the directories that snapshots are attached in.
fn all_at_once() {
    const THREADS: usize = 6;
    /// So many stay attached that nobody uses.
    const MOST: usize = 32;
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    past.checkpoint();
    // To attach one snapshot in many places takes no less than to attach many.
    record_copies(&past.state(), MOST + 7, |_, _| Ok(())).unwrap();
    past.mount_with(&["--native"]);
    let ids = names(past.at("ids"));
    assert_eq!(ids.len(), MOST + 8);
    let root = device(past.at(""));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (past, ids) = (&past, &ids);
            scope.spawn(move || {
                for id in ids[..MOST - 2].iter().cycle().skip(thread * 2).take(MOST * 2) {
                    let dir = past.at(&format!("ids/{id}"));
                    assert_eq!(
                        fs::create_dir(dir.join("new")).unwrap_err().kind(),
                        std::io::ErrorKind::ReadOnlyFilesystem
                    );
                    let file = File::open(dir.join("db/file")).unwrap();
                    assert_ne!(rustix::fs::fstat(file).unwrap().st_dev, root);
                }
            });
        }
    });
    for id in &ids {
        assert_ne!(device(past.at(&format!("ids/{id}/db/file"))), root);
    }
    until("some are taken off", || attached(&past).len() <= MOST);
    assert_eq!(past.unmount(), "");
    assert!(attached(&past).is_empty());
}

fn others_see_it_if_they_may() {
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    for (name, mode) in [("open", 0o644), ("closed", 0o600)] {
        fs::write(db.join(name), name).unwrap();
        fs::set_permissions(db.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    past.checkpoint();
    // The way to it is open to everybody.
    for dir in past.path("mnt").ancestors() {
        let mode = fs::metadata(dir).unwrap().permissions().mode();
        assert!(dir == past.path("") || mode & 0o1 != 0 || dir.starts_with(past.path("")), "{dir:?} is closed");
    }
    fs::set_permissions(past.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let read = |name: &str| {
        let mut cat = Command::new("cat");
        cat.arg(past.at("latest/db").join(name)).uid(65_534).gid(65_534).output().unwrap()
    };
    for (options, open) in [(&["--native"][..], false), (&["--native", "--allow-other"], true)] {
        past.mount_with(options);
        // Whether root has it attached or they are the first.
        for name in ["open", "closed", "open"] {
            let read = read(name);
            assert_eq!(read.status.success(), open && name == "open", "{options:?}, {name}: {read:?}");
            assert_eq!(fs::read_to_string(past.at("latest/db").join(name)).unwrap(), name);
        }
        until("one is attached", || attached(&past).len() == 1);
        past.unmount();
    }
}

fn what_is_removed_is_taken_off() {
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    let ids = [past.checkpoint(), past.checkpoint()];
    past.mount_with(&["--native"]);
    let snapshots = || {
        let list = Command::new("btrfs").args(["subvolume", "list"]).arg(past.path("disk")).output().unwrap();
        String::from_utf8(list.stdout).unwrap().lines().filter(|line| line.contains("/snapshots/")).count()
    };
    assert_eq!(snapshots(), 2);
    let [first, second] = ids.each_ref().map(|id| past.at(&format!("ids/{id}/db")));
    let open = File::open(first.join("file")).unwrap();
    assert_eq!(fs::read_to_string(second.join("file")).unwrap(), "one");
    shows(&past, &[&first, &second]);
    past.fsnap(["rm", &ids[1]]);
    shows(&past, &[&first]);
    assert_eq!(snapshots(), 1);
    // Who has a file open keeps it.
    past.fsnap(["rm", &ids[0]]);
    assert_eq!((attached(&past).len(), snapshots()), (0, 0));
    assert_eq!(std::io::read_to_string(open).unwrap(), "one");
    until("their directories are gone", || names(past.at("ids")) == [""; 0] && !first.exists());
    past.unmount();
}

fn what_nobody_uses_is_taken_off() {
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    let ids = [past.checkpoint(), past.checkpoint()];
    past.mount_with(&["--native", "--idle", "1"]);
    let [used, idle] = ids.each_ref().map(|id| past.at(&format!("ids/{id}/db")));
    let inside = File::open(&used).unwrap();
    for _ in 0..2 {
        // Who comes just when it is taken off sees it through FUSE.
        until("it is attached", || device(&idle) != device(past.at("")));
        assert_eq!(fs::read_to_string(idle.join("file")).unwrap(), "one");
        shows(&past, &[&used]);
    }
    rustix::fs::statat(&inside, "file", AtFlags::empty()).unwrap();
    drop(inside);
    until("both are taken off", || attached(&past).is_empty());
    past.unmount();
}

fn a_killed_server_leaves_one_mount() {
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    let id = past.checkpoint();
    let shown = past.at(&format!("ids/{id}/db"));
    let look = || assert_eq!(fs::read_to_string(shown.join("file")).unwrap(), "one");
    past.mount_with(&["--native"]);
    look();
    past.kill();
    past.mount_with(&["--native"]);
    look();
    let ours = || {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = table.lines().map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()));
        points.filter(|point| point.starts_with(past.path("mnt"))).collect::<Vec<_>>()
    };
    until("there is one mount, and one attached", || ours() == [past.path("mnt"), shown.clone()]);
    // Who stands in it is told where.
    let inside = File::open(&shown).unwrap();
    let refused = umount(&past);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said.contains(&format!("{shown:?} is in use")), "{said}");
    look();
    past.kill();
    assert!(umount(&past).status.success());
    assert!(ours().is_empty() && !is_mounted(&past.path("mnt")));
    let file = rustix::fs::statx(&inside, "file", AtFlags::empty(), StatxFlags::BTIME).unwrap();
    assert_ne!(file.stx_btime.tv_sec, 0, "whoever stands in it keeps it");
}

fn attached_over(backend: &str) {
    let past = Past::new();
    let db = past.volume("db", backend);
    fs::create_dir(db.join("dir")).unwrap();
    fs::write(db.join("dir/file"), "one").unwrap();
    let before = tree::with_times(&db);
    let id = past.checkpoint();
    past.mount_with(&["--native"]);
    let shown = past.at(&format!("ids/{id}/db"));
    tree::assert_equal(&before, &tree::with_times(&shown), backend);
    shows(&past, &[&shown]);
    past.unmount();
    assert!(attached(&past).is_empty());
    assert_eq!(past.ground().snapshots_in_use(), 0);
    past.fsnap(["rm", &id]);
}
