//! Snapshots and clones of a subvolume without others in it.

mod support;

use std::fs;

use fsnap_backend::{Backend, ErrorKind, Source};
use support::{Disk, clone, dir_of, snapshot};

#[test]
fn a_snapshot_stays_and_its_clones_go_their_own_ways() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    fs::write(dir.join("file"), "one").unwrap();
    let volume = store.adopt(&dir).unwrap();
    let taken = snapshot(&store, &volume);
    fs::write(dir.join("file"), "two").unwrap();

    let first = clone(&store, &taken);
    let second = clone(&store, &taken);
    fs::write(dir_of(&store, &first).join("file"), "three").unwrap();
    assert_eq!(fs::read_to_string(dir_of(&store, &second).join("file")).unwrap(), "one");
    assert_eq!(fs::read_to_string(dir_of(&store, &taken.at).join("file")).unwrap(), "one");

    let error = fs::write(dir_of(&store, &taken.at).join("file"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

    store.delete(&taken.at).unwrap();
    assert_eq!(fs::read_to_string(dir_of(&store, &first).join("file")).unwrap(), "three");
    assert_eq!(store.settle(&taken.at).unwrap_err().kind(), ErrorKind::NotFound);
    let images: Vec<_> = store.list().unwrap().into_iter().map(|image| image.at).collect();
    let mut clones = vec![first, second];
    clones.sort();
    assert_eq!(images, clones);
}

/// Without a flush by anybody: what the kernel writes out at the snapshot must be all.
#[test]
fn fresh_writes_are_in_the_snapshot() {
    let disk = Disk::new();
    let store = disk.store();
    let dir = disk.subvolume("v");
    let volume = store.adopt(&dir).unwrap();
    for round in 0..20_u8 {
        // Large and small: extents of their own, and bytes inside the tree.
        let (large, small) = (vec![round + 1; 3_000_000], vec![round + 1; 100]);
        fs::write(dir.join("large"), &large).unwrap();
        fs::write(dir.join("small"), &small).unwrap();
        let at = store.reserve(Source::Volume(&volume), &Default::default()).unwrap();
        store.snapshot(&volume, &at).unwrap();
        let seen = dir_of(&store, &at);
        assert_eq!(fs::read(seen.join("large")).unwrap(), large);
        assert_eq!(fs::read(seen.join("small")).unwrap(), small);
    }
}
