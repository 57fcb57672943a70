//! The content of a file, as the model and the listings hold it.

use std::collections::BTreeMap;
use std::fmt;

use fsnap_backend::Content;

use crate::failure::{Failure, Verdict, ensure};

/// The size of the blocks that a content is kept in; also the finest hole that any common file system makes.
const BLOCK: u64 = 4096;

/// Files up to this size are read whole, holes included, to see that no data hides in a hole.
const READ_WHOLE: u64 = 256 * 1024;

/// The bytes of a file of any size: only the blocks that were written are kept.
///
/// Two contents are equal if their bytes are, whichever of their zeros are holes.
#[derive(Clone, Default)]
pub struct Bytes {
    len: u64,
    blocks: BTreeMap<u64, Box<[u8]>>,
}

impl Bytes {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes are in blocks that are no holes.
    pub fn allocated(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// Writes `data` at `offset`, and grows to hold it.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let within = (at % BLOCK) as usize;
            let (now, later) = rest.split_at(rest.len().min(BLOCK as usize - within));
            let block = self.blocks.entry(at / BLOCK).or_insert_with(|| vec![0; BLOCK as usize].into());
            block[within..within + now.len()].copy_from_slice(now);
            at += now.len() as u64;
            rest = later;
        }
        self.len = self.len.max(at);
    }

    /// Cuts or grows it to `len` bytes; what is new is a hole.
    pub fn resize(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    /// Makes `len` bytes at `offset` zero, whole blocks holes; never grows it.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        // The last block may be shorter than a block: nothing of it is left beyond the end.
        let end = if end < self.len { end } else { end.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX) };
        for (index, block) in self.blocks.range_mut(offset / BLOCK..end.div_ceil(BLOCK)) {
            let start = index * BLOCK;
            let from = offset.max(start) - start;
            let to = end.min(start + BLOCK) - start;
            block[from as usize..to as usize].fill(0);
        }
        self.blocks.retain(|&index, _| !(offset <= index * BLOCK && (index + 1) * BLOCK <= end));
    }

    /// Takes blocks of zeros for holes.
    pub(crate) fn drop_zeros(&mut self) {
        self.blocks.retain(|_, block| block.iter().any(|&byte| byte != 0));
    }

    /// Reads a content through the contract, and checks that it keeps its promises while it does so.
    pub fn read(content: &dyn Content) -> Verdict<Self> {
        let mut bytes = Self { len: content.len(), blocks: BTreeMap::new() };
        let mut at = 0;
        while let Some(range) = content.data_after(at)? {
            ensure!(
                at <= range.start && range.start < range.end && range.end <= bytes.len,
                "data_after({at}) answered {range:?} in a file of {} bytes",
                bytes.len
            );
            bytes.copy_from(content, range.start, range.end)?;
            at = range.end;
        }
        if bytes.len <= READ_WHOLE {
            let mut whole = Self { len: bytes.len, blocks: BTreeMap::new() };
            whole.copy_from(content, 0, bytes.len)?;
            if let Some(offset) = bytes.first_difference(&whole) {
                return Err(Failure::new(format!("data_after hides the data at byte {offset}")));
            }
        }
        let mut beyond = [0; 1];
        ensure!(content.read_at(&mut beyond, bytes.len)? == 0, "there is data beyond the end at {}", bytes.len);
        Ok(bytes)
    }

    fn copy_from(&mut self, content: &dyn Content, start: u64, end: u64) -> Verdict {
        let mut buffer = vec![0; 64 * 1024];
        let mut at = start;
        while at < end {
            let wanted = buffer.len().min((end - at) as usize);
            let count = content.read_at(&mut buffer[..wanted], at)?;
            ensure!(count > 0, "it ends at byte {at}, before its length of {}", self.len);
            self.write(at, &buffer[..count]);
            at += count as u64;
        }
        Ok(())
    }

    /// The first byte in which two contents differ, their lengths included.
    pub fn first_difference(&self, other: &Self) -> Option<u64> {
        let zeros = [0; BLOCK as usize];
        let block = |bytes: &Self, index| bytes.blocks.get(&index).map_or(zeros.to_vec(), |block| block.to_vec());
        let mut indexes: Vec<u64> = self.blocks.keys().chain(other.blocks.keys()).copied().collect();
        indexes.sort_unstable();
        indexes.dedup();
        let differing = indexes.into_iter().find_map(|index| {
            let (a, b) = (block(self, index), block(other, index));
            let within = a.iter().zip(&b).position(|(a, b)| a != b)?;
            Some(index * BLOCK + within as u64)
        });
        differing.or((self.len != other.len).then_some(self.len.min(other.len)))
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        self.first_difference(other).is_none()
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, {} of them allocated", self.len, self.allocated())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_equal_to_zeros_and_not_to_data() {
        let mut sparse = Bytes::default();
        sparse.resize(3 * BLOCK);
        let mut dense = Bytes::default();
        dense.write(0, &[0; 3 * BLOCK as usize]);
        assert_eq!(sparse, dense);
        assert_eq!((sparse.allocated(), dense.allocated()), (0, 3 * BLOCK));
        dense.write(BLOCK + 7, b"x");
        assert_eq!(sparse.first_difference(&dense), Some(BLOCK + 7));
    }

    #[test]
    fn cutting_forgets_what_was_beyond_the_end() {
        let mut bytes = Bytes::default();
        bytes.write(BLOCK - 2, b"abcd");
        bytes.resize(BLOCK - 1);
        bytes.resize(2 * BLOCK);
        let mut expected = Bytes::default();
        expected.write(BLOCK - 2, b"a");
        expected.resize(2 * BLOCK);
        assert_eq!(bytes, expected);
        assert_eq!(bytes.allocated(), BLOCK);
    }

    #[test]
    fn a_punched_hole_keeps_its_neighbours() {
        let mut bytes = Bytes::default();
        bytes.write(0, &[7; 4 * BLOCK as usize]);
        bytes.zero(10, 2 * BLOCK);
        let mut expected = Bytes::default();
        expected.write(0, &[7; 10]);
        expected.write(2 * BLOCK + 10, &vec![7; 2 * BLOCK as usize - 10]);
        assert_eq!(bytes, expected);
        assert_eq!(bytes.allocated(), 3 * BLOCK);
    }
}
