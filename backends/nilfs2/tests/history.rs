//! Past states that nobody asked for, and the cleaner, which takes them.

mod support;

use std::fs::{self, File};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use fsnap_backend::{Backend, ErrorKind, ImageState, Kept, Locator, Moment, Source, Volume};
use fsnap_nilfs2::Store;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use support::{Disk, run};
use tempfile::TempDir;

type Done = Result<(), Failed>;

/// A name and what it runs.
type Case = (&'static str, fn() -> Done);

/// A volume with a store beside it.
struct Site {
    store: Store,
    volume: Volume,
    disk: Disk,
    _temp: TempDir,
}

impl Site {
    fn new() -> Result<Self, Failed> {
        let temp = tempfile::tempdir()?;
        let dir = temp.path().join("volume");
        fs::create_dir(&dir)?;
        let disk = Disk::new(&dir)?;
        let store = Store::create(&temp.path().join("store"))?;
        Ok(Self { volume: store.adopt(&dir)?, store, disk, _temp: temp })
    }

    /// Writes the file, and returns the number of the state that has it.
    fn write(&self, content: &str) -> Result<u64, Failed> {
        fs::write(self.disk.dir.join("file"), content)?;
        File::open(&self.disk.dir)?.sync_all()?;
        rustix::fs::syncfs(&self.volume)?;
        self.history()?.pop().map(|moment| moment.number).ok_or_else(|| "there is no state".into())
    }

    fn history(&self) -> Result<Vec<Moment>, Failed> {
        Ok(self.store.history(&self.volume)?)
    }

    fn kept(&self, number: u64) -> Result<Kept, Failed> {
        let found = self.history()?.into_iter().find(|moment| moment.number == number);
        found.map(|moment| moment.kept).ok_or_else(|| format!("checkpoint {number} is gone").into())
    }

    fn reserve(&self) -> Result<Locator, Failed> {
        Ok(self.store.reserve(Source::Volume(&self.volume), &Default::default())?)
    }

    /// What the file holds in the snapshot of that number.
    fn content(&self, number: u64) -> Result<String, Failed> {
        let dir = tempfile::tempdir()?;
        let options = std::ffi::CString::new(format!("cp={number}"))?;
        let flags = rustix::mount::MountFlags::RDONLY;
        rustix::mount::mount(&self.disk.device, dir.path(), "nilfs2", flags, Some(options.as_c_str()))?;
        let content = fs::read_to_string(dir.path().join("file"));
        support::unmount(dir.path())?;
        Ok(content?)
    }
}

fn ensure(holds: bool, what: &str) -> Done {
    if holds { Ok(()) } else { Err(what.to_owned().into()) }
}

/// Several pins of one state are counted, and the state goes with the last of them.
fn pins_are_counted() -> Done {
    let site = Site::new()?;
    let number = site.write("first")?;
    site.write("second")?;
    ensure(site.kept(number)? == Kept::Not, "it is kept already")?;
    let (one, other) = (site.reserve()?, site.reserve()?);
    let first = site.store.pin(&site.volume, number, &one)?;
    ensure(site.store.pin(&site.volume, number, &one)? == first, "a pin cannot be repeated")?;
    let second = site.store.pin(&site.volume, number, &other)?;
    ensure(first.identity == second.identity, "one state has two identities")?;
    ensure(site.store.settle(&other)? == second, "settle tells another")?;
    ensure(site.content(number)? == "first", "it is of another state")?;
    let refused = site.store.pin(&site.volume, number + 1, &one).map_err(|error| error.kind());
    ensure(refused == Err(ErrorKind::Exists), &format!("another state took its place: {refused:?}"))?;

    site.store.delete(&one)?;
    ensure(site.kept(number)? == Kept::ByStore(vec![other.clone()]), "the other pin is gone")?;
    ensure(site.store.settle(&other)? == second, "the other pin is not whole")?;
    site.store.delete(&other)?;
    ensure(site.kept(number)? == Kept::Not, "it is still kept")
}

/// Every snapshot of a volume that did not change has a state of its own: one may go, and the other stays.
fn an_unchanged_volume_has_other_numbers() -> Done {
    let site = Site::new()?;
    site.write("same")?;
    let mut taken = Vec::new();
    for _ in 0..3 {
        let at = site.reserve()?;
        site.store.prime(&site.volume, &at)?;
        taken.push(site.store.snapshot(&site.volume, &at)?);
    }
    let kept = |history: Vec<Moment>| -> Vec<Locator> {
        history
            .into_iter()
            .filter_map(|one| if let Kept::ByStore(at) = one.kept { Some(at) } else { None })
            .flatten()
            .collect()
    };
    ensure(kept(site.history()?).len() == 3, "two snapshots share a state")?;
    site.store.delete(&taken[1].at)?;
    for left in [&taken[0], &taken[2]] {
        ensure(site.store.settle(&left.at)? == *left, "deleting one has taken another")?;
    }
    Ok(())
}

/// What others keep stays, whatever fsnap does with it.
fn marks_of_others_stay() -> Done {
    let site = Site::new()?;
    let number = site.write("first")?;
    site.write("second")?;
    run(Command::new("chcp").arg("ss").arg(&site.disk.device).arg(number.to_string()))?;
    ensure(site.kept(number)? == Kept::ByOthers, "the mark is not seen")?;
    for _ in 0..2 {
        let at = site.reserve()?;
        site.store.pin(&site.volume, number, &at)?;
        ensure(site.kept(number)? == Kept::ByBoth(vec![at.clone()]), "the mark of another is not seen beside fsnap's")?;
        site.store.delete(&at)?;
        ensure(site.kept(number)? == Kept::ByOthers, "the mark of another is gone")?;
    }
    // A mark of fsnap's is not somebody else's, though it was found.
    let later = site.write("third")?;
    site.write("fourth")?;
    let (one, other) = (site.reserve()?, site.reserve()?);
    site.store.pin(&site.volume, later, &one)?;
    site.store.pin(&site.volume, later, &other)?;
    site.store.delete(&other)?;
    site.store.delete(&one)?;
    ensure(site.kept(later)? == Kept::Not, "a mark of fsnap's is left")
}

fn what_is_gone_is_not_found() -> Done {
    let site = Site::new()?;
    let number = site.write("first")?;
    site.write("second")?;
    support::sys::delete_checkpoint(&File::open(&site.disk.dir)?, number)?;
    let at = site.reserve()?;
    for gone in [number, 1 << 40] {
        match site.store.pin(&site.volume, gone, &at) {
            Err(error) if error.kind() == ErrorKind::NotFound && error.to_string().contains("its cleaner") => {}
            other => return Err(format!("{other:?}").into()),
        }
    }
    ensure(site.store.list()?.is_empty(), "a record is left")
}

/// While somebody takes every checkpoint that is no snapshot, a snapshot is whole, or not there and said so.
fn the_cleaner_is_faster() -> Done {
    let site = Site::new()?;
    site.write("begin")?;
    let (stop, taken_away) = (AtomicBool::new(false), AtomicU32::new(0));
    // How fast the two are beside each other is not for this test to say.
    let enough = |rounds: u32| rounds >= 100 && taken_away.load(Ordering::Relaxed) > 20;
    let cleaner = || -> Done {
        let file = File::open(&site.disk.dir)?;
        while !stop.load(Ordering::Relaxed) {
            for moment in site.store.history(&site.volume)?.into_iter().rev().take(4) {
                if moment.kept == Kept::Not && support::sys::delete_checkpoint(&file, moment.number).is_ok() {
                    taken_away.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    };
    let work = || -> Result<(u32, u32), Failed> {
        let (mut whole, mut gone) = (0, 0);
        for round in (0..5000).take_while(|round| !enough(*round)) {
            let content = format!("round {round}");
            fs::write(site.disk.dir.join("file"), &content)?;
            let at = site.reserve()?;
            site.store.prime(&site.volume, &at)?;
            // What is there to be pinned may be gone a moment later.
            let pin = if round % 2 == 0 { None } else { site.history()?.pop() };
            let made = match &pin {
                None => site.store.snapshot(&site.volume, &at),
                Some(moment) => site.store.pin(&site.volume, moment.number, &at),
            };
            match made {
                Ok(snapshot) => {
                    ensure(site.store.settle(&at)? == snapshot, "a snapshot is not whole")?;
                    whole += 1;
                    site.store.delete(&at)?;
                }
                Err(error) => {
                    let said = error.to_string();
                    ensure(error.kind() == ErrorKind::NotFound && said.contains("cleaner"), &said)?;
                    let left = site.store.list()?.into_iter().any(|image| image.at == at);
                    ensure(!left, "a failed snapshot has left something")?;
                    gone += 1;
                }
            }
        }
        Ok((whole, gone))
    };
    let (worked, cleaned) = thread::scope(|scope| {
        let cleaning = scope.spawn(cleaner);
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        (worked, cleaning.join())
    });
    cleaned.map_err(|_| "the cleaner fell")??;
    let (whole, gone) = worked?;
    ensure(enough(whole + gone), "nothing was taken away")?;
    // The next try, with nobody in the way, works.
    fs::write(site.disk.dir.join("file"), "end")?;
    let at = site.reserve()?;
    let taken = site.store.snapshot(&site.volume, &at)?;
    ensure(site.store.settle(&at)? == taken, "it is not whole")
}

/// The cleaner itself, allowed to take everything at once, leaves what is a snapshot.
fn the_real_cleaner_leaves_snapshots() -> Done {
    let site = Site::new()?;
    let conf = site.disk.dir.with_file_name("cleanerd.conf");
    let settings = "protection_period 0\nmin_clean_segments 0\nclean_check_interval 1\nnsegments_per_clean 32\n\
                    mc_nsegments_per_clean 32\ncleaning_interval 0.05\nmc_cleaning_interval 0.05\nretry_interval 1\n\
                    min_reclaimable_blocks 0\nselection_policy timestamp\nlog_priority info\n";
    fs::write(&conf, settings)?;
    let mut cleaner = Command::new("nilfs_cleanerd")
        .args(["-n", "-c"])
        .args([&conf, &site.disk.device, &site.disk.dir])
        .stdout(Stdio::null())
        .spawn()?;
    // It begins when it has read what there is, and works at a pace of its own.
    let cleaned = || -> Result<bool, Failed> {
        let history = site.history()?;
        let numbers = history.last().zip(history.first()).map_or(0, |(last, first)| last.number - first.number + 1);
        Ok(numbers > history.len() as u64)
    };
    let work = || -> Done {
        let mut taken = Vec::new();
        let block = vec![7_u8; 1 << 20];
        for round in 0.. {
            if round >= 40 && cleaned()? {
                break;
            }
            ensure(round < 2000, "the cleaner has taken nothing")?;
            fs::write(site.disk.dir.join("file"), format!("round {round}"))?;
            for part in 0..4 {
                fs::write(site.disk.dir.join(format!("other{part}")), &block)?;
            }
            let at = site.reserve()?;
            site.store.prime(&site.volume, &at)?;
            match site.store.snapshot(&site.volume, &at) {
                Ok(snapshot) if round % 8 == 0 && round < 40 => taken.push((round, snapshot)),
                Ok(snapshot) => site.store.delete(&snapshot.at)?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
            thread::sleep(std::time::Duration::from_millis(50));
        }
        let history = site.history()?;
        for (round, snapshot) in &taken {
            ensure(site.store.settle(&snapshot.at)? == *snapshot, &format!("snapshot {round} is not whole"))?;
            let held = |moment: &&Moment| matches!(&moment.kept, Kept::ByStore(at) if at.contains(&snapshot.at));
            let number = history.iter().find(held).map(|moment| moment.number).ok_or("it is not in the history")?;
            ensure(site.content(number)? == format!("round {round}"), &format!("snapshot {round} has changed"))?;
        }
        let whole = site.store.list()?.iter().filter(|image| image.state == ImageState::Whole).count();
        ensure(whole == taken.len(), &format!("{whole} snapshots instead of {}", taken.len()))
    };
    let done = work();
    cleaner.kill().ok();
    cleaner.wait()?;
    done
}

fn main() -> ExitCode {
    let cases: &[Case] = &[
        ("pins_are_counted", pins_are_counted),
        ("an_unchanged_volume_has_other_numbers", an_unchanged_volume_has_other_numbers),
        ("marks_of_others_stay", marks_of_others_stay),
        ("what_is_gone_is_not_found", what_is_gone_is_not_found),
        ("the_cleaner_is_faster", the_cleaner_is_faster),
        ("the_real_cleaner_leaves_snapshots", the_real_cleaner_leaves_snapshots),
    ];
    let trial = |&(name, case): &Case| {
        Trial::ignorable_test(name, move || match support::why_not() {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => case().map(|()| Completion::Completed),
        })
    };
    libtest_mimic::run(&Arguments::from_args(), cases.iter().map(trial).collect()).exit_code()
}
