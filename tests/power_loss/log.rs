//! The log of all that was written to a disk, as the kernel's dm-log-writes keeps it.
//!
//! The format is that of [dm-log-writes]: a block that describes the log, and then for each write a block that describes it,
//! followed by what was written. Writes appear when a flush has made them durable; those that bypass the disk's cache (FUA) and
//! marks at once.
//!
//! [dm-log-writes]: https://docs.kernel.org/admin-guide/device-mapper/log-writes.html

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const SECTOR: u64 = 512;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// What one entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Something was written, at a byte of the disk, from so many bytes at a byte of the log.
    Write { at: u64, from: u64, len: u64, through: bool, flush: bool },
    /// All that was written before is durable.
    Flush,
    /// The content of a range does not matter any more.
    Discard,
    /// What the test had to say.
    Mark(String),
}

impl Entry {
    /// Whether everything before it is durable.
    pub(crate) fn is_flush(&self) -> bool {
        matches!(self, Self::Flush | Self::Write { flush: true, .. })
    }

    fn is_through(&self) -> bool {
        matches!(self, Self::Write { through: true, .. })
    }
}

/// A whole log.
#[derive(Debug)]
pub(crate) struct Log {
    file: File,
    pub(crate) entries: Vec<Entry>,
}

impl Log {
    pub(crate) fn read(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!(number(&head, 0), MAGIC, "the log does not begin like one");
        assert_eq!((number(&head, 1), number(&head, 3) as u32), (1, SECTOR as u32), "its version and unit");
        let count = number(&head, 2);
        let mut position = SECTOR;
        let entries = (0..count).map(|_| {
            let mut block = [0; SECTOR as usize];
            file.read_exact_at(&mut block, position).unwrap();
            position += SECTOR;
            let (at, len, flags) = (number(&block, 0) * SECTOR, number(&block, 1) * SECTOR, number(&block, 2));
            if flags & MARK != 0 {
                let text = &block[32..][..number(&block, 3) as usize];
                return Entry::Mark(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned());
            }
            if flags & DISCARD != 0 {
                return Entry::Discard;
            }
            let from = position;
            position += len;
            match len {
                0 => Entry::Flush,
                _ => Entry::Write { at, from, len, through: flags & FUA != 0, flush: flags & FLUSH != 0 },
            }
        });
        let entries = entries.collect();
        Self { file, entries }
    }

    /// The mark's place.
    pub(crate) fn mark(&self, text: &str) -> Option<usize> {
        self.entries.iter().position(|entry| matches!(entry, Entry::Mark(mark) if mark == text))
    }

    /// What a disk may hold if the power goes after the entry `last`, and the promises that it must hold: all marks before the
    /// returned place.
    ///
    /// `choose` says how much of a write that nothing has made durable is there: none, all, or a part.
    pub(crate) fn put_together(&self, last: usize, disk: &File, choose: &mut dyn FnMut(u64) -> u64) -> usize {
        let flushed = self.entries[..=last].iter().rposition(Entry::is_flush).unwrap_or(0);
        let next =
            self.entries[last + 1..].iter().position(Entry::is_flush).map_or(self.entries.len(), |at| last + 1 + at);
        self.apply(0..flushed + 1, disk, |_, len| len);
        let rest = &self.entries[last + 1..next];
        if rest.iter().any(Entry::is_through) {
            // What was not durable may have been written after what bypasses the cache later: leave it all out.
            self.apply(flushed + 1..last + 1, disk, |through, len| if through { len } else { 0 });
            return last + 1;
        }
        self.apply(flushed + 1..next, disk, |through, len| if through { len } else { choose(len / SECTOR) * SECTOR });
        last + 1
    }

    fn apply(&self, range: Range<usize>, disk: &File, mut how_much: impl FnMut(bool, u64) -> u64) {
        for entry in &self.entries[range] {
            let Entry::Write { at, from, len, through, .. } = entry else { continue };
            let mut content = vec![0; how_much(*through, *len) as usize];
            self.file.read_exact_at(&mut content, *from).unwrap();
            disk.write_all_at(&content, *at).unwrap();
        }
    }
}

/// The number at that place of a block.
fn number(block: &[u8], index: usize) -> u64 {
    let mut bytes = [0; 8];
    let rest = &block[8 * index..];
    let len = rest.len().min(8);
    bytes[..len].copy_from_slice(&rest[..len]);
    u64::from_le_bytes(bytes)
}
