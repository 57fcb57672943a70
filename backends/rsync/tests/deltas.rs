//! Large files that change in small places, where blocks cannot be shared.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use common::{Mounted, Place, assert_same_as_dir};
use fsnap_backend::Backend;
use fsnap_rsync::{Options, Store};
use proptest::prelude::*;
use rustix::fs::FallocateFlags;

/// One change of a file.
#[derive(Debug, Clone)]
enum Edit {
    Overwrite(u64, Vec<u8>),
    Insert(u64, Vec<u8>),
    Truncate(u64),
    Extend(u64),
    Punch(u64, u64),
}

fn edit() -> impl Strategy<Value = Edit> {
    let (at, bytes) = (0..300_000_u64, proptest::collection::vec(any::<u8>(), 1..9_000));
    prop_oneof![
        3 => (at.clone(), bytes.clone()).prop_map(|(at, bytes)| Edit::Overwrite(at, bytes)),
        2 => (at.clone(), bytes).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        1 => at.clone().prop_map(Edit::Truncate),
        1 => at.clone().prop_map(Edit::Extend),
        2 => (at.clone(), 1..60_000_u64).prop_map(|(at, len)| Edit::Punch(at, len)),
    ]
}

fn apply(place: &Place, edit: &Edit) {
    let path = place.path("file");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    match edit {
        Edit::Overwrite(at, bytes) => file.write_all_at(bytes, at % (length + 1)).unwrap(),
        Edit::Insert(at, more) => {
            let mut bytes = fs::read(&path).unwrap();
            let at = (at % (length + 1)) as usize;
            bytes.splice(at..at, more.iter().copied());
            fs::write(&path, bytes).unwrap();
        }
        Edit::Truncate(at) => file.set_len(at % (length + 1)).unwrap(),
        Edit::Extend(more) => file.set_len(length + more).unwrap(),
        Edit::Punch(at, len) => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, flags, *at, *len).unwrap();
        }
    }
}

fn place_on(mounted: &Mounted) -> Place {
    Place::with(&mounted.dir, |place| Store::create_with(place, Options { deltas_from: 4096 }).unwrap())
}

fn noise(length: usize) -> Vec<u8> {
    let mut reader = blake3::Hasher::new().finalize_xof();
    let mut bytes = vec![0; length];
    reader.fill(&mut bytes);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_version_is_kept(versions in proptest::collection::vec(proptest::collection::vec(edit(), 1..4), 1..8)) {
        let mounted = Mounted::tmpfs("100m");
        let place = place_on(&mounted);
        place.write("file", noise(300_000));
        let mut taken = Vec::new();
        for edits in versions {
            taken.push((place.take(), fs::read(place.path("file")).unwrap()));
            edits.iter().for_each(|edit| apply(&place, edit));
            assert_same_as_dir(&*place.tree(&place.take()), &place.dir);
        }
        // Each other snapshot goes; what the rest need stays.
        while let Some((snapshot, bytes)) = taken.pop() {
            prop_assert_eq!(place.store.verify(&snapshot).unwrap(), []);
            if !bytes.is_empty() {
                prop_assert!(common::read(&*place.tree(&snapshot), "file") == bytes);
            }
            if let Some((next, _)) = taken.pop() {
                place.store.delete(&next.at).unwrap();
            }
            prop_assert_eq!(place.store.verify(&snapshot).unwrap(), []);
        }
    }
}

fn sizes(place: &Place, patches: bool) -> Vec<u64> {
    let is_patch = |path: &std::path::PathBuf| path.extension().is_some_and(|found| found == "patch");
    place
        .contents()
        .iter()
        .filter(|path| is_patch(path) == patches)
        .map(|path| path.metadata().unwrap().len())
        .collect()
}

#[test]
fn a_small_change_costs_little_and_damage_is_named() {
    let mounted = Mounted::tmpfs("200m");
    let place = place_on(&mounted);
    place.write("file", noise(8 << 20));
    place.take();
    let file = File::options().write(true).open(place.path("file")).unwrap();
    let mut last = None;
    for round in 0..40_u64 {
        file.write_all_at(&round.to_le_bytes(), round * 100_000).unwrap();
        last = Some(place.take());
    }
    assert!(sizes(&place, true).iter().all(|&size| size < 10_000), "{:?}", sizes(&place, true));
    assert_eq!(sizes(&place, false).len(), 3, "the chain is bounded");

    // An insertion moves what is behind it.
    let mut bytes = fs::read(place.path("file")).unwrap();
    bytes.splice(1000..1000, *b"put in");
    place.write("file", bytes);
    let moved = place.take();
    assert!(sizes(&place, true).iter().all(|&size| size < 50_000), "{:?}", sizes(&place, true));
    assert_same_as_dir(&*place.tree(&moved), &place.dir);
    assert_eq!(place.store.verify(&moved).unwrap(), []);

    for base in place.contents().into_iter().filter(|path| path.metadata().unwrap().len() > 1 << 20) {
        let base_file = File::options().write(true).open(&base).unwrap();
        base_file.write_all_at(&[0; 100], 7 << 20).unwrap();
    }
    let damage = place.store.verify(&last.unwrap()).unwrap();
    assert_eq!(damage.len(), 1);
    assert_eq!(damage[0].path, "file");
    assert!(damage[0].what.contains("batches"), "{damage:?}");
}
