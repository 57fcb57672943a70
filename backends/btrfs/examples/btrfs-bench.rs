//! Compares the backend with the bare ioctl and with the command, all in one run; only the ratios mean anything.
//!
//! ```text
//! cargo run --release -p fsnap-btrfs --example btrfs-bench [DIR]
//! ```
//!
//! `DIR` is a directory on btrfs in which to work; without one, a file system is made on a loop device. Needs root.
#![allow(clippy::print_stdout, reason = "its output is a table")]

#[path = "../tests/support/mod.rs"]
mod support;
#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../src/sys.rs"]
mod sys;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use fsnap_backend::{Backend, Locator, Source, Volume, beneath};
use fsnap_btrfs::Store;
use fsnap_conformance::measure::{dirty, median, ms, ratio, timed};
use support::{Disk, make_subvolume, run};

/// As many files as a project of some size has.
const FILES: usize = 20_000;
const NESTED: usize = 4;

fn main() {
    let disk;
    let top = match std::env::args_os().nth(1) {
        Some(dir) => PathBuf::from(dir),
        None => {
            disk = Disk::sized(8 << 30, "");
            disk.top.clone()
        }
    };
    let work = top.join(format!("fsnap-bench-{}", std::process::id()));
    make_subvolume(&work).expect("make a subvolume");
    Bench::new(&work).run();
    support::delete_subvolume(&work).expect("remove what was made");
}

struct Bench {
    dir: PathBuf,
    volume_dir: PathBuf,
    /// Where the bare calls put their snapshots.
    bare: OwnedFd,
    store: Store,
    volume: Volume,
    file: File,
}

impl Bench {
    fn new(dir: &Path) -> Self {
        let store = Store::create(&dir.join(".fsnap")).expect("make a store");
        let volume_dir = dir.join("volume");
        make_subvolume(&volume_dir).expect("make a subvolume");
        for number in 0..FILES {
            let sub = volume_dir.join(format!("d{}", number / 200));
            fs::create_dir_all(&sub).expect("make a directory");
            fs::write(sub.join(format!("f{number}")), format!("{number:01000}")).expect("write");
        }
        fs::create_dir(dir.join("bare")).expect("make a directory");
        let bare = beneath::open_root(&dir.join("bare")).expect("open");
        let volume = store.adopt(&volume_dir).expect("adopt");
        let file = File::create(volume_dir.join("large")).expect("make a file");
        Self { dir: dir.to_owned(), volume_dir, bare, store, volume, file }
    }

    fn run(&self) {
        println!("median ms; {FILES} files; × is the ratio to the bare ioctl of the same line");
        println!("{:<28}{:>9}{:>19}{:>19}{:>19}", "snapshot", "bare", "fsnap", "bare, synced", "fsnap, primed");
        for (mib, rounds) in [(0, 60), (1, 40), (16, 30), (64, 15), (512, 5)] {
            // Side by side, so that whatever else the machine does falls on all.
            let mut times = [(); 4].map(|()| Vec::new());
            for _ in 0..rounds {
                times[0].push(self.bare(mib, false));
                times[1].push(self.backend(mib, false));
                times[2].push(self.bare(mib, true));
                times[3].push(self.backend(mib, true));
            }
            let [bare, fsnap, synced, primed] = times.map(median);
            let line = format!("{mib} MiB dirty, {rounds} rounds");
            let cells = [over(fsnap, bare), over(synced, bare), over(primed, bare)];
            println!("{line:<28}{:>9.2}{:>19}{:>19}{:>19}", ms(bare), cells[0], cells[1], cells[2]);
            println!("{:<28}fsnap, primed, to bare, synced: {:.2}", "", primed.as_secs_f64() / synced.as_secs_f64());
        }
        self.command();
        self.clones();
        self.nested();
    }

    fn dirty(&self, mib: u64) {
        dirty(&self.file, mib);
    }

    fn bare(&self, mib: u64, synced: bool) -> Duration {
        self.dirty(mib);
        if synced {
            rustix::fs::syncfs(&self.volume).expect("sync");
        }
        let name = OsStr::new("bare");
        let time = timed(|| sys::snapshot(&self.volume, &self.bare, name, true).expect("snapshot"));
        sys::destroy(&self.bare, name).expect("destroy");
        self.rest();
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
        self.rest();
        time
    }

    fn reserve(&self) -> Locator {
        self.store.reserve(Source::Volume(&self.volume), &Default::default()).expect("reserve")
    }

    /// Lets no one's leftovers fall on the next.
    fn rest(&self) {
        rustix::fs::syncfs(&self.volume).expect("sync");
    }

    fn command(&self) {
        let mut times = [(); 2].map(|()| Vec::new());
        let target = self.dir.join("bare/command");
        for _ in 0..30 {
            times[0].push(self.bare(0, true));
            self.dirty(0);
            self.rest();
            let mut command = Command::new("btrfs");
            command.args(["-q", "subvolume", "snapshot", "-r"]).args([&self.volume_dir, &target]);
            times[1].push(timed(|| run(&mut command)));
            sys::destroy(&self.bare, OsStr::new("command")).expect("destroy");
            self.rest();
        }
        let [bare, command] = times.map(median);
        println!("{:<28}{:>9.2}{:>19}", "`btrfs subvolume snapshot`", ms(bare), over(command, bare));
    }

    fn clones(&self) {
        let at = self.reserve();
        let snapshot = self.store.snapshot(&self.volume, &at).expect("snapshot");
        let source = beneath::open_root(&self.dir.join(".fsnap/snapshots").join(at.as_str())).expect("open");
        let mut times = [(); 2].map(|()| Vec::new());
        for _ in 0..40 {
            let name = OsStr::new("clone");
            times[0].push(timed(|| sys::snapshot(&source, &self.bare, name, false).expect("snapshot")));
            sys::destroy(&self.bare, name).expect("destroy");
            self.rest();
            let to = self.store.reserve(Source::Snapshot(&snapshot), &Default::default()).expect("reserve");
            times[1].push(timed(|| self.store.clone_snapshot(&snapshot, &to).expect("clone")));
            self.store.delete(&to).expect("delete");
            self.rest();
        }
        self.store.delete(&at).expect("delete");
        let [bare, clone] = times.map(median);
        println!("{:<28}{:>9.2}{:>19}", "clone_snapshot", ms(bare), over(clone, bare));
    }

    /// A volume with others in it costs as many ioctls as there are subvolumes.
    fn nested(&self) {
        let mut roots = Vec::new();
        for number in 0..NESTED {
            let path = self.volume_dir.join(format!("nested{number}"));
            make_subvolume(&path).expect("make a subvolume");
            fs::write(path.join("file"), "nested").expect("write");
            roots.push(beneath::open_root(&path).expect("open"));
        }
        roots.push(beneath::open_root(&self.volume_dir).expect("open"));
        let mut times = [(); 2].map(|()| Vec::new());
        for _ in 0..30 {
            self.dirty(0);
            self.rest();
            let names: Vec<_> = (0..roots.len()).map(|number| number.to_string()).collect();
            times[0].push(timed(|| {
                for (root, name) in roots.iter().zip(&names) {
                    sys::snapshot(root, &self.bare, OsStr::new(name), true).expect("snapshot");
                }
            }));
            names.iter().for_each(|name| sys::destroy(&self.bare, OsStr::new(name)).expect("destroy"));
            self.rest();
            times[1].push(self.backend(0, true));
        }
        let [bare, group] = times.map(median);
        println!("{:<28}{:>9.2}{:>19}", format!("{NESTED} nested, primed"), ms(bare), over(group, bare));
    }
}

fn over(time: Duration, bare: Duration) -> String {
    format!("{:.2} ×{:.3}", ms(time), ratio(time, bare))
}
