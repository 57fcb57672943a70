//! Compares the snapshots of the backends with each other, in one machine and one run; only the ratios mean anything.
//!
//! ```text
//! cargo run --release -p vm-tests -- bench
//! ```
//!
//! Needs root, btrfs, device-mapper and NILFS2.
#![allow(clippy::print_stdout, reason = "its output is a table")]

#[path = "../../backends/btrfs/tests/support/mod.rs"]
mod on_btrfs;
#[path = "../../backends/nilfs2/tests/support/mod.rs"]
mod on_nilfs2;
#[path = "../../backends/dm-thin/tests/support/mod.rs"]
mod on_thin;

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use fsnap_backend::{Backend, Source, Volume};
use fsnap_conformance::measure::{dirty, median, tell, timed};
use fsnap_dm_thin::FileSystem;

/// As many files as a small project has.
const FILES: usize = 1000;

const ROUNDS: usize = 40;

/// At the median, at most so many times a btrfs snapshot.
const THIN_GOAL: f64 = 1.2;
/// The same, with 4 KiB to be written out.
const NILFS2_GOAL: f64 = 0.5;

fn main() {
    let temp = tempfile::tempdir().expect("make a directory");
    let dir = temp.path().join("nilfs2");
    fs::create_dir(&dir).expect("make a directory");
    let (btrfs, nilfs2, pool) = (
        on_btrfs::Disk::sized(4 << 30, ""),
        on_nilfs2::Disk::sized(&dir, 4 << 30).expect("make a file system"),
        on_thin::TestPool::new(4 << 30),
    );
    let store = fsnap_nilfs2::Store::create(&temp.path().join("store")).expect("make a store");
    let btrfs = Contender::new(btrfs.store(), &btrfs.subvolume("volume"));
    let nilfs2 = Contender::new(store, &nilfs2.dir);
    let [ext4, xfs] =
        [FileSystem::Ext4, FileSystem::Xfs].map(|kind| Contender::new(pool.store(), &pool.volume(kind.name(), kind)));

    // Side by side, so that whatever else the machine does falls on all.
    let mut times = [(); 4].map(|()| Vec::new());
    for _ in 0..ROUNDS {
        times[0].push(btrfs.snapshot(0));
        times[1].push(ext4.snapshot(0));
        times[2].push(xfs.snapshot(0));
        times[3].push(nilfs2.snapshot(4096));
    }
    let [btrfs, ext4, xfs, nilfs2] = times.map(median);
    println!("median ms of a snapshot; the ratio is to one of btrfs with nothing left to write out");
    tell("dm-thin with ext4, nothing left", btrfs, ext4, THIN_GOAL);
    tell("dm-thin with xfs, nothing left", btrfs, xfs, THIN_GOAL);
    tell("NILFS2, 4 KiB left", btrfs, nilfs2, NILFS2_GOAL);
}

/// A backend, and a volume with some files.
struct Contender {
    store: Box<dyn Backend>,
    volume: Volume,
    file: File,
}

impl Contender {
    fn new(store: impl Backend + 'static, dir: &Path) -> Self {
        for number in 0..FILES {
            fs::write(dir.join(format!("f{number}")), format!("{number:01000}")).expect("write");
        }
        let volume = store.adopt(dir).expect("adopt");
        let file = File::create(dir.join("large")).expect("make a file");
        dirty(&file, 1);
        Self { store: Box::new(store), volume, file }
    }

    /// How long a snapshot takes with so many bytes left to write out.
    fn snapshot(&self, left: usize) -> Duration {
        let at = self.store.reserve(Source::Volume(&self.volume), &Default::default()).expect("reserve");
        dirty(&self.file, 1);
        self.store.prime(&self.volume, &at).expect("prime");
        std::os::unix::fs::FileExt::write_all_at(&self.file, &vec![0xa5; left], 0).expect("write");
        let time = timed(|| self.store.snapshot(&self.volume, &at).map(drop).expect("snapshot"));
        self.store.delete(&at).expect("delete");
        rustix::fs::syncfs(&self.volume).expect("sync");
        time
    }
}
