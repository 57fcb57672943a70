//! What is easily lost on the way: a snapshot and its clone have it, or name it.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use common::{Mounted, Place, assert_same, assert_same_as_dir, ranges, run};
use fsnap_backend::{Backend, Dir, FileKind, beneath};

/// Says to a program of this file that it was started without privileges, and where it may work.
const UNPRIVILEGED: &str = "FSNAP_TEST_UNPRIVILEGED";

/// The user and group that own nothing.
const NOBODY: &str = "65534";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Takes a snapshot and a clone of it; both equal the volume.
fn kept(place: &Place) -> std::path::PathBuf {
    let snapshot = place.take();
    assert_eq!(snapshot.omissions, []);
    let tree = place.tree(&snapshot);
    assert_same_as_dir(&*tree, &place.dir);
    let clone = place.clone_of(&snapshot);
    assert_same_as_dir(&*tree, &clone);
    assert_eq!(place.store.verify(&snapshot).unwrap(), []);
    clone
}

fn keeps_a_sparse_tebibyte(mounted: &Mounted) {
    let place = Place::below(&mounted.dir);
    let file = File::create(place.path("sparse")).unwrap();
    file.write_all_at(b"begins", 0).unwrap();
    file.write_all_at(b"goes on", 1 << 39).unwrap();
    file.set_len(1 << 40).unwrap();
    // Read to the end it would take minutes, and copied whole it would not fit.
    let clone = kept(&place);
    let found = fs::metadata(clone.join("sparse")).unwrap();
    assert_eq!(found.len(), 1 << 40);
    assert!(found.blocks() < 4096, "{} blocks are taken", found.blocks());
    // A change far behind is seen, too.
    file.write_all_at(b"ends", (1 << 40) - 4).unwrap();
    let tree = place.tree(&place.take());
    assert_eq!(ranges(&*tree.open_file(OsStr::new("sparse")).unwrap()).last().unwrap().end, 1 << 40);
}

#[test]
fn a_sparse_tebibyte_is_kept_where_blocks_are_shared() {
    keeps_a_sparse_tebibyte(&Mounted::btrfs());
}

#[test]
fn a_sparse_tebibyte_is_kept_where_it_is_copied() {
    keeps_a_sparse_tebibyte(&Mounted::ext4(256 << 20));
}

#[test]
fn large_extended_attributes_are_kept() {
    let mounted = Mounted::xfs();
    let place = Place::below(&mounted.dir);
    place.write("file", "x");
    let value: Vec<u8> = (0..60 << 10).map(|n: u32| n as u8 ^ (n >> 8) as u8).collect();
    let file = File::open(&place.dir).unwrap();
    beneath::set_xattr(&file, OsStr::new("file"), OsStr::new("user.large"), &value).unwrap();
    rustix::fs::fsetxattr(&file, "user.of the root", &value, rustix::fs::XattrFlags::empty()).unwrap();
    let clone = kept(&place);
    let clone = File::open(clone).unwrap();
    let found = beneath::xattrs(&clone, OsStr::new("file")).unwrap();
    assert!(found == [("user.large".into(), value.clone())], "it is not kept");
    assert!(beneath::xattrs_fd(&clone).unwrap() == [("user.of the root".into(), value)], "it is not kept");
}

/// With [`NAME`] much deeper than any path can say, and than directories are kept open.
const DEPTH: usize = 4096;

const NAME: &str = "one of many levels";

fn deepest(dir: &Path) -> OwnedFd {
    (0..DEPTH).fold(beneath::open_root(dir).unwrap(), |dir, _| beneath::open_dir(&dir, OsStr::new(NAME)).unwrap())
}

#[test]
fn the_deepest_directory_is_kept() {
    let place = Place::new();
    let mut dir = beneath::open_root(&place.dir).unwrap();
    for _ in 0..DEPTH {
        dir = beneath::make_dir(&dir, OsStr::new(NAME)).unwrap();
    }
    let file = beneath::create_file(&dir, OsStr::new("file"), 0o640).unwrap();
    file.write_all_at(b"far down", 0).unwrap();

    let snapshot = place.take();
    assert_eq!(snapshot.omissions, []);
    let mut tree: Box<dyn Dir> = place.tree(&snapshot).open_dir(OsStr::new(NAME)).unwrap();
    for _ in 1..DEPTH {
        tree = tree.open_dir(OsStr::new(NAME)).unwrap();
    }
    assert_eq!(common::read(&*tree, "file"), b"far down");
    assert_eq!(place.store.verify(&snapshot).unwrap(), []);
    let clone = place.clone_of(&snapshot);
    let restored = beneath::open_file(deepest(&clone), OsStr::new("file")).unwrap();
    assert_eq!(std::io::read_to_string(restored).unwrap(), "far down");

    // A change down there goes all the way up, and removing a clone all the way down.
    file.write_all_at(b"FAR", 0).unwrap();
    assert_ne!(place.tree(&place.take()).token(), place.tree(&snapshot).token());
    for image in place.store.list().unwrap() {
        place.store.delete(&image.at).unwrap();
    }
    assert_eq!(place.files_in("volumes"), Vec::<std::path::PathBuf>::new());
    let above = beneath::open_root(place.dir.parent().unwrap()).unwrap();
    beneath::remove_tree(above, OsStr::new("volume")).unwrap();
    fs::create_dir(&place.dir).unwrap();
}

#[test]
fn times_before_1970_and_after_2038_are_kept() {
    let mounted = Mounted::btrfs();
    let place = Place::below(&mounted.dir);
    let times = [("old", -2_000_000_000, 1), ("just before", -1, 999_999_999), ("epoch", 0, 0), ("late", 1 << 33, 7)];
    for (name, seconds, nanoseconds) in times {
        place.write(name, "x");
        let time = fsnap_backend::Timestamp { seconds, nanoseconds };
        beneath::set_times(File::open(&place.dir).unwrap(), OsStr::new(name), time, time).unwrap();
    }
    let clone = kept(&place);
    for (name, seconds, nanoseconds) in times {
        let found = fs::metadata(clone.join(name)).unwrap();
        assert_eq!((found.mtime(), found.mtime_nsec()), (seconds, i64::from(nanoseconds)), "{name}");
    }
}

#[test]
fn set_id_bits_and_capabilities_survive_the_change_of_owner() {
    let place = Place::new();
    for name in ["setuid", "setgid", "capable"] {
        place.write(name, "program");
        run("chown", &["1234:4321", text(&place.path(name))]);
    }
    run("chmod", &["4755", text(&place.path("setuid"))]);
    run("chmod", &["2755", text(&place.path("setgid"))]);
    run("setcap", &["cap_net_raw,cap_kill=ep", text(&place.path("capable"))]);
    let clone = kept(&place);
    for (name, mode) in [("setuid", 0o104_755), ("setgid", 0o102_755)] {
        let found = fs::metadata(clone.join(name)).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode()), (1234, 4321, mode), "{name}");
    }
    let capable = beneath::xattrs(File::open(&clone).unwrap(), OsStr::new("capable")).unwrap();
    assert_eq!(capable.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["security.capability"]);
}

#[test]
fn nodes_are_made_again() {
    let place = Place::new();
    run("mkfifo", &[text(&place.path("fifo"))]);
    run("mknod", &[text(&place.path("null")), "c", "1", "3"]);
    run("mknod", &[text(&place.path("whiteout")), "c", "0", "0"]);
    run("mknod", &[text(&place.path("disk")), "b", "259", "70000"]);
    drop(std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap());
    let clone = File::open(kept(&place)).unwrap();
    let kinds = ["disk", "fifo", "null", "socket", "whiteout"]
        .map(|name| beneath::stat(&clone, OsStr::new(name)).unwrap().kind);
    let [block, char] = [FileKind::BlockDevice, FileKind::CharDevice];
    assert_eq!(kinds, [block, FileKind::Fifo, char, FileKind::Socket, char]);
}

#[test]
fn hard_links_across_directories_stay_one_file() {
    let place = Place::new();
    place.write("a/deep/down/first", "one file");
    fs::create_dir_all(place.path("z/other")).unwrap();
    for name in ["second", "a/third", "z/other/fourth"] {
        fs::hard_link(place.path("a/deep/down/first"), place.path(name)).unwrap();
    }
    place.write("z/twin", "one file");
    let clone = kept(&place);
    assert_eq!(fs::metadata(clone.join("second")).unwrap().nlink(), 4);
    fs::write(clone.join("z/other/fourth"), "written by one name").unwrap();
    assert_eq!(fs::read(clone.join("a/deep/down/first")).unwrap(), b"written by one name");
    assert_eq!(fs::read(clone.join("z/twin")).unwrap(), b"one file");
    assert_eq!(place.contents().len(), 2);
}

/// Takes the attribute off again, or nobody could remove the file.
struct Immutable<'a>(&'a Path);

impl<'a> Immutable<'a> {
    fn new(path: &'a Path, flag: &str) -> Self {
        run("chattr", &[flag, text(path)]);
        Self(path)
    }
}

impl Drop for Immutable<'_> {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg("-ia").arg(self.0).status();
    }
}

#[test]
fn immutable_and_append_only_files_are_named() {
    let place = Place::new();
    place.write("dir/immutable", "x");
    place.write("appended", "x");
    place.write("plain", "x");
    let (immutable, appended) = (place.path("dir/immutable"), place.path("appended"));
    let _guards = [Immutable::new(&immutable, "+i"), Immutable::new(&appended, "+a")];
    // The second takes the records over from the first, and says it all the same.
    for snapshot in [place.take(), place.take()] {
        let named: Vec<_> = snapshot.omissions.iter().map(|omission| omission.path.as_str()).collect();
        assert_eq!(named, ["appended", "dir/immutable"]);
        assert!(snapshot.omissions.iter().all(|omission| omission.reason.contains("chattr")));
        assert_same_as_dir(&*place.tree(&snapshot), &place.dir);
        // The clone can be changed and removed.
        let clone = place.clone_of(&snapshot);
        fs::remove_file(clone.join("dir/immutable")).unwrap();
    }
}

/// Runs without privileges, in a volume that has files of others.
fn as_nobody(parent: &Path) {
    let place = Place::below(parent);
    fs::remove_dir(&place.dir).unwrap();
    let dir = parent.join("volume");
    let store = &place.store;
    let volume = store.adopt(&dir).unwrap();
    let at = store.reserve(fsnap_backend::Source::Volume(&volume), &Default::default()).unwrap();
    store.prime(&volume, &at).unwrap();
    store.snapshot(&volume, &at).unwrap();
    let snapshot = store.settle(&at).unwrap();
    let named: Vec<_> = snapshot.omissions.iter().map(|omission| omission.path.as_str()).collect();
    assert_eq!(named, ["closed", "device", "secret"], "{:?}", snapshot.omissions);
    let tree = place.tree(&snapshot);
    let clone = place.clone_of(&snapshot);
    assert!(["device", "secret"].iter().all(|name| !clone.join(name).exists()));
    assert_eq!(fs::read(clone.join("open")).unwrap(), b"anybody's");
    // It belongs to somebody else now: the set-uid bit would speak for that one.
    assert_eq!(fs::metadata(clone.join("setuid")).unwrap().mode() & 0o7777, 0o755);
    assert_same(
        &*tree.open_dir(OsStr::new("mine")).unwrap(),
        &fsnap_backend::DirTree::open(&clone.join("mine")).unwrap(),
    );
}

#[test]
fn what_we_may_not_read_is_named() {
    if let Some(parent) = std::env::var_os(UNPRIVILEGED) {
        return as_nobody(Path::new(&parent));
    }
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    fs::create_dir(at("volume")).unwrap();
    fs::create_dir(at("volume/closed")).unwrap();
    fs::create_dir(at("volume/mine")).unwrap();
    for (name, bytes, mode) in [
        ("volume/secret", "root's", 0o600),
        ("volume/closed/inside", "root's", 0o644),
        ("volume/open", "anybody's", 0o644),
        ("volume/setuid", "root's", 0o4755),
        ("volume/mine/file", "nobody's", 0o640),
    ] {
        fs::write(at(name), bytes).unwrap();
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(at("volume/closed"), fs::Permissions::from_mode(0o700)).unwrap();
    run("mknod", &["-m", "666", text(&at("volume/device")), "c", "1", "3"]);
    run("chown", &["-R", &format!("{NOBODY}:{NOBODY}"), text(&at("volume/mine"))]);
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = at("fidelity");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"])
        .arg(&program)
        .args(["--exact", "what_we_may_not_read_is_named", "--nocapture"])
        .env(UNPRIVILEGED, temp.path())
        .current_dir("/")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}
