//! The sum of a large content, chunk by chunk, so that a new version of it is read only where it is new.
//!
//! A large file whose blocks are shared with its version before is taken in no time, however long it is; summing it
//! takes as long as reading all of it. Therefore the sums of its chunks are kept beside the content, in `<lo>.sums`.
//! Where the next version has the same blocks at the same place ([`crate::extents`]), the sum of a chunk is carried over.
//! That is not only faster: the sum stays that of the bytes as they were when they were first read. If a medium changes a
//! byte later, reading it again would bless the wrong one; so every version that has the block is named as damaged.
//!
//! ```text
//! chunks  := frame "fsnapCHU": length of the content, binary logarithm of the size of a chunk (varints),
//!            count (varint), (number (varint; less that before), sum (32 bytes))*
//! ```
//!
//! Chunks of zeros are not listed. A chunk's sum is that of a content of its bytes alone (see [`crate::content`]); the
//! sum of the whole is BLAKE3 over the length, the size of a chunk, and the number (8 bytes each) and sum of each that is
//! listed. The content's own sum stays in `sums`, and `verify` needs nothing else: a missing or damaged file of chunks
//! costs time, and nothing more.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use fsnap_backend::{Content, IoContext, Result};

use crate::content::{self, BLOCK, BUFFER, Summer, read_exact};
use crate::extents;
use crate::format::{self, Malformed, Parsed, Reader, Writer};
use crate::record::{ContentRef, Form};
use crate::store::{Inner, write_file};

/// A shared content that is longer is summed in chunks.
pub(crate) const FROM: u64 = 1 << 20;

/// The size of a chunk, unless there would be too many: a database writes 4 to 16 KiB at once.
const LEAST: u64 = 64 << 10;

/// How many chunks a content has at the most: their sums take 32 MiB.
const MOST: u64 = 1 << 20;

/// Into how many parts a content is divided for the threads that read it.
const PARTS: u64 = 64;

const MAGIC: &[u8; 8] = b"fsnapCHU";

type Hash = [u8; 32];

/// Sums of chunks by number, sorted; those of zeros are left out.
type Sums = Vec<(u64, Hash)>;

/// The sums of the chunks of one content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunks {
    length: u64,
    /// Of one chunk, in bytes: a power of two.
    size: u64,
    sums: Sums,
}

impl Chunks {
    /// The sum of the whole content.
    pub(crate) fn total(&self) -> Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.length.to_le_bytes()).update(&self.size.to_le_bytes());
        for (number, sum) in &self.sums {
            hasher.update(&number.to_le_bytes()).update(sum);
        }
        *hasher.finalize().as_bytes()
    }

    /// The bytes of the first chunk that differs in a content of equal length.
    pub(crate) fn first_difference(&self, other: &Self) -> Option<Range<u64>> {
        let differs = |one: &Self, other: &Self| {
            let one = one.sums.iter().find(|sum| other.sums.binary_search(sum).is_err());
            one.map(|(number, _)| *number)
        };
        let number = [differs(self, other), differs(other, self)].into_iter().flatten().min()?;
        Some(self.range(number))
    }

    fn range(&self, number: u64) -> Range<u64> {
        range_of(number, self.size, self.length)
    }

    fn get(&self, number: u64) -> Option<Hash> {
        let at = self.sums.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        Some(self.sums[at].1)
    }

    fn encode(&self) -> Writer {
        let mut writer = Writer::default();
        writer.varint(self.length);
        writer.varint(self.size.trailing_zeros().into());
        writer.varint(self.sums.len() as u64);
        let mut before = 0;
        for (number, sum) in &self.sums {
            writer.varint(number - before);
            writer.raw(sum);
            before = *number;
        }
        writer
    }

    fn decode(mut reader: Reader<'_>) -> Parsed<Self> {
        let (length, size) = (reader.varint()?, reader.varint()?);
        let size = u32::try_from(size).ok().and_then(|size| 1_u64.checked_shl(size)).filter(|size| *size >= LEAST);
        let size = size.ok_or(Malformed("the size of a chunk is not allowed"))?;
        let count = reader.count(33)?;
        let mut sums: Sums = Vec::with_capacity(count);
        for _ in 0..count {
            let (more, before) = (reader.varint()?, sums.last().map(|(number, _)| *number));
            let number = before.unwrap_or(0).checked_add(more).filter(|number| *number < length.div_ceil(size));
            let number = number.filter(|number| before.is_none_or(|before| before < *number));
            sums.push((number.ok_or(Malformed("its chunks are not in order"))?, reader.array()?));
        }
        reader.end()?;
        Ok(Self { length, size, sums })
    }

    /// Reads the sums beside a content; `None` if there are none that can be relied upon.
    pub(crate) fn read(store: &Inner, content: &ContentRef) -> Option<Self> {
        store.read_frame(&path_of(store, content), MAGIC, Self::decode).ok()?
    }

    /// Writes the sums beside their content.
    pub(crate) fn write(&self, store: &Inner, content: &ContentRef) -> Result<()> {
        write_file(&path_of(store, content), &format::seal(MAGIC, self.encode()), false)
    }
}

/// The file of the sums of a content's chunks.
pub(crate) fn path_of(store: &Inner, content: &ContentRef) -> PathBuf {
    store.content_path(content).with_extension("sums")
}

fn size_for(length: u64) -> u64 {
    length.div_ceil(MOST).checked_next_power_of_two().unwrap_or(1 << 63).max(LEAST)
}

fn range_of(number: u64, size: u64, length: u64) -> Range<u64> {
    let start = number * size;
    start..start.saturating_add(size).min(length)
}

/// What is known of a content from its version before.
struct Known {
    before: Chunks,
    /// Where both have the same blocks, sorted.
    same: Vec<Range<u64>>,
}

impl Known {
    fn of(store: &Inner, content: &dyn Content, before: &ContentRef) -> Option<Self> {
        let chunks = Chunks::read(store, before).filter(|chunks| chunks.size == size_for(content.len()))?;
        if before.form != Form::Whole {
            return None;
        }
        let old = content::open(store, before, chunks.length).ok()?;
        let same = extents::same(old.as_file()?, content.as_file()?, content.len());
        Some(Self { before: chunks, same })
    }

    /// The sum of a chunk, if it has not changed: `Some(None)` for one of zeros.
    fn get(&self, number: u64, chunk: &Range<u64>) -> Option<Option<Hash>> {
        let at = self.same.partition_point(|same| same.end < chunk.end);
        let same = self.same.get(at).is_some_and(|same| same.start <= chunk.start && chunk.end <= same.end);
        // The last chunk of a shorter version is another.
        (same && self.before.range(number) == *chunk).then(|| self.before.get(number))
    }
}

/// Sums a content with two threads, less what is known from its version before.
pub(crate) fn sum_after(
    store: &Inner,
    content: &ContentRef,
    length: u64,
    before: Option<&ContentRef>,
) -> Result<Chunks> {
    let path = store.content_path(content);
    let opened = content::open(store, content, length)?;
    let known = before.and_then(|before| Known::of(store, &*opened, before));
    let size = size_for(length);
    let part = length.div_ceil(size).div_ceil(PARTS) * size;
    let next = AtomicU64::new(0);
    let found = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        // Each thread has a file of its own: the kernel reads ahead for each.
        let opened = content::open(store, content, length)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let start = next.fetch_add(1, Ordering::Relaxed).saturating_mul(part);
            if start >= length {
                return Ok(());
            }
            let range = start..start.saturating_add(part).min(length);
            let sums = sum_range(&*opened, size, range, known.as_ref(), &mut buffer).context("read", &path)?;
            found.lock().unwrap_or_else(PoisonError::into_inner).extend(sums);
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let done = work();
        other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(done)
    })?;
    let mut sums = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    sums.sort_unstable();
    Ok(Chunks { length, size, sums })
}

/// Sums a whole content.
pub(crate) fn sum(content: &dyn Content, buffer: &mut [u8]) -> io::Result<Chunks> {
    let (length, size) = (content.len(), size_for(content.len()));
    Ok(Chunks { length, size, sums: sum_range(content, size, 0..length, None, buffer)? })
}

/// The sums of the chunks in `range`, which begins and ends with one.
fn sum_range(
    content: &dyn Content,
    size: u64,
    range: Range<u64>,
    known: Option<&Known>,
    buffer: &mut [u8],
) -> io::Result<Sums> {
    let mut sums = Vec::new();
    let mut next = content.data_after(range.start)?;
    while let Some(data) = next.filter(|data| data.start < range.end) {
        let number = data.start / size;
        let chunk = range_of(number, size, content.len());
        let sum = match known.and_then(|known| known.get(number, &chunk)) {
            None => {
                let read = sum_chunk(content, &chunk, data, buffer)?;
                next = read.next;
                read.sum
            }
            Some(known) => {
                // Asking where the data end is dear in a file of many pieces, so it is asked once for each.
                next = if data.end > chunk.end { Some(chunk.end..data.end) } else { content.data_after(chunk.end)? };
                known
            }
        };
        sums.extend(sum.map(|sum| (number, sum)));
    }
    Ok(sums)
}

/// What reading a chunk tells.
struct Read {
    /// `None` for one of zeros.
    sum: Option<Hash>,
    /// The data that follow it.
    next: Option<Range<u64>>,
}

/// Sums one chunk; `data` are the first in it.
fn sum_chunk(content: &dyn Content, chunk: &Range<u64>, mut data: Range<u64>, buffer: &mut [u8]) -> io::Result<Read> {
    let mut summer = Summer::default();
    let next = loop {
        // Whole blocks, since sums are of whole blocks.
        let mut at = data.start - data.start % BLOCK;
        let end = data.end.next_multiple_of(BLOCK).min(chunk.end);
        while at < end {
            let wanted = buffer.len().min((end - at) as usize);
            read_exact(content, &mut buffer[..wanted], at)?;
            summer.add(at - chunk.start, &buffer[..wanted]);
            at += wanted as u64;
        }
        if data.end > end {
            break Some(end..data.end);
        }
        match content.data_after(end)? {
            Some(more) if more.start < chunk.end => data = more,
            more => break more,
        }
    };
    let data = summer.has_data();
    Ok(Read { sum: data.then(|| summer.finish(chunk.end - chunk.start)), next })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::content::Live;

    fn chunks() -> impl Strategy<Value = Chunks> {
        (0..4_u32, proptest::collection::btree_map(0..100_u64, any::<[u8; 32]>(), 0..9)).prop_map(|(size, sums)| {
            let size = LEAST << size;
            Chunks { length: 100 * size - 7, size, sums: sums.into_iter().collect() }
        })
    }

    proptest! {
        #[test]
        fn sums_come_back(chunks in chunks()) {
            prop_assert_eq!(Chunks::decode(Reader::new(&chunks.encode().0)), Ok(chunks));
        }

        #[test]
        fn arbitrary_bytes_are_no_panic(bytes: Vec<u8>) {
            let _ = Chunks::decode(Reader::new(&bytes));
        }

        #[test]
        fn damaged_sums_are_no_panic(chunks in chunks(), at: prop::sample::Index, value: u8) {
            let mut bytes = chunks.encode().0;
            let at = at.index(bytes.len());
            bytes[at] = value;
            let _ = Chunks::decode(Reader::new(&bytes));
        }
    }

    fn file_of(parts: &[(u64, &[u8])], length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        parts.iter().for_each(|(offset, bytes)| file.write_all_at(bytes, *offset).unwrap());
        file.set_len(length).unwrap();
        file
    }

    fn sum_of(file: &File, length: u64) -> Chunks {
        sum(&Live { file, length }, &mut vec![0; 16 << 10]).unwrap()
    }

    #[test]
    fn a_sum_is_of_the_bytes_and_of_nothing_else() {
        let length = 5 * LEAST + 100;
        let (data, zeros) = (vec![7; 3 * LEAST as usize], vec![0; LEAST as usize]);
        let sparse = sum_of(&file_of(&[(LEAST, &data)], length), length);
        let dense = sum_of(&file_of(&[(0, &zeros), (LEAST, &data), (4 * LEAST, &zeros)], length), length);
        assert_eq!(sparse, dense);
        assert_eq!(sparse.sums.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 2, 3]);
        for (offset, bytes) in [(LEAST + 5, b"x"), (0, b"x"), (length - 1, b"x"), (3 * LEAST - 1, b"x")] {
            let other = sum_of(&file_of(&[(LEAST, &data), (offset, bytes)], length), length);
            assert_ne!(other.total(), sparse.total(), "{offset}");
            let found = sparse.first_difference(&other).unwrap();
            assert!(found.contains(&offset) && found == other.first_difference(&sparse).unwrap(), "{found:?}");
        }
        let longer = sum_of(&file_of(&[(LEAST, &data)], length + 1), length + 1);
        assert_ne!(longer.total(), sparse.total());
    }

    #[test]
    fn a_chunk_is_known_only_where_all_of_it_is_the_same() {
        let length = 3 * LEAST + 10;
        let before = sum_of(&file_of(&[(0, &vec![7; length as usize])], length), length);
        let known_of = |same: &[Range<u64>], length: u64| -> Vec<bool> {
            let known = Known { before: before.clone(), same: same.to_vec() };
            (0..length.div_ceil(LEAST)).map(|n| known.get(n, &range_of(n, LEAST, length)).is_some()).collect()
        };
        let same = [0..LEAST, LEAST + 1..2 * LEAST, 2 * LEAST..length];
        assert_eq!(known_of(&same, length), [true, false, true, true]);
        // The last chunk has become longer, and then shorter.
        assert_eq!(known_of(std::slice::from_ref(&(0..length + 1)), length + 1), [true, true, true, false]);
        assert_eq!(known_of(std::slice::from_ref(&(0..length - 1)), length - 1), [true, true, true, false]);
    }

    #[test]
    fn there_are_never_too_many_chunks() {
        for length in [FROM + 1, 64 << 30, (64 << 30) + 1, 1 << 40, u64::MAX] {
            let size = size_for(length);
            assert!(length.div_ceil(size) <= MOST && size >= LEAST && size.is_power_of_two(), "{length}");
        }
    }
}
