//! Contents of regular files: reading, copying and comparing them, and their sums.
//!
//! A content never changes. A whole one is a file of exactly the volume's file's bytes and holes, so it can be opened and
//! mapped as it is; a patch is the difference to others (see [`crate::patch`]). Both are read in the same way.
//!
//! The *sum* of a content is BLAKE3 over its blocks of 4 KiB that are not all zero: each run of such blocks, followed by
//! its offset and length (8 bytes each), and at the end the file's length (8 bytes). So a sparse terabyte is summed as
//! fast as its data, and a copy has the same sum whatever became of its holes. Large contents whose blocks are shared are
//! summed in chunks instead (see [`crate::chunks`]).

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fsnap_backend::{Content, Error, IoContext, Result, WholeFile};

use crate::patch::Patch;
use crate::record::{BatchId, ContentRef, Form};
use crate::store::{Inner, content_name};

/// The unit in which zeros are told from data.
pub(crate) const BLOCK: u64 = 4096;

/// How much is read at once.
pub(crate) const BUFFER: usize = 256 << 10;

/// Opens a content for reading.
pub(crate) fn open(store: &Inner, content: &ContentRef, length: u64) -> Result<Box<dyn Content>> {
    let opened: Box<dyn Content> = match content.form {
        Form::Whole => {
            let path = store.content_path(content);
            let file = open_file(&path)?;
            Box::new(WholeFile::new(file).context("read the attributes of", &path)?)
        }
        Form::Patch => Box::new(Patch::open(store, content)?),
    };
    if opened.len() != length {
        let what = store.content_path(content).display().to_string();
        return Err(Error::Damaged { what, reason: "its length is wrong".to_owned() });
    }
    Ok(opened)
}

/// Opens a file that must be there.
pub(crate) fn open_file(path: &Path) -> Result<File> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Error::Damaged { what: path.display().to_string(), reason: "it is missing".to_owned() })
        }
        opened => opened.context("open", path),
    }
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
        // On ext4 this call also waits for a write(2) that is under way, which read(2) does not: see `walk`.
        fsnap_backend::data_in(self.file, self.length, offset)
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

    /// Whether anything but zeros was added.
    pub(crate) fn has_data(&self) -> bool {
        self.run.is_some() || self.hasher.count() > 0
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
    pieces(from, buffer, &mut |at, bytes, ranges| -> io::Result<()> {
        if let Some(sum) = &mut sum {
            sum.add(at, bytes);
        }
        for range in ranges.iter().filter(|_| to.is_some()) {
            let data = &bytes[(range.start - at) as usize..(range.end - at) as usize];
            to.map_or(Ok(()), |to| to.write_all_at(data, range.start))?;
        }
        Ok(())
    })?;
    to.map_or(Ok(()), |to| to.set_len(from.len()))
}

/// What is told of a piece: where it begins, its bytes, and which ranges of the file are data.
type Each<'a, E> = dyn FnMut(u64, &[u8], &[Range<u64>]) -> std::result::Result<(), E> + 'a;

/// Reads all that is data, in order and in pieces of at most the length of `buffer`, a multiple of 4 KiB.
///
/// A piece consists of whole blocks, since sums are of whole blocks, and begins at a multiple of one; `each` is told
/// which ranges of the file within it are data. A file system with smaller blocks has several in one of ours.
pub(crate) fn pieces<E: From<io::Error>>(
    from: &dyn Content,
    buffer: &mut [u8],
    each: &mut Each<'_, E>,
) -> std::result::Result<(), E> {
    let mut next = from.data_after(0)?;
    let mut ranges = Vec::new();
    while let Some(mut range) = next {
        let at = range.start - range.start % BLOCK;
        let end = range.end.next_multiple_of(BLOCK).min(from.len()).min(at + buffer.len() as u64);
        let bytes = &mut buffer[..(end - at) as usize];
        read_exact(from, bytes, at)?;
        ranges.clear();
        next = loop {
            ranges.push(range.start..range.end.min(end));
            if range.end > end {
                break Some(end..range.end);
            }
            match from.data_after(range.end)? {
                Some(more) if more.start < end => range = more,
                more => break more,
            }
        };
        each(at, bytes, &ranges)?;
    }
    Ok(())
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

    /// A content whose holes are smaller than our blocks.
    #[derive(Debug)]
    struct Fine(Vec<u8>, Vec<Range<u64>>);

    impl Content for Fine {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let from = &self.0[offset as usize..];
            let length = from.len().min(buffer.len());
            buffer[..length].copy_from_slice(&from[..length]);
            Ok(length)
        }

        fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            let range = self.1.iter().find(|range| range.end > offset);
            Ok(range.map(|range| range.start.max(offset)..range.end))
        }
    }

    #[test]
    fn every_hole_of_a_file_system_with_small_blocks_is_seen() {
        let mut bytes = vec![0; 20_000];
        let ranges = vec![0..1024, 2048..3072, 4096..6144, 7168..12_288, 19_456..20_000];
        ranges.iter().for_each(|range| bytes[range.start as usize..range.end as usize].fill(7));
        let from = Fine(bytes.clone(), ranges.clone());
        let (to, mut sum) = (tempfile::tempfile().unwrap(), Summer::default());
        copy(&from, Some(&to), Some(&mut sum), &mut [0; 8192]).unwrap();
        let mut copied = vec![0; 20_000];
        to.read_exact_at(&mut copied, 0).unwrap();
        assert_eq!(copied, bytes);
        assert_eq!(sum.finish(20_000), sum_of(&to));
        let mut seen = Vec::new();
        pieces(&from, &mut [0; 4096], &mut |_, _, ranges| -> io::Result<()> {
            seen.extend_from_slice(ranges);
            Ok(())
        })
        .unwrap();
        seen.dedup_by(|next, before| before.end == next.start && std::mem::replace(&mut before.end, next.end) > 0);
        assert_eq!(seen, ranges);
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
