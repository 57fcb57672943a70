//! Compares the backend with the bare ioctls of NILFS2, all in one run; only the ratios mean anything.
//!
//! ```text
//! cargo run --release -p vm-tests -- bench
//! ```
//!
//! Needs root and NILFS2.
#![allow(clippy::print_stdout, reason = "its output is a table")]

#[path = "../tests/support/mod.rs"]
mod support;
#[allow(dead_code, reason = "the backend uses the rest")]
#[path = "../src/sys.rs"]
mod sys;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use fsnap_backend::{Backend, Locator, MountSpec, Source, Volume};
use fsnap_conformance::measure::{dirty, median, ratio, tell, timed};
use fsnap_nilfs2::Store;
use rustix::mount::MountFlags;
use support::Disk;
use tempfile::TempDir;

/// At the median, at most so many times the bare calls.
const GOAL: f64 = 1.5;

fn main() {
    // As many dirty pages as are wanted.
    fs::write("/proc/sys/vm/dirty_ratio", "90").expect("set the limit of dirty pages");
    fs::write("/proc/sys/vm/dirty_background_ratio", "80").expect("set the limit of dirty pages");
    Bench::new().run();
}

struct Bench {
    store: Store,
    volume: Volume,
    file: File,
    disk: Disk,
    temp: TempDir,
}

impl Bench {
    fn new() -> Self {
        let temp = tempfile::tempdir().expect("make a directory");
        let dir = temp.path().join("volume");
        fs::create_dir(&dir).and_then(|()| fs::create_dir(temp.path().join("place"))).expect("make directories");
        let disk = Disk::sized(&dir, 12 << 30).expect("make a file system");
        let store = Store::create(&temp.path().join("store")).expect("make a store");
        let volume = store.adopt(&dir).expect("adopt");
        let file = File::create(dir.join("large")).expect("make a file");
        Self { store, volume, file, disk, temp }
    }

    fn run(&self) {
        println!("nilfs2: median ms; the ratio is to the bare SYNC and CHANGE_CPMODE; goal: at most {GOAL}");
        for (mib, rounds) in [(0, 30), (256, 8)] {
            // Side by side, so that whatever else the machine does falls on all.
            let mut times = [(); 4].map(|()| Vec::new());
            for round in 0..rounds {
                // In turns first: what the file system still does in the background falls on all alike.
                let order = if round % 2 == 0 { [0, 1, 2, 3] } else { [1, 0, 3, 2] };
                for which in order {
                    let (fsnap, ahead) = (which % 2 == 1, which >= 2);
                    times[which].push(if fsnap { self.backend(mib, ahead) } else { self.bare(mib, ahead) });
                }
            }
            let [bare, fsnap, synced, primed] = times.map(median);
            tell(&format!("snapshot, {mib} MiB dirty"), bare, fsnap, GOAL);
            tell(&format!("snapshot, {mib} MiB dirty, written out ahead"), synced, primed, GOAL);
            println!("{:<50}{:>9.2} of what it is without", "  frozen window with prime", ratio(primed, fsnap));
        }
        let at = self.reserve();
        self.store.snapshot(&self.volume, &at).expect("snapshot");
        let number = sys::sync(&self.volume).expect("sync");
        sys::make_snapshot(&self.volume, number).expect("make a snapshot");
        let mut times = [(); 2].map(|()| Vec::new());
        for _ in 0..20 {
            times[0].push(self.mounted(|| format!("cp={number}")));
            times[1].push(self.mounted(|| {
                let MountSpec::Mount { source, options, .. } = self.store.activate(&at).expect("activate") else {
                    panic!("the recipe is no mount");
                };
                assert_eq!(source, self.disk.device);
                options
            }));
            self.store.deactivate(&at).expect("deactivate");
        }
        self.store.delete(&at).expect("delete");
        let [bare, fsnap] = times.map(median);
        tell("activate and mount", bare, fsnap, GOAL);
    }

    fn dirty(&self, mib: u64) {
        dirty(&self.file, mib);
        // Something has to differ, for else the bare calls have nothing to do.
        self.file.write_all_at(&self.now().to_le_bytes(), 0).expect("write");
    }

    fn now(&self) -> u64 {
        sys::next_number(&self.volume).expect("ask for the next number")
    }

    fn bare(&self, mib: u64, synced: bool) -> Duration {
        self.dirty(mib);
        if synced {
            sys::sync(&self.volume).expect("sync");
        }
        let mut number = 0;
        let time = timed(|| {
            number = sys::sync(&self.volume).expect("sync");
            sys::make_snapshot(&self.volume, number).expect("make a snapshot");
        });
        sys::sync(&self.volume).expect("sync");
        sys::make_checkpoint(&self.volume, number).expect("make it a checkpoint");
        sys::sync(&self.volume).expect("sync");
        time
    }

    fn backend(&self, mib: u64, primed: bool) -> Duration {
        let at = self.reserve();
        self.dirty(mib);
        if primed {
            self.store.prime(&self.volume, &at).expect("prime");
        }
        let time = timed(|| self.store.snapshot(&self.volume, &at).map(drop).expect("snapshot"));
        self.store.delete(&at).expect("delete");
        sys::sync(&self.volume).expect("sync");
        time
    }

    fn reserve(&self) -> Locator {
        self.store.reserve(Source::Volume(&self.volume), &Default::default()).expect("reserve")
    }

    fn mounted(&self, options: impl FnOnce() -> String) -> Duration {
        let place = self.temp.path().join("place");
        let time = timed(|| {
            let options = std::ffi::CString::new(options()).expect("no option has a NUL");
            let flags = MountFlags::RDONLY;
            rustix::mount::mount(&self.disk.device, &place, "nilfs2", flags, Some(options.as_c_str())).expect("mount");
        });
        support::unmount(&place).expect("unmount");
        time
    }
}
