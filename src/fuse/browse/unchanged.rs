//! What the catalog has said, remembered for as long as its files are what they were.
//!
//! To open the catalog takes most of a millisecond, which each look through `latest` would take again. Whoever commits to it writes its
//! file or its log, and that shows in their times and lengths. Times tell only ticks of the clock apart: an answer is
//! remembered only if the last change lies so far back that no later one can have the same time. What was written to the log is seen only when it
//! is durable, which may take longer than any such time: then the header of the log's index changes.

use std::collections::HashMap;
use std::hash::Hash;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::catalog::{format, index};

/// Many times longer than a tick.
const SETTLED: Duration = Duration::from_millis(200);

/// How a file is, if it is there: which one, its length, and when it was last changed. Of the log, when it was last written: the superuser gives it
/// to the catalog's owner whenever he opens it, to read as well.
type State = Option<(u64, u64, u64, i64, i64)>;

/// How the catalog's file and its log are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::fuse) struct States {
    files: [State; 2],
    /// It is shared by all who have the catalog open; without it, nobody has.
    index: Option<index::Head>,
}

impl States {
    /// How they are in this directory.
    pub(in crate::fuse) fn of(dir: &Path) -> Self {
        let beside = |end: &str| dir.join(format!("{}-{end}", format::FILE));
        let look = |path: &Path| std::fs::symlink_metadata(path).ok();
        let file = look(&dir.join(format::FILE))
            .map(|meta| (meta.dev(), meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec()));
        let log =
            look(&beside("wal")).map(|meta| (meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()));
        Self { files: [file, log], index: index::head(dir).ok() }
    }

    /// Whether every later change will show.
    fn are_settled(&self) -> bool {
        let since =
            SystemTime::now().checked_sub(SETTLED).and_then(|then| then.duration_since(SystemTime::UNIX_EPOCH).ok());
        let is_old = |state: &State| {
            let Some((_, _, _, seconds, nanoseconds)) = *state else { return true };
            let changed = u64::try_from(seconds).map(|seconds| Duration::new(seconds, nanoseconds as u32));
            since.zip(changed.ok()).is_some_and(|(since, changed)| changed < since)
        };
        self.files.iter().all(is_old)
    }
}

/// Answers by what was asked.
#[derive(Debug)]
pub(super) struct Remembered<Q, A>(Mutex<(States, HashMap<Q, A>)>);

impl<Q, A> Default for Remembered<Q, A> {
    fn default() -> Self {
        Self(Mutex::new((States::default(), HashMap::new())))
    }
}

impl<Q: Eq + Hash, A: Clone> Remembered<Q, A> {
    /// The answer of the catalog in `dir`; `read` reads it there.
    pub(super) fn ask<E>(&self, dir: &Path, asked: Q, read: impl FnOnce() -> Result<A, E>) -> Result<A, E> {
        let now = States::of(dir);
        let locked = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let (states, answers) = &*locked()
            && *states == now
            && let Some(answer) = answers.get(&asked)
        {
            return Ok(answer.clone());
        }
        let answer = read()?;
        if now.are_settled() {
            let (states, answers) = &mut *locked();
            if *states != now {
                *states = now;
                answers.clear();
            }
            answers.insert(asked, answer.clone());
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::catalog::{Access, Catalog};

    #[test]
    fn to_read_the_catalog_does_not_change_it() {
        let dir = tempfile::tempdir().unwrap();
        let open = |access| Catalog::open(dir.path(), access, Duration::ZERO);
        // Somebody has it open, so that there is a log.
        let _open = open(Access::Create).unwrap();
        let (remembered, read) = (Remembered::default(), Cell::new(0));
        while !States::of(dir.path()).are_settled() {
            std::thread::sleep(Duration::from_millis(20));
        }
        let ask = || {
            remembered.ask(dir.path(), (), || {
                read.set(read.get() + 1);
                open(Access::Read).map(|catalog| catalog.branches().map(|branches| branches.len()).unwrap())
            })
        };
        assert_eq!((ask().unwrap(), ask().unwrap(), ask().unwrap()), (0, 0, 0));
        assert_eq!(read.get(), 1);
    }

    #[test]
    fn what_becomes_durable_late_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let _open = Catalog::open(dir.path(), Access::Create, Duration::ZERO).unwrap();
        let other = rusqlite::Connection::open(dir.path().join(format::FILE)).unwrap();
        let index = dir.path().join(format!("{}-shm", format::FILE));
        let before = std::fs::read(&index).unwrap();
        other.execute_batch("CREATE TABLE another (a)").unwrap();
        let after = States::of(dir.path());
        // As it is while the log is being made durable, however long that takes.
        let now = std::fs::read(&index).unwrap();
        std::fs::write(&index, &before).unwrap();
        let meanwhile = States::of(dir.path());
        std::fs::write(&index, &now).unwrap();
        assert_eq!((meanwhile.files, States::of(dir.path())), (after.files, after));
        assert_ne!(meanwhile, after);
    }
}
