//! In which parts of files two states of a volume can differ, by what the pool says of their blocks.
//!
//! Two thin devices of a pool share every block that neither has written since they parted. `thin_delta` of the
//! thin-provisioning tools reads from the pool's metadata which those are; the file system says by FIEMAP which blocks of
//! the device a file lies in. A part of a file that lies in one and the same shared block in both states is equal in both,
//! and need not be read. Everything else may differ: blocks that the pool does not share, parts that lie elsewhere, and whatever
//! FIEMAP cannot place exactly.
//!
//! `thin_delta` reads the metadata of a pool that is in use from a copy that the pool reserves for it, one at a time. A note in
//! the store, locked as long as its author lives, says that the copy is fsnap's: whoever finds the note unlocked gives the
//! copy back.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::process::Command;

use fsnap_backend::{Differences, Error, ImageKind, IoContext, Result, Snapshot, Source, beneath};
use rustix::fs::AtFlags;
use rustix::io::Errno;

use crate::dm::Number;
use crate::pool::ThinId;
use crate::record::Lock;
use crate::store::Store;
use crate::superblock::FileSystem;
use crate::sys::{self, Extent};

/// The note that the reserved copy of the metadata is fsnap's.
const NOTE: &str = "metadata-copy";

const PROGRAM: &str = "thin_delta";

/// The parts of two thin devices that they do not share.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Delta {
    /// In bytes of the devices; in order, and none touches the next.
    differ: Vec<Range<u64>>,
    /// The newer state is a mounted volume, whose files may have blocks that are not written out.
    live: bool,
}

impl Store {
    /// Asks the pool in which blocks `new` differs from `old`; `None` if that cannot be told here.
    pub(crate) fn delta(&self, old: &Snapshot, new: Source<'_>) -> Result<Option<Delta>> {
        let origin = self.form(&old.at, ImageKind::Snapshot)?.id;
        let (other, others) = match new {
            Source::Snapshot(new) => (self.form(&new.at, ImageKind::Snapshot)?.id, Some(new)),
            Source::Volume(volume) => {
                let live = self.check(volume)?;
                // With it, syncfs(2) writes contents to the journal, and FIEMAP knows of their later place alone.
                if live.file_system == FileSystem::Ext4 && live.mount.options().any(|one| one == b"data=journal") {
                    return Ok(None);
                }
                // What is not written out has no block, or still its old one.
                rustix::fs::syncfs(volume).context("write out the file system of", volume.dir())?;
                (live.thin.id, None)
            }
        };
        // Held until the end: nobody removes them, and gives their numbers to others. In one order, whoever asks.
        let mut held: Vec<&Snapshot> = others.into_iter().chain([old]).collect();
        held.sort_by(|a, b| a.at.cmp(&b.at));
        held.dedup_by(|a, b| a.at == b.at);
        let _held = held.into_iter().map(|one| self.recorded(one)).collect::<Result<Vec<_>>>()?;
        let differ = self.ask(origin, other)?;
        Ok(differ.map(|differ| Delta { differ, live: others.is_none() }))
    }

    fn ask(&self, origin: ThinId, other: ThinId) -> Result<Option<Vec<Range<u64>>>> {
        let Some(_note) = self.note_copy()? else { return Ok(None) };
        match self.mapper.message(&self.pool.name, "reserve_metadata_snap") {
            Ok(()) => {}
            // Somebody else has it.
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                return self.remove_note().map(|()| None);
            }
            Err(error) => {
                let error = Err(error).context("reserve a copy of the metadata of", self.pool.to_string());
                return error.map_err(|error: Error| error.and_undo(self.remove_note()));
            }
        }
        let told = self.run(origin, other);
        let given_back = self.release_copy().and_then(|()| self.remove_note());
        match told {
            Ok(differ) => given_back.map(|()| differ),
            Err(error) => Err(error.and_undo(given_back)),
        }
    }

    fn run(&self, origin: ThinId, other: ThinId) -> Result<Option<Vec<Range<u64>>>> {
        let table = self.mapper.table(&self.pool.name)?.map(|(_, table)| table).unwrap_or_default();
        let metadata = table.first().and_then(|target| Number::parse(target.text.split(' ').next()?));
        let damaged = |reason: String| Error::Damaged { what: self.pool.to_string(), reason };
        let metadata = metadata.ok_or_else(|| damaged("its table cannot be understood".to_owned()))?;
        let device = metadata.node_of_any()?;
        let mut command = Command::new(PROGRAM);
        command.args(["--metadata-snap", "--snap1", &origin.to_string(), "--snap2", &other.to_string()]).arg(device);
        let output = match command.output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            output => output.context("run", PROGRAM)?,
        };
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(io::Error::other(format!("{}: {said}", output.status))).context("run", PROGRAM);
        }
        // What a later release prints otherwise is no reason to fail: everything is read then.
        Ok(parse(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Gives the copy of the metadata back that a killed call has left reserved.
    pub(crate) fn release_left_behind(&self) -> Result<()> {
        if !self.place.join(NOTE).exists() {
            return Ok(());
        }
        // Somebody reads it just now if it is locked.
        if let Some(_note) = self.note_copy()? {
            self.remove_note()?;
        }
        Ok(())
    }

    /// Writes the note, or takes over that of a killed call and gives its copy back; `None` if somebody else's is locked.
    fn note_copy(&self) -> Result<Option<Lock>> {
        let there = beneath::stat(&self.root, OsStr::new(NOTE)).is_ok();
        let note = Lock::try_take_named(&self.root, NOTE).context("lock", self.place.join(NOTE))?;
        if there && note.is_some() {
            self.release_copy()?;
        }
        Ok(note)
    }

    fn remove_note(&self) -> Result<()> {
        rustix::fs::unlinkat(&self.root, NOTE, AtFlags::empty()).context("remove", self.place.join(NOTE))
    }

    fn release_copy(&self) -> Result<()> {
        match self.mapper.message(&self.pool.name, "release_metadata_snap") {
            // There is none.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
            released => released.context("release the copy of the metadata of", self.pool.to_string()),
        }
    }
}

/// Reads what `thin_delta` prints: one element for each run of blocks. `None` if it is not what is expected.
fn parse(text: &str) -> Option<Vec<Range<u64>>> {
    let mut block = None;
    let mut differ: Vec<Range<u64>> = Vec::new();
    let mut ended = false;
    for line in text.lines() {
        let line = line.trim().strip_prefix('<')?;
        let name = line.split([' ', '>', '/']).next()?;
        let number = |key: &str| {
            let (_, rest) = line.split_once(&format!(" {key}=\""))?;
            rest.split('"').next()?.parse::<u64>().ok()
        };
        match name {
            "superblock" => block = Some(number("data_block_size")?.checked_mul(512)?),
            "same" => {}
            "different" | "left_only" | "right_only" => {
                let begin = number("begin")?.checked_mul(block?)?;
                let end = begin.checked_add(number("length")?.checked_mul(block?)?)?;
                match differ.last_mut() {
                    Some(last) if last.end == begin => last.end = end,
                    Some(last) if last.end > begin => return None,
                    _ => differ.push(begin..end),
                }
            }
            "diff" => {}
            // The end of an element.
            "" => ended |= line.starts_with("/superblock"),
            _ => return None,
        }
    }
    (block.is_some() && ended).then_some(differ)
}

impl Differences for Delta {
    fn ranges(&self, old: &File, new: &File) -> io::Result<Option<Vec<Range<u64>>>> {
        let length = new.metadata()?.len();
        if length != old.metadata()?.len() {
            return Ok(None);
        }
        if self.live && sys::journals_contents(new)? {
            return Ok(None);
        }
        let (old, new) = (sys::extents(old)?, sys::extents(new)?);
        Ok(Some(self.compare(&old, &new, length)))
    }
}

impl Delta {
    /// The parts of a file that may differ between two layouts of it.
    fn compare(&self, old: &[Extent], new: &[Extent], length: u64) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
        while at < length {
            let (a, a_end) = piece(&mut old, at, length);
            let (b, b_end) = piece(&mut new, at, length);
            let end = a_end.min(b_end);
            match (a, b) {
                // Both read as zeros.
                (Piece::Zeros, Piece::Zeros) => {}
                (Piece::At(a), Piece::At(b)) if a == b => {
                    let before = self.differ.partition_point(|range| range.end <= a);
                    let here = self.differ[before..].iter().take_while(|range| range.start < a + (end - at));
                    here.for_each(|range| {
                        push(&mut found, at + range.start.max(a) - a..at + range.end.min(a + (end - at)) - a);
                    });
                }
                _ => push(&mut found, at..end),
            }
            at = end;
        }
        found
    }
}

/// What a part of a file is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// No block, or one that was never written.
    Zeros,
    /// The bytes of the device from there on.
    At(u64),
    /// Not told exactly.
    Somewhere,
}

/// The part of a file that begins at `at`, and where it ends.
fn piece<'a>(
    extents: &mut std::iter::Peekable<impl Iterator<Item = &'a Extent>>,
    at: u64,
    length: u64,
) -> (Piece, u64) {
    while extents.next_if(|extent| extent.logical.saturating_add(extent.length) <= at).is_some() {}
    match extents.peek() {
        None => (Piece::Zeros, length),
        Some(extent) if extent.logical > at => (Piece::Zeros, extent.logical.min(length)),
        Some(extent) => {
            let end = extent.logical.saturating_add(extent.length).min(length);
            let piece = match extent.kind {
                sys::ExtentKind::Written => Piece::At(extent.physical + (at - extent.logical)),
                sys::ExtentKind::Unwritten => Piece::Zeros,
                sys::ExtentKind::Other => Piece::Somewhere,
            };
            (piece, end)
        }
    }
}

fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ExtentKind::{self, Other, Unwritten, Written};

    #[test]
    fn the_output_is_understood_or_not_believed() {
        let text = r#"<superblock uuid="" time="2" transaction="0" data_block_size="128" nr_data_blocks="0">
  <diff left="1" right="2">
    <same begin="0" length="16"/>
    <different begin="16" length="1"/>
    <right_only begin="17" length="2"/>
    <left_only begin="40" length="1"/>
  </diff>
</superblock>
"#;
        let kib = 1 << 10;
        assert_eq!(parse(text), Some(vec![1024 * kib..1216 * kib, 2560 * kib..2624 * kib]));
        assert_eq!(parse(&text.replace("left_only", "both_perhaps")), None);
        assert_eq!(parse(&text.replace("</superblock>", "")), None);
        assert_eq!(parse(&text.replace(r#"length="2""#, "")), None);
        assert_eq!(parse(&text.replace(r#"begin="40""#, r#"begin="4""#)), None);
        assert_eq!(parse(""), None);
    }

    fn extent(logical: u64, physical: u64, length: u64, kind: ExtentKind) -> Extent {
        Extent { logical, physical, length, kind }
    }

    #[test]
    fn only_what_lies_in_one_shared_block_is_equal() {
        let delta = Delta { differ: vec![100..200, 300..400], live: false };
        let compare = |old: &[Extent], new: &[Extent], length| -> Vec<(u64, u64)> {
            delta.compare(old, new, length).into_iter().map(|range| (range.start, range.end)).collect()
        };
        let one = [extent(0, 0, 500, Written)];
        assert_eq!(compare(&one, &one, 500), [(100, 200), (300, 400)]);
        assert_eq!(compare(&one, &one, 150), [(100, 150)]);
        assert_eq!(compare(&[], &[], 500), vec![]);
        let shifted = [extent(0, 10, 500, Written)];
        assert_eq!(compare(&one, &shifted, 500), [(0, 500)]);
        let (holes, unwritten) = ([extent(50, 50, 10, Written)], [extent(0, 0, 60, Unwritten)]);
        assert_eq!(compare(&holes, &holes, 500), vec![]);
        assert_eq!(compare(&holes, &unwritten, 500), [(50, 60)]);
        let unknown = [extent(0, 0, 20, Other), extent(20, 20, 40, Written)];
        assert_eq!(compare(&unknown, &unknown, 60), [(0, 20)]);
        // Parts of it lie at the beginning of a run and at the end of one.
        let parts = [extent(0, 190, 20, Written), extent(20, 290, 20, Written)];
        assert_eq!(compare(&parts, &parts, 40), [(0, 10), (30, 40)]);
    }
}
