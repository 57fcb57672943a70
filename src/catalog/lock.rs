//! Who works on an intent.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::{Catalog, Error, IntentId, Result};

/// Held by the process that works on an intent; the kernel releases it when the process dies, however it dies.
///
/// Lock order: an intent's lock is taken before a transaction begins, never inside one.
#[derive(Debug)]
pub struct IntentLock {
    _file: File,
    path: PathBuf,
    finished: bool,
}

impl IntentLock {
    /// Removes the lock's file with the lock: the intent is gone.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for IntentLock {
    fn drop(&mut self) {
        if self.finished {
            // A file left behind is one byte of dirt, which the next recovery removes; nothing depends on it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Catalog {
    /// Locks the intent; `None` if somebody works on it.
    ///
    /// The caller looks the intent up again afterwards: its former owner may have finished it.
    pub fn lock_intent(&self, id: IntentId) -> Result<Option<IntentLock>> {
        let dir = self.state.join("intents");
        let path = dir.join(id.to_string());
        let io = |action| {
            let path = path.clone();
            move |source| Error::Io { action, path, source }
        };
        match std::fs::create_dir(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(io("make")(error)),
            _ => {}
        }
        let opened = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = opened.map_err(io("open"))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(IntentLock { _file: file, path, finished: false })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(io("lock")(error)),
        }
    }
}
