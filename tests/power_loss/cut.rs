//! The cuts, and what must hold after each.

use std::fs::{self, File};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::Path;
use std::time::Duration;

use fsnap::catalog::{Access, Catalog};
use fsnap::checkpoint::Checkpoint;
use fsnap::stores;
use fsnap_conformance::{Listing, View};
use serde_json::Value;

use crate::disk::{Logged, Places, SIZE, Standing, ok};
use crate::log::Log;
use crate::work::{self, Record, STEPS};

/// Numbers that follow from the seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        // A step of splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end.max(1)
    }

    /// How many of the sectors of a write are there.
    ///
    /// A disk of today writes 4 KiB in one piece, and btrfs relies on it: it has one superblock of that size at the usual place.
    fn part(&mut self, sectors: u64) -> u64 {
        const PIECE: u64 = 8;
        match self.below(3) {
            0 => 0,
            1 => sectors,
            _ => self.below(sectors.div_ceil(PIECE)) * PIECE,
        }
    }
}

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |number| number.parse().unwrap_or_else(|error| panic!("{name}: {error}")))
}

pub(crate) fn every_promise_outlives_a_power_cut() {
    let dir = tempfile::tempdir().unwrap();
    // In memory: what is flushed here is flushed to the log, and need not wait for a real disk as well.
    let memory = Memory::new(dir.path());
    let places = Places::in_dir(dir.path());
    let logged = Logged::new(dir.path());
    let standing = Standing::make(&places, &logged.device);
    let record = work::all(&standing);
    drop(standing);
    let log = Log::read(&logged.close(dir.path()));
    let begin = log.mark("begin").unwrap();
    let seed = setting("FSNAP_POWER_SEED", RandomState::new().build_hasher().finish());
    let mut random = Random(seed);
    let disk = dir.path().join("disk");
    for number in 0..setting("FSNAP_POWER_CUTS", 30) {
        let last = begin + random.below((log.entries.len() - begin) as u64) as usize;
        let file = empty(&disk);
        let promises = log.put_together(last, &file, &mut |sectors| random.part(sectors));
        drop(file);
        let checked = in_another_boot(dir.path(), number, || check(&places, &disk, &log, promises, &record));
        if let Err(said) = checked {
            panic!("cut {number} of FSNAP_POWER_SEED={seed}, after entry {last} of {}: {said}", log.entries.len());
        }
    }
    // And now a disk that has kept but half of what it was told to keep: that must not pass.
    let half = begin + (log.entries.len() - begin) / 2;
    log.put_together(half, &empty(&disk), &mut |_| 0);
    let checked =
        in_another_boot(dir.path(), u64::MAX >> 16, || check(&places, &disk, &log, log.entries.len(), &record));
    assert!(checked.is_err_and(|said| said.starts_with("checkpoint ")), "broken promises were not noticed");
    drop(memory);
}

/// A file system in memory; gone when dropped.
struct Memory<'a>(&'a Path);

impl<'a> Memory<'a> {
    fn new(at: &'a Path) -> Self {
        rustix::mount::mount("power-loss", at, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=75%")).unwrap();
        Self(at)
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// What follows a start from a disk that lost power.
fn check(places: &Places, disk: &Path, log: &Log, promises: usize, record: &Record) {
    let standing = Standing::start(places, disk);
    let recovered = json(places, &["recover", "--json"]);
    let done: Vec<_> = recovered.as_array().unwrap().iter().map(|one| one["done"].as_str().unwrap()).collect();
    assert!(!done.contains(&"postponed"), "{recovered}");
    let catalog = Catalog::open(&places.system.join("state"), Access::Read, Duration::from_secs(60)).unwrap();
    assert_eq!(catalog.intents().unwrap(), [], "half-done work");
    let all = catalog.checkpoints().unwrap();
    let held = |text: String| log.mark(&text).is_some_and(|at| at < promises);
    for number in 0..STEPS {
        let images = work::images(places, number);
        let of_step =
            |checkpoint: &Checkpoint| checkpoint.engine.as_ref().is_some_and(|by| by.images.as_path() == images);
        let found = catalog.tagged(&work::tag(number).parse().unwrap()).unwrap();
        // The hook's has no tag yet.
        let found = found.or_else(|| all.iter().find(|checkpoint| of_step(checkpoint)).map(|checkpoint| checkpoint.id));
        let promised = held(work::taken(number)) && !held(work::leaving(number));
        assert!(found.is_some() || !promised, "checkpoint {number} was promised and is not there");
        assert!(found.is_none() || !held(work::gone(number)), "checkpoint {number} was removed and is there");
        let Some(id) = found else { continue };
        reads_back(places, &catalog, &id, &record[&number], &format!("checkpoint {number}"));
    }
    // All that is there was read and compared; that fsnap finds nothing either is asked now and then.
    if promises.is_multiple_of(4) {
        ok(&mut places.fsnap(&["verify"]));
    }
    let branches = catalog.branches().unwrap();
    for number in 0..STEPS {
        let found = branches.iter().find(|branch| branch.name.as_str() == work::alone(number));
        assert!(found.is_some() || !held(work::branched(number)), "branch {number} was promised and is not there");
        let Some(branch) = found else { continue };
        let [member] = &branch.members[..] else { panic!("{branch:?}") };
        let store = stores::open(&catalog.store(&member.store).unwrap().unwrap(), &Default::default()).unwrap();
        let at = work::volumes(places).iter().position(|volume| *volume == member.origin.as_path()).unwrap();
        let copy = Listing::of(member.path.as_path()).unwrap();
        record[&number][at].expect(&copy, &store.store().capabilities, format!("branch {number}")).unwrap();
    }
    // Of the others, none lives longer than the step that made it, except over a cut.
    for branch in branches {
        ok(&mut places.fsnap(&["rm", "--branch", branch.name.as_str()]));
    }
    no_strays(&catalog);
    for volume in work::volumes(places) {
        fs::write(volume.join("after"), "the cut").unwrap();
    }
    let expected = work::look(places);
    let id = ok(&mut places.fsnap(&["checkpoint"])).trim().parse().unwrap();
    reads_back(places, &catalog, &id, &expected, "the next checkpoint");
    ok(&mut places.fsnap(&["rm", &id.to_string()]));
    no_strays(&catalog);
    drop(catalog);
    drop(standing);
}

fn json(places: &Places, args: &[&str]) -> Value {
    serde_json::from_str(&ok(&mut places.fsnap(args))).unwrap()
}

/// Makes sure that every member of a checkpoint holds what its volume held.
fn reads_back(
    places: &Places,
    catalog: &Catalog,
    id: &fsnap::checkpoint::CheckpointId,
    record: &[fsnap_conformance::Listing],
    what: &str,
) {
    let checkpoint = catalog.checkpoint(id).unwrap().unwrap();
    assert_eq!(checkpoint.members.len(), record.len(), "{what}");
    for (volume, listing) in work::volumes(places).into_iter().zip(record) {
        let member = checkpoint.members.iter().find(|member| member.path.as_path() == volume).unwrap();
        let store = stores::open(&catalog.store(&member.store).unwrap().unwrap(), &Default::default()).unwrap();
        let view = View::carry_out(&store.activate(&member.snapshot.at).unwrap()).unwrap();
        let copy = view.listing().unwrap();
        listing.expect(&copy, &store.store().capabilities, format!("{} in {what}", volume.display())).unwrap();
        drop(view);
        store.deactivate(&member.snapshot.at).unwrap();
    }
}

/// Makes sure that the stores hold what the catalog records, and nothing else.
fn no_strays(catalog: &Catalog) {
    for store in catalog.stores().unwrap() {
        let images = stores::open(&store, &Default::default()).unwrap().list().unwrap();
        let found: std::collections::BTreeSet<_> = images.into_iter().map(|image| image.at).collect();
        assert_eq!(found, catalog.held(&store.identity).unwrap(), "images of the store at {}", store.place);
    }
}

/// A disk on which nothing is.
fn empty(path: &Path) -> File {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    file
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Runs a check while this looks like another boot of the machine, as it would be; returns what it panicked with.
fn in_another_boot(dir: &Path, number: u64, check: impl FnOnce()) -> Result<(), String> {
    let id = dir.join("boot-id");
    fs::write(&id, format!("00000000-0000-4000-8000-{number:012x}\n")).unwrap();
    rustix::mount::mount_bind(&id, BOOT_ID).unwrap();
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
    rustix::mount::unmount(BOOT_ID, rustix::mount::UnmountFlags::DETACH).unwrap();
    let text = |panic: Box<dyn std::any::Any + Send>| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().copied().unwrap_or("it panicked").to_owned(),
    };
    checked.map_err(text)
}
