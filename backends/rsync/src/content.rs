//! Contents of regular files: making them, reading them, and their sums.
//!
//! A content never changes. It is made by sharing the file's blocks (`FICLONE`, which takes the file as of one instant)
//! where volume and store lie on one file system that can, else by copying the ranges that hold data. In both cases
//! the file in the store is exactly the volume's file, holes included, so it can be opened and mapped as it is.
//!
//! The *sum* of a content is BLAKE3 over its blocks of 4 KiB that are not all zero: each run of such blocks, followed by
//! its offset and length (8 bytes each), and at the end the file's length (8 bytes). So a sparse terabyte is summed as
//! fast as its data, and a copy has the same sum whatever became of its holes.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fsnap_backend::{Content, Error, IoContext, Result, WholeFile, beneath};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::manifest::Made;
use crate::record::{BatchId, ContentRef, Form};
use crate::store::{Inner, content_name};

/// The unit in which zeros are told from data.
const BLOCK: u64 = 4096;

/// How much is read at once.
pub(crate) const BUFFER: usize = 256 << 10;

/// Up to this size a file that is taken in the frozen window is copied: sharing the blocks of a file that was just
/// written makes the kernel write them out first, and the writers stand still meanwhile.
const COPY_WHEN_FROZEN: u64 = 64 << 10;

/// Opens a content for reading.
pub(crate) fn open(store: &Inner, content: &ContentRef, length: u64) -> Result<Box<dyn Content>> {
    let path = store.content_path(content);
    let damaged = |reason: &str| Error::Damaged { what: path.display().to_string(), reason: reason.to_owned() };
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged("it is missing")),
        opened => opened.context("open", &path)?,
    };
    let opened: Box<dyn Content> = match content.form {
        Form::Whole => Box::new(WholeFile::new(file).context("read the attributes of", &path)?),
        Form::Patch => return Err(damaged("its form is unknown")),
    };
    if opened.len() != length {
        return Err(damaged("its length is wrong"));
    }
    Ok(opened)
}

/// All contents that a batch has, whether anything uses them or not.
pub(crate) fn contents_of(store: &Inner, batch: BatchId) -> Result<Vec<ContentRef>> {
    let dir = store.batch_dir(batch);
    let mut found = Vec::new();
    for entry in fs::read_dir(&dir).context("list", &dir)? {
        let chunk_name = entry.context("list", &dir)?.file_name();
        let Some(chunk) = chunk_name.to_str().and_then(|name| u64::from_str_radix(name, 16).ok()) else { continue };
        let path = dir.join(&chunk_name);
        for entry in fs::read_dir(&path).context("list", &path)? {
            let name = entry.context("list", &path)?.file_name();
            for form in [Form::Whole, Form::Patch] {
                let number = name.to_str().and_then(|name| u64::from_str_radix(name.get(..2)?, 16).ok());
                let number = number.map(|low| chunk << 8 | low);
                found.extend(
                    number.filter(|&number| content_name(number, form).1.as_str() == name).map(|number| ContentRef {
                        batch,
                        number,
                        form,
                    }),
                );
            }
        }
    }
    Ok(found)
}

/// A file that is open elsewhere, as a content.
#[derive(Debug)]
pub(crate) struct Live<'a> {
    pub(crate) file: &'a File,
    pub(crate) length: u64,
}

impl Content for Live<'_> {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        if offset >= self.length {
            return Ok(None);
        }
        // On ext4 this call also waits for a write(2) that is under way, which read(2) does not: see `walk`.
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(offset)) {
            Ok(start) if start < self.length => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end.min(self.length)))
    }
}

/// Computes the sum of a content from its data, given in order.
#[derive(Default)]
pub(crate) struct Summer {
    hasher: blake3::Hasher,
    run: Option<Range<u64>>,
}

impl Summer {
    /// Adds the bytes at `offset`, a multiple of 4 KiB; what is not added counts as zeros.
    pub(crate) fn add(&mut self, offset: u64, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let data = span(rest, false);
            if data > 0 {
                let start = offset + (bytes.len() - rest.len()) as u64;
                if self.run.as_ref().is_none_or(|run| run.end != start) {
                    self.end_run();
                }
                self.hasher.update(&rest[..data]);
                self.run.get_or_insert(start..start).end = start + data as u64;
            }
            rest = &rest[data..];
            rest = &rest[span(rest, true)..];
        }
    }

    fn end_run(&mut self) {
        if let Some(run) = self.run.take() {
            self.hasher.update(&run.start.to_le_bytes());
            self.hasher.update(&(run.end - run.start).to_le_bytes());
        }
    }

    /// The sum of a content of `length` bytes.
    pub(crate) fn finish(mut self, length: u64) -> [u8; 32] {
        self.end_run();
        self.hasher.update(&length.to_le_bytes());
        *self.hasher.finalize().as_bytes()
    }
}

/// How many bytes at the front are blocks of zeros, or blocks that are not.
fn span(bytes: &[u8], zeros: bool) -> usize {
    bytes.chunks(BLOCK as usize).take_while(|block| is_zero(block) == zeros).map(<[u8]>::len).sum()
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(64).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Copies the ranges of `from` that hold data into `to`, sums them, or both. What is not copied stays a hole.
///
/// Fails with `UnexpectedEof` if `from` is shorter than it said.
pub(crate) fn copy(
    from: &dyn Content,
    to: Option<&File>,
    mut sum: Option<&mut Summer>,
    buffer: &mut [u8],
) -> io::Result<()> {
    let length = from.len();
    let mut done = 0;
    while let Some(range) = from.data_after(done)? {
        // Whole blocks are read, since sums are of whole blocks; only what is data is written.
        let mut at = done.max(range.start - range.start % BLOCK);
        let end = range.end.next_multiple_of(BLOCK).min(length);
        while at < end {
            let wanted = buffer.len().min((end - at) as usize);
            let bytes = &mut buffer[..wanted];
            read_exact(from, bytes, at)?;
            if let Some(sum) = &mut sum {
                sum.add(at, bytes);
            }
            if let Some(to) = to {
                let data = range.start.max(at)..range.end.min(at + wanted as u64);
                if !data.is_empty() {
                    to.write_all_at(&bytes[(data.start - at) as usize..(data.end - at) as usize], data.start)?;
                }
            }
            at += wanted as u64;
        }
        done = end.max(range.end);
    }
    to.map_or(Ok(()), |to| to.set_len(length))
}

/// Reads exactly `buffer`, or fails with `UnexpectedEof`.
pub(crate) fn read_exact(from: &dyn Content, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match from.read_at(buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => {
                buffer = &mut buffer[got..];
                offset += got as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The sum of a content.
pub(crate) fn sum(content: &dyn Content, buffer: &mut [u8]) -> io::Result<[u8; 32]> {
    let mut sum = Summer::default();
    copy(content, None, Some(&mut sum), buffer)?;
    Ok(sum.finish(content.len()))
}

/// Whether two contents have the same bytes.
pub(crate) fn equal(one: &dyn Content, other: &dyn Content, buffer: &mut [u8]) -> io::Result<bool> {
    if one.len() != other.len() {
        return Ok(false);
    }
    let (left, right) = buffer.split_at_mut(buffer.len() / 2);
    let mut at = 0;
    loop {
        let ranges = [one.data_after(at)?, other.data_after(at)?];
        // Where neither has data, both are zeros.
        let Some(range) = ranges.into_iter().flatten().min_by_key(|range| range.start) else { return Ok(true) };
        at = range.start;
        while at < range.end {
            let wanted = right.len().min((range.end - at) as usize);
            read_exact(one, &mut left[..wanted], at)?;
            read_exact(other, &mut right[..wanted], at)?;
            if left[..wanted] != right[..wanted] {
                return Ok(false);
            }
            at += wanted as u64;
        }
    }
}

/// What all makers of one batch share.
#[derive(Debug)]
pub(crate) struct Making {
    pub(crate) batch: BatchId,
    /// The next directory of contents.
    next_chunk: AtomicU64,
    /// Cleared when the file system says that it cannot share blocks.
    reflinks: AtomicBool,
    /// Writers stand still.
    frozen: bool,
}

impl Making {
    /// Goes on after the contents that a batch has.
    pub(crate) fn new(store: &Inner, batch: BatchId, frozen: bool) -> Result<Self> {
        let path = store.batch_dir(batch);
        let mut next = 0;
        for entry in fs::read_dir(&path).context("list", &path)? {
            let name = entry.context("list", &path)?.file_name();
            if let Some(chunk) = name.to_str().and_then(|name| u64::from_str_radix(name, 16).ok()) {
                next = next.max(chunk + 1);
            }
        }
        Ok(Self { batch, next_chunk: AtomicU64::new(next), reflinks: AtomicBool::new(true), frozen })
    }
}

/// Makes contents for one thread.
#[derive(Debug)]
pub(crate) struct Maker<'a> {
    store: &'a Inner,
    making: &'a Making,
    /// The directory that this thread alone fills, and the next number in it.
    chunk: Option<(OwnedFd, u64)>,
    pub(crate) buffer: Vec<u8>,
    /// What was made, for the batch's table.
    pub(crate) made: Vec<Made>,
}

/// What became of a file's content.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is what the file had before.
    Kept,
    /// It was taken as of one instant; so long it is.
    Shared(ContentRef, u64),
    /// It was read piece by piece: whether the file changed meanwhile must be looked at.
    Copied(ContentRef),
    /// The file became shorter meanwhile.
    Torn,
}

/// The content that a file had before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before {
    pub(crate) content: ContentRef,
    pub(crate) length: u64,
    /// Nothing says that the bytes changed since.
    pub(crate) likely_equal: bool,
}

/// Up to this size a file that probably did not change is compared before it is taken again.
const COMPARE: u64 = 1 << 20;

impl<'a> Maker<'a> {
    pub(crate) fn new(store: &'a Inner, making: &'a Making) -> Self {
        Self { store, making, chunk: None, buffer: vec![0; BUFFER], made: Vec::new() }
    }

    /// Takes the content of `file`, which is `length` bytes long and not empty.
    pub(crate) fn take(&mut self, file: &File, length: u64, before: Option<Before>) -> io::Result<Taken> {
        match self.try_take(file, length, before) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Taken::Torn),
            taken => taken,
        }
    }

    fn try_take(&mut self, file: &File, length: u64, before: Option<Before>) -> io::Result<Taken> {
        let live = Live { file, length };
        // Sharing the blocks of a large file again is faster than reading it twice to learn that it is the same.
        if length > COMPARE
            && let Some(taken) = self.share(file)?
        {
            return Ok(taken);
        }
        // A content that cannot be opened is damaged: it is not compared with, and the file is taken anew.
        if let Some(before) = before.filter(|before| before.length == length && before.likely_equal)
            && let Ok(old) = open(self.store, &before.content, length)
            && equal(&live, &*old, &mut self.buffer)?
        {
            return Ok(Taken::Kept);
        }
        if length <= COMPARE
            && !(self.making.frozen && length <= COPY_WHEN_FROZEN)
            && let Some(taken) = self.share(file)?
        {
            return Ok(taken);
        }
        let (content, to) = self.create(Form::Whole)?;
        let mut sum = Summer::default();
        match copy(&live, Some(&to), Some(&mut sum), &mut self.buffer) {
            Ok(()) => {
                let hash = Some(sum.finish(length));
                self.made.push(Made { number: content.number, length, hash });
                Ok(Taken::Copied(content))
            }
            Err(error) => {
                self.unlink(&content)?;
                Err(error)
            }
        }
    }

    /// Shares the file's blocks; `None` if that cannot be done.
    fn share(&mut self, file: &File) -> io::Result<Option<Taken>> {
        if !self.making.reflinks.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (content, to) = self.create(Form::Whole)?;
        match rustix::fs::ioctl_ficlone(&to, file) {
            Ok(()) => {
                let length = to.metadata()?.len();
                self.made.push(Made { number: content.number, length, hash: None });
                Ok(Some(Taken::Shared(content, length)))
            }
            Err(error) => {
                self.unlink(&content)?;
                match error {
                    // Another file system, or one that cannot: true of all other files, too.
                    Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS => {
                        self.making.reflinks.store(false, Ordering::Relaxed);
                        Ok(None)
                    }
                    // This file cannot be shared: a swap file, one without checksums beside one with them.
                    Errno::INVAL | Errno::TXTBSY | Errno::PERM | Errno::ACCESS => Ok(None),
                    error => Err(error.into()),
                }
            }
        }
    }

    fn create(&mut self, form: Form) -> io::Result<(ContentRef, File)> {
        if self.chunk.as_ref().is_none_or(|(_, next)| next & 0xff == 0) {
            let chunk = self.making.next_chunk.fetch_add(1, Ordering::Relaxed);
            let batch = beneath::open_root(&self.store.batch_dir(self.making.batch))?;
            let dir = beneath::make_dir(batch, content_name(chunk << 8, form).0.as_ref())?;
            self.chunk = Some((dir, chunk << 8));
        }
        let Some((dir, next)) = &mut self.chunk else { unreachable!("it was made above") };
        let number = *next;
        let file = beneath::create_file(dir, content_name(number, form).1.as_ref(), 0o600)?;
        *next += 1;
        Ok((ContentRef { batch: self.making.batch, number, form }, file))
    }

    /// Removes a content that this maker made.
    pub(crate) fn discard(&mut self, content: &ContentRef) -> io::Result<()> {
        self.made.retain(|made| made.number != content.number);
        self.unlink(content)
    }

    fn unlink(&self, content: &ContentRef) -> io::Result<()> {
        fs::remove_file(self.store.content_path(content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(parts: &[(u64, &[u8])], length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        for (offset, bytes) in parts {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file.set_len(length).unwrap();
        file
    }

    fn sum_of(file: &File) -> [u8; 32] {
        let length = file.metadata().unwrap().len();
        sum(&Live { file, length }, &mut vec![0; 16 << 10]).unwrap()
    }

    #[test]
    fn a_sum_does_not_depend_on_holes() {
        let data = vec![7; 9000];
        let sparse = file_of(&[(100_000, &data)], 1 << 40);
        let mut filled = vec![0; 200_000];
        filled[100_000..109_000].copy_from_slice(&data);
        let dense = file_of(&[(0, &filled)], 1 << 40);
        assert_eq!(sum_of(&sparse), sum_of(&dense));
    }

    #[test]
    fn a_sum_depends_on_everything_else() {
        let data = vec![7; 5000];
        let files = [
            file_of(&[], 0),
            file_of(&[], 1),
            file_of(&[], 8192),
            file_of(&[(0, &data)], 20_000),
            file_of(&[(4096, &data)], 20_000),
            file_of(&[(0, &data[..4096])], 20_000),
            file_of(&[(0, &data[..4096]), (12_288, &data[..904])], 20_000),
            file_of(&[(0, &data), (19_999, &[1])], 20_000),
        ];
        let sums: std::collections::HashSet<_> = files.iter().map(sum_of).collect();
        assert_eq!(sums.len(), files.len());
    }

    #[test]
    fn a_copy_keeps_holes() {
        use std::os::unix::fs::MetadataExt;
        let from = file_of(&[(1 << 30, b"a"), (1 << 39, b"b")], 1 << 40);
        let to = tempfile::tempfile().unwrap();
        copy(&Live { file: &from, length: 1 << 40 }, Some(&to), None, &mut vec![0; 8192]).unwrap();
        assert_eq!(sum_of(&to), sum_of(&from));
        assert!(to.metadata().unwrap().blocks() < 1000, "{}", to.metadata().unwrap().blocks());
    }

    #[test]
    fn contents_are_compared_whole() {
        let length = 1 << 30;
        let one = file_of(&[(5000, b"a"), (1 << 29, b"b")], length);
        let zeros = vec![0; 50_000];
        let same = file_of(&[(1 << 20, &zeros), (5000, b"a"), (1 << 29, b"b")], length);
        let other = file_of(&[(5000, b"a"), (1 << 29, b"b"), ((1 << 29) + 100, b"c")], length);
        let equal = |one, other| {
            let (one, other) = (Live { file: one, length }, Live { file: other, length });
            equal(&one, &other, &mut vec![0; 16 << 10]).unwrap()
        };
        assert!(equal(&one, &same) && equal(&same, &one));
        assert!(!equal(&one, &other) && !equal(&other, &one));
    }
}
