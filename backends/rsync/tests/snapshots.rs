//! A snapshot equals its volume, and stays so.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use common::{Mounted, Place, assert_same_as_dir, os, read, run};
use fsnap_backend::{Backend, ErrorKind, ImageKind, ImageState};

/// One of everything that a directory can hold.
fn fill(place: &Place) {
    place.write("plain", "content");
    place.write("empty", "");
    place.write("a/b/c/deep", vec![1; 300_000]);
    place.write(os(b"bytes \xff\xfe\n\x1b[31m"), "odd name");
    place.write("x".repeat(255), "long name");
    place.write("linked", "two names");
    fs::hard_link(place.path("linked"), place.path("a/linked too")).unwrap();
    symlink("/nowhere/\n", place.path("symlink")).unwrap();
    symlink(os(&[b'y'; 1000]), place.path("long symlink")).unwrap();
    fs::create_dir(place.path("empty dir")).unwrap();
    let path = |name: &str| place.path(name).to_str().unwrap().to_owned();
    run("mkfifo", &[&path("fifo")]);
    run("mknod", &[&path("char"), "c", "0", "0"]);
    run("mknod", &[&path("block"), "b", "259", "70000"]);
    drop(std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap());
    let sparse = fs::File::create(place.path("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 50 << 20).unwrap();
    sparse.set_len(1 << 30).unwrap();
    for (name, mode, owner, time) in [
        ("plain", "4755", "1000:1001", "1901-12-14 00:00:00.123456789"),
        ("empty", "0000", "4294967294:4294967294", "2300-01-01 00:00:00.000000001"),
        ("a/b", "2711", "7:8", "1969-12-31 23:59:59.999999999"),
        ("fifo", "0640", "9:9", "2040-01-01"),
        ("symlink", "", "5:6", "2001-01-01 00:00:00.5"),
    ] {
        run("chown", &["-h", owner, &path(name)]);
        if !mode.is_empty() {
            run("chmod", &[mode, &path(name)]);
        }
        run("touch", &["-h", "-d", time, &path(name)]);
    }
}

fn add_xattrs(place: &Place) {
    let path = |name: &str| place.path(name).to_str().unwrap().to_owned();
    place.write("a/attributed", "x");
    fs::set_permissions(place.path("a"), std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
    run("chown", &["33:33", &path("a/attributed")]);
    run("setfattr", &["-n", "user.small", "-v", "value", &path("a/attributed")]);
    run("setfattr", &["-n", "user.empty", &path("a/attributed")]);
    run("setfattr", &["-n", "trusted.overlay.opaque", "-v", "y", &path("a")]);
    run("setfattr", &["-h", "-n", "trusted.link", "-v", "z", &path("symlink")]);
    run("setfacl", &["-m", "u:1234:rw,g:4321:-", &path("a/attributed")]);
    run("setfacl", &["-d", "-m", "u:1234:rwx", &path("a")]);
    run("setcap", &["cap_net_raw+ep", &path("a/attributed")]);
}

fn keeps_everything(place: &Place) {
    fill(place);
    add_xattrs(place);
    let snapshot = place.take();
    assert_eq!(snapshot.omissions, []);
    let tree = place.tree(&snapshot);
    assert_same_as_dir(&*tree, &place.dir);
    let clone = place.clone_of(&snapshot);
    assert_same_as_dir(&*tree, &clone);
    assert_eq!(place.store.verify(&snapshot).unwrap(), []);

    // Writes to the volume and to the clone change neither the snapshot nor each other.
    fs::remove_dir_all(place.path("a")).unwrap();
    fs::write(place.path("plain"), "changed").unwrap();
    fs::write(clone.join("linked"), "written in the clone").unwrap();
    assert_eq!(read(&*tree, "plain"), b"content");
    assert_eq!(read(&*place.tree(&snapshot), "a/linked too"), b"two names");
    assert_eq!(fs::read(place.path("linked")).unwrap(), b"two names");
    assert_eq!(fs::read(clone.join("a/linked too")).unwrap(), b"written in the clone");
    let second = place.take();
    assert_same_as_dir(&*place.tree(&second), &place.dir);
    assert_eq!(place.store.verify(&snapshot).unwrap(), []);

    // The clone is a volume like any other.
    let volume = place.store.adopt(&clone).unwrap();
    let at = place.reserve();
    place.store.snapshot(&volume, &at).unwrap();
    let of_clone = place.store.settle(&at).unwrap();
    assert_same_as_dir(&*place.tree(&of_clone), &clone);
}

#[test]
fn everything_is_kept_on_the_root_file_system() {
    keeps_everything(&Place::new());
}

#[test]
fn everything_is_kept_on_btrfs() {
    let mounted = Mounted::btrfs();
    keeps_everything(&Place::below(&mounted.dir));
}

#[test]
fn everything_is_kept_on_xfs() {
    let mounted = Mounted::xfs();
    keeps_everything(&Place::below(&mounted.dir));
}

#[test]
fn everything_is_kept_on_tmpfs() {
    let mounted = Mounted::tmpfs("200m");
    keeps_everything(&Place::below(&mounted.dir));
}

#[test]
fn what_did_not_change_costs_no_inode() {
    let place = Place::new();
    for n in 0..200 {
        place.write(format!("dir-{}/{n}", n % 10), format!("content {n}"));
    }
    // Files that were written just before are looked at twice, which the second record says of them.
    std::thread::sleep(std::time::Duration::from_millis(50));
    place.take();
    assert_eq!(place.contents().len(), 200);
    let second = place.take();
    assert_eq!(place.contents().len(), 200);
    place.write("dir-3/3", "changed");
    let third = place.take();
    assert_eq!(place.contents().len(), 201);
    let (before, after) = (place.tree(&second), place.tree(&third));
    for n in 0..10 {
        let token = |tree: &dyn fsnap_backend::Dir| tree.open_dir(format!("dir-{n}").as_ref()).unwrap().token();
        assert_eq!(token(&*before) == token(&*after), n != 3, "dir-{n}");
    }
}

#[test]
fn what_nobody_needs_is_removed() {
    let place = Place::new();
    place.write("stays", "in all");
    place.write("goes", "in the first two");
    let first = place.take();
    let second = place.take();
    fs::remove_file(place.path("goes")).unwrap();
    place.write("comes", "in the third");
    let third = place.take();
    assert_eq!(place.contents().len(), 3);

    place.store.delete(&first.at).unwrap();
    assert_eq!(place.contents().len(), 3);
    assert_eq!(place.store.verify(&second).unwrap(), []);
    place.store.delete(&second.at).unwrap();
    assert_eq!(place.contents().len(), 2);
    assert_eq!(place.store.verify(&third).unwrap(), []);
    assert_same_as_dir(&*place.tree(&third), &place.dir);
    place.store.delete(&third.at).unwrap();
    assert_eq!(place.files_in("batches"), Vec::<std::path::PathBuf>::new());
    assert_eq!(place.store.list().unwrap(), []);
    place.store.delete(&third.at).unwrap();
    assert_eq!(place.store.settle(&third.at).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn images_are_listed_as_what_they_are() {
    let place = Place::new();
    place.write("file", "x");
    let at = place.reserve();
    assert_eq!(place.store.list().unwrap(), []);
    place.store.prime(&place.volume(), &at).unwrap();
    let state = |place: &Place| {
        place.store.list().unwrap().into_iter().map(|image| (image.kind, image.state)).collect::<Vec<_>>()
    };
    assert_eq!(state(&place), [(ImageKind::Snapshot, ImageState::Partial)]);
    assert_eq!(place.store.settle(&at).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(place.store.activate(&at).unwrap_err().kind(), ErrorKind::NotFound);
    let snapshot = place.store.snapshot(&place.volume(), &at).unwrap();
    assert_eq!(state(&place), [(ImageKind::Snapshot, ImageState::Whole)]);
    assert_eq!(place.store.settle(&at).unwrap(), snapshot);
    place.clone_of(&snapshot);
    assert_eq!(state(&place), [(ImageKind::Snapshot, ImageState::Whole), (ImageKind::Volume, ImageState::Whole)]);
    let unsettled = place.reserve();
    place.store.prime(&place.volume(), &unsettled).unwrap();
    place.store.delete(&unsettled).unwrap();
    assert_eq!(state(&place).len(), 2);
    for image in place.store.list().unwrap() {
        place.store.delete(&image.at).unwrap();
    }
    assert_eq!(place.store.list().unwrap(), []);
    assert_eq!(place.files_in("volumes"), Vec::<std::path::PathBuf>::new());
}

#[test]
fn contents_are_shared_where_the_file_system_can() {
    let mounted = Mounted::btrfs();
    let place = Place::below(&mounted.dir);
    place.write("large", vec![5; 20 << 20]);
    run("sync", &["-f", mounted.dir.to_str().unwrap()]);
    let used = || {
        let found = rustix::fs::statvfs(&mounted.dir).unwrap();
        (found.f_blocks - found.f_bfree) * found.f_frsize
    };
    let before = used();
    let snapshot = place.take();
    place.clone_of(&snapshot);
    assert!(used() < before + (10 << 20), "{} more bytes are used", used() - before);
    assert_eq!(fs::metadata(place.path("large")).unwrap().size(), 20 << 20);
}
