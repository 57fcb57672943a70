//! A content that is kept as the difference to others: `<lo>.patch`.
//!
//! ```text
//! patch   := data frame length-of-the-frame (8 bytes)
//! data    := the bytes that no other content has, one after the other
//! frame   := "fsnapPAT": length, length of data (varints), BLAKE3 of data (32 bytes),
//!            count (varint) source*, count (varint) extent*
//! source  := batch id (16 bytes), 2 × number + (1 if a patch) (varint)        each one is used
//! extent  := origin, length (varints) [offset (signed; less the extent's own)] in order, without gaps
//! origin  := 0: a hole; 1: zeros that are no hole; 2: the next bytes of data; 3 + n: source n, and where in its file
//! ```
//!
//! A source is a *file*, not a content: of a whole content its bytes, of a patch its data. So every byte is found with
//! one search in one index and read from one file, however many versions lie between. Nothing is ever put together.
//!
//! Each version adds itself to the sources of the next, until nothing of it is left there; a version with more than
//! [`MAX_SOURCES`] is kept whole. The bound says how many files a damaged byte, and an open content, can have to do
//! with. A whole copy every 17th version costs 6 % of the file's length for each of them at the most, which is
//! what a longer chain could still save.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fsnap_backend::{Content, IoContext, Result};

use crate::content::open_file;
use crate::format::{self, Malformed, Parsed, Reader, Writer};
use crate::record::{BatchId, ContentRef, Form};
use crate::store::Inner;

/// How many files a patch may lead to.
pub(crate) const MAX_SOURCES: usize = 16;

const MAGIC: &[u8; 8] = b"fsnapPAT";

/// The bytes that say how long the frame is.
const TAIL: usize = 8;

/// Where the bytes of an extent are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nowhere: a hole.
    Hole,
    /// Nowhere: zeros that are no hole.
    Zeros,
    /// In the patch's data.
    Own,
    /// In a source's file.
    Source(usize),
}

/// Some bytes of the content; it ends where the next one begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) origin: Origin,
    /// The offset in the file of their origin.
    pub(crate) at: u64,
}

/// What a patch says of the content's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Index {
    /// Of the content.
    pub(crate) length: u64,
    /// How long the patch's data are, and their hash.
    pub(crate) data: u64,
    pub(crate) hash: [u8; 32],
    pub(crate) sources: Vec<ContentRef>,
    /// Sorted, from 0 to `length` without a gap.
    pub(crate) extents: Vec<Extent>,
}

impl Index {
    fn encode(&self) -> Writer {
        let mut writer = Writer::default();
        writer.varint(self.length);
        writer.varint(self.data);
        writer.raw(&self.hash);
        writer.varint(self.sources.len() as u64);
        for source in &self.sources {
            writer.raw(&source.batch.0);
            writer.varint(source.number << 1 | u64::from(source.form == Form::Patch));
        }
        writer.varint(self.extents.len() as u64);
        for (number, extent) in self.extents.iter().enumerate() {
            writer.varint(match extent.origin {
                Origin::Hole => 0,
                Origin::Zeros => 1,
                Origin::Own => 2,
                Origin::Source(source) => 3 + source as u64,
            });
            writer.varint(self.end_of(number) - extent.start);
            if let Origin::Source(_) = extent.origin {
                writer.signed(extent.at.wrapping_sub(extent.start) as i64);
            }
        }
        writer
    }

    fn decode(mut reader: Reader<'_>) -> Parsed<Self> {
        let (length, data, hash) = (reader.varint()?, reader.varint()?, reader.array()?);
        let count = reader.count(17)?;
        if count > MAX_SOURCES {
            return Err(Malformed("it has too many sources"));
        }
        let sources = (0..count)
            .map(|_| {
                let (batch, number) = (BatchId(reader.array()?), reader.varint()?);
                let form = if number & 1 == 0 { Form::Whole } else { Form::Patch };
                Ok(ContentRef { batch, number: number >> 1, form })
            })
            .collect::<Parsed<Vec<_>>>()?;
        let count = reader.count(2)?;
        let mut extents = Vec::with_capacity(count);
        let (mut start, mut own) = (0_u64, 0_u64);
        for _ in 0..count {
            let (origin, len) = (reader.varint()?, reader.varint()?);
            let end = start.checked_add(len).filter(|&end| len > 0 && end <= length);
            let end = end.ok_or(Malformed("an extent is empty, or ends beyond the content"))?;
            let (origin, at) = match origin {
                0 => (Origin::Hole, 0),
                1 => (Origin::Zeros, 0),
                2 => {
                    own += len;
                    (Origin::Own, own - len)
                }
                source => {
                    let source = usize::try_from(source - 3).ok().filter(|&source| source < sources.len());
                    let source = source.ok_or(Malformed("an extent has an unknown origin"))?;
                    let at = start.wrapping_add(reader.signed()? as u64);
                    if at > i64::MAX as u64 - len.min(i64::MAX as u64) {
                        return Err(Malformed("an extent lies beyond any file"));
                    }
                    (Origin::Source(source), at)
                }
            };
            extents.push(Extent { start, origin, at });
            start = end;
        }
        reader.end()?;
        if start != length || own != data {
            return Err(Malformed("its extents do not make up the content"));
        }
        Ok(Self { length, data, hash, sources, extents })
    }

    /// Reads the index of the patch at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::read_from(&open_file(path)?, path)
    }

    fn read_from(file: &File, path: &Path) -> Result<Self> {
        let damaged = |reason| Malformed(reason).of(path.display().to_string());
        let length = file.metadata().context("read the attributes of", path)?.len();
        let frame_end = length.checked_sub(TAIL as u64).ok_or_else(|| damaged("it ends too early"))?;
        let mut tail = [0; TAIL];
        file.read_exact_at(&mut tail, frame_end).context("read", path)?;
        let frame_start = frame_end.checked_sub(u64::from_le_bytes(tail));
        let frame_start = frame_start.ok_or_else(|| damaged("its frame does not fit into it"))?;
        let mut frame = vec![0; (frame_end - frame_start) as usize];
        file.read_exact_at(&mut frame, frame_start).context("read", path)?;
        let reader = format::unseal(MAGIC, &frame, path)?;
        let index = Self::decode(reader).map_err(|malformed| malformed.of(path.display().to_string()))?;
        if index.data != frame_start {
            return Err(damaged("it has more or less data than it says"));
        }
        Ok(index)
    }

    /// The frame and what follows it; the data lie before.
    pub(crate) fn seal(&self) -> Vec<u8> {
        let mut frame = format::seal(MAGIC, self.encode());
        frame.extend_from_slice(&(frame.len() as u64).to_le_bytes());
        frame
    }

    fn end_of(&self, extent: usize) -> u64 {
        self.extents.get(extent + 1).map_or(self.length, |next| next.start)
    }

    /// The extents that hold `range`, each cut to it.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Extent)> + '_ {
        let first = self.extents.partition_point(|extent| extent.start <= range.start).saturating_sub(1);
        (first..self.extents.len())
            .map(move |number| {
                let extent = self.extents[number];
                let cut = extent.start.max(range.start)..self.end_of(number).min(range.end);
                let at = extent.at + (cut.start.saturating_sub(extent.start));
                (cut.clone(), Extent { start: cut.start, at, ..extent })
            })
            .take_while(|(cut, _)| cut.start < cut.end)
    }
}

/// A patch, open for reading.
#[derive(Debug)]
pub(crate) struct Patch {
    pub(crate) index: Index,
    file: File,
    sources: Vec<File>,
}

impl Patch {
    /// Opens a patch and every file that it leads to: what is open stays readable, whatever is removed.
    pub(crate) fn open(store: &Inner, content: &ContentRef) -> Result<Self> {
        let path = store.content_path(content);
        let file = open_file(&path)?;
        let index = Index::read_from(&file, &path)?;
        let sources = index.sources.iter().map(|source| open_file(&store.content_path(source)));
        Ok(Self { sources: sources.collect::<Result<_>>()?, file, index })
    }

    /// Opens a patch for its own data alone.
    pub(crate) fn open_alone(store: &Inner, content: &ContentRef) -> Result<Self> {
        let path = store.content_path(content);
        let file = open_file(&path)?;
        Ok(Self { index: Index::read_from(&file, &path)?, file, sources: Vec::new() })
    }

    /// Whether the data that this patch itself holds are what they were.
    pub(crate) fn has_its_data(&self, buffer: &mut [u8]) -> Result<bool> {
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < self.index.data {
            let wanted = buffer.len().min((self.index.data - at) as usize);
            self.file.read_exact_at(&mut buffer[..wanted], at).context("read", "a patch")?;
            hasher.update(&buffer[..wanted]);
            at += wanted as u64;
        }
        Ok(hasher.finalize().as_bytes() == &self.index.hash)
    }
}

impl Content for Patch {
    fn len(&self) -> u64 {
        self.index.length
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = self.index.length.min(offset.saturating_add(buffer.len() as u64));
        if end <= offset {
            return Ok(0);
        }
        for (cut, extent) in self.index.within(offset..end) {
            let part = &mut buffer[(cut.start - offset) as usize..(cut.end - offset) as usize];
            match extent.origin {
                Origin::Hole | Origin::Zeros => part.fill(0),
                Origin::Own => self.file.read_exact_at(part, extent.at)?,
                Origin::Source(source) => self.sources[source].read_exact_at(part, extent.at)?,
            }
        }
        Ok((end - offset) as usize)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        if offset >= self.index.length {
            return Ok(None);
        }
        let mut cuts = self.index.within(offset..self.index.length);
        let is_data = |extent: &Extent| extent.origin != Origin::Hole;
        let Some((mut found, _)) = cuts.find(|(_, extent)| is_data(extent)) else { return Ok(None) };
        for (cut, _) in cuts.take_while(|(_, extent)| is_data(extent)) {
            found.end = cut.end;
        }
        Ok(Some(found))
    }
}

#[cfg(test)]
mod tests {
    use fsnap_backend::Error;
    use proptest::prelude::*;

    use super::*;

    fn index() -> impl Strategy<Value = Index> {
        let source = (0..3_u8, 0..1_u64 << 40, any::<bool>()).prop_map(|(batch, number, patch)| ContentRef {
            batch: BatchId([batch; 16]),
            number,
            form: if patch { Form::Patch } else { Form::Whole },
        });
        let extents = proptest::collection::vec((0..6_usize, 1..1_u64 << 40, 0..1_u64 << 50), 0..20);
        (proptest::collection::vec(source, 3), extents, any::<[u8; 32]>()).prop_map(|(sources, parts, hash)| {
            let (mut length, mut data) = (0, 0);
            let mut extents = Vec::new();
            for (origin, len, at) in parts {
                let (origin, at) = match origin {
                    0 => (Origin::Hole, 0),
                    1 => (Origin::Zeros, 0),
                    2 => (Origin::Own, data),
                    source => (Origin::Source(source - 3), at),
                };
                data += if origin == Origin::Own { len } else { 0 };
                extents.push(Extent { start: length, origin, at });
                length += len;
            }
            Index { length, data, hash, sources, extents }
        })
    }

    proptest! {
        #[test]
        fn an_index_comes_back(index in index()) {
            prop_assert_eq!(Index::decode(Reader::new(&index.encode().0)), Ok(index));
        }

        #[test]
        fn arbitrary_bytes_are_no_panic(bytes: Vec<u8>) {
            let _ = Index::decode(Reader::new(&bytes));
        }

        #[test]
        fn a_damaged_index_is_no_panic(index in index(), at: prop::sample::Index, value: u8) {
            let mut bytes = index.encode().0;
            let at = at.index(bytes.len());
            bytes[at] = value;
            let _ = Index::decode(Reader::new(&bytes));
        }

        #[test]
        fn extents_are_found(index in index(), start: u64, len in 1..1_u64 << 42) {
            prop_assume!(index.length > 0);
            let start = start % index.length;
            let range = start..(start + len).min(index.length);
            let mut at = range.start;
            for (cut, extent) in index.within(range.clone()) {
                prop_assert_eq!((cut.start, extent.start), (at, at));
                at = cut.end;
            }
            prop_assert_eq!(at, range.end);
        }
    }

    #[test]
    fn a_frame_that_claims_too_much_is_refused() {
        use std::io::Write;
        for tail in [0_u64, 1, 52, 53, 1 << 40, u64::MAX] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&[7; 52]).unwrap();
            file.write_all(&tail.to_le_bytes()).unwrap();
            assert!(matches!(Index::read(file.path()), Err(Error::Damaged { .. })), "{tail}");
        }
    }
}
