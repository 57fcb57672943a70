//! Finding, making and opening stores, and what is refused.

mod support;

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use fsnap_backend::{Backend, ErrorKind, Image, ImageKind, ImageState, Locator, Result, Source};
use fsnap_btrfs::Store;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use support::{Disk, clone, delete_subvolume, dir_of, make_subvolume, run, snapshot};

/// Fails unless the call was refused so; returns what the user is told.
fn refused<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind) -> String {
    let error = result.expect_err("it was not refused");
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

#[test]
fn probe_finds_the_mount_and_says_why_not() {
    let disk = Disk::new();
    let dir = disk.subvolume("v");
    let nested = disk.subvolume("v/nested");
    let place = disk.top.canonicalize().unwrap().join(".fsnap");
    for volume in [&disk.top, &dir, &nested] {
        assert_eq!(Store::probe(volume).unwrap(), place);
    }
    fs::create_dir(dir.join("plain")).unwrap();
    let told = refused(Store::probe(&dir.join("plain")), ErrorKind::NotAVolume);
    assert!(told.contains("btrfs subvolume create"), "{told}");
    symlink(&dir, disk.top.join("link")).unwrap();
    refused(Store::probe(&disk.top.join("link")), ErrorKind::NotAVolume);
    refused(Store::probe(&disk.top.join("absent")), ErrorKind::NotFound);
    refused(Store::probe(Path::new("relative")), ErrorKind::NotAVolume);
    let told = refused(Store::probe(Path::new("/proc")), ErrorKind::NotAVolume);
    assert!(told.contains("not lie on btrfs"), "{told}");
    let long = disk.top.join("x".repeat(256));
    refused(Store::probe(&long), ErrorKind::Io);
    run(Command::new("btrfs").args(["property", "set"]).arg(&nested).args(["ro", "true"]));
    refused(Store::probe(&nested), ErrorKind::NotAVolume);
}

/// The mount of a subvolume is a mount of its own, with a store of its own place.
#[test]
fn probe_stays_in_the_mount_through_which_the_volume_is_seen() {
    let disk = Disk::new();
    let dir = disk.subvolume("v");
    let inner = disk.subvolume("v/inner");
    let elsewhere = tempfile::tempdir().unwrap();
    mount(Some(&dir), elsewhere.path(), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let found = Store::probe(&elsewhere.path().join("inner"));
    umount2(elsewhere.path(), MntFlags::empty()).unwrap();
    assert_eq!(found.unwrap(), elsewhere.path().canonicalize().unwrap().join(".fsnap"));
    drop(inner);
}

#[test]
fn without_the_privilege_it_says_which() {
    let disk = Disk::new();
    let dir = disk.subvolume("v");
    let told = thread::spawn(move || {
        // Of this thread alone.
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        set_capabilities(None, sets).unwrap();
        refused(Store::probe(&dir), ErrorKind::Permission)
    });
    let told = told.join().unwrap();
    assert!(told.contains("CAP_SYS_ADMIN"), "{told}");
}

#[test]
fn a_store_is_made_once_and_half_a_store_is_finished() {
    let disk = Disk::new();
    let place = disk.top.join(".fsnap");
    refused(Store::open(&place), ErrorKind::NotFound);
    // A kill after the first step of making it.
    make_subvolume(&place).unwrap();
    fs::create_dir(place.join("snapshots")).unwrap();
    refused(Store::open(&place), ErrorKind::NotAStore);
    let store = Store::create(&place).unwrap();
    assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(Store::create(&place).unwrap().store(), store.store());
    assert_eq!(Store::open(&place).unwrap().store(), store.store());
    // Many at once make one.
    let other = disk.top.join("other");
    let made: Vec<_> = thread::scope(|scope| {
        let makers: Vec<_> = (0..8).map(|_| scope.spawn(|| Store::create(&other).unwrap().store().clone())).collect();
        makers.into_iter().map(|maker| maker.join().unwrap()).collect()
    });
    assert!(made.iter().all(|info| *info == made[0]));
    assert_ne!(made[0].identity, store.store().identity);
}

#[test]
fn what_is_no_store_is_left_alone() {
    let disk = Disk::new();
    let full = disk.subvolume("full");
    fs::write(full.join("file"), "mine").unwrap();
    fs::create_dir(full.join("snapshots")).unwrap();
    refused(Store::create(&full), ErrorKind::NotAStore);
    assert_eq!(support::contents(&full).len(), 2);
    fs::create_dir(disk.top.join("plain")).unwrap();
    refused(Store::create(&disk.top.join("plain")), ErrorKind::NotAStore);
    fs::write(disk.top.join("file"), "").unwrap();
    refused(Store::create(&disk.top.join("file")), ErrorKind::NotAStore);
    symlink("full", disk.top.join("link")).unwrap();
    refused(Store::create(&disk.top.join("link")), ErrorKind::NotAStore);
    refused(Store::create(&disk.top.join("absent/store")), ErrorKind::NotFound);
    refused(Store::create(Path::new("relative")), ErrorKind::NotAStore);
    refused(Store::create(&disk.top.join("..")), ErrorKind::NotAStore);
    refused(Store::create(Path::new("/proc/store")), ErrorKind::NotAStore);
    refused(Store::create(&disk.top.join("x".repeat(256))), ErrorKind::Io);
}

/// Whoever could write to the store could pass off his own files as snapshots.
#[test]
fn a_store_that_others_may_write_to_is_refused() {
    let disk = Disk::new();
    let place = disk.top.join(".fsnap");
    drop(disk.store());
    chown(&place, Some(1000), None).unwrap();
    refused(Store::open(&place), ErrorKind::NotAStore);
    chown(&place, Some(0), None).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o770)).unwrap();
    refused(Store::open(&place), ErrorKind::NotAStore);
    fs::set_permissions(&place, fs::Permissions::from_mode(0o700)).unwrap();
    Store::open(&place).unwrap();
}

#[test]
fn the_version_decides_who_reads_a_store() {
    let disk = Disk::new();
    let place = disk.top.join(".fsnap");
    drop(disk.store());
    let version = place.join("fsnap-store");
    let written = fs::read_to_string(&version).unwrap();
    fs::write(&version, written.replace('1', "2")).unwrap();
    let told = refused(Store::open(&place), ErrorKind::NewerVersion);
    assert!(told.contains("version 2"), "{told}");
    refused(Store::create(&place), ErrorKind::NewerVersion);
    for strange in ["", "fsnap btrfs store, version ", "fsnap btrfs store, version x", "\u{0}", &"9".repeat(5000)] {
        fs::write(&version, strange).unwrap();
        refused(Store::open(&place), ErrorKind::NotAStore);
    }
    fs::remove_file(&version).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &version, rustix::fs::Mode::RWXU).unwrap();
    refused(Store::open(&place), ErrorKind::NotAStore);
}

#[test]
fn what_others_put_into_the_store_is_shown_and_never_touched() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    let own = snapshot(&store, &store.adopt(&dir).unwrap());
    let snapshots = disk.top.join(".fsnap/snapshots");
    make_subvolume(&snapshots.join("mine")).unwrap();
    make_subvolume(&snapshots.join("two words")).unwrap();
    fs::write(snapshots.join("s-0123456789abcdef"), "a file").unwrap();
    symlink("/etc", snapshots.join("s-0123456789abcde0")).unwrap();
    fs::create_dir(disk.top.join(".fsnap/volumes/v-0123456789abcdef")).unwrap();
    let before = support::contents(&disk.top.join(".fsnap"));

    let listed = store.list().unwrap();
    let (known, foreign): (Vec<_>, Vec<_>) = listed.into_iter().partition(|image| image.at == own.at);
    assert_eq!(known, [Image { at: own.at.clone(), kind: ImageKind::Snapshot, state: ImageState::Whole }]);
    assert_eq!(foreign.len(), 5, "{foreign:?}");
    for image in &foreign {
        assert_eq!(image.state, ImageState::Foreign, "{image:?}");
        refused(store.delete(&image.at), ErrorKind::NotFound);
        refused(store.settle(&image.at), ErrorKind::NotFound);
    }
    for taken in ["s-0123456789abcdef", "s-0123456789abcde0", "v-0123456789abcdef"] {
        let at: Locator = taken.parse().unwrap();
        refused(store.delete(&at), ErrorKind::NotFound);
        refused(store.activate(&at), ErrorKind::NotFound);
    }
    let at = "s-0123456789abcdef".parse().unwrap();
    refused(store.snapshot(&store.adopt(&dir).unwrap(), &at), ErrorKind::Exists);
    assert_eq!(support::contents(&disk.top.join(".fsnap")), before);
}

#[test]
fn a_snapshot_that_was_made_writable_is_damaged() {
    let disk = Disk::new();
    let store = disk.store();
    let volume = store.adopt(&disk.subvolume("v")).unwrap();
    let taken = snapshot(&store, &volume);
    run(Command::new("btrfs").args(["property", "set"]).arg(dir_of(&store, &taken.at)).args(["ro", "false"]));
    refused(store.settle(&taken.at), ErrorKind::Damaged);
    refused(store.activate(&taken.at), ErrorKind::Damaged);
    refused(store.verify(&taken), ErrorKind::Damaged);
    refused(store.snapshot(&volume, &taken.at), ErrorKind::Damaged);
    let at = store.reserve(Source::Snapshot(&taken), &Default::default()).unwrap();
    refused(store.clone_snapshot(&taken, &at), ErrorKind::Damaged);
    store.delete(&taken.at).unwrap();
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn a_volume_made_again_under_its_path_is_another() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    let volume = store.adopt(&dir).unwrap();
    let at = store.reserve(Source::Volume(&volume), &Default::default()).unwrap();
    delete_subvolume(&dir).unwrap();
    refused(store.snapshot(&volume, &at), ErrorKind::NotFound);
    fs::create_dir(&dir).unwrap();
    refused(store.snapshot(&volume, &at), ErrorKind::WrongIdentity);
    fs::remove_dir(&dir).unwrap();
    symlink("elsewhere", &dir).unwrap();
    refused(store.snapshot(&volume, &at), ErrorKind::WrongIdentity);
    fs::remove_file(&dir).unwrap();
    make_subvolume(&dir).unwrap();
    let told = refused(store.snapshot(&volume, &at), ErrorKind::WrongIdentity);
    let again = store.adopt(&dir).unwrap();
    assert_ne!(again.identity(), volume.identity());
    assert!(told.contains(again.identity().as_str()) && told.contains(volume.identity().as_str()), "{told}");
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn a_volume_of_another_file_system_is_refused() {
    let (disk, other) = (Disk::new(), Disk::new());
    let store = disk.store();
    refused(store.adopt(&other.subvolume("v")), ErrorKind::NotAVolume);
    let at = "s-0123456789abcdef".parse().unwrap();
    let foreign = other.store().adopt(&other.top).unwrap();
    refused(store.snapshot(&foreign, &at), ErrorKind::Io);
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn a_read_only_mount_is_browsed_and_not_written() {
    let disk = Disk::new();
    let dir = disk.subvolume("v");
    fs::write(dir.join("file"), "kept").unwrap();
    let (taken, copy) = {
        let store = disk.store();
        let taken = snapshot(&store, &store.adopt(&dir).unwrap());
        let copy = clone(&store, &taken);
        (taken, copy)
    };
    disk.remount("ro");
    let place = disk.top.join(".fsnap");
    let store = Store::open(&place).unwrap();
    assert_eq!(store.list().unwrap().len(), 2);
    assert_eq!(fs::read_to_string(dir_of(&store, &taken.at).join("file")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(dir_of(&store, &copy).join("file")).unwrap(), "kept");
    assert_eq!(store.settle(&taken.at).unwrap(), taken);
    assert_eq!(store.verify(&taken).unwrap(), []);
    let volume = store.adopt(&dir).unwrap();
    let at = store.reserve(Source::Volume(&volume), &Default::default()).unwrap();
    refused(store.snapshot(&volume, &at), ErrorKind::ReadOnly);
    refused(store.clone_snapshot(&taken, &copy), ErrorKind::Exists);
    refused(store.delete(&taken.at), ErrorKind::ReadOnly);
    refused(Store::create(&disk.top.join("other")), ErrorKind::ReadOnly);
}

/// From no room at all, bit by bit, to enough: the room ends before the call, in the middle of it, or not at all.
#[test]
fn a_full_file_system_takes_nothing_and_keeps_everything() {
    let disk = Disk::mixed(48 << 20);
    let store = disk.store();
    let dir = disk.subvolume("v");
    make_subvolume(&dir.join("nested")).unwrap();
    fs::write(dir.join("nested/file"), "kept").unwrap();
    let volume = store.adopt(&dir).unwrap();
    let kept = snapshot(&store, &volume);
    let listed = store.list().unwrap();
    let fill = |number: usize| disk.top.join(format!("fill{number}"));
    let mut files = 0;
    let full = loop {
        match fs::write(fill(files), [1; 65_536]) {
            Ok(()) => files += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);

    let mut refusals = 0;
    loop {
        let at = store.reserve(Source::Volume(&volume), &Default::default()).unwrap();
        match store.snapshot(&volume, &at).and_then(|_| store.settle(&at)) {
            Ok(_) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
        }
        refusals += 1;
        // Room for a snapshot, but none for its view: what was captured is whole, and can be removed.
        if store.list().unwrap() != listed {
            store.delete(&at).unwrap();
        }
        assert_eq!(store.list().unwrap(), listed);
        assert_eq!(fs::read_to_string(dir_of(&store, &kept.at).join("nested/file")).unwrap(), "kept");
        let copy = store.reserve(Source::Snapshot(&kept), &Default::default()).unwrap();
        match store.clone_snapshot(&kept, &copy) {
            Ok(()) => store.delete(&copy).unwrap(),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
        }
        assert_eq!(store.list().unwrap(), listed);
        files = files.checked_sub(1).expect("an empty disk has room");
        fs::remove_file(fill(files)).unwrap();
        rustix::fs::syncfs(fs::File::open(&disk.top).unwrap()).unwrap();
    }
    assert!(refusals > 0, "the disk was never full");
}

#[test]
fn a_mounted_image_is_in_use() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    make_subvolume(&dir.join("nested")).unwrap();
    let taken = snapshot(&store, &store.adopt(&dir).unwrap());
    let copy = clone(&store, &taken);
    let target = tempfile::tempdir().unwrap();
    for (at, inner) in [(&taken.at, ""), (&taken.at, "nested"), (&copy, ""), (&copy, "nested")] {
        let source = dir_of(&store, at).join(inner);
        mount(Some(&source), target.path(), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let told = refused(store.delete(at), ErrorKind::Busy);
        umount2(target.path(), MntFlags::empty()).unwrap();
        assert!(told.contains(target.path().to_str().unwrap()), "{told}");
    }
    // In a namespace of another process, which nobody sees from here.
    let script = format!("mount --bind {} {} && echo && cat", dir_of(&store, &copy).display(), target.path().display());
    let mut user = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    io::BufRead::read_line(&mut io::BufReader::new(user.stdout.take().unwrap()), &mut String::new()).unwrap();
    let told = refused(store.delete(&copy), ErrorKind::Busy);
    assert!(told.contains(&user.id().to_string()), "{told}");
    drop(user.stdin.take());
    user.wait().unwrap();
    store.delete(&copy).unwrap();
    store.delete(&taken.at).unwrap();
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn an_active_swap_file_is_named() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    let file = dir.join("swap");
    let script = format!(
        "touch {0} && chmod 600 {0} && chattr +C {0} && fallocate -l 16M {0} && mkswap -q {0} && swapon {0}",
        file.display()
    );
    run(Command::new("sh").args(["-c", &script]));
    let volume = store.adopt(&dir).unwrap();
    let at = store.reserve(Source::Volume(&volume), &Default::default()).unwrap();
    let answer = store.snapshot(&volume, &at);
    run(Command::new("swapoff").arg(&file));
    let told = refused(answer, ErrorKind::Busy);
    assert!(told.contains("swap"), "{told}");
    store.snapshot(&volume, &at).unwrap();
}

/// A quota that is used up stops the volume's writers, and not its snapshots.
#[test]
fn a_quota_that_is_used_up_stops_no_snapshot() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    run(Command::new("btrfs").args(["quota", "enable"]).arg(&disk.top));
    run(Command::new("btrfs").args(["qgroup", "limit", "2M"]).arg(&dir));
    let error = (0..1000).find_map(|n| {
        let written = fs::write(dir.join(format!("f{n}")), vec![1; 100_000]);
        written.and_then(|()| fs::File::open(dir.join(format!("f{n}")))?.sync_all()).err()
    });
    assert_eq!(error.expect("the quota does not hold").kind(), io::ErrorKind::QuotaExceeded);
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    assert_eq!(support::contents(&dir_of(&store, &taken.at)), support::contents(&dir));
}

#[test]
fn without_checksums_verify_promises_less() {
    let disk = Disk::new();
    assert!(disk.store().store().capabilities.verifies_contents);
    disk.remount("nodatasum");
    assert!(!disk.store().store().capabilities.verifies_contents);
}
