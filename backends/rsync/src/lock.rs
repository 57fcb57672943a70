//! Locks that end when they are given up.
//!
//! A lock of `flock(2)` belongs to the open file, not to the descriptor, and is held until the last copy of the
//! descriptor is closed. A program that another thread of this process starts has copies of all descriptors from its
//! fork to its exec: a lock that was given up by closing alone would live on in there, and the next call would find the
//! snapshot in use by nobody. Therefore a [`Lock`] is unlocked before it is closed.
//!
//! What is locked is what the path leads to: a file that was replaced or removed while the lock was waited for is opened
//! again.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use fsnap_backend::{Error, IoContext, Result};

/// A locked file or directory of the store.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Waits until nobody else holds the lock at `path`.
    pub(crate) fn exclusive(path: &Path) -> Result<Self> {
        Self::take(path, |file| retry(|| file.lock()).context("lock", path))
    }

    /// Waits until nobody holds the lock at `path` exclusively.
    pub(crate) fn shared(path: &Path) -> Result<Self> {
        Self::take(path, |file| retry(|| file.lock_shared()).context("lock", path))
    }

    /// Locks `path` if nobody else does, or only for a moment longer; else `what` is busy: `by`.
    pub(crate) fn try_exclusive(path: &Path, what: impl Fn() -> String, by: &str) -> Result<Self> {
        Self::take(path, |file| answer(in_a_moment(|| file.try_lock()), path, &what, by))
    }

    /// Locks `path` if nobody does so exclusively, or only for a moment longer; else `what` is busy: `by`.
    pub(crate) fn try_shared(path: &Path, what: impl Fn() -> String, by: &str) -> Result<Self> {
        Self::take(path, |file| answer(in_a_moment(|| file.try_lock_shared()), path, &what, by))
    }

    fn take(path: &Path, lock: impl Fn(&File) -> Result<()>) -> Result<Self> {
        loop {
            let file = File::open(path).context("open", path)?;
            lock(&file)?;
            let locked = Self(file);
            let (own, here) = (locked.0.metadata(), fs::symlink_metadata(path));
            let place = |found: io::Result<fs::Metadata>| found.map(|found| (found.dev(), found.ino()));
            if place(own).context("read the attributes of", path)? == place(here).context("lock", path)? {
                return Ok(locked);
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // It cannot fail for a descriptor that was locked; if it did, closing would still do it.
        let _ = self.0.unlock();
    }
}

/// Tries for a while. A process that was killed has its descriptors closed one after the other: whoever learns of its end by one of them
/// finds another one's lock still held.
fn in_a_moment(lock: impl Fn() -> std::result::Result<(), TryLockError>) -> std::result::Result<(), TryLockError> {
    const MOMENT: Duration = Duration::from_millis(500);
    let start = Instant::now();
    loop {
        match lock() {
            Err(TryLockError::WouldBlock) if start.elapsed() < MOMENT => std::thread::sleep(Duration::from_millis(1)),
            locked => return locked,
        }
    }
}

/// Turns a lock that somebody else holds into `Busy`.
fn answer(
    locked: std::result::Result<(), TryLockError>,
    path: &Path,
    what: impl Fn() -> String,
    by: &str,
) -> Result<()> {
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::Busy { what: what(), by: by.to_owned() }),
        Err(TryLockError::Error(error)) => Err(error).context("lock", path),
    }
}

fn retry(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use fsnap_backend::ErrorKind;

    use super::*;

    fn try_lock(path: &Path) -> Result<Lock> {
        Lock::try_exclusive(path, || "it".into(), "a test")
    }

    #[test]
    fn a_lock_excludes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let held = Lock::shared(file.path()).unwrap();
        assert_eq!(try_lock(file.path()).unwrap_err().kind(), ErrorKind::Busy);
        Lock::try_shared(file.path(), || "it".into(), "a test").unwrap();
        drop(held);
        try_lock(file.path()).unwrap();
    }

    #[test]
    fn a_lock_ends_though_a_child_still_has_its_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let held = Lock::exclusive(file.path()).unwrap();
        // What a child has from its fork to its exec: another descriptor of the same open file.
        let _copy = held.0.try_clone().unwrap();
        drop(held);
        try_lock(file.path()).unwrap();
    }

    #[test]
    fn a_file_that_was_replaced_is_not_the_locked_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("file"), dir.path().join("other"));
        fs::write(&path, "").unwrap();
        fs::write(&other, "").unwrap();
        let held = Lock::exclusive(&path).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| Lock::exclusive(&path).unwrap());
            fs::rename(&other, &path).unwrap();
            drop(held);
            let locked = waiting.join().unwrap();
            assert_eq!(locked.0.metadata().unwrap().ino(), fs::metadata(&path).unwrap().ino());
        });
    }
}
