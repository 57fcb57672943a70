//! What lies in the catalog's log of changes, as far as fsnap looks into it ([the WAL format]).
//!
//! [the WAL format]: https://www.sqlite.org/fileformat2.html#the_write_ahead_log

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// The numbers of the pages that have a frame in the log; none if there is no log.
///
/// Whether a frame's content is whole is left to SQLite, which has a checksum for it.
pub(super) fn pages_in(log: &Path, page: u64) -> io::Result<BTreeSet<u32>> {
    let mut pages = BTreeSet::new();
    let mut log = match File::open(log) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(pages),
        log => BufReader::new(log?),
    };
    let mut header = [0; HEADER];
    if !filled(&mut log, &mut header)? {
        return Ok(pages);
    }
    let salts = &header[16..24];
    let mut frame = [0; FRAME_HEADER];
    while filled(&mut log, &mut frame)? {
        // Frames with other salts are left from before the log was begun anew.
        if &frame[8..16] != salts {
            break;
        }
        pages.insert(u32::from_be_bytes([frame[0], frame[1], frame[2], frame[3]]));
        log.seek(SeekFrom::Current(page.cast_signed()))?;
    }
    Ok(pages)
}

/// Tells one state of a log from any other: a log only grows, and one that is begun anew has another header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    /// In bytes.
    pub(super) length: u64,
    header: [u8; HEADER],
}

impl Mark {
    /// The mark of the log as it is; `None` if nothing is in it.
    pub(super) fn of(log: &Path) -> io::Result<Option<Self>> {
        let mut log = match File::open(log) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            log => log?,
        };
        let (length, mut header) = (log.metadata()?.len(), [0; HEADER]);
        Ok(filled(&mut log, &mut header)?.then_some(Self { length, header }))
    }

    /// Whether this mark was the last that was [written](Self::write) to the note.
    pub(super) fn is_noted(&self, note: &Path) -> io::Result<bool> {
        match std::fs::read(note) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            noted => Ok(noted? == self.text().as_bytes()),
        }
    }

    /// Writes it to the note, without a sync: a note that is lost or torn is that of no log.
    pub(super) fn write(&self, note: &Path) -> io::Result<()> {
        let text = self.text();
        // The text before it is as long, nearly always: a file that is emptied first has to get its block anew.
        let file = File::options().create(true).truncate(false).write(true).open(note)?;
        file.write_all_at(text.as_bytes(), 0)?;
        let length = text.len() as u64;
        if file.metadata()?.len() == length { Ok(()) } else { file.set_len(length) }
    }

    fn text(&self) -> String {
        let header = self.header.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        format!("{} {header}\n", self.length)
    }
}

/// Fills the buffer; `false` if the file ends before.
fn filled(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(frames: &[(u32, u8)]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[16..24].fill(7);
        for (page, salt) in frames {
            bytes.extend(page.to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend([*salt; 8]);
            bytes.extend([0; 8 + 512]);
        }
        bytes
    }

    #[test]
    fn frames_of_this_log_count_up_to_the_first_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, log(&[(3, 7), (9, 7), (4, 6), (5, 7)])).unwrap();
        assert_eq!(pages_in(&path, 512).unwrap(), BTreeSet::from([3, 9]));
    }

    #[test]
    fn a_log_that_has_changed_has_another_mark() {
        let dir = tempfile::tempdir().unwrap();
        let (path, note) = (dir.path().join("log"), dir.path().join("note"));
        let mark = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Mark::of(&path).unwrap()
        };
        let bytes = log(&[(3, 7)]);
        let first = mark(&bytes).unwrap();
        assert!(!first.is_noted(&note).unwrap());
        first.write(&note).unwrap();
        assert!(mark(&bytes).unwrap().is_noted(&note).unwrap());
        assert!(!mark(&log(&[(3, 7), (3, 7)])).unwrap().is_noted(&note).unwrap());
        let mut anew = bytes.clone();
        anew[16] ^= 1;
        assert!(!mark(&anew).unwrap().is_noted(&note).unwrap());
        let noted = std::fs::read(&note).unwrap();
        for cut in 0..noted.len() {
            std::fs::write(&note, &noted[..cut]).unwrap();
            assert!(!first.is_noted(&note).unwrap(), "{cut}");
        }
        assert_eq!(mark(&bytes[..HEADER - 1]), None);
        assert_eq!(mark(&[]), None);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Mark::of(&path).unwrap(), None);
    }

    #[test]
    fn a_log_that_is_missing_or_cut_has_no_pages() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert!(pages_in(&path, 512).unwrap().is_empty());
        std::fs::write(&path, &log(&[(3, 7)])[..HEADER + 20]).unwrap();
        assert!(pages_in(&path, 512).unwrap().is_empty());
    }
}
