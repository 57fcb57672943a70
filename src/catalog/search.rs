//! The answer to a question that outlives the frozen window: who else has files of the volumes open for writing. With it goes what was
//! seen of the tree while that was frozen.
//!
//! The file `N.search` beside the lock of the intent `N` is locked while a process searches for it, and holds its answer, in the form of
//! the other records, once that process has ended well. Whoever seals the checkpoint waits for the lock.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::lock::{from_bytes, io_error, options, read, to_bytes};
use super::{Error, IntentLock, Result};
use crate::checkpoint::OtherWriters;
use crate::processes::TreeRecord;

/// The writers found, for each member of the checkpoint.
pub type WriterLists = Vec<OtherWriters>;

/// What a search found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SearchAnswer {
    /// Who else was writing.
    pub writers: WriterLists,
    /// The processes that were frozen, if they could be looked at.
    #[serde(default)]
    pub tree: Option<TreeRecord>,
}

/// Between two looks whether a search has ended.
pub(super) const PAUSE: Duration = Duration::from_millis(1);

/// A search that goes on as long as a process has this open.
#[derive(Debug)]
pub struct SearchFile {
    file: File,
    path: PathBuf,
}

impl SearchFile {
    /// Writes the answer.
    pub fn write(mut self, answer: &SearchAnswer) -> Result<()> {
        self.file.write_all(&to_bytes(answer)).map_err(io_error("write", &self.path))
    }
}

impl AsFd for SearchFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl IntentLock {
    /// Says that a search begins.
    pub fn begin_search(&self) -> Result<SearchFile> {
        let path = self.search();
        let opened = options().create(true).truncate(true).write(true).mode(0o600).open(&path);
        let file = opened.map_err(io_error("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(SearchFile { file, path }),
            Err(TryLockError::WouldBlock) => Err(Error::Searching { path }),
            Err(TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
        }
    }

    /// What the search found, once it has ended; `None` if it ended without an answer.
    ///
    /// [`Error::Searching`] if it goes on for longer than `patience`.
    pub fn end_of_search(&self, patience: Duration) -> Result<Option<SearchAnswer>> {
        let path = self.search();
        let file = match options().read(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(io_error("open", &path))?,
        };
        let start = Instant::now();
        loop {
            match file.try_lock_shared() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < patience => std::thread::sleep(PAUSE),
                Err(TryLockError::WouldBlock) => return Err(Error::Searching { path }),
                Err(TryLockError::Error(error)) => return Err(io_error("lock", &path)(error)),
            }
        }
        let content: io::Result<Vec<u8>> = read(&file);
        Ok(from_bytes(&content.map_err(io_error("read", &path))?))
    }
}
