//! Past states as files: what there is, that it is equal, and what happens when it goes.

use std::ffi::OsStr;
use std::fs;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fsnap::fuse::branches::Branches;
use fsnap::fuse::browse::{Browse, ROOT, Records};
use fsnap_backend::{Capabilities, Consistency};
use fsnap_conformance::{Listing, Model, samples};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::Case;
use crate::copies::record_copies;
use crate::past::{Past, names, until};
use crate::site::is_mounted;
use crate::tree;

pub(crate) const CASES: &[Case] = &[
    ("the_layout", the_layout),
    ("processes_are_shown_as_they_stood", processes_are_shown_as_they_stood),
    ("a_file_without_a_name_on_a_branch_is_kept", a_file_without_a_name_on_a_branch_is_kept),
    ("what_is_new_shows_up", what_is_new_shows_up),
    ("what_was_taken_is_sealed_by_a_look", what_was_taken_is_sealed_by_a_look),
    ("every_kind_of_file_is_as_it_was_in_btrfs", || every_kind_of_file_is_as_it_was("btrfs")),
    ("every_kind_of_file_is_as_it_was_in_rsync", || every_kind_of_file_is_as_it_was("rsync")),
    ("holes_stay_holes_for_whoever_copies", holes_stay_holes_for_whoever_copies),
    ("files_of_nested_subvolumes_are_told_apart", files_of_nested_subvolumes_are_told_apart),
    ("nothing_can_be_written", nothing_can_be_written),
    ("devices_and_set_id_bits_count_if_root_asks", devices_and_set_id_bits_count_if_root_asks),
    ("a_link_is_shown_and_not_followed", a_link_is_shown_and_not_followed),
    ("a_removed_checkpoint_is_gone_in_btrfs", || a_removed_checkpoint_is_gone("btrfs")),
    ("a_removed_checkpoint_is_gone_in_rsync", || a_removed_checkpoint_is_gone("rsync")),
    ("a_removed_checkpoint_is_let_go", a_removed_checkpoint_is_let_go),
    ("a_store_that_is_missing_takes_nothing_along", a_store_that_is_missing_takes_nothing_along),
    ("ten_thousand_checkpoints_activate_nothing", ten_thousand_checkpoints_activate_nothing),
    ("a_killed_server_is_cleared", a_killed_server_is_cleared),
    ("without_privileges_through_fusermount", without_privileges_through_fusermount),
];

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

fn the_layout() {
    let past = Past::new();
    let (db, home) = (past.volume("db", "btrfs"), past.volume("home", "rsync"));
    fs::write(db.join("file"), "one").unwrap();
    fs::write(home.join("file"), "of home").unwrap();
    let first = past.fsnap(["checkpoint", "-t", "kept", "-m", "first"]);
    fs::write(db.join("file"), "two").unwrap();
    let second = past.checkpoint();
    let branch = past.fsnap(["branch", "kept", "try", "--json"]);
    past.mount();

    assert_eq!(names(past.at("")), ["README", "branches", "ids", "latest", "snapshots", "tags"]);
    for name in names(past.at("")).into_iter().skip(1) {
        assert!(read(past.at("README")).contains(&format!("\n{name}")), "{name}");
    }
    let mut ids = [first.clone(), second.clone()];
    ids.sort();
    assert_eq!(names(past.at("ids")), ids);
    assert_eq!(names(past.at(&format!("ids/{first}"))), ["db", "home"], ".fsnap is not listed");
    assert_eq!(read(past.at(&format!("ids/{first}/db/file"))), "one");
    assert_eq!(read(past.at(&format!("ids/{first}/home/file"))), "of home");
    assert_eq!(read(past.at(&format!("ids/{second}/db/file"))), "two");

    let link = |path: &str| fs::read_link(past.at(path)).unwrap().into_os_string().into_string().unwrap();
    assert_eq!(link("latest"), format!("ids/{second}"));
    assert_eq!(names(past.at("tags")), ["kept"]);
    assert_eq!(link("tags/kept"), format!("../ids/{first}"));
    assert_eq!(read(past.at("tags/kept/db/file")), "one");
    let snapshots = names(past.at("snapshots"));
    let (latest, times) = snapshots.split_last().unwrap();
    assert_eq!(latest, "latest");
    assert_eq!(link("snapshots/latest"), format!("../ids/{second}"));
    assert_eq!(times.len(), 2);
    let log: serde_json::Value = serde_json::from_str(&past.fsnap(["log", "--json"])).unwrap();
    for (name, id) in times.iter().zip([&first, &second]) {
        assert_eq!(link(&format!("snapshots/{name}")), format!("../ids/{id}"));
        let taken = log.as_array().unwrap().iter().find(|one| one["id"] == **id).unwrap()["time"].as_str().unwrap();
        assert_eq!(name[..19], taken[..19], "the name is the time");
    }

    let extras = |id: &str, name: &str| past.at(&format!("ids/{id}/.fsnap/{name}"));
    assert_eq!(names(extras(&first, "")), ["meta.json"]);
    assert_eq!(names(extras(&second, "")), ["changed", "meta.json", "parent"]);
    assert_eq!(fs::read_link(extras(&second, "parent")).unwrap(), Path::new("../..").join(&first));
    assert_eq!(read(extras(&second, "parent/db/file")), "one");
    let differs = past.fsnap(["diff", &first, &second]);
    assert_eq!(read(extras(&second, "changed")).trim_end(), differs);
    assert!(differs.contains("db/file"), "{differs}");
    assert_eq!(read(extras(&first, "meta.json")).trim_end(), past.fsnap(["show", "--json", "kept"]));
    assert_eq!(
        fs::metadata(extras(&first, "meta.json")).unwrap().len(),
        read(extras(&first, "meta.json")).len() as u64
    );

    let branch: serde_json::Value = serde_json::from_str(&branch).unwrap();
    assert_eq!(names(past.at("branches")), ["try"]);
    assert_eq!(names(past.at("branches/try")), ["db", "home"]);
    assert_eq!(link("branches/try/db"), branch["members"][0]["path"].as_str().unwrap());
    fs::write(past.at("branches/try/db/file"), "on the branch").unwrap();
    assert_eq!(read(past.at("tags/kept/db/file")), "one");

    for missing in ["nothing", "ids/0", "ids/../..x", "tags/none", "branches/none", "snapshots/2001-01-01T00:00:00Z"] {
        let error = fs::symlink_metadata(past.at(missing)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{missing}");
    }
    let upper = past.at(&format!("ids/{}", first.to_uppercase()));
    assert!(upper == past.at(&format!("ids/{first}")) || !upper.exists(), "one directory has one name");
    past.unmount();
}

fn processes_are_shown_as_they_stood() {
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    fs::create_dir(db.join("sub")).unwrap();
    fs::write(db.join("sub/file"), "one").unwrap();
    let lines = "cd sub; exec 5<>file 6>gone 7</etc/passwd; chmod 640 gone; echo kept >&6; rm gone";
    let mut child = working_in(&db, lines);
    let pid = child.id();
    let id = past.fsnap(["checkpoint", "--pid", &pid.to_string()]);
    fs::write(db.join("sub/file"), "two").unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    past.mount();

    let at = |name: &str| past.at(&format!("ids/{id}/.fsnap/processes/{name}"));
    assert_eq!(names(at("")), [pid.to_string()]);
    assert_eq!(names(at(&pid.to_string())), ["cmdline", "cwd", "exe", "fd", "root"]);
    let of = |name: &str| at(&format!("{pid}/{name}"));
    let link = |name: &str| fs::read_link(of(name)).unwrap().into_os_string().into_string().unwrap();
    let arguments = format!("bash\0-c\0{lines}; echo ready; read line\0");
    assert_eq!(read(of("cmdline")), arguments);
    assert_eq!(fs::metadata(of("cmdline")).unwrap().len(), arguments.len() as u64);
    // The links lead to the files as they were.
    assert_eq!(link("cwd"), "../../../db/sub");
    assert_eq!(read(of("cwd/file")), "one");
    assert_eq!(link("fd/5"), "../../../../db/sub/file");
    assert_eq!(read(of("fd/5")), "one");
    assert_eq!(link("root"), "/");
    assert_eq!(link("fd/7"), "/etc/passwd");
    // What had no name is there itself, and stays when the process has ended.
    let gone = fs::symlink_metadata(of("fd/6")).unwrap();
    assert!(gone.is_file() && gone.len() == 5 && gone.permissions().mode() & 0o7777 == 0o640, "{gone:?}");
    assert_eq!(read(of("fd/6")), "kept\n");
    assert_eq!(fs::File::options().write(true).open(of("fd/6")).unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    assert!(link("fd/1").starts_with("pipe:["));
    // By the short way, too, which no copy of the files takes.
    assert_eq!(read(past.at(&format!("latest/@processes/{pid}/cwd/file"))), "one");
    assert_eq!(names(past.at(&format!("ids/{id}"))), ["db"]);
    // One without processes has none to show, and a pid that is none is nothing.
    let other = past.checkpoint();
    assert_eq!(
        fs::symlink_metadata(past.at(&format!("ids/{other}/@processes"))).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(names(past.at(&format!("ids/{other}/.fsnap"))), ["changed", "meta.json", "parent"]);
    for bad in ["0", "x", "+1", &format!("0{pid}")] {
        assert_eq!(fs::metadata(at(bad)).unwrap_err().kind(), ErrorKind::NotFound, "{bad}");
    }
}

/// A process that works in `dir`, and runs these lines before this returns.
fn working_in(dir: &Path, lines: &str) -> Child {
    let script = format!("{lines}; echo ready; read line");
    let mut command = Command::new("setsid");
    command.args(["bash", "-c", &script]).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    child
}

/// The server of the branch is asked for it while the process stands, which has it open for writing only.
fn a_file_without_a_name_on_a_branch_is_kept() {
    let past = Past::new();
    past.volume("db", "btrfs");
    past.checkpoint();
    past.mount();
    fs::create_dir(past.at("branches/idea@latest")).unwrap();
    let mut child =
        working_in(&past.at("branches/idea/db"), "exec 6>gone; truncate -s 1G gone; echo kept >&6; rm gone");
    let pid = child.id();
    let id = past.fsnap(["checkpoint", "--branch", "idea", "--pid", &pid.to_string()]);
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = past.at(&format!("ids/{id}/.fsnap/processes/{pid}/fd/6"));
    assert_eq!(fs::metadata(&kept).unwrap().len(), 1 << 30);
    let mut start = [1; 8];
    fs::File::open(&kept).unwrap().read_exact(&mut start).unwrap();
    assert_eq!(&start, b"kept\n\0\0\0");
    past.fsnap(["verify"]);
    // It goes with its checkpoint.
    past.fsnap(["rm", &id]);
    assert_eq!(names(past.state().join("unlinked")), [""; 0]);
}

fn what_is_new_shows_up() {
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    past.mount();
    assert_eq!(names(past.at("")), ["README", "branches", "ids", "snapshots", "tags"]);
    assert_eq!(fs::symlink_metadata(past.at("latest")).unwrap_err().kind(), ErrorKind::NotFound);
    for number in 0..3 {
        fs::write(db.join("file"), number.to_string()).unwrap();
        let tag = format!("t{number}");
        let id = past.fsnap(["checkpoint", "-t", &tag]);
        assert_eq!(names(past.at("ids")).len(), number + 1);
        for way in [format!("ids/{id}"), format!("tags/{tag}"), "latest".into(), "snapshots/latest".into()] {
            assert_eq!(read(past.at(&way).join("db/file")), number.to_string(), "{way}");
        }
    }
    past.unmount();
}

/// What a store keeps that keeps everything, as [`samples::rich`] makes it.
pub(crate) fn everything() -> Capabilities {
    Capabilities {
        clones: true,
        constant_time_clones: true,
        xattrs: true,
        acls: true,
        ownership: true,
        mountable: true,
        verifies_contents: true,
        live: Consistency::PointInTime,
    }
}

/// As after a hook that was the last command: nobody has sealed what it took.
fn what_was_taken_is_sealed_by_a_look() {
    let past = Past::new();
    let db = past.volume("db", "rsync");
    past.mount();
    fs::write(db.join("file"), "taken").unwrap();
    let killed = past.command().env("FSNAP_FAILPOINT", "take:all=kill").arg("checkpoint").output().unwrap();
    assert!(!killed.status.success());
    assert_eq!(names(past.at("ids")), [""; 0], "nothing was taken wholly");
    let killed = past.command().env("FSNAP_FAILPOINT", "seal:before=kill").arg("checkpoint").output().unwrap();
    assert!(!killed.status.success());
    until("it shows up", || names(past.at("ids")).len() == 1);
    assert_eq!(fs::read_to_string(past.at("latest/db/file")).unwrap(), "taken");
    assert_eq!(past.unmount(), "");
}

fn every_kind_of_file_is_as_it_was(backend: &str) {
    let past = Past::new();
    let db = past.volume("db", backend);
    let mut model = Model::of_empty(&db).unwrap();
    model.apply_all(&samples::rich(&everything())).unwrap();
    past.checkpoint();
    let before = Listing::of(&db).unwrap();
    past.mount();
    let shown = past.at("latest/db");
    before.expect(&Listing::of(&shown).unwrap(), &everything(), backend).unwrap();
    // Once more, from what the kernel and the server have kept.
    before.expect(&Listing::of(&shown).unwrap(), &everything(), backend).unwrap();
    past.unmount();
    past.mount();
    before.expect(&Listing::of(&past.at("latest/db")).unwrap(), &everything(), backend).unwrap();
    past.unmount();
}

fn holes_stay_holes_for_whoever_copies() {
    let past = Past::new();
    for backend in ["btrfs", "rsync"] {
        let file = fs::File::create(past.volume(backend, backend).join("sparse")).unwrap();
        // More than could be read as zeros while a test waits.
        file.set_len(4 << 40).unwrap();
        file.write_all_at(&[1; 4096], 1 << 40).unwrap();
    }
    past.checkpoint();
    past.mount();
    for backend in ["btrfs", "rsync"] {
        let (shown, copy) =
            (past.at(&format!("latest/{backend}/sparse")), past.path("disk").join(backend).join("copy"));
        let mut open = fs::File::open(&shown).unwrap();
        let at = |from| rustix::fs::seek(&open, from);
        assert_eq!(at(rustix::fs::SeekFrom::Data(5)), Ok(1 << 40), "{backend}");
        assert_eq!(at(rustix::fs::SeekFrom::Hole(1 << 40)), Ok((1 << 40) + 4096), "{backend}");
        assert_eq!(at(rustix::fs::SeekFrom::Data((1 << 40) + 4096)), Err(Errno::NXIO), "{backend}");
        assert_eq!(at(rustix::fs::SeekFrom::Hole(2 << 40)), Ok(2 << 40), "{backend}");
        open.seek(SeekFrom::Start((1 << 40) - 1)).unwrap();
        let mut bytes = [7; 3];
        open.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [0, 1, 1], "{backend}");
        let mut cp = Command::new("timeout");
        cp.args(["60", "cp", "--reflink=never"]).args([&shown, &copy]);
        assert!(cp.status().unwrap().success(), "{backend}");
        let copied = fs::metadata(&copy).unwrap();
        assert_eq!((copied.len(), copied.blocks() <= 16), (4 << 40, true), "{backend}");
    }
    past.unmount();
}

fn files_of_nested_subvolumes_are_told_apart() {
    let past = Past::new();
    let db = past.volume("db", "btrfs");
    for nested in ["", "a", "a/b"] {
        if !nested.is_empty() {
            let made = Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(db.join(nested)).status();
            assert!(made.unwrap().success());
        }
        // The first file of each subvolume has the same number, and so has each root.
        fs::write(db.join(nested).join("file"), format!("in {nested:?}")).unwrap();
        fs::hard_link(db.join(nested).join("file"), db.join(nested).join("link")).unwrap();
    }
    let numbers: Vec<_> = ["file", "a/file", "a/b/file"].map(|path| fs::metadata(db.join(path)).unwrap().ino()).into();
    assert!(numbers.iter().all(|number| *number == numbers[0]), "this shows nothing otherwise: {numbers:?}");
    past.checkpoint();
    past.mount();
    let shown = past.at("latest/db");
    tree::assert_equal(&tree::of(&db), &tree::of(&shown), "nested subvolumes");
    let numbers = tree::numbers(&shown);
    let distinct: std::collections::BTreeSet<_> = numbers.values().collect();
    // Three links have the numbers of their files.
    assert_eq!(distinct.len() + 3, numbers.len(), "{numbers:?}");
    past.unmount();
    past.mount();
    assert_eq!(tree::numbers(&past.at("latest/db")), numbers, "the numbers are the same in every mount");
    past.unmount();
}

fn nothing_can_be_written() {
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    past.checkpoint();
    past.mount();
    let refused = [
        fs::write(past.at("latest/db/file"), "two").unwrap_err(),
        fs::write(past.at("latest/db/new"), "two").unwrap_err(),
        fs::write(past.at("README"), "two").unwrap_err(),
        fs::create_dir(past.at("tags/new")).unwrap_err(),
        fs::set_permissions(past.at("latest/db/file"), PermissionsExt::from_mode(0o777)).unwrap_err(),
        fs::File::options().write(true).open(past.at("latest/db/file")).unwrap_err(),
        fs::File::options().read(true).append(true).open(past.at("latest/db/file")).unwrap_err(),
        rustix::fs::setxattr(past.at("latest/db"), "user.a", b"b", rustix::fs::XattrFlags::empty()).unwrap_err().into(),
        rustix::fs::mkfifoat(CWD, past.at("latest/db/fifo"), Mode::RWXU).unwrap_err().into(),
        symlink("a", past.at("latest/db/link")).unwrap_err(),
        fs::hard_link(past.at("latest/db/file"), past.at("latest/db/second")).unwrap_err(),
        fs::remove_file(past.at("latest")).unwrap_err(),
        fs::rename(past.at("latest"), past.at("first")).unwrap_err(),
    ];
    for error in refused {
        assert_eq!(Errno::from_io_error(&error), Some(Errno::ROFS), "{error}");
    }
    let flags = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = flags.lines().find(|line| line.contains(past.path("mnt").to_str().unwrap())).unwrap();
    assert!(line.contains(" rw,nosuid,nodev,"), "{line}");
    for (key, error) in [("user.none", Errno::NODATA), ("none.none", Errno::OPNOTSUPP)] {
        assert_eq!(rustix::fs::getxattr(past.at("latest/db/file"), key, &mut [0; 9]), Err(error), "{key}");
    }
    past.unmount();
}

fn devices_and_set_id_bits_count_if_root_asks() {
    let past = Past::new();
    past.volume("db", "rsync");
    past.checkpoint();
    for (options, opens) in [(&[] as &[&str], false), (&["--suid", "--dev"], true)] {
        past.mount_with(options);
        let branch = past.at(&format!("branches/with-{}@latest", options.len()));
        fs::create_dir(&branch).unwrap();
        let null = past.at(&format!("branches/with-{}/db/null", options.len()));
        rustix::fs::mknodat(CWD, &null, FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3)).unwrap();
        let opened = fs::read(&null).map_err(|error| error.kind());
        assert_eq!(opened, if opens { Ok(Vec::new()) } else { Err(ErrorKind::PermissionDenied) }, "{options:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(past.path("mnt").to_str().unwrap())).unwrap();
        assert_eq!((line.contains(",nosuid"), line.contains(",nodev")), (!opens, !opens), "{line}");
        past.unmount();
    }
}

fn a_link_is_shown_and_not_followed() {
    let past = Past::new();
    for backend in ["btrfs", "rsync"] {
        let dir = past.volume(backend, backend);
        fs::write(past.path("disk").join("secret"), "not of the volume").unwrap();
        for (name, target) in [("up", "../secret"), ("dir", "/etc"), ("self", "self"), ("root", "/")] {
            symlink(target, dir.join(name)).unwrap();
        }
    }
    past.checkpoint();
    let browse = browse(&past);
    for backend in ["btrfs", "rsync"] {
        let id = names_of(&browse, find(&browse, &["ids"])).pop().unwrap();
        let volume = find(&browse, &["ids", &id, backend]);
        for (name, target) in [("up", "../secret"), ("dir", "/etc"), ("self", "self"), ("root", "/")] {
            let link = browse.look_up(volume, OsStr::new(name)).unwrap().meta;
            assert_eq!(link.kind, fsnap_backend::FileKind::Symlink);
            assert_eq!(browse.read_link(link.ino).unwrap(), target);
            // Whoever treats it as what it leads to gets nothing.
            assert_eq!(browse.look_up(link.ino, OsStr::new("passwd")).unwrap_err(), Errno::NOTDIR);
            assert_eq!(browse.open(link.ino).unwrap_err(), Errno::INVAL);
            assert_eq!(browse.list(link.ino).unwrap_err(), Errno::NOTDIR);
        }
        for name in ["..", ".", "up/x", ""] {
            browse.look_up(volume, OsStr::new(name)).unwrap_err();
        }
    }
    past.mount();
    assert_eq!(fs::read_link(past.at("latest/btrfs/dir")).unwrap(), Path::new("/etc"));
    past.unmount();
}

fn a_removed_checkpoint_is_gone(backend: &str) {
    let past = Past::new();
    let db = past.volume("db", backend);
    fs::create_dir(db.join("d")).unwrap();
    let content = "0123456789".repeat(100_000);
    for name in ["f", "d/in"] {
        fs::write(db.join(name), &content).unwrap();
    }
    let (id, other) = (past.checkpoint(), past.checkpoint());
    past.mount();
    let root = past.at(&format!("ids/{id}"));
    let mut open = fs::File::open(root.join("db/f")).unwrap();
    let dir = fs::File::open(root.join("db")).unwrap();
    past.fsnap(["rm", &id]);
    until("its directory is gone", || {
        fs::symlink_metadata(&root).is_err_and(|error| error.kind() == ErrorKind::NotFound)
    });
    assert_eq!(names(past.at("ids")), [&*other]);
    assert_eq!(read(past.at(&format!("ids/{other}/db/d/in"))), content);
    // What is open can be read to its end.
    let mut text = String::new();
    open.seek(SeekFrom::Start(5)).and_then(|_| open.read_to_string(&mut text)).unwrap();
    assert_eq!(text, content[5..]);
    // Whoever stands in the directory is told that it is gone, or sees what it was: never anything else.
    match rustix::fs::openat(&dir, "d/in", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => {
            let mut text = String::new();
            fs::File::from(file).read_to_string(&mut text).unwrap();
            assert_eq!(text, content);
        }
        Err(error) => assert!(matches!(error, Errno::STALE | Errno::NOENT), "{error:?}"),
    }
    drop(dir);
    drop(open);
    past.unmount();
}

fn a_removed_checkpoint_is_let_go() {
    let past = Past::new();
    for backend in ["btrfs", "rsync"] {
        fs::write(past.volume(backend, backend).join("file"), backend).unwrap();
    }
    let (id, other) = (past.checkpoint(), past.checkpoint());
    let browse = browse(&past);
    let checkpoint = find(&browse, &["ids", &id]);
    let files = ["btrfs", "rsync"].map(|backend| find(&browse, &["ids", &id, backend, "file"]));
    let stays = find(&browse, &["ids", &other, "rsync", "file"]);
    assert_eq!(browse.active(), 3);
    browse.let_go_of_removed();
    assert_eq!(browse.active(), 3);
    past.fsnap(["rm", &id]);
    browse.let_go_of_removed();
    assert_eq!(browse.active(), 1);
    assert_eq!(browse.attr(checkpoint).unwrap_err(), Errno::STALE);
    for file in files {
        assert_eq!(browse.open(file).unwrap_err(), Errno::STALE);
    }
    assert_eq!(browse.look_up(find(&browse, &["ids"]), OsStr::new(&id)).unwrap_err(), Errno::NOENT);
    assert_eq!(browse.active(), 1);
    browse.open(stays).unwrap();
}

fn a_store_that_is_missing_takes_nothing_along() {
    let past = Past::new();
    for backend in ["btrfs", "rsync"] {
        fs::write(past.volume(backend, backend).join("file"), backend).unwrap();
    }
    past.checkpoint();
    let (place, away) = (past.path("disk/rsync-store"), past.path("disk/away"));
    fs::rename(&place, &away).unwrap();
    past.mount();
    assert_eq!(names(past.at("latest")), ["btrfs", "rsync"]);
    assert_eq!(read(past.at("latest/btrfs/file")), "btrfs");
    // The name is there: what it stands for is not, and that is no wrong name.
    let error = fs::read(past.at("latest/rsync/file")).unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::IO));
    fs::rename(&away, &place).unwrap();
    assert_eq!(read(past.at("latest/rsync/file")), "rsync", "it is looked for again");
    let said = past.unmount();
    assert!(said.contains("rsync-store") && said.starts_with("fsnap: error: "), "{said}");
}

fn browse(past: &Past) -> Browse {
    let records = Records {
        state: past.state(),
        patience: Duration::from_secs(10),
        describe: |checkpoint, tags| format!("{} {tags:?}", checkpoint.id),
        branches: None,
    };
    let branches = Branches::new(records.clone(), Box::new(|_| {}), Arc::default());
    Browse::new(records, Arc::new(branches), Box::new(|_| {}))
}

/// Looks a path up.
fn find(browse: &Browse, path: &[&str]) -> u64 {
    path.iter().fold(ROOT, |at, name| browse.look_up(at, OsStr::new(name)).unwrap().meta.ino)
}

fn names_of(browse: &Browse, dir: u64) -> Vec<String> {
    browse.list(dir).unwrap().into_iter().map(|listed| listed.name.into_string().unwrap()).collect()
}

const MANY: usize = 10_000;

fn ten_thousand_checkpoints_activate_nothing() {
    let past = Past::new();
    for backend in ["btrfs", "rsync"] {
        let dir = past.volume(backend, backend);
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::write(dir.join("a/b/file"), backend).unwrap();
    }
    past.checkpoint();
    // All have the same snapshots.
    record_copies(&past.state(), MANY, |_, _| Ok(())).unwrap();
    let browse = browse(&past);
    let ids = names_of(&browse, find(&browse, &["ids"]));
    assert_eq!(ids.len(), MANY + 1);
    let snapshots = find(&browse, &["snapshots"]);
    assert_eq!(browse.list(snapshots).unwrap().len(), MANY + 2);
    for id in &ids[..100] {
        let checkpoint = find(&browse, &["ids", id]);
        assert_eq!(names_of(&browse, checkpoint), ["btrfs", "rsync"]);
        browse.attr(checkpoint).unwrap();
        find(&browse, &["ids", id, "btrfs"]);
    }
    assert_eq!(browse.active(), 0, "names take no snapshot");

    let content = |browse: &Browse, number: u64| {
        let (opened, mut buffer) = (browse.open(number).unwrap(), [0; 16]);
        let length = opened.read(&mut buffer, 0).unwrap();
        (opened, String::from_utf8(buffer[..length].to_vec()).unwrap())
    };
    for backend in ["btrfs", "rsync"] {
        let file = find(&browse, &["ids", &ids[0], backend, "a", "b", "file"]);
        assert_eq!(browse.active(), 1);
        browse.let_go(Duration::ZERO);
        assert_eq!(browse.active(), 0);
        browse.attr(file).unwrap();
        assert_eq!(browse.active(), 0, "what is known is told without the snapshot");
        // It is found again by what was known of it.
        let (open, text) = content(&browse, file);
        assert_eq!(text, backend);
        browse.let_go(Duration::ZERO);
        assert_eq!(browse.active(), 1, "a file of it is open");
        drop(open);
        browse.let_go(Duration::from_secs(3600));
        assert_eq!(browse.active(), 1, "it was used a moment ago");
        browse.let_go(Duration::ZERO);
        assert_eq!(browse.active(), 0);
    }
    for id in &ids[..300] {
        assert_eq!(content(&browse, find(&browse, &["ids", id, "rsync", "a", "b", "file"])).1, "rsync");
        assert!(browse.active() <= 65, "{} are active", browse.active());
    }
    // The same through the kernel.
    past.mount();
    assert_eq!(names(past.at("ids")).len(), MANY + 1);
    assert_eq!(names(past.at("snapshots")).len(), MANY + 2);
    assert_eq!(read(past.at("latest/btrfs/a/b/file")), "btrfs");
    past.unmount();
}

fn a_killed_server_is_cleared() {
    let past = Past::new();
    fs::write(past.volume("db", "btrfs").join("file"), "one").unwrap();
    past.checkpoint();
    past.mount();
    assert_eq!(read(past.at("latest/db/file")), "one");
    past.kill();
    assert!(is_mounted(&past.path("mnt")), "a killed server leaves its mount, which the next one clears");
    past.mount();
    assert_eq!(read(past.at("latest/db/file")), "one");
    past.kill();
    past.fsnap([OsStr::new("umount"), past.path("mnt").as_ref()]);
    assert!(!is_mounted(&past.path("mnt")));
    let again = past.command().arg("umount").arg(past.path("mnt")).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is not mounted by fsnap"), "{again:?}");
    past.mount();
    // While somebody stands in it, it stays.
    let inside = fs::File::open(past.at("latest/db")).unwrap();
    let refused = past.command().arg("umount").arg(past.path("mnt")).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is in use"), "{refused:?}");
    drop(inside);
    past.unmount();
}

/// The user without privileges.
const NOBODY: u32 = 65_534;

fn without_privileges_through_fusermount() {
    // Where that user can come.
    let base = tempfile::tempdir().unwrap();
    let path = |name: &str| base.path().join(name);
    fs::copy(env!("CARGO_BIN_EXE_fsnap"), path("fsnap")).unwrap();
    chown(base.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // The device is for everybody on most machines, and only for root on some. Nobody but this program sees the change.
    let device = Covered::fuse(path("device"));
    let shell = |script: &str| {
        let mut command = Command::new("/bin/sh");
        command.args(["-euc", script]).current_dir(base.path()).uid(NOBODY).gid(NOBODY).env_clear();
        command.env("PATH", "/usr/bin:/bin").env("FSNAP_STATE", "state").stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    shell(
        "mkdir db mnt
         echo one >db/file; chmod 640 db/file; ln -s /etc/shadow db/link; ln -s '#odd' db/odd; ln db/odd db/odd2; mkfifo db/fifo
         ./fsnap init db --backend rsync; ./fsnap checkpoint -t first",
    );
    shell("! ./fsnap mount --native mnt 2>said; grep -q 'which takes root' said");
    let look = "cat mnt/latest/db/file; readlink mnt/tags/first/db/link; stat -c %a mnt/latest/db/file";
    let seen = "one\n/etc/shadow\n640\n";
    assert_eq!(shell(&format!("./fsnap mount mnt; {look}")), seen);
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.contains(path("mnt").to_str().unwrap())).unwrap();
    assert!(line.contains(" rw,nosuid,nodev,") && !line.contains("allow_other"), "{line}");
    assert_eq!(fs::read_dir(path("mnt")).unwrap_err().kind(), ErrorKind::PermissionDenied, "it is not for others");
    // A branch, copy-on-write over a store that the kernel cannot mount.
    let written = "mkdir mnt/branches/try@first; echo two >mnt/branches/try/db/file; echo new >mnt/branches/try/db/new
         mv mnt/branches/try/db/link mnt/branches/try/db/moved; rm mnt/branches/try/db/new
         ls mnt/branches/try/db; cat mnt/branches/try/db/file mnt/latest/db/file; ./fsnap umount mnt; ./fsnap mount mnt
         ls mnt/branches/try/db; cat mnt/branches/try/db/file
         mv mnt/branches/try/db/odd mnt/branches/try/db/odder; mv mnt/branches/try/db/fifo mnt/branches/try/db/pipe
         readlink mnt/branches/try/db/odder mnt/branches/try/db/odd2; stat -c '%F %h' mnt/branches/try/db/odd2
         stat -c %F mnt/branches/try/db/pipe";
    let names = "fifo\nfile\nmoved\nodd\nodd2\n";
    let links = "#odd\n#odd\nsymbolic link 2\nfifo\n";
    assert_eq!(shell(written), format!("{names}two\none\n{names}two\n{links}"));
    shell("./fsnap umount mnt");
    assert!(!is_mounted(&path("mnt")));
    // A server that is killed.
    let killed = format!(
        "./fsnap mount --foreground mnt & server=$!
         until [ -e mnt/README ]; do kill -0 $server; sleep 0.01; done
         kill -9 $server; wait $server || :
         ! ls mnt 2>/dev/null
         ./fsnap mount mnt; {look}; ./fsnap umount mnt"
    );
    assert_eq!(shell(&killed), seen);
    assert!(!is_mounted(&path("mnt")));
    // A server whose last user goes when another one serves at the same place: it takes nothing of the other's off.
    let late = "mkdir lower; echo below >lower/file
         ./fsnap overlay --foreground lower one mnt & first=$!
         until [ -e mnt/file ]; do kill -0 $first; sleep 0.01; done
         exec 3<mnt/file
         fusermount3 -u -z mnt
         ./fsnap overlay lower two mnt 3<&-; echo new >mnt/file
         exec 3<&-
         wait $first
         cat mnt/file; ./fsnap umount mnt";
    assert_eq!(shell(late), "new\n");
    // What its owner may not write to can be linked, moved and removed, and so can what lies in such a directory be changed.
    let change = "ln a c; rm a; mv b d; stat -c %h d; mv shut moved; echo more >>moved/deeper/file; chmod 600 moved/own
         stat -c '%n %a' moved moved/deeper moved/own d; cat moved/deeper/file d; chmod 444 moved/own; ln moved/own own; rm own";
    let changed = shell(&format!(
        "mkdir -p plain/shut/deeper; cd plain; echo linked >a; ln a b; echo deep >shut/deeper/file; echo own >shut/own
         chmod 444 a shut/own; chmod 555 shut shut/deeper; cp -a . ../read-only; {change}"
    ));
    assert_eq!(
        shell(&format!("./fsnap overlay read-only three mnt; cd mnt; {change}; cd ..; ./fsnap umount mnt")),
        changed
    );
    shell("chmod -R u+w plain read-only three");
    drop(device);
}

/// The FUSE device, with rights for everybody, over itself.
struct Covered(PathBuf);

impl Covered {
    fn fuse(dir: PathBuf) -> Self {
        fs::create_dir(&dir).unwrap();
        rustix::mount::mount("device", &dir, "tmpfs", MountFlags::empty(), None).unwrap();
        let number = fs::metadata("/dev/fuse").unwrap().rdev();
        let open = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(CWD, dir.join("fuse"), FileType::CharacterDevice, open, number).unwrap();
        // Whatever this process's own mask is.
        rustix::fs::chmod(dir.join("fuse"), open).unwrap();
        rustix::mount::mount_bind(dir.join("fuse"), "/dev/fuse").unwrap();
        Self(dir)
    }
}

impl Drop for Covered {
    fn drop(&mut self) {
        for dir in [Path::new("/dev/fuse"), &self.0] {
            let _ = rustix::mount::unmount(dir, UnmountFlags::DETACH);
        }
    }
}
