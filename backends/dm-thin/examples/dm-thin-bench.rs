//! Compares the backend with the bare calls of device-mapper, all in one run; only the ratios mean anything.
//!
//! ```text
//! cargo run --release -p vm-tests -- bench
//! ```
//!
//! Needs root and device-mapper.
#![allow(clippy::print_stdout, reason = "its output is a table")]

#[allow(dead_code, reason = "the backend uses the rest")]
#[path = "../src/dm.rs"]
mod dm;
#[path = "../tests/support/mod.rs"]
mod support;
#[allow(dead_code, unreachable_pub, reason = "the backend uses the rest")]
#[path = "../src/sys.rs"]
mod sys;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dm::{By, Mapper, Target};
use fsnap_backend::{Backend, Locator, MountSpec, Source, Volume};
use fsnap_conformance::measure::{dirty, median, ratio, tell, timed};
use fsnap_dm_thin::{FileSystem, Limits, Store};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use support::{TestPool, device_of, dmsetup};

/// Of the module that the backend shares with this program.
const KIND: &str = "dm-thin";

/// At the median, at most so many times the bare calls.
const GOAL: f64 = 1.5;

/// The number of the thin device that the bare calls make: others count from 0.
const BARE: u32 = 7;

fn main() {
    // As many dirty pages as are wanted.
    fs::write("/proc/sys/vm/dirty_ratio", "90").expect("set the limit of dirty pages");
    fs::write("/proc/sys/vm/dirty_background_ratio", "80").expect("set the limit of dirty pages");
    for file_system in [FileSystem::Ext4, FileSystem::Xfs] {
        Bench::new(file_system).run();
    }
}

struct Bench {
    store: Store,
    volume: Volume,
    mapper: Mapper,
    file: File,
    /// The device of the volume, its number in the pool, and its length.
    device: String,
    thin: u32,
    length: u64,
    pool_device: String,
    file_system: FileSystem,
    place: PathBuf,
    pool: TestPool,
}

impl Bench {
    fn new(file_system: FileSystem) -> Self {
        let pool = TestPool::new(32 << 30);
        let mut store = pool.store();
        store.keep_free(Limits { free_data: 1, free_metadata: 1 });
        let node = store.make_volume("bench", 2 << 30, file_system).expect("make a volume");
        let (dir, place) = (pool.dir().join("volume"), pool.dir().join("place"));
        fs::create_dir(&dir).and_then(|()| fs::create_dir(&place)).expect("make directories");
        mount(Some(&node), &dir, Some(file_system.name()), MsFlags::empty(), None::<&str>).expect("mount");
        let device = device_of(&dir).expect("find the device");
        let table = dmsetup(&["table", &device]);
        let words: Vec<_> = table.split_whitespace().collect();
        let (length, pool_device, thin) =
            (words[1].parse().expect("a length"), words[3].to_owned(), words[4].parse().expect("a number"));
        let volume = store.adopt(&dir).expect("adopt");
        let file = File::create(dir.join("large")).expect("make a file");
        let mapper = Mapper::open().expect("open device-mapper");
        Self { store, volume, mapper, file, device, thin, length, pool_device, file_system, place, pool }
    }

    fn run(&self) {
        let name = self.file_system.name();
        println!("{name}: median ms; the ratio is to the bare suspend, create_snap and resume; goal: at most {GOAL}");
        for (mib, rounds) in [(0, 30), (256, 7)] {
            // Side by side, so that whatever else the machine does falls on all.
            let mut times = [(); 4].map(|()| Vec::new());
            for _ in 0..rounds {
                times[0].push(self.bare(mib, false));
                times[1].push(self.backend(mib, false));
                times[2].push(self.bare(mib, true));
                times[3].push(self.backend(mib, true));
            }
            let [bare, fsnap, synced, primed] = times.map(median);
            tell(&format!("snapshot, {mib} MiB dirty"), bare, fsnap, GOAL);
            tell(&format!("snapshot, {mib} MiB dirty, written out ahead"), synced, primed, GOAL);
            println!("{:<50}{:>9.2} of what it is without", "  frozen window with prime", ratio(primed, fsnap));
        }
        let mut times = [(); 2].map(|()| Vec::new());
        let at = self.reserve();
        self.store.snapshot(&self.volume, &at).expect("snapshot");
        self.mapper.suspend(&self.device).expect("suspend");
        self.message(&format!("create_snap {BARE} {}", self.thin));
        self.mapper.resume(&self.device).expect("resume");
        for _ in 0..20 {
            times[0].push(self.bare_mount());
            times[1].push(self.backend_mount(&at));
        }
        self.message(&format!("delete {BARE}"));
        self.store.delete(&at).expect("delete");
        let [bare, fsnap] = times.map(median);
        tell("activate and mount", bare, fsnap, GOAL);
    }

    fn message(&self, message: &str) {
        self.mapper.message(&self.pool.name, message).expect("send a message");
    }

    fn dirty(&self, mib: u64) {
        dirty(&self.file, mib);
    }

    fn rest(&self) {
        rustix::fs::syncfs(&self.volume).expect("sync");
    }

    fn bare(&self, mib: u64, synced: bool) -> Duration {
        self.dirty(mib);
        if synced {
            self.rest();
        }
        let time = timed(|| {
            self.mapper.suspend(&self.device).expect("suspend");
            self.message(&format!("create_snap {BARE} {}", self.thin));
            self.mapper.resume(&self.device).expect("resume");
        });
        self.message(&format!("delete {BARE}"));
        self.rest();
        time
    }

    fn backend(&self, mib: u64, primed: bool) -> Duration {
        let at = self.reserve();
        // The record is written ahead in any case, as it is by the coordinator.
        self.store.prime(&self.volume, &at).expect("prime");
        self.dirty(mib);
        if primed {
            self.store.prime(&self.volume, &at).expect("prime");
        }
        let time = timed(|| self.store.snapshot(&self.volume, &at).map(drop).expect("snapshot"));
        self.store.delete(&at).expect("delete");
        self.rest();
        time
    }

    fn reserve(&self) -> Locator {
        self.store.reserve(Source::Volume(&self.volume), &Default::default()).expect("reserve")
    }

    fn bare_mount(&self) -> Duration {
        let name = "bench-bare";
        let text = format!("{} {BARE}", self.pool_device);
        let target = Target { length: self.length, kind: "thin".into(), text };
        let time = timed(|| {
            let made = self.mapper.make(name, "bench-bare", &[target], true).expect("make a device");
            let options = match self.file_system {
                FileSystem::Xfs => "norecovery,nouuid",
                _ => "noload",
            };
            self.mount_at_place(&made.number.node(), options);
        });
        umount2(&self.place, MntFlags::empty()).expect("unmount");
        self.mapper.remove(name).expect("remove the device");
        assert!(self.mapper.find(By::Name(name)).expect("look").is_none());
        time
    }

    fn backend_mount(&self, at: &Locator) -> Duration {
        let time = timed(|| {
            let MountSpec::Mount { source, options, .. } = self.store.activate(at).expect("activate") else {
                panic!("the recipe is no mount");
            };
            self.mount_at_place(&source, &options);
        });
        umount2(&self.place, MntFlags::empty()).expect("unmount");
        self.store.deactivate(at).expect("deactivate");
        time
    }

    fn mount_at_place(&self, source: &Path, options: &str) {
        let name = Some(self.file_system.name());
        mount(Some(source), &self.place, name, MsFlags::MS_RDONLY, Some(options)).expect("mount");
    }
}
