//! Records overwritten in place.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::fault::compare;
use crate::kind::Writer;
use crate::sys::Mapping;
use crate::{Fault, Stream};

/// A file of fixed length with places for records; every step overwrites one of them.
#[derive(Debug)]
pub(crate) struct Slots<M = File> {
    stream: Stream,
    path: PathBuf,
    medium: M,
    layout: Layout,
    named: bool,
    done: u64,
    /// The step that wrote each slot last; 0 if none did.
    table: Vec<u64>,
}

/// Where the slots of a file are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    count: u64,
    len: usize,
    stride: u64,
}

/// What steps write through.
pub(crate) trait Medium: Send {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

impl Medium for File {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }
}

/// A shared mapping whose file is closed: only the mapping leads there.
pub(crate) type Mapped = Mapping;

impl Medium for Mapping {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        buffer.copy_from_slice(&self.load(offset as usize).to_ne_bytes());
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let word = bytes.try_into().map_err(io::Error::other)?;
        self.store(offset as usize, u64::from_ne_bytes(word));
        Ok(())
    }
}

impl Slots {
    /// Records that do not fit the pages.
    pub(crate) const OVERWRITE: Layout = Layout { count: 64, len: 1000, stride: 1000 };
    /// Words, since nothing longer is stored into memory at once.
    pub(crate) const MMAP: Layout = Layout { count: 512, len: 8, stride: 512 };
    /// 4 GiB, of which 64 times two blocks are data at the most.
    pub(crate) const SPARSE: Layout = Layout { count: 64, len: 5000, stride: (64 << 20) + 4077 };

    pub(crate) fn create(stream: Stream, path: PathBuf, layout: Layout) -> Result<Self, Fault> {
        let file = new_file(&path, layout)?;
        Ok(Slots::new(stream, path, file, layout, true))
    }

    pub(crate) fn create_unlinked(stream: Stream, path: PathBuf, layout: Layout) -> Result<Self, Fault> {
        let file = new_file(&path, layout)?;
        std::fs::remove_file(&path).map_err(|error| Fault::call(&path, "unlink", error))?;
        Ok(Slots::new(stream, path, file, layout, false))
    }

    pub(crate) fn examine(stream: Stream, path: &Path, layout: Layout) -> Result<u64, Fault> {
        let file = File::open(path).map_err(|error| Fault::call(path, "open", error))?;
        let mut done = 0;
        let mut buffer = vec![0; layout.len];
        for slot in 0..layout.count {
            let offset = slot * layout.stride;
            file.read_exact_at(&mut buffer, offset).map_err(|error| Fault::call(path, "pread", error))?;
            if buffer.iter().any(|&byte| byte != 0) {
                let step = stream.step_of(slot, &buffer);
                done = done.max(step.ok_or_else(|| Fault::new(path, offset, "a record", "something else"))?);
            }
        }
        // The latest record tells how many steps there were, and that decides every other slot.
        let mut slots = Slots::new(stream, path.to_owned(), file, layout, true);
        for step in 1..=done {
            let slot = slots.slot(step);
            slots.table[slot as usize] = step;
        }
        slots.done = done;
        slots.check()?;
        Ok(done)
    }
}

impl Slots<Mapped> {
    pub(crate) fn create_mapped(stream: Stream, path: PathBuf, layout: Layout) -> Result<Self, Fault> {
        let file = new_file(&path, layout)?;
        let mapping = Mapping::new(&file, layout.size() as usize).map_err(|error| Fault::call(&path, "mmap", error))?;
        Ok(Self::new(stream, path, mapping, layout, true))
    }
}

impl<M: Medium> Slots<M> {
    fn new(stream: Stream, path: PathBuf, medium: M, layout: Layout, named: bool) -> Self {
        Self { stream, path, medium, layout, named, done: 0, table: vec![0; layout.count as usize] }
    }

    fn slot(&self, step: u64) -> u64 {
        self.stream.choose(step) % self.layout.count
    }

    fn expected(&self, slot: u64) -> Vec<u8> {
        match self.table[slot as usize] {
            0 => vec![0; self.layout.len],
            step => self.stream.record(slot, step, self.layout.len),
        }
    }

    fn check_slot(&self, medium: &impl Medium, slot: u64) -> Result<(), Fault> {
        let offset = slot * self.layout.stride;
        let mut found = vec![0; self.layout.len];
        medium.read(&mut found, offset).map_err(|error| Fault::call(&self.path, "read", error))?;
        let what = format!("step {} in slot {slot}", self.table[slot as usize]);
        compare(&self.path, offset, &what, &self.expected(slot), &found)
    }

    /// Compares all that is not a hole, the bytes between the slots included.
    fn check_data(&self, file: &File) -> Result<(), Fault> {
        let failed = |call| move |error| Fault::call(&self.path, call, error);
        let mut at = 0;
        while at < self.layout.size() {
            match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(data) => at = data,
                Err(Errno::NXIO) => break,
                Err(error) => return Err(Fault::call(&self.path, "SEEK_DATA", error)),
            }
            let hole = rustix::fs::seek(file, SeekFrom::Hole(at)).map_err(failed("SEEK_HOLE"))?;
            let mut found = vec![0; (hole - at).min(64 * 1024) as usize];
            file.read_exact_at(&mut found, at).map_err(|error| Fault::call(&self.path, "pread", error))?;
            compare(&self.path, at, &format!("steps to {}", self.done), &self.image(at, found.len()), &found)?;
            at += found.len() as u64;
        }
        Ok(())
    }

    /// What the file must hold from `offset` on.
    fn image(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut image = vec![0; len];
        let end = offset + len as u64;
        let Layout { count, stride, .. } = self.layout;
        for slot in offset / stride..count.min(end.div_ceil(stride)) {
            let record = self.expected(slot);
            let start = slot * stride;
            let (from, to) = (start.max(offset), (start + record.len() as u64).min(end));
            if from < to {
                image[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&record[(from - start) as usize..(to - start) as usize]);
            }
        }
        image
    }
}

impl Layout {
    /// The length of the file.
    fn size(&self) -> u64 {
        self.count * self.stride
    }
}

fn new_file(path: &Path, layout: Layout) -> Result<File, Fault> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|error| Fault::call(path, "open", error))?;
    file.set_len(layout.size()).map_err(|error| Fault::call(path, "ftruncate", error))?;
    Ok(file)
}

impl<M: Medium> Writer for Slots<M> {
    fn done(&self) -> u64 {
        self.done
    }

    fn step(&mut self, pause: &mut dyn FnMut()) -> Result<(), Fault> {
        let next = self.done + 1;
        let slot = self.slot(next);
        pause();
        self.check_slot(&self.medium, slot)?;
        let record = self.stream.record(slot, next, self.layout.len);
        self.medium
            .write(&record, slot * self.layout.stride)
            .map_err(|error| Fault::call(&self.path, "write", error))?;
        pause();
        self.table[slot as usize] = next;
        self.done = next;
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        for slot in 0..self.layout.count {
            self.check_slot(&self.medium, slot)?;
        }
        if !self.named {
            return Ok(());
        }
        let file = File::open(&self.path).map_err(|error| Fault::call(&self.path, "open", error))?;
        let len = file.metadata().map_err(|error| Fault::call(&self.path, "fstat", error))?.len();
        if len != self.layout.size() {
            let expected = format!("{} bytes", self.layout.size());
            return Err(Fault::new(&self.path, len.min(self.layout.size()), expected, format!("{len} bytes")));
        }
        for slot in 0..self.layout.count {
            self.check_slot(&file, slot)?;
        }
        self.check_data(&file)
    }
}
