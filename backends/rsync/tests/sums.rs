//! The sums of large files whose blocks are shared with the version before.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{Mounted, Place, assert_same_as_dir, read};
use fsnap_backend::Backend;
use rustix::fs::FallocateFlags;

const CHUNK: u64 = 64 << 10;

/// Of the large file: just over what is summed in chunks.
const LENGTH: u64 = (2 << 20) + 12_345;

/// Numbers that look random, the same in every run.
struct Numbers(blake3::OutputReader);

impl Numbers {
    fn new() -> Self {
        Self(blake3::Hasher::new().finalize_xof())
    }

    fn below(&mut self, most: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes) % most
    }

    /// Bytes that can be compressed to the half, and no more.
    fn bytes(&mut self, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.0.fill(&mut bytes);
        bytes.iter_mut().for_each(|byte| *byte &= 0xf);
        bytes
    }
}

fn btrfs_that_compresses() -> Mounted {
    let mounted = Mounted::btrfs();
    mounted.remount("compress-force=zstd");
    mounted
}

/// The file systems that share blocks, each in its ways.
fn sharing() -> [(&'static str, Mounted); 3] {
    [("btrfs", Mounted::btrfs()), ("xfs", Mounted::xfs()), ("btrfs that compresses", btrfs_that_compresses())]
}

fn large(place: &Place) -> File {
    File::options().read(true).write(true).open(place.path("large")).unwrap()
}

/// One change of the large file, of a kind that makes blocks new, moves them, or takes them away.
fn change(file: &File, numbers: &mut Numbers) {
    let length = file.metadata().unwrap().len();
    let at = numbers.below(length);
    match numbers.below(7) {
        0 => file.write_all_at(&numbers.bytes(5), at).unwrap(),
        1 => {
            let more = numbers.below(3 * CHUNK);
            file.write_all_at(&numbers.bytes(more), at).unwrap();
        }
        2 => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, at, 1 + numbers.below(2 * CHUNK)).unwrap();
        }
        3 => file.set_len((1 << 20) + 1 + numbers.below(2 << 20)).unwrap(),
        4 => file.write_all_at(&vec![0; 2 * CHUNK as usize], at - at % CHUNK).unwrap(),
        5 => rustix::fs::fallocate(file, FallocateFlags::empty(), at, CHUNK).unwrap(),
        // The same blocks at another place, also within one that is compressed.
        _ => {
            let (mut from, mut to) = (at - at % 4096, numbers.below(length / 4096) * 4096);
            let mut left = 2 * CHUNK as usize;
            while left > 0 {
                match rustix::fs::copy_file_range(file, Some(&mut from), file, Some(&mut to), left) {
                    Ok(0) => break,
                    Ok(more) => left -= more,
                    // They overlap.
                    Err(rustix::io::Errno::INVAL) => break,
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
    // Some pieces are written out on their own.
    if numbers.below(2) == 0 {
        rustix::fs::fsync(file).unwrap();
    }
}

#[test]
fn every_version_has_the_right_sum() {
    for (what, mounted) in sharing() {
        let place = Place::below(&mounted.dir);
        let mut numbers = Numbers::new();
        place.write("large", numbers.bytes(LENGTH));
        let mut last = place.take();
        for round in 0..40 {
            (0..=numbers.below(3)).for_each(|_| change(&large(&place), &mut numbers));
            let snapshot = place.take();
            assert_eq!(place.store.verify(&snapshot).unwrap(), [], "{what}, round {round}");
            // Bytes only: XFS allocates more than is written where blocks were shared, and calls it data.
            assert!(
                read(&*place.tree(&snapshot), "large") == fs::read(place.path("large")).unwrap(),
                "{what}, {round}"
            );
            place.store.delete(&last.at).unwrap();
            last = snapshot;
        }
        assert_eq!(place.contents().len(), 1, "{what}: what lies beside a content goes with it");
        assert_eq!(sums_beside(&place).len(), 1, "{what}: what lies beside a content goes with it");
    }
}

fn sums_beside(place: &Place) -> Vec<PathBuf> {
    let mut found = place.files_in("batches");
    found.retain(|path| path.extension().is_some_and(|found| found == "sums"));
    found
}

/// Changes the sum of the chunk with that place in a file of sums, and makes the file whole again.
fn forge(path: &Path, place: usize) {
    let mut bytes = fs::read(path).unwrap();
    let end = bytes.len() - 32;
    // Each takes one byte for its number and 32 for its sum; the last stands before the hash of the file.
    let count = (LENGTH.div_ceil(CHUNK)) as usize;
    bytes[end - 33 * (count - place) + 1] ^= 1;
    let hash = blake3::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(hash.as_bytes());
    fs::write(path, bytes).unwrap();
}

/// What `verify` says after the sum of the fourth chunk was forged, and the chunk at `changed` written to.
fn verified_after_forging(mounted: &Mounted, changed: u64) -> Vec<fsnap_backend::Damage> {
    let place = Place::below(&mounted.dir);
    place.write("large", Numbers::new().bytes(LENGTH));
    let first = place.take();
    for path in sums_beside(&place) {
        forge(&path, 4);
    }
    assert_eq!(place.store.verify(&first).unwrap(), [], "the sums of chunks are not needed to verify");
    large(&place).write_all_at(b"changed", changed * CHUNK + 5).unwrap();
    let second = place.take();
    place.store.verify(&second).unwrap()
}

#[test]
fn a_chunk_is_read_again_only_if_its_blocks_changed() {
    for mounted in [Mounted::btrfs(), Mounted::xfs()] {
        assert_eq!(verified_after_forging(&mounted, 4), []);
        let damage = verified_after_forging(&mounted, 5);
        assert_eq!(damage.len(), 1, "the sum was carried over: {damage:?}");
        assert_eq!(damage[0].path, "large");
    }
    // It is not known which of the compressed blocks are meant.
    assert_eq!(verified_after_forging(&btrfs_that_compresses(), 5), []);
}

#[test]
fn missing_and_damaged_sums_of_chunks_cost_time_and_nothing_else() {
    let mounted = Mounted::btrfs();
    let place = Place::below(&mounted.dir);
    place.write("large", Numbers::new().bytes(LENGTH));
    for damage in [|path: &Path| fs::remove_file(path).unwrap(), |path: &Path| fs::write(path, "torn").unwrap()] {
        let first = place.take();
        sums_beside(&place).iter().for_each(|path| damage(path));
        assert_eq!(place.store.verify(&first).unwrap(), []);
        large(&place).write_all_at(b"changed", 5).unwrap();
        let second = place.take();
        assert_eq!(place.store.verify(&second).unwrap(), []);
        assert_same_as_dir(&*place.tree(&second), &place.dir);
    }
}

#[test]
fn the_damaged_chunk_is_named() {
    for (what, mounted) in sharing() {
        let place = Place::below(&mounted.dir);
        place.write("large", Numbers::new().bytes(LENGTH));
        let snapshot = place.take();
        let content = File::options().write(true).open(&place.contents()[0]).unwrap();
        content.write_all_at(b"damaged", 3 * CHUNK + 100).unwrap();
        let damage = place.store.verify(&snapshot).unwrap();
        assert_eq!(damage.len(), 1, "{what}");
        let range = format!("{} to {}", 3 * CHUNK, 4 * CHUNK - 1);
        assert!(damage[0].path == "large" && damage[0].what.contains(&range), "{what}: {damage:?}");
    }
}

#[test]
fn a_change_between_prime_and_snapshot_has_the_right_sum() {
    let mounted = Mounted::btrfs();
    let place = Place::below(&mounted.dir);
    place.write("large", Numbers::new().bytes(LENGTH));
    place.write("small", "a few bytes");
    place.take();
    for round in 0_u64..3 {
        let (volume, at) = (place.volume(), place.reserve());
        large(&place).write_all_at(&round.to_le_bytes(), CHUNK).unwrap();
        place.write("small", round.to_le_bytes());
        place.store.prime(&volume, &at).unwrap();
        large(&place).write_all_at(&round.to_le_bytes(), 9 * CHUNK).unwrap();
        place.write("small", (round + 100).to_le_bytes());
        place.store.snapshot(&volume, &at).unwrap();
        let snapshot = place.store.settle(&at).unwrap();
        assert_eq!(place.store.verify(&snapshot).unwrap(), []);
        assert_same_as_dir(&*place.tree(&snapshot), &place.dir);
    }
}
