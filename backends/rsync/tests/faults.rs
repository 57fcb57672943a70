//! What goes wrong below the backend, and what it says then.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Mounted, Place, assert_same_as_dir, read};
use fsnap_backend::{Backend, ErrorKind, ImageState, Source};
use fsnap_rsync::{Options, Store};

/// A volume on the root file system, and a store on another.
fn apart(mounted: &Mounted, options: Options) -> (Place, Store) {
    let store = Store::create_with(&mounted.dir.join("store"), options).unwrap();
    (Place::new(), store)
}

fn used(mounted: &Mounted) -> u64 {
    let found = rustix::fs::statvfs(&mounted.dir).unwrap();
    (found.f_blocks - found.f_bfree) * found.f_frsize
}

fn store_gets_full(after_prime: bool) {
    let mounted = Mounted::ext4(32 << 20);
    let (place, store) = apart(&mounted, Options::default());
    place.write("kept", "by the first");
    let volume = store.adopt(&place.dir).unwrap();
    let reserve = || store.reserve(Source::Volume(&volume), &Default::default()).unwrap();
    let first = reserve();
    store.snapshot(&volume, &first).unwrap();
    let first = store.settle(&first).unwrap();
    let ballast = mounted.dir.join("ballast");
    fs::write(&ballast, vec![1; 16 << 20]).unwrap();
    let before = used(&mounted);

    let at = reserve();
    if after_prime {
        store.prime(&volume, &at).unwrap();
    }
    for number in 0..60 {
        place.write(format!("dir/{number}"), vec![number; 1 << 20]);
    }
    let full = match after_prime {
        true => store.snapshot(&volume, &at).unwrap_err(),
        false => store.prime(&volume, &at).unwrap_err(),
    };
    assert_eq!(full.kind(), ErrorKind::NoSpace, "{full}");
    assert!(store.list().unwrap().iter().all(|image| image.at != at || image.state == ImageState::Partial));
    store.delete(&at).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(used(&mounted) < before + (256 << 10), "{} bytes were left", used(&mounted) - before);
    assert_eq!(store.verify(&first).unwrap(), []);

    fs::remove_file(ballast).unwrap();
    (20..60).for_each(|number| fs::remove_file(place.path(format!("dir/{number}"))).unwrap());
    let again = reserve();
    store.prime(&volume, &again).unwrap();
    store.snapshot(&volume, &again).unwrap();
    let snapshot = store.settle(&again).unwrap();
    let fsnap_backend::MountSpec::Tree(tree) = store.activate(&snapshot.at).unwrap() else { panic!("it is no tree") };
    assert_same_as_dir(&*tree, &place.dir);
}

#[test]
fn a_store_that_gets_full_in_prime_keeps_nothing_and_goes_on_with_room() {
    store_gets_full(false);
}

#[test]
fn a_store_that_gets_full_in_snapshot_keeps_nothing_and_goes_on_with_room() {
    store_gets_full(true);
}

#[test]
fn a_read_only_store_lists_reads_and_verifies() {
    let mounted = Mounted::ext4(64 << 20);
    let place = Place::below(&mounted.dir);
    place.write("dir/file", "content");
    let snapshot = place.take();
    let at = place.reserve();
    mounted.remount("ro");
    let store = Store::open(&place.store_dir()).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_same_as_dir(&*place.tree(&snapshot), &place.dir);
    assert_eq!(store.verify(&snapshot).unwrap(), []);
    let volume = store.adopt(&place.dir).unwrap();
    assert_eq!(store.prime(&volume, &at).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(store.delete(&snapshot.at).unwrap_err().kind(), ErrorKind::ReadOnly);
    mounted.remount("rw");
    assert_eq!(store.verify(&snapshot).unwrap(), []);
}

/// Inverts one byte, counted from the end where it is negative; returns the byte that was there.
fn flip(path: &PathBuf, at: i64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let at = if at < 0 { file.metadata().unwrap().len() - at.unsigned_abs() } else { at as u64 };
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

#[test]
fn damage_is_named_wherever_it_is() {
    let mounted = Mounted::tmpfs("100m");
    let place = Place::with(&mounted.dir, |at| Store::create_with(at, Options { deltas_from: 4096 }).unwrap());
    let mut noise = vec![0; 1 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    place.write("dir/large", &noise);
    place.write("dir/small", "a few bytes");
    place.take();
    noise[500_000..500_100].fill(7);
    place.write("dir/large", &noise);
    let snapshot = place.take();
    assert_eq!(place.store.verify(&snapshot).unwrap(), []);

    let of = |test: &dyn Fn(&PathBuf) -> bool| {
        let found: Vec<_> = place.files_in("batches").into_iter().filter(test).collect();
        assert!(!found.is_empty());
        found
    };
    let patches = of(&|path| path.extension().is_some_and(|found| found == "patch"));
    let records = of(&|path| path.file_name().is_some_and(|found| found == "records"));
    let small = of(&|path| fs::read(path).unwrap() == b"a few bytes");
    let manifest = vec![place.store_dir().join("snapshots").join(snapshot.at.as_str())];
    for (what, files, at, path) in [
        ("data of a patch", &patches, 0, "dir/large"),
        ("index of a patch", &patches, -12, "dir/large"),
        ("content", &small, 3, "dir/small"),
        ("manifest", &manifest, -3, ""),
    ] {
        files.iter().for_each(|file| flip(file, at));
        let damage = place.store.verify(&snapshot).unwrap();
        assert!(!damage.is_empty() && damage.iter().all(|one| one.path == path), "{what}: {damage:?}");
        files.iter().for_each(|file| flip(file, at));
        assert_eq!(place.store.verify(&snapshot).unwrap(), [], "{what}");
    }
    let whole: Vec<_> = records.iter().map(|file| fs::read(file).unwrap()).collect();
    records.iter().for_each(|file| (0..file.metadata().unwrap().len() as i64).for_each(|at| flip(file, at)));
    let damage = place.store.verify(&snapshot).unwrap();
    assert!(damage[0].path.is_empty() && damage[0].what.contains("record "), "{damage:?}");
    records.iter().zip(whole).for_each(|(file, bytes)| fs::write(file, bytes).unwrap());
    assert_eq!(place.store.verify(&snapshot).unwrap(), []);
}

#[test]
fn a_file_that_keeps_changing_is_never_torn() {
    let mounted = Mounted::ext4(256 << 20);
    let place = Place::below(&mounted.dir);
    let length = 4 << 20;
    place.write("changing", vec![0; length]);
    let stop = AtomicBool::new(false);
    let (mut whole, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Each round is one write(2): during it, the file begins with the new and ends with the old.
            let file = File::options().write(true).open(place.path("changing")).unwrap();
            for round in 0_u32.. {
                file.write_all_at(&vec![round as u8; length], 0).unwrap();
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for _ in 0..12 {
            let at = place.reserve();
            match place.store.snapshot(&place.volume(), &at) {
                Ok(snapshot) => {
                    let bytes = read(&*place.tree(&snapshot), "changing");
                    // A panic here would wait for the writer.
                    whole += usize::from(bytes.iter().all(|byte| *byte == bytes[0]));
                }
                Err(error) => {
                    refused += usize::from(error.kind() == ErrorKind::Changed);
                    place.store.delete(&at).unwrap();
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(whole + refused, 12, "{whole} whole, {refused} refused: the others are torn, or failed");
    assert!(refused > 0, "nothing was noticed: the writer was too slow for this test");
    assert_same_as_dir(&*place.tree(&place.take()), &place.dir);
}
