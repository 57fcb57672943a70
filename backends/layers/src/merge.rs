//! Merging: a layer that nobody needs by itself is given to the next one, and the room of what that had hidden is given back.
//!
//! A sealed layer ends the state that an image is of. When no image needs that state any more, the layer above can be moved into
//! it ([`plan`](super::plan)), and the tree reads the same. So a tree that is sealed for ever has as many layers as images hold.
//!
//! * Who merges has the lock of the store. A server merges while it serves; nobody waits for more than the renames.
//! * Who reads a sealed state without the server holds the bytes up to its number in the file `reading`, shared; who merges holds
//!   the bytes of both layers exclusively, or does it another time.
//! * What is to be done is written down, and synced, before it is begun ([`steps`]). Who finds that finishes it before he reads
//!   the layers.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::node::Ino;
use super::object::{self, SAFE};
use super::open_dirs::OpenDirs;
use super::plan::Planner;
use super::steps::{self, Place, Root, Step};
use super::store::{self, Error, PATIENCE, Purpose};
use super::{Overlay, Result, Tree, seal};

const READING: &str = "reading";
const HOLDS: &str = "holds";

/// Takes those bytes of the file of readers.
fn hold_bytes(file: &OwnedFd, exclusively: bool, bytes: std::ops::RangeInclusive<u64>, wait: bool) -> Result<()> {
    let kind = if exclusively { libc::F_WRLCK } else { libc::F_RDLCK };
    let length = bytes.end() - bytes.start() + 1;
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start().cast_signed(),
        l_len: length.cast_signed(),
        l_pid: 0,
    };
    loop {
        let call = if wait { FcntlArg::F_OFD_SETLKW(&lock) } else { FcntlArg::F_OFD_SETLK(&lock) };
        match fcntl(file, call) {
            Err(nix::errno::Errno::EINTR) => {}
            done => return done.map(drop).map_err(|error| Errno::from_raw_os_error(error as i32)),
        }
    }
}

fn readers(store: &OwnedFd) -> Result<OwnedFd> {
    rustix::fs::openat(store, READING, OFlags::RDWR | OFlags::CREATE | SAFE, Mode::RUSR | Mode::WUSR)
}

/// Keeps the layers up to this one from being merged for as long as the file is open; finishes what somebody has left who was killed.
pub(super) fn read_up_to(dir: &OwnedFd, store: &Path, number: u64) -> Result<OwnedFd, Error> {
    let failed = store::failed("read the layers of", store);
    let until = Instant::now() + PATIENCE;
    loop {
        let file = readers(dir).map_err(&failed)?;
        hold_bytes(&file, false, 0..=number, true).map_err(&failed)?;
        if steps::pending(dir).map_err(&failed)?.is_none_or(|low| low > number) {
            return Ok(file);
        }
        drop(file);
        match store::lock(dir, store, Purpose::Merge, Duration::ZERO) {
            Ok(_lock) => recover(dir).map_err(&failed)?,
            // A server has just begun, and does it.
            Err(Error::Locked { .. }) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error),
        }
    }
}

/// Finishes what somebody has left who was killed. The caller has the lock of the store.
pub(super) fn recover(dir: &OwnedFd) -> Result<()> {
    if object::find_at(dir, OsStr::new(steps::DIR))?.is_none() {
        return Ok(());
    }
    if steps::pending(dir)?.is_some() {
        let readers = readers(dir)?;
        hold_bytes(&readers, true, 0..=i64::MAX.cast_unsigned() - 1, true)?;
        steps::finish(dir)?;
    }
    steps::prepare(dir).map(drop)
}

/// The images that need sealed layers.
fn holds(dir: &OwnedFd) -> Result<HashSet<String>> {
    match object::open_dir(dir, OsStr::new(HOLDS)) {
        Err(Errno::NOENT) => Ok(HashSet::new()),
        holds => {
            Ok(object::names(holds?.as_fd())?.iter().filter_map(|(name, _)| name.to_str().map(str::to_owned)).collect())
        }
    }
}

impl Overlay {
    /// Merges layers that no image needs any more, as far as nobody reads them.
    ///
    /// `passed` is what [`seal`](Self::seal) takes: where the uppermost sealed state is not needed, what was written since is sealed for
    /// nobody, unless files are written past this tree.
    pub fn merge<G>(&self, passed: impl FnOnce() -> (G, Vec<Ino>)) -> Result<()> {
        let _merging = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = self.tree().store.dir.clone();
        self.tree().mend()?;
        self.seal_for_nobody(&dir, passed)?;
        let mut low = 0;
        loop {
            let numbers = seal::numbers(&dir)?;
            // An image holds before its layer is sealed, so that this one is read afterwards.
            let held = holds(&dir)?;
            let above = numbers.iter().position(|&number| number > low).filter(|&at| at + 1 < numbers.len());
            let Some(at) = above else { return Ok(()) };
            let (lower, upper) = (numbers[at - 1], numbers[at]);
            if held.contains(&seal::sealed_for(&dir, upper)?) || !self.merge_two(&dir, lower, upper)? {
                low = upper;
            }
        }
    }

    fn seal_for_nobody<G>(&self, dir: &OwnedFd, passed: impl FnOnce() -> (G, Vec<Ino>)) -> Result<()> {
        let live = seal::live(dir)?;
        if live == 0 {
            return Ok(());
        }
        let image = seal::sealed_for(dir, live)?;
        if image.is_empty() || holds(dir)?.contains(&image) || seal::numbers(dir)?.len() >= seal::MOST_LAYERS {
            return Ok(());
        }
        self.seal_if("", passed, <[Ino]>::is_empty)
    }

    /// Moves a layer into the next lower one. `false`: somebody reads them, or has a file open that nothing but them has.
    fn merge_two(&self, dir: &OwnedFd, low: u64, high: u64) -> Result<bool> {
        let readers = readers(dir)?;
        match hold_bytes(&readers, true, low..=high, false) {
            Err(Errno::AGAIN | Errno::ACCESS) => return Ok(false),
            held => held?,
        }
        steps::prepare(dir)?;
        let mut steps = self.tree().planner(low, high)?()?;
        rustix::fs::syncfs(dir)?;
        let mut tree = self.tree();
        // It could not be found any more: names in a snapshot stay, but not in a layer that is merged.
        if tree.nodes.any(|node| node.pin.as_ref().is_some_and(super::object::Object::is_below)) {
            return Ok(false);
        }
        tree.count_links(low, high, &mut steps)?;
        steps::commit(dir, low, high, &steps)?;
        tree.lower.give_up();
        tree.mend()?;
        drop(tree);
        // What has gone is not in anybody's way.
        drop(readers);
        steps::prepare(dir).map(|_| true)
    }
}

impl Tree {
    /// Finds the steps that merge two layers. What is returned needs no lock on the tree: sealed layers do not change.
    fn planner(&self, low: u64, high: u64) -> Result<impl FnOnce() -> Result<Vec<Step>> + use<>> {
        let numbers = seal::numbers(&self.store.dir)?;
        let under: Vec<u64> = numbers.into_iter().take_while(|&number| number < low).collect();
        let layer = || {
            let (upper, index) = seal::parts(&self.store.dir, low)?;
            Ok(Self::new(self.stack(&under)?, self.store.reading(upper, index)))
        };
        let state = layer()?.into_state();
        let planner = Planner::new(layer()?, state, seal::parts(&self.store.dir, high)?);
        Ok(move || planner.plan())
    }

    /// Makes differences of counts into counts. A file that is written in a later layer counts its names while the tree is locked.
    fn count_links(&mut self, low: u64, high: u64, steps: &mut [Step]) -> Result<()> {
        let ((below, _), (_, above_index)) = (seal::parts(&self.store.dir, low)?, seal::parts(&self.store.dir, high)?);
        let mut below = OpenDirs::new(below);
        for step in steps {
            let Step::Links(Place { root, path }, links) = step else { continue };
            let (dir, name) = steps::split(path);
            let object = match root {
                Root::Below => object::Object::at(below.open(dir)?, name),
                _ => object::Object::at(above_index.clone(), name),
            };
            *links += self.lower_links(&object)?;
        }
        Ok(())
    }

    /// Finishes the merging that was begun. As long as that fails, nothing below is read.
    fn mend(&mut self) -> Result<()> {
        if !self.lower.is_given_up() {
            return Ok(());
        }
        steps::finish(&self.store.dir)?;
        let mut numbers = seal::numbers(&self.store.dir)?;
        numbers.pop();
        let lower = self.stack(&numbers)?;
        self.lower.reread(lower);
        Ok(())
    }
}
