//! Records appended to a log.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::fault::compare;
use crate::kind::Writer;
use crate::{Fault, Stream};

/// A file that grows by one record of varying length per step, and is emptied by a step when it is long.
///
/// The descriptor is `O_APPEND`: should the file be ahead of memory, the same record is appended twice and stays.
#[derive(Debug)]
pub(crate) struct Log {
    stream: Stream,
    path: PathBuf,
    file: File,
    done: u64,
    /// The step that emptied the file last.
    emptied: u64,
    len: u64,
}

/// A log of this length is emptied.
const LIMIT: u64 = 256 * 1024;

impl Log {
    pub(crate) fn create(stream: Stream, path: PathBuf) -> Result<Self, Fault> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| Fault::call(&path, "open", error))?;
        Ok(Self { stream, path, file, done: 0, emptied: 0, len: 0 })
    }

    pub(crate) fn examine(stream: Stream, path: &Path) -> Result<u64, Fault> {
        let found = std::fs::read(path).map_err(|error| Fault::call(path, "read", error))?;
        if found.is_empty() {
            return Ok(0);
        }
        let first = stream.step_of(0, &found).ok_or_else(|| Fault::new(path, 0, "a record", "something else"))?;
        let (mut step, mut at) = (first, 0);
        while at < found.len() {
            let expected = record(&stream, step);
            let end = found.len().min(at + expected.len());
            compare(path, at as u64, &format!("step {step}"), &expected, &found[at..end])?;
            (step, at) = (step + 1, end);
        }
        Ok(step - 1)
    }
}

fn record(stream: &Stream, step: u64) -> Vec<u8> {
    let len = 24 + stream.choose(step) % 700;
    stream.record(0, step, len as usize)
}

impl Writer for Log {
    fn done(&self) -> u64 {
        self.done
    }

    fn step(&mut self, pause: &mut dyn FnMut()) -> Result<(), Fault> {
        let failed = |call| move |error| (call, error);
        let next = self.done + 1;
        pause();
        let len = self.file.metadata().map_err(|error| Fault::call(&self.path, "fstat", error))?.len();
        if len != self.len {
            return Err(Fault::new(
                &self.path,
                len.min(self.len),
                format!("{} bytes", self.len),
                format!("{len} bytes"),
            ));
        }
        let written = if self.len >= LIMIT {
            self.file.set_len(0).map(|()| 0).map_err(failed("ftruncate"))
        } else {
            let record = record(&self.stream, next);
            self.file.write_all(&record).map(|()| self.len + record.len() as u64).map_err(failed("write"))
        };
        self.len = written.map_err(|(call, error)| Fault::call(&self.path, call, error))?;
        pause();
        if self.len == 0 {
            self.emptied = next;
        } else {
            // The record just written, through the descriptor.
            let record = record(&self.stream, next);
            let offset = self.len - record.len() as u64;
            let mut found = vec![0; record.len()];
            self.file.read_exact_at(&mut found, offset).map_err(|error| Fault::call(&self.path, "pread", error))?;
            compare(&self.path, offset, &format!("step {next}"), &record, &found)?;
        }
        self.done = next;
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        let found = std::fs::read(&self.path).map_err(|error| Fault::call(&self.path, "read", error))?;
        let mut expected = Vec::with_capacity(self.len as usize);
        for step in self.emptied + 1..=self.done {
            expected.extend_from_slice(&record(&self.stream, step));
        }
        compare(&self.path, 0, &format!("steps to {}", self.done), &expected, &found)
    }
}
