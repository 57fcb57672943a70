//! Making a patch: what of a large file is the same as in its version before.
//!
//! Two ways, tried in this order:
//!
//! * *By blocks.* Both versions are local, so they are compared at equal offsets, 4 KiB by 4 KiB: 13 GB/s where the rolling
//!   hashes of rsync make 0.8. A database, a disk image, a log: all that is written in place, and appended to.
//! * *By search.* Where too much differs, the bytes may have moved: something was put into the middle, or taken out. Then
//!   `fast_rsync` looks for each 8 MiB of the new version in the 16 MiB around their place in the old one, and the
//!   place moves along with what is found. Never in the frozen window, where copying is faster.
//!
//! A patch that would hold more than a half of the file is none: the file is kept whole.
//!
//! `fast_rsync` finds blocks by MD4, which anybody can forge. Its answer is a proposal: every range that it says is equal
//! is compared byte by byte before it is believed, and what is not equal is kept as it is. No delta of its is ever
//! applied. The content's BLAKE3 sum is of the new version as it was read, so `verify` checks all of it once more.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use fast_rsync::{Signature, SignatureOptions};
use fsnap_backend::{Content, Error, Result};

use crate::content::{self, BLOCK, Summer};
use crate::patch::{Extent, Index, MAX_SOURCES, Origin, Patch};
use crate::record::{ContentRef, Form};
use crate::store::Inner;

/// How much is searched for at once, and how far to both sides of where it is expected.
const WINDOW: usize = 8 << 20;
const SLACK: u64 = 4 << 20;

/// A patch may have more extents than that only if it is wrong to make one.
const MAX_EXTENTS: usize = 1 << 20;

/// How the new version is compared with the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// At equal offsets.
    ByBlocks,
    /// Wherever it may be.
    BySearch,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The bytes are those of the old version, holes included.
    Equal,
    /// The patch is written; the sum is that of the new version.
    Made { sum: [u8; 32] },
    /// The versions have too little in common, or the old one cannot be read.
    Unfit,
}

/// The version before.
#[derive(Debug)]
pub(crate) struct Old {
    content: ContentRef,
    opened: Opened,
}

#[derive(Debug)]
enum Opened {
    Whole(Box<dyn Content>),
    Patch(Patch),
}

impl Old {
    /// Opens the version before, which is `length` bytes long.
    pub(crate) fn open(store: &Inner, content: &ContentRef, length: u64) -> Result<Self> {
        let opened = match content.form {
            Form::Whole => Opened::Whole(content::open(store, content, length)?),
            Form::Patch => Opened::Patch(Patch::open(store, content)?),
        };
        let old = Self { content: *content, opened };
        if old.as_content().len() != length {
            let what = store.content_path(content).display().to_string();
            return Err(Error::Damaged { what, reason: "its length is wrong".to_owned() });
        }
        Ok(old)
    }

    fn as_content(&self) -> &dyn Content {
        match &self.opened {
            Opened::Whole(whole) => &**whole,
            Opened::Patch(patch) => patch,
        }
    }

    /// Reads at `at`; what lies beyond the end is zeros. `None` if it cannot be read.
    fn read<'b>(&self, buffer: &'b mut [u8], at: u64) -> Option<&'b [u8]> {
        let there = self.as_content().len().saturating_sub(at).min(buffer.len() as u64) as usize;
        let (read, beyond) = buffer.split_at_mut(there);
        beyond.fill(0);
        content::read_exact(self.as_content(), read, at).ok()?;
        Some(buffer)
    }
}

/// Why a patch is not made: the error is of the new version or of the patch itself.
enum Stop {
    Unfit,
    Failed(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// Writes what makes `new` of `old` to the empty file `to`.
pub(crate) fn make(new: &dyn Content, old: &Old, to: &File, how: How, buffer: &mut [u8]) -> io::Result<Outcome> {
    let mut builder = Builder::new(old, to, new.len());
    let mut sum = Summer::default();
    let compared = match how {
        How::ByBlocks => by_blocks(new, old, &mut builder, &mut sum, buffer),
        How::BySearch => by_search(new, old, &mut builder, &mut sum),
    };
    let made = compared.and_then(|()| {
        let equal = how == How::ByBlocks && builder.index.data == 0 && new.len() == old.as_content().len();
        if equal && same_ranges(new, old.as_content())? {
            return Ok(Outcome::Equal);
        }
        builder.finish()?;
        Ok(Outcome::Made { sum: sum.finish(new.len()) })
    });
    match made {
        Ok(outcome) => Ok(outcome),
        Err(Stop::Unfit) => Ok(Outcome::Unfit),
        Err(Stop::Failed(error)) => Err(error),
    }
}

fn by_blocks(
    new: &dyn Content,
    old: &Old,
    builder: &mut Builder<'_>,
    sum: &mut Summer,
    buffer: &mut [u8],
) -> Result<(), Stop> {
    let mut then = vec![0; buffer.len()];
    let old_length = old.as_content().len();
    content::pieces(new, buffer, &mut |at, bytes, ranges| {
        sum.add(at, bytes);
        let then = old.read(&mut then[..bytes.len()], at).ok_or(Stop::Unfit)?;
        for range in ranges {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start - start % BLOCK + BLOCK);
                let within = (start - at) as usize..(end - at) as usize;
                if end <= old_length && bytes[within.clone()] == then[within.clone()] {
                    builder.old(start, start, end - start)?;
                } else {
                    builder.own(start, &bytes[within])?;
                }
                start = end;
            }
        }
        // Where more than an eighth differs, it is worth while to look whether it has only moved.
        builder.within(builder.length / 8)
    })
}

fn by_search(new: &dyn Content, old: &Old, builder: &mut Builder<'_>, sum: &mut Summer) -> Result<(), Stop> {
    let mut buffer = vec![0; WINDOW];
    let mut then = vec![0; WINDOW + 2 * SLACK as usize];
    let old_length = old.as_content().len();
    // How far the old version's bytes lie behind the new one's.
    let mut moved = 0_i64;
    let mut seen = 0;
    content::pieces(new, &mut buffer, &mut |at, bytes, ranges| {
        sum.add(at, bytes);
        seen += bytes.len() as u64;
        let expected = at.saturating_add_signed(moved);
        let first = expected.saturating_sub(SLACK).min(old_length);
        let last = (expected + bytes.len() as u64 + SLACK).min(old_length);
        let then = old.read(&mut then[..(last - first) as usize], first).ok_or(Stop::Unfit)?;
        for (piece, found) in matches(bytes, then, (expected - first.min(expected)) as usize) {
            if let Some(found) = found {
                moved = (first + found as u64) as i64 - (at + piece.start as u64) as i64;
            }
            // Holes stay holes, whatever was found for the zeros that they read as.
            for range in ranges {
                let start = range.start.max(at + piece.start as u64);
                let end = range.end.min(at + piece.end as u64);
                if start >= end {
                    continue;
                }
                match found {
                    Some(found) => {
                        let from = first + found as u64 + (start - at - piece.start as u64);
                        builder.old(start, from, end - start)?;
                    }
                    None => builder.own(start, &bytes[(start - at) as usize..(end - at) as usize])?,
                }
            }
        }
        builder.within(WINDOW as u64 / 2 + seen / 2)
    })
}

/// Cuts `new` into pieces, each with the place in `old` where the same bytes are, if they are.
fn matches(new: &[u8], old: &[u8], expected: usize) -> Vec<(Range<usize>, Option<usize>)> {
    // The usual case behind an insertion: everything has moved by the same distance.
    if old.get(expected..).is_some_and(|old| old.starts_with(new)) {
        return vec![(0..new.len(), Some(expected))];
    }
    let options = SignatureOptions { block_size: BLOCK as u32, crypto_hash_size: 8 };
    let signature = Signature::calculate(old, options);
    let mut script = Vec::new();
    let proposed = match fast_rsync::diff(&signature.index(), new, &mut script) {
        Ok(()) => proposals(&script).unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    let mut pieces = Vec::with_capacity(proposed.len());
    let mut at = 0;
    for (length, found) in proposed {
        let piece = at..(at + length).min(new.len());
        let same = |found: &usize| old.get(*found..).is_some_and(|old| old.starts_with(&new[piece.clone()]));
        pieces.push((piece.clone(), found.filter(same)));
        at = piece.end;
    }
    pieces.push((at..new.len(), None));
    pieces
}

/// What a script in the format of librsync says: how many bytes, and where they are in the old version, if they are.
fn proposals(script: &[u8]) -> Option<Vec<(usize, Option<usize>)>> {
    let mut rest = script.get(4..)?;
    let number = |rest: &mut &[u8], length: usize| {
        let (bytes, after) = rest.split_at_checked(length)?;
        *rest = after;
        bytes.iter().try_fold(0_usize, |number, &byte| Some(number.checked_mul(256)? | usize::from(byte)))
    };
    let mut found = Vec::new();
    loop {
        let (&command, after) = rest.split_first()?;
        rest = after;
        match command {
            0 => return Some(found),
            1..=0x44 => {
                let length = if command <= 0x40 { command.into() } else { number(&mut rest, 1 << (command - 0x41))? };
                rest = rest.get(length..)?;
                found.push((length, None));
            }
            0x45..=0x54 => {
                let (at, length) = ((command - 0x45) / 4, (command - 0x45) % 4);
                let at = number(&mut rest, 1 << at)?;
                found.push((number(&mut rest, 1 << length)?, Some(at)));
            }
            _ => return None,
        }
    }
}

/// Writes a patch from its first byte to its last.
struct Builder<'a> {
    old: &'a Old,
    to: &'a File,
    length: u64,
    index: Index,
    /// Where the next extent begins.
    at: u64,
    hasher: blake3::Hasher,
    /// Data that are not yet written.
    waiting: Vec<u8>,
}

impl<'a> Builder<'a> {
    fn new(old: &'a Old, to: &'a File, length: u64) -> Self {
        let index = Index { length, data: 0, hash: [0; 32], sources: Vec::new(), extents: Vec::new() };
        Self { old, to, length, index, at: 0, hasher: blake3::Hasher::new(), waiting: Vec::new() }
    }

    /// Gives up if there are more than `most` bytes of data.
    fn within(&self, most: u64) -> Result<(), Stop> {
        if self.index.data > most.max(BLOCK) || self.index.extents.len() > MAX_EXTENTS {
            return Err(Stop::Unfit);
        }
        Ok(())
    }

    /// The bytes at `start` are new.
    fn own(&mut self, start: u64, bytes: &[u8]) -> Result<(), Stop> {
        self.hole_until(start);
        self.push(Origin::Own, self.index.data, bytes.len() as u64);
        self.index.data += bytes.len() as u64;
        self.hasher.update(bytes);
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= content::BUFFER { Ok(self.flush()?) } else { Ok(()) }
    }

    /// The `length` bytes at `start` are those of the old version at `from`.
    fn old(&mut self, start: u64, from: u64, length: u64) -> Result<(), Stop> {
        self.hole_until(start);
        let patch = match &self.old.opened {
            Opened::Whole(_) => {
                let source = self.source(self.old.content)?;
                self.push(Origin::Source(source), from, length);
                return Ok(());
            }
            Opened::Patch(patch) => patch,
        };
        for (cut, extent) in patch.index.within(from..from + length) {
            let (origin, at) = match extent.origin {
                Origin::Hole | Origin::Zeros => (Origin::Zeros, 0),
                Origin::Own => (Origin::Source(self.source(self.old.content)?), extent.at),
                Origin::Source(source) => (Origin::Source(self.source(patch.index.sources[source])?), extent.at),
            };
            self.push(origin, at, cut.end - cut.start);
        }
        Ok(())
    }

    fn hole_until(&mut self, start: u64) {
        if self.at < start {
            self.push(Origin::Hole, 0, start - self.at);
        }
    }

    fn source(&mut self, content: ContentRef) -> Result<usize, Stop> {
        let sources = &mut self.index.sources;
        if let Some(known) = sources.iter().position(|known| *known == content) {
            return Ok(known);
        }
        if sources.len() == MAX_SOURCES {
            return Err(Stop::Unfit);
        }
        sources.push(content);
        Ok(sources.len() - 1)
    }

    fn push(&mut self, origin: Origin, at: u64, length: u64) {
        let start = self.at;
        self.at += length;
        if let Some(last) = self.index.extents.last()
            && last.origin == origin
            && (matches!(origin, Origin::Hole | Origin::Zeros) || last.at + (start - last.start) == at)
        {
            return;
        }
        self.index.extents.push(Extent { start, origin, at });
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = self.index.data - self.waiting.len() as u64;
        self.to.write_all_at(&self.waiting, written)?;
        self.waiting.clear();
        Ok(())
    }

    /// Writes the rest.
    fn finish(&mut self) -> io::Result<()> {
        self.hole_until(self.length);
        self.flush()?;
        self.index.hash = *self.hasher.finalize().as_bytes();
        self.to.write_all_at(&self.index.seal(), self.index.data)
    }
}

/// Whether two contents have data at the same places.
fn same_ranges(one: &dyn Content, other: &dyn Content) -> io::Result<bool> {
    let mut at = 0;
    loop {
        let (range, same) = (one.data_after(at)?, other.data_after(at)?);
        if range != same {
            return Ok(false);
        }
        let Some(range) = range else { return Ok(true) };
        at = range.end;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_proposal_is_believed_only_where_the_bytes_are_equal() {
        let old: Vec<u8> = (0..40_000_u32).flat_map(u32::to_le_bytes).collect();
        let mut new = old.clone();
        new.splice(50_000..50_000, b"put in".iter().copied());
        let pieces = matches(&new, &old, 0);
        let found: usize = pieces.iter().filter(|(_, found)| found.is_some()).map(|(piece, _)| piece.len()).sum();
        assert!(found > new.len() - 20_000, "{found} of {}", new.len());
        for (piece, found) in pieces {
            if let Some(found) = found {
                assert_eq!(new[piece.clone()], old[found..found + piece.len()]);
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_scripts_are_no_panic(script: Vec<u8>) {
            let _ = proposals(&script);
        }
    }
}
