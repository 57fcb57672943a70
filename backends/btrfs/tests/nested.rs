//! Volumes with other subvolumes in them.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use fsnap_backend::{Backend, ErrorKind, ImageState, Locator, MountSpec, Source, Volume};
use fsnap_btrfs::Store;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use support::{Disk, clone, contents, delete_subvolume, dir_of, make_subvolume, placeholders, snapshot};

/// A volume with three levels of subvolumes, whose names are the worst that a file can have.
fn three_levels(disk: &Disk) -> PathBuf {
    let top = disk.subvolume("v");
    let first = top.join(OsStr::from_bytes(b"dir/new\nline"));
    let second = first.join(OsStr::from_bytes(b"deep/er/not \xff\xfe utf-8"));
    let third = second.join("x".repeat(255));
    let beside = top.join("beside");
    for (index, path) in [&top, &first, &second, &third, &beside].into_iter().enumerate() {
        if index > 0 {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            make_subvolume(path).unwrap();
        }
        fs::write(path.join("file"), format!("level {index}")).unwrap();
    }
    top
}

fn reserve(store: &Store, volume: &Volume) -> Locator {
    store.reserve(Source::Volume(volume), &Default::default()).unwrap()
}

#[test]
fn nested_subvolumes_are_seen_and_cloned() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    let before = contents(&dir);
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    fs::write(dir.join(OsStr::from_bytes(b"dir/new\nline/file")), "later").unwrap();

    let seen = dir_of(&store, &taken.at);
    assert_eq!(contents(&seen), before);
    for path in before.keys().filter(|path| path.ends_with("file")) {
        let error = fs::write(seen.join(path), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{path:?} could be written");
    }
    let first = clone(&store, &taken);
    let second = clone(&store, &taken);
    let (first_dir, second_dir) = (dir_of(&store, &first), dir_of(&store, &second));
    assert_eq!(contents(&first_dir), before);
    for path in before.keys().filter(|path| path.ends_with("file")) {
        fs::write(first_dir.join(path), "changed").unwrap();
    }
    assert_eq!(contents(&second_dir), before);
    assert_eq!(contents(&seen), before);
    assert_eq!(store.verify(&taken).unwrap(), []);

    // A clone is a volume again, with everything in it.
    let branch = store.adopt(&first_dir).unwrap();
    let again = snapshot(&store, &branch);
    assert_eq!(contents(&dir_of(&store, &again.at)), contents(&first_dir));

    for at in [&taken.at, &first, &second, &again.at] {
        store.delete(at).unwrap();
    }
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(disk.subvolumes(), 6, "the volume's five and the store are left");
}

#[test]
fn the_directory_around_a_nested_subvolume_keeps_its_times() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    let copy = clone(&store, &taken);
    let times = |dir: &Path| {
        let meta = fs::metadata(dir).unwrap();
        (meta.mtime(), meta.mtime_nsec(), meta.atime(), meta.atime_nsec(), meta.mode())
    };
    for copy in [dir_of(&store, &taken.at), dir_of(&store, &copy)] {
        for path in ["", "dir", "dir/new\nline", "dir/new\nline/deep", "dir/new\nline/deep/er"] {
            assert_eq!(times(&copy.join(path)), times(&dir.join(path)), "{path:?}");
        }
    }
}

#[test]
fn a_subvolume_made_after_prime_is_not_lost() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    let volume = store.adopt(&dir).unwrap();
    let at = reserve(&store, &volume);
    store.prime(&volume, &at).unwrap();
    make_subvolume(&dir.join("late")).unwrap();
    fs::write(dir.join("late/file"), "late").unwrap();
    store.snapshot(&volume, &at).unwrap();
    store.settle(&at).unwrap();
    assert_eq!(fs::read_to_string(dir_of(&store, &at).join("late/file")).unwrap(), "late");
}

/// Somebody makes subvolumes at every moment of the call: a snapshot has all that were there, or there is none.
#[test]
fn a_subvolume_made_during_the_call_is_not_lost() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    let volume = store.adopt(&dir).unwrap();
    for round in 0..24 {
        let at = reserve(&store, &volume);
        let start = Barrier::new(2);
        let taken = thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                thread::sleep(Duration::from_micros(150 * round));
                make_subvolume(&dir.join(format!("n{round}"))).unwrap();
            });
            start.wait();
            store.snapshot(&volume, &at)
        });
        match taken {
            Ok(_) => {
                store.settle(&at).unwrap();
                assert_eq!(placeholders(&dir_of(&store, &at)), [] as [PathBuf; 0]);
                store.delete(&at).unwrap();
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Changed, "{error}"),
        }
        // The volume is small again, now and then.
        if round % 4 == 3 {
            (round - 3..=round).for_each(|round| delete_subvolume(&dir.join(format!("n{round}"))).unwrap());
        }
    }
    assert_eq!(store.list().unwrap(), [], "a refused snapshot left something behind");
}

#[test]
fn a_read_only_subvolume_is_read_only_in_a_clone() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    let frozen = dir.join(OsStr::from_bytes(b"dir/new\nline"));
    let flag = |value: &str| {
        support::run(std::process::Command::new("btrfs").args(["property", "set"]).arg(&frozen).args(["ro", value]))
    };
    flag("true");
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    let at = clone(&store, &taken);
    let copy = dir_of(&store, &at);
    assert_eq!(contents(&copy), contents(&dir));
    let error = fs::write(copy.join(OsStr::from_bytes(b"dir/new\nline/file")), "x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    fs::write(copy.join("beside/file"), "x").expect("the others stay writable");
    // What lies in a read-only subvolume goes with it.
    let before = disk.subvolumes();
    store.delete(&at).unwrap();
    assert_eq!(disk.subvolumes(), before - 5);
    flag("false");
}

/// The volume is the mount's root, and the store lies in it.
#[test]
fn the_store_is_not_part_of_the_volume() {
    let disk = Disk::new();
    let store = disk.store();
    fs::write(disk.top.join("file"), "one").unwrap();
    let volume = store.adopt(&disk.top).unwrap();
    let plain = snapshot(&store, &volume);
    assert_eq!(
        contents(&dir_of(&store, &plain.at)).into_keys().collect::<Vec<_>>(),
        [Path::new(".fsnap"), Path::new("file")]
    );
    disk.subvolume("nested");
    fs::write(disk.top.join("nested/file"), "two").unwrap();
    let group = snapshot(&store, &volume);
    let seen = dir_of(&store, &group.at);
    assert_eq!(placeholders(&seen), [Path::new(".fsnap")]);
    assert_eq!(fs::read_to_string(seen.join("nested/file")).unwrap(), "two");
    assert_eq!(placeholders(&dir_of(&store, &clone(&store, &group))), [Path::new(".fsnap")]);
    assert_eq!(store.adopt(&disk.top.join(".fsnap")).unwrap_err().kind(), ErrorKind::NotAVolume);
}

/// What is mounted over a directory hides it from paths, and not from the file system.
#[test]
fn a_subvolume_below_a_mount_point_is_not_lost() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    let before = contents(&dir);
    let volume = store.adopt(&dir).unwrap();
    let over = [dir.join("dir"), dir.join("beside")];
    for over in &over {
        mount(Some("none"), over, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    }
    let taken = snapshot(&store, &volume);
    for over in &over {
        umount2(over, MntFlags::empty()).unwrap();
    }
    assert_eq!(contents(&dir_of(&store, &taken.at)), before);
}

/// What a power cut or a kill can leave, one state after the other.
#[test]
fn half_a_group_is_finished_or_removed() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    let whole = disk.top.join(".fsnap/snapshots").join(taken.at.as_str());
    let before = disk.subvolumes();

    // Cut short before the view was whole.
    fs::rename(whole.join("view"), whole.join(".view")).unwrap();
    assert_eq!(store.settle(&taken.at).unwrap(), taken);
    assert_eq!(contents(&dir_of(&store, &taken.at)), contents(&dir));
    assert_eq!(disk.subvolumes(), before);

    // Cut short before the last part was there.
    let hidden = whole.with_file_name(format!(".{}", taken.at));
    fs::rename(&whole, &hidden).unwrap();
    delete_subvolume(&hidden.join("0")).unwrap();
    assert_eq!(store.list().unwrap().first().map(|image| image.state), Some(ImageState::Partial));
    assert_eq!(store.settle(&taken.at).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.activate(&taken.at).unwrap_err().kind(), ErrorKind::NotFound);
    let again = store.snapshot(&volume, &taken.at).unwrap();
    assert_ne!(again.identity, taken.identity);
    assert_eq!(store.settle(&taken.at).unwrap(), again);
    assert_eq!(store.snapshot(&volume, &taken.at).unwrap(), again, "a whole one is returned as it is");
    assert_eq!(disk.subvolumes(), before);

    // A removal cut short.
    fs::rename(&whole, &hidden).unwrap();
    delete_subvolume(&hidden.join("1")).unwrap();
    store.delete(&taken.at).unwrap();
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(disk.subvolumes(), 6);
}

#[test]
fn half_a_clone_is_finished_or_removed() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    let before = disk.subvolumes();
    let at = clone(&store, &taken);
    let whole = disk.top.join(".fsnap/volumes").join(at.as_str());
    let hidden = whole.with_file_name(format!(".{at}"));
    fs::rename(&whole, &hidden).unwrap();
    delete_subvolume(&hidden.join("beside")).unwrap();
    let listed = store.list().unwrap().into_iter().find(|image| image.at == at).unwrap();
    assert_eq!(listed.state, ImageState::Partial);
    assert_eq!(store.activate(&at).unwrap_err().kind(), ErrorKind::NotFound);
    store.clone_snapshot(&taken, &at).unwrap();
    assert_eq!(contents(&dir_of(&store, &at)), contents(&dir));
    assert_eq!(store.clone_snapshot(&taken, &at).unwrap_err().kind(), ErrorKind::Exists);
    fs::rename(&whole, &hidden).unwrap();
    store.delete(&at).unwrap();
    assert_eq!(disk.subvolumes(), before);
}

/// A process of the volume exchanges a directory on the way with a symbolic link, all the time.
#[test]
fn no_link_is_followed_to_a_nested_subvolume() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    // What the link leads to looks the same from outside.
    let bait = disk.subvolume("bait");
    make_subvolume(&bait.join("new\nline")).unwrap();
    fs::write(bait.join("new\nline/file"), "bait").unwrap();
    symlink(&bait, dir.join("link")).unwrap();
    let volume = store.adopt(&dir).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                renameat_with(CWD, dir.join("dir"), CWD, dir.join("link"), RenameFlags::EXCHANGE).unwrap();
            }
        });
        for _ in 0..30 {
            let at = reserve(&store, &volume);
            match store.snapshot(&volume, &at) {
                Ok(_) => {
                    store.settle(&at).unwrap();
                    let seen = dir_of(&store, &at);
                    assert_eq!(placeholders(&seen), [] as [PathBuf; 0]);
                    let files = contents(&seen);
                    assert!(files.values().all(|content| content.as_deref() != Some(b"bait")), "a link was followed");
                    assert_eq!(files.values().flatten().count(), 5, "{files:?}");
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Changed, "{error}"),
            }
            store.delete(&at).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Whoever works in a clone renames what is in it while the clone is removed, and makes more.
#[test]
fn a_clone_is_removed_under_the_hands_of_its_users() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = three_levels(&disk);
    let outside = disk.subvolume("outside");
    fs::write(outside.join("file"), "outside").unwrap();
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    for _ in 0..10 {
        let at = clone(&store, &taken);
        let copy = dir_of(&store, &at);
        symlink(&disk.top, copy.join("link")).unwrap();
        // The removal renames the clone's root, and may be done before the thread runs: so a descriptor is used.
        let root = fs::File::open(&copy).unwrap();
        thread::scope(|scope| {
            let user = scope.spawn(|| {
                // Until the ground is gone.
                for round in 0..100_000 {
                    if renameat_with(&root, "dir", &root, "link", RenameFlags::EXCHANGE).is_err() {
                        return;
                    }
                    if round == 50 {
                        make_subvolume(&copy.join("more")).ok();
                    }
                }
            });
            store.delete(&at).unwrap();
            user.join().unwrap();
        });
        assert_eq!(store.settle(&taken.at).unwrap(), taken);
    }
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "outside");
    assert_eq!(contents(&dir_of(&store, &taken.at)), contents(&dir));
    store.delete(&taken.at).unwrap();
    assert_eq!(disk.subvolumes(), 7);
}

#[test]
fn a_nested_subvolume_deeper_than_any_path_is_captured() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    let volume = store.adopt(&dir).unwrap();
    let mut at = fsnap_backend::beneath::open_root(&dir).unwrap();
    let level = "d".repeat(250);
    for _ in 0..40 {
        rustix::fs::mkdirat(&at, &*level, rustix::fs::Mode::RWXU).unwrap();
        at = fsnap_backend::beneath::open_dir(&at, OsStr::new(&level)).unwrap();
    }
    let through = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&at));
    make_subvolume(&Path::new(&through).join("deep")).unwrap();
    fs::write(Path::new(&through).join("deep/file"), "deep").unwrap();
    let taken = snapshot(&store, &volume);
    for image in [taken.at.clone(), clone(&store, &taken)] {
        let mut at = fsnap_backend::beneath::open_root(&dir_of(&store, &image)).unwrap();
        for _ in 0..40 {
            at = fsnap_backend::beneath::open_dir(&at, OsStr::new(&level)).unwrap();
        }
        at = fsnap_backend::beneath::open_dir(&at, OsStr::new("deep")).unwrap();
        let file = fsnap_backend::beneath::open_file(&at, OsStr::new("file")).unwrap();
        assert_eq!(io::read_to_string(file).unwrap(), "deep");
        store.delete(&image).unwrap();
    }
}

/// A store that cannot be written to shows what it has.
#[test]
fn a_view_is_browsed_on_a_read_only_mount() {
    let disk = Disk::new();
    let dir = three_levels(&disk);
    let (settled, unsettled) = {
        let store = disk.store();
        let volume = store.adopt(&dir).unwrap();
        let unsettled = reserve(&store, &volume);
        store.snapshot(&volume, &unsettled).unwrap();
        (snapshot(&store, &volume), unsettled)
    };
    disk.remount("ro");
    let store = Store::open(&disk.top.join(".fsnap")).unwrap();
    assert_eq!(store.list().unwrap().len(), 2);
    assert_eq!(store.settle(&settled.at).unwrap(), settled);
    assert!(matches!(store.activate(&settled.at).unwrap(), MountSpec::Bind { read_only: true, .. }));
    assert_eq!(contents(&dir_of(&store, &settled.at)), contents(&dir));
    let unseen = store.settle(&unsettled).unwrap();
    assert_eq!(store.verify(&unseen).unwrap(), []);
    assert_eq!(store.activate(&unsettled).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(store.delete(&unsettled).unwrap_err().kind(), ErrorKind::ReadOnly);
}
