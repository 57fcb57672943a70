//! A file written beside the old one and renamed over it.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::fault::compare;
use crate::kind::Writer;
use crate::{Fault, Stream};

/// A file that is replaced as a whole by every step; nobody ever sees half of it.
#[derive(Debug)]
pub(crate) struct Replace {
    stream: Stream,
    path: PathBuf,
    temporary: PathBuf,
    done: u64,
}

impl Replace {
    pub(crate) fn create(stream: Stream, path: PathBuf) -> Result<Self, Fault> {
        let temporary = path.with_extension("new");
        let mut file = File::create_new(&path).map_err(|error| Fault::call(&path, "open", error))?;
        file.write_all(&content(&stream, 0)).map_err(|error| Fault::call(&path, "write", error))?;
        Ok(Self { stream, path, temporary, done: 0 })
    }

    pub(crate) fn examine(stream: Stream, path: &Path) -> Result<u64, Fault> {
        let found = std::fs::read(path).map_err(|error| Fault::call(path, "read", error))?;
        let step = stream.step_of(0, &found).ok_or_else(|| Fault::new(path, 0, "a record", "something else"))?;
        compare(path, 0, &format!("step {step}"), &content(&stream, step), &found)?;
        Ok(step)
    }
}

fn content(stream: &Stream, step: u64) -> Vec<u8> {
    let len = 100 + stream.choose(step) % 20_000;
    stream.record(0, step, len as usize)
}

impl Writer for Replace {
    fn done(&self) -> u64 {
        self.done
    }

    fn step(&mut self, pause: &mut dyn FnMut()) -> Result<(), Fault> {
        let next = self.done + 1;
        let content = content(&self.stream, next);
        let failed = |call| move |error| (call, error);
        let mut write = || {
            // A left-over would be the work of another process in our files.
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&self.temporary)
                .map_err(failed("open with O_EXCL"))?;
            let (first, second) = content.split_at(content.len() / 2);
            file.write_all(first).map_err(failed("write"))?;
            pause();
            file.write_all(second).map_err(failed("write"))
        };
        write().map_err(|(call, error)| Fault::call(&self.temporary, call, error))?;
        pause();
        self.check()?;
        std::fs::rename(&self.temporary, &self.path).map_err(|error| Fault::call(&self.path, "rename", error))?;
        pause();
        self.done = next;
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        let found = std::fs::read(&self.path).map_err(|error| Fault::call(&self.path, "read", error))?;
        compare(&self.path, 0, &format!("step {}", self.done), &content(&self.stream, self.done), &found)
    }
}
