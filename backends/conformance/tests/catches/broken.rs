//! The reference backend with one fault.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use fsnap_backend::{
    Backend, Content, Damage, Differences, Dir, DirTree, Entry, Error, ErrorKind, FileKind, FileMeta, Identity, Image,
    ImageKind, IoContext, Locator, Moment, MountSpec, Result, Snapshot, Source, StoreInfo, Timestamp, Volume, Xattrs,
};
use fsnap_conformance::{Item, Listing, Live, Op};

use crate::copy_store::CopyStore;
use crate::faults::Fault;

/// A store of copies that does one thing wrong.
#[derive(Debug)]
pub(crate) struct Broken {
    store: CopyStore,
    info: StoreInfo,
    place: PathBuf,
    fault: Fault,
    /// What was taken, primed or activated since the store was opened.
    seen: Mutex<BTreeSet<Locator>>,
    /// Held while a snapshot is taken.
    entered: Mutex<()>,
}

impl Broken {
    /// Breaks a store.
    pub(crate) fn new(store: CopyStore, place: &Path, fault: Fault) -> Self {
        let mut info = store.store().clone();
        match fault {
            Fault::OneIdentityForAll => info.identity = Identity::new("the store"),
            Fault::NewIdentityEachTime => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                info.identity = Identity::new(format!("opened-{}", now.as_nanos()));
            }
            Fault::ClaimsMore => info.capabilities.constant_time_clones = true,
            _ => {}
        }
        Self { store, info, place: place.to_owned(), fault, seen: Mutex::default(), entered: Mutex::default() }
    }

    fn see(&self, at: &Locator) -> bool {
        self.seen.lock().expect("no test panics with it").insert(at.clone())
    }

    fn has_seen(&self, at: &Locator) -> bool {
        self.seen.lock().expect("no test panics with it").contains(at)
    }

    fn missing(at: &Locator) -> Error {
        Error::NotFound { what: at.to_string() }
    }

    /// Spoils the files of a fresh image.
    fn spoil(&self, at: &Locator) -> io::Result<()> {
        let tree = self.store.tree(at);
        let listing = Listing::of(&tree).map_err(|failure| io::Error::other(failure.to_string()))?;
        let live = Live::open(&tree)?;
        for (path, item) in listing.items() {
            self.spoil_file(&live, path, item)?;
        }
        // Only what was meant to be spoiled is: the times of its directory, and its own, are put back.
        if !matches!(self.fault, Fault::RoundsTimes | Fault::CloneForgetsTimes) {
            for (path, item) in listing.items() {
                if live.meta(path).is_ok_and(|meta| meta.mtime != item.mtime) {
                    live.apply(&Op::Touch(path.clone(), item.mtime))?;
                }
            }
        }
        Ok(())
    }

    fn spoil_file(&self, live: &Live, path: &[u8], item: &Item) -> io::Result<()> {
        let path = path.to_vec();
        let is_second_name = item.first_name != path;
        let has_holes = item.content.allocated() < item.content.len() && item.content.len() < 16 << 20;
        match (self.fault, item.kind) {
            (Fault::ForgetsXattrs, FileKind::File | FileKind::Dir) => {
                let mut user = item.xattrs.keys().filter(|key| key.as_encoded_bytes().starts_with(b"user."));
                user.try_for_each(|key| live.apply(&Op::RemoveXattr(path.clone(), key.clone())))
            }
            (Fault::ForgetsAcls, FileKind::File) => {
                live.apply(&Op::RemoveXattr(path.clone(), "system.posix_acl_access".into()))?;
                live.apply(&Op::Chmod(path, item.mode))
            }
            (Fault::RoundsTimes | Fault::CloneForgetsTimes, _) => {
                let seconds = if self.fault == Fault::RoundsTimes { item.mtime.seconds } else { 0 };
                live.apply(&Op::Touch(path, Timestamp { seconds, nanoseconds: 0 }))
            }
            (Fault::SplitsHardLinks, FileKind::File) if is_second_name => {
                live.apply(&Op::Remove(path.clone()))?;
                live.apply(&Op::Create(path.clone()))?;
                let mut data = vec![0; item.content.len() as usize];
                live.open_file(&item.first_name)?.read_exact_at(&mut data, 0)?;
                live.apply(&Op::Write(path.clone(), 0, data))?;
                live.apply(&Op::Chmod(path, item.mode))
            }
            (Fault::FillsHoles, FileKind::File) if has_holes => {
                let file = live.open_file(&path)?;
                let mut data = vec![0; item.content.len() as usize];
                file.read_exact_at(&mut data, 0)?;
                file.write_all_at(&data, 0)
            }
            (Fault::CutsTrailingHoles, FileKind::File) if has_holes && item.content.allocated() == 0 => {
                live.apply(&Op::Truncate(path, 0))
            }
            (Fault::ForgetsAFileToo, FileKind::File) if path == b"dir/inner" => live.apply(&Op::Remove(path)),
            (Fault::DropsFifos, FileKind::Fifo) => live.apply(&Op::Remove(path)),
            (Fault::FollowsLinks, FileKind::Symlink) => {
                live.apply(&Op::Remove(path.clone()))?;
                live.apply(&Op::Create(path))
            }
            (Fault::DropsOddNames, FileKind::File) if path.ends_with(b"not UTF-8 \xc3") => {
                live.apply(&Op::Remove(path))
            }
            (Fault::DropsSetId, FileKind::File) if item.mode & 0o6000 != 0 => {
                live.apply(&Op::Chmod(path, item.mode & 0o777))
            }
            (Fault::OwnsEverything, FileKind::File) if item.uid != 0 => live.apply(&Op::Chown(path, 0, 0)),
            (Fault::MistakesDevices, FileKind::CharDevice) if item.rdev == 0 => {
                live.apply(&Op::Remove(path.clone()))?;
                live.apply(&Op::CharDevice(path, 1, 1))
            }
            _ => Ok(()),
        }
    }

    /// Links the files of a fresh image to those of the volume instead of copying them.
    fn share_inodes(&self, volume: &Volume, at: &Locator) -> io::Result<()> {
        self.for_small_files(at, |path, file| {
            fs::remove_file(file)?;
            fs::hard_link(volume.dir().join(path), file)
        })
    }

    /// Takes the content of the snapshot before wherever the size is the same.
    fn trust_sizes(&self, at: &Locator) -> io::Result<()> {
        let number: u64 = at.as_str()[2..].parse().unwrap_or_default();
        let Some(before) = number.checked_sub(1).and_then(|number| format!("s-{number}").parse().ok()) else {
            return Ok(());
        };
        let before: PathBuf = self.store.tree(&before);
        self.for_small_files(at, |path, file| match fs::read(before.join(path)) {
            Ok(data) if data.len() as u64 == fs::metadata(file)?.len() => rewrite(file, &data),
            _ => Ok(()),
        })
    }

    /// Writes a file again after the image was marked as whole.
    fn rewrite_one(&self, at: &Locator) -> io::Result<()> {
        self.for_small_files(
            at,
            |path, file| {
                if path == Path::new("file") { rewrite(file, &fs::read(file)?) } else { Ok(()) }
            },
        )
    }

    /// Only for trees that paths can name.
    fn for_small_files(&self, at: &Locator, each: impl Fn(&Path, &Path) -> io::Result<()>) -> io::Result<()> {
        let tree = self.store.tree(at);
        let listing = Listing::of(&tree).map_err(|failure| io::Error::other(failure.to_string()))?;
        for (path, item) in listing.items().filter(|(_, item)| item.kind == FileKind::File) {
            let path = Path::new(OsStr::from_bytes(path));
            each(path, &tree.join(path))?;
            let times = fs::File::options().write(true).open(tree.join(path))?;
            let time =
                std::time::UNIX_EPOCH + std::time::Duration::new(item.mtime.seconds as u64, item.mtime.nanoseconds);
            times.set_modified(time)?;
        }
        Ok(())
    }
}

fn rewrite(file: &Path, data: &[u8]) -> io::Result<()> {
    let open = fs::OpenOptions::new().write(true).truncate(true).open(file)?;
    open.write_all_at(data, 0)
}

/// Names an error of this module's own file handling.
fn at_fault<T>(result: io::Result<T>, at: &Locator) -> Result<T> {
    result.context("break", at.as_str())
}

impl Backend for Broken {
    fn store(&self) -> &StoreInfo {
        &self.info
    }

    fn adopt(&self, dir: &Path) -> Result<Volume> {
        match self.fault {
            Fault::AdoptsThroughLinks => {
                let dir = fs::canonicalize(dir).context("resolve", dir)?;
                self.store.adopt(&dir)
            }
            Fault::AdoptsWhatIsMissing => {
                fs::create_dir_all(dir).context("make", dir)?;
                self.store.adopt(dir)
            }
            Fault::RefusesClones if dir.starts_with(&self.place) => {
                let reason = "it lies in the store".into();
                Err(Error::NotAVolume { dir: dir.to_owned(), kind: "copies", reason })
            }
            Fault::IdentifiesByPath | Fault::IdentifiesByTime => {
                let volume = self.store.adopt(dir)?;
                let time = fs::metadata(dir).and_then(|meta| meta.modified()).context("read the time of", dir)?;
                let by_time = self.fault == Fault::IdentifiesByTime;
                let identity = if by_time { format!("{time:?}") } else { dir.display().to_string() };
                let descriptor = std::os::fd::AsFd::as_fd(&volume).try_clone_to_owned().context("open", dir)?;
                Ok(Volume::new(dir, Identity::new(identity), descriptor))
            }
            _ => self.store.adopt(dir),
        }
    }

    fn reserve(&self, source: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator> {
        match self.fault {
            Fault::ReservesAgain => self.store.reserve(source, &BTreeSet::new()),
            Fault::ReservesByMaking => {
                let at = self.store.reserve(source, known)?;
                match source {
                    Source::Volume(volume) => drop(self.store.snapshot(volume, &at)?),
                    Source::Snapshot(snapshot) => self.store.clone_snapshot(snapshot, &at)?,
                }
                Ok(at)
            }
            _ => self.store.reserve(source, known),
        }
    }

    fn prime(&self, volume: &Volume, at: &Locator) -> Result<()> {
        match self.fault {
            Fault::NeedsPrime => drop(self.see(at)),
            // Under another name until the snapshot, where it is hidden from `list`.
            Fault::FixesAtPrime if self.see(at) => {
                self.store.snapshot(volume, at)?;
                let place = |suffix: &str| self.place.join(format!("{at}{suffix}"));
                fs::rename(place(""), place(".primed")).context("hide", self.place.as_path())?;
            }
            Fault::PrimeIsEnough => drop(self.store.snapshot(volume, at)?),
            _ => {}
        }
        self.store.prime(volume, at)
    }

    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        let whole = self.store.settle(at).is_ok();
        match self.fault {
            Fault::FixesAtPrime => {
                let place = |suffix: &str| self.place.join(format!("{at}{suffix}"));
                if place(".primed").exists() {
                    fs::rename(place(".primed"), place("")).context("show", self.place.as_path())?;
                }
            }
            Fault::RefusesToRepeat if whole => return Err(Error::Exists { what: at.to_string() }),
            Fault::RefusesToFinish if !whole && self.place.join(at.as_str()).exists() => {
                return Err(Error::Exists { what: at.to_string() });
            }
            Fault::RepeatsAnew if whole => self.store.delete(at)?,
            Fault::TakesAnyVolume => return self.store.snapshot(&self.store.adopt(volume.dir())?, at),
            Fault::RefusesTooLate => {
                let refused = self.store.snapshot(volume, at);
                if let Err(error) = &refused
                    && error.kind() == ErrorKind::WrongIdentity
                {
                    self.store.snapshot(&self.store.adopt(volume.dir())?, at)?;
                }
                return refused;
            }
            _ => {}
        }
        let mut snapshot = match self.fault {
            Fault::IdentifiesByPath | Fault::IdentifiesByTime => {
                self.store.snapshot(&self.store.adopt(volume.dir())?, at)?
            }
            Fault::OneThreadOnly => {
                let busy = || Error::Busy { what: at.to_string(), by: "another thread".into() };
                let _entered = self.entered.try_lock().map_err(|_| busy())?;
                // Long enough for the others to come.
                std::thread::sleep(std::time::Duration::from_millis(50));
                self.store.snapshot(volume, at)?
            }
            Fault::LocksUntilClosed => {
                let lock = self.place.join("identity");
                let lock = fs::File::open(&lock).context("open", &lock)?;
                lock.try_lock().map_err(|_| Error::Busy { what: at.to_string(), by: "another".into() })?;
                // As long as a snapshot of more than a few files takes.
                std::thread::sleep(std::time::Duration::from_millis(10));
                self.store.snapshot(volume, at)?
            }
            _ => self.store.snapshot(volume, at)?,
        };
        if !whole {
            match self.fault {
                Fault::NeedsPrime if !self.has_seen(at) => {
                    let live = at_fault(Live::open(&self.store.tree(at)), at)?;
                    at_fault(live.apply(&Op::Truncate(b"file".to_vec(), 0)), at)?;
                }
                Fault::TrustsSizes => at_fault(self.trust_sizes(at), at)?,
                Fault::SharesInodes => at_fault(self.share_inodes(volume, at), at)?,
                Fault::MarksTooEarly => at_fault(self.rewrite_one(at), at)?,
                Fault::CloneForgetsTimes => {}
                _ => at_fault(self.spoil(at), at)?,
            }
        }
        match self.fault {
            Fault::OmitsSilently => snapshot.omissions.clear(),
            Fault::ListsFromMemory | Fault::SettlesFromMemory => drop(self.see(at)),
            _ => {}
        }
        Ok(snapshot)
    }

    fn settle(&self, at: &Locator) -> Result<Snapshot> {
        match self.fault {
            Fault::SettlesFromMemory if !self.has_seen(at) => return Err(Self::missing(at)),
            Fault::SettlesPartial if self.place.join(at.as_str()).exists() => {
                let partial = Snapshot { at: at.clone(), identity: Identity::new("partial"), omissions: Vec::new() };
                return self.store.settle(at).or(Ok(partial));
            }
            Fault::SettlesByRewriting => {
                let mark = self.place.join(at.as_str()).join("whole");
                if let Ok(text) = fs::read(&mark) {
                    fs::remove_file(&mark).context("unmark", &mark)?;
                    fs::write(&mark, text).context("mark", &mark)?;
                }
            }
            _ => {}
        }
        let mut snapshot = self.store.settle(at)?;
        if matches!(self.fault, Fault::OmitsSilently | Fault::SettleForgetsOmissions) {
            snapshot.omissions.clear();
        }
        Ok(snapshot)
    }

    fn clone_snapshot(&self, snapshot: &Snapshot, at: &Locator) -> Result<()> {
        match self.fault {
            Fault::ClonesWithoutLooking => self.store.clone_snapshot(&self.store.settle(&snapshot.at)?, at)?,
            Fault::ClonesAnyway => {
                let able = CopyStore::open(&self.place, crate::copy_store::CAPABILITIES)?;
                able.clone_snapshot(snapshot, at)?;
            }
            _ => self.store.clone_snapshot(snapshot, at)?,
        }
        match self.fault {
            Fault::CloneForgetsTimes => at_fault(self.spoil(at), at),
            Fault::ClonesMarkTooEarly => at_fault(self.rewrite_one(at), at),
            _ => Ok(()),
        }
    }

    fn list(&self) -> Result<Vec<Image>> {
        let mut images = self.store.list()?;
        match self.fault {
            Fault::ListsNoClones => images.retain(|image| image.kind == ImageKind::Snapshot),
            Fault::ListsTwice => images.extend(images.clone()),
            Fault::ListsFromMemory => images.retain(|image| self.has_seen(&image.at)),
            _ => {}
        }
        Ok(images)
    }

    fn activate(&self, at: &Locator) -> Result<MountSpec> {
        match (self.fault, self.store.activate(at)) {
            (Fault::OneTokenForAll, Ok(MountSpec::Bind { dir, read_only: true })) => {
                Ok(MountSpec::Tree(Arc::new(SameToken(DirTree::open(&dir)?))))
            }
            (Fault::ActivatesWritable, Ok(MountSpec::Bind { dir, .. })) => {
                Ok(MountSpec::Bind { dir, read_only: false })
            }
            (Fault::ActivatesAnything, _) => Ok(MountSpec::Bind { dir: self.store.tree(at), read_only: true }),
            (Fault::ClonesAreOne, Ok(MountSpec::Bind { read_only: false, .. })) => {
                let clones = self.store.list()?.into_iter().filter(|image| image.kind == ImageKind::Volume);
                let first = clones.map(|image| image.at).min().unwrap_or_else(|| at.clone());
                Ok(MountSpec::Bind { dir: self.store.tree(&first), read_only: false })
            }
            (Fault::DeactivatesOnce, spec) => {
                self.see(at);
                spec
            }
            (_, spec) => spec,
        }
    }

    fn deactivate(&self, at: &Locator) -> Result<()> {
        let forgotten = || self.seen.lock().expect("no test panics with it").remove(at);
        if self.fault == Fault::DeactivatesOnce && !forgotten() {
            return Err(Self::missing(at));
        }
        self.store.deactivate(at)
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>> {
        let mut damage = self.store.verify(snapshot)?;
        match self.fault {
            Fault::SeesGhosts => damage.push(Damage { path: "ghost".into(), what: "it moves".into() }),
            Fault::VerifiesNothing => damage.clear(),
            Fault::NamesNoFile => damage.iter_mut().for_each(|damage| damage.path.clear()),
            _ => {}
        }
        Ok(damage)
    }

    fn history(&self, volume: &Volume) -> Result<Vec<Moment>> {
        let mut history = self.store.history(volume)?;
        if self.fault == Fault::HistoryFallsBack {
            history.reverse();
        }
        Ok(history)
    }

    fn pin(&self, volume: &Volume, number: u64, at: &Locator) -> Result<Snapshot> {
        match self.fault {
            Fault::PinsWithoutHistory | Fault::PinsThePresent => self.store.snapshot(volume, at),
            Fault::PinsOnce if self.store.settle(at).is_ok() => Err(Error::Exists { what: at.to_string() }),
            Fault::PinsTheLast => {
                let last = self.store.history(volume)?.last().map_or(number, |last| last.number);
                self.store.pin(volume, number.min(last), at)
            }
            _ => self.store.pin(volume, number, at),
        }
    }

    fn differences(&self, old: &Snapshot, new: Source<'_>) -> Result<Option<Box<dyn Differences>>> {
        let told = self.store.differences(old, new)?;
        Ok(match told {
            Some(all) if self.fault == Fault::TellsOneDifference => Some(Box::new(First(all))),
            told => told,
        })
    }

    fn delete(&self, at: &Locator) -> Result<()> {
        let there = self.place.join(at.as_str());
        match self.fault {
            Fault::LeavesScraps => {
                if there.exists() && !there.join("whole").exists() {
                    let scrap = self.place.join(format!("scrap-of-{at}"));
                    fs::write(&scrap, "left").context("leave", &scrap)?;
                }
                self.store.delete(at)
            }
            Fault::DeletesOnce if !there.exists() => Err(Self::missing(at)),
            Fault::DeletesWhatItIsTold => match self.store.image_dir(at) {
                Some(_) => self.store.delete(at),
                None if there.is_dir() => fs::remove_dir_all(&there).context("remove", &there),
                None => fs::remove_file(&there).or_else(ignore_missing).context("remove", &there),
            },
            Fault::DeletesOlder => {
                let mut older = self.store.list()?.into_iter().filter(|image| image.at <= *at);
                older.try_for_each(|image| self.store.delete(&image.at))
            }
            Fault::DeleteTakesClones if at.as_str().starts_with('s') => {
                let mut clones = self.store.list()?.into_iter().filter(|image| image.kind == ImageKind::Volume);
                clones.try_for_each(|image| self.store.delete(&image.at))?;
                self.store.delete(at)
            }
            Fault::UnpinsAll => {
                let Ok(gone) = self.store.settle(at) else { return self.store.delete(at) };
                let images = self.store.list()?.into_iter().map(|image| image.at);
                let same = images.filter(|at| self.store.settle(at).is_ok_and(|one| one.identity == gone.identity));
                same.collect::<Vec<_>>().iter().try_for_each(|at| self.store.delete(at))
            }
            Fault::DeletesTheMarkOnly if there.exists() => {
                fs::remove_file(there.join("whole")).or_else(ignore_missing).context("unmark", &there)
            }
            Fault::DeletesFilesFirst if there.exists() => {
                fs::remove_dir_all(there.join("tree")).or_else(ignore_missing).context("remove", &there)?;
                self.store.delete(at)
            }
            _ => self.store.delete(at),
        }
    }
}

/// No difference but the first.
#[derive(Debug)]
struct First(Box<dyn Differences>);

impl Differences for First {
    fn ranges(&self, old: &fs::File, new: &fs::File) -> io::Result<Option<Vec<Range<u64>>>> {
        let all = self.0.ranges(old, new)?;
        Ok(all.map(|all| all.into_iter().take(1).collect()))
    }
}

/// A tree that claims to be equal to every other.
#[derive(Debug)]
struct SameToken(DirTree);

impl Dir for SameToken {
    fn meta(&self) -> Result<FileMeta> {
        self.0.meta()
    }

    fn own_xattrs(&self) -> Result<Xattrs> {
        self.0.own_xattrs()
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        self.0.entries()
    }

    fn entry(&self, name: &OsStr) -> Result<Option<Entry>> {
        self.0.entry(name)
    }

    fn open_dir(&self, name: &OsStr) -> Result<Box<dyn Dir>> {
        self.0.open_dir(name)
    }

    fn open_file(&self, name: &OsStr) -> Result<Box<dyn Content>> {
        self.0.open_file(name)
    }

    fn read_link(&self, name: &OsStr) -> Result<OsString> {
        self.0.read_link(name)
    }

    fn xattrs(&self, name: &OsStr) -> Result<Xattrs> {
        self.0.xattrs(name)
    }

    fn token(&self) -> Option<[u8; 32]> {
        Some([7; 32])
    }
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
