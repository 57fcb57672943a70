//! Where two files have the same blocks on the disk, and so the same bytes.
//!
//! Only for files that nobody writes to: contents of the store. The kernel says where the bytes of each range lie
//! (`FIEMAP`); a block that two files share is written to by neither, so equal places mean equal bytes, and a hole in both
//! means zeros in both.
//!
//! What is not certain is not the same:
//!
//! * Other file systems than btrfs and XFS: some give places on several disks without saying on which.
//! * A file in XFS's realtime section, whose places are counted from another beginning.
//! * Compressed blocks: the kernel says where the compressed ones begin, and not which of them are meant. A store on a file
//!   system that compresses is therefore read whole for its sums.
//! * Bytes within the metadata, and blocks that were promised but not written.
//!
//! A file system that is being balanced moves blocks while they are looked at. So the old file is looked at before and
//! after the new one, and the answer counts only if it was the same both times.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::sys::{self, Mapped};
use crate::volume::{BTRFS, XFS};

/// Beyond so many pieces a file is read: looking for each piece would not be faster.
const MOST: usize = 1 << 20;

/// Flags that leave it certain where the bytes of a piece are: the last of the file, put together, shared.
const CERTAIN: u32 = 0x1 | 0x1000 | 0x2000;

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Extent {
    range: Range<u64>,
    /// Where its bytes are, if that is certain.
    at: Option<u64>,
}

/// The ranges before `length` in which both files have the same blocks, sorted and as long as they can be.
pub(crate) fn same(old: &File, new: &File, length: u64) -> Vec<Range<u64>> {
    let look = || -> io::Result<Option<Vec<Range<u64>>>> {
        if old.metadata()?.dev() != new.metadata()?.dev() || !(is_certain(old)? && is_certain(new)?) {
            return Ok(None);
        }
        let (Some(before), Some(here), Some(after)) = (map(old)?, map(new)?, map(old)?) else { return Ok(None) };
        Ok((before == after).then(|| compare(&before, &here, length)))
    };
    // Not to know is no failure: everything is read then.
    look().ok().flatten().unwrap_or_default()
}

fn is_certain(file: &File) -> io::Result<bool> {
    Ok(match rustix::fs::fstatfs(file)?.f_type as u64 {
        BTRFS => true,
        XFS => sys::is_realtime(file) == Some(false),
        _ => false,
    })
}

/// All pieces of a file, in order; `None` if there are too many.
fn map(file: &File) -> io::Result<Option<Vec<Extent>>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut from = 0;
    loop {
        let more = sys::extents(file, from)?;
        let Some(last) = more.last() else { return Ok(Some(found)) };
        let (end, is_last) = (last.logical.saturating_add(last.length), last.flags & 0x1 != 0);
        let extent = |mapped: &Mapped| Extent {
            range: mapped.logical..mapped.logical.saturating_add(mapped.length),
            at: (mapped.flags & !CERTAIN == 0).then_some(mapped.physical),
        };
        found.extend(more.iter().map(extent));
        if is_last || end <= from {
            return Ok(Some(found));
        }
        if found.len() > MOST {
            return Ok(None);
        }
        from = end;
    }
}

/// Compares what two files have, piece by piece.
fn compare(old: &[Extent], new: &[Extent], length: u64) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let (mut olds, mut news) = (old.iter().peekable(), new.iter().peekable());
    let mut at = 0;
    while at < length {
        let (one, end) = piece(&mut olds, at);
        let (other, other_end) = piece(&mut news, at);
        let end = end.min(other_end).min(length);
        if one == other && one != Some(None) {
            match found.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => found.push(at..end),
            }
        }
        at = end;
    }
    found
}

/// What is at `at`, and how far it goes: `None` for a hole, `Some(None)` if it is not certain where the bytes are.
fn piece<'a>(
    extents: &mut std::iter::Peekable<impl Iterator<Item = &'a Extent>>,
    at: u64,
) -> (Option<Option<u64>>, u64) {
    while extents.next_if(|extent| extent.range.end <= at).is_some() {}
    match extents.peek() {
        None => (None, u64::MAX),
        Some(next) if next.range.start > at => (None, next.range.start),
        Some(here) => (Some(here.at.map(|first| first.wrapping_add(at - here.range.start))), here.range.end),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of few blocks, each with its place: 0 for a hole, 1 for one that is not certain.
    fn blocks() -> impl Strategy<Value = Vec<u64>> {
        proptest::collection::vec(0..6_u64, 12)
    }

    fn extents(blocks: &[u64], together: bool) -> Vec<Extent> {
        let mut found: Vec<Extent> = Vec::new();
        for (number, &place) in blocks.iter().enumerate().filter(|(_, place)| **place > 0) {
            let start = number as u64 * 10;
            let extent = Extent { range: start..start + 10, at: (place > 1).then_some(place * 10) };
            match found.last_mut() {
                Some(last)
                    if together
                        && last.range.end == start
                        && last.at.is_some_and(|at| Some(at + start - last.range.start) == extent.at) =>
                {
                    last.range.end += 10;
                }
                _ => found.push(extent),
            }
        }
        found
    }

    proptest! {
        #[test]
        fn pieces_are_the_same_where_their_blocks_are(old in blocks(), new in blocks(), cut in 0..130_u64) {
            let found = compare(&extents(&old, true), &extents(&new, false), cut);
            for byte in 0..cut {
                let block = |blocks: &[u64]| blocks.get(byte as usize / 10).copied().unwrap_or(0);
                let expected = block(&old) == block(&new) && block(&old) != 1;
                prop_assert_eq!(found.iter().any(|range| range.contains(&byte)), expected, "{} {:?}", byte, found);
            }
            prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert!(found.iter().all(|range| range.end <= cut && range.start < range.end));
        }
    }
}
