//! The file that takes the new records of one snapshot, one after the other.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use fsnap_backend::{Error, IoContext, Result};

use crate::record::{BatchId, RecordRef};
use crate::store::{Inner, private_file};

/// Records are written in pieces of about this size.
const PIECE: usize = 1 << 20;

/// A file of records that is being written by several threads.
#[derive(Debug)]
pub(crate) struct Pack {
    batch: BatchId,
    path: PathBuf,
    file: File,
    tail: Mutex<Tail>,
}

#[derive(Debug)]
struct Tail {
    /// Where `waiting` will be written.
    offset: u64,
    waiting: Vec<u8>,
}

impl Pack {
    /// Opens the records of a batch to add to the first `length` bytes of them; what follows is dropped.
    pub(crate) fn open(store: &Inner, batch: BatchId, length: u64) -> Result<Self> {
        let path = store.batch_dir(batch).join("records");
        let file = private_file().write(true).create(true).truncate(false).open(&path).context("open", &path)?;
        let found = file.metadata().context("read the attributes of", &path)?.len();
        if found < length {
            let reason = format!("it has {found} bytes of {length}");
            return Err(Error::Damaged { what: path.display().to_string(), reason });
        }
        file.set_len(length).context("shorten", &path)?;
        Ok(Self { batch, path, file, tail: Mutex::new(Tail { offset: length, waiting: Vec::new() }) })
    }

    /// Adds a record; it can be read after `flush`.
    pub(crate) fn append(&self, record: &[u8]) -> Result<RecordRef> {
        let length = u32::try_from(record.len()).map_err(|_| Error::Unsupported {
            kind: crate::KIND,
            action: "keep a directory",
            reason: format!("its record of {} bytes is over 4 GiB", record.len()),
        })?;
        let hash = *blake3::hash(record).as_bytes();
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = tail.offset + tail.waiting.len() as u64;
        tail.waiting.extend_from_slice(record);
        if tail.waiting.len() >= PIECE {
            self.write(&mut tail)?;
        }
        Ok(RecordRef { batch: self.batch, offset, length, hash })
    }

    /// Writes what waits, and returns how long the file is.
    pub(crate) fn flush(&self) -> Result<u64> {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(&mut tail)?;
        Ok(tail.offset)
    }

    fn write(&self, tail: &mut Tail) -> Result<()> {
        self.file.write_all_at(&tail.waiting, tail.offset).context("write", &self.path)?;
        tail.offset += tail.waiting.len() as u64;
        tail.waiting.clear();
        Ok(())
    }
}
