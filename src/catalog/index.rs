//! The index of the catalog's log, `catalog.db-shm`, which all who have the catalog open share ([the WAL-index format]).
//!
//! [the WAL-index format]: https://www.sqlite.org/walformat.html#the_wal_index_file_format

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};

use super::format;

/// The part of the index's header that tells what of the log counts: it changes with each commit.
pub type Head = [u8; 48];

/// Each index that was read, by its device and number, for as long as it has a name.
///
/// Never closed before: with any descriptor of a file that a process closes, the kernel takes away all locks that the process has on it (fcntl(2)), those
/// of SQLite as well. Another process would find nobody who uses the index, shorten it, and whoever of this one has it mapped would die of SIGBUS.
static READ: Mutex<Vec<((u64, u64), File)>> = Mutex::new(Vec::new());

/// What the index of the catalog in `state` says of its log.
///
/// # Errors
///
/// There is none, since nobody has the catalog open, or it is not a regular file, or cannot be read.
pub fn head(state: &Path) -> io::Result<Head> {
    let path = format::index(&state.join(format::FILE));
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    let meta = path.symlink_metadata()?;
    if !meta.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let which = (meta.dev(), meta.ino());
    if !read.iter().any(|(other, _)| *other == which) {
        // Whoever removed a name held the whole catalog: nobody here has a lock on what has none any more.
        read.retain(|(_, index)| index.metadata().is_ok_and(|meta| meta.nlink() > 0));
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let index = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
        let meta = index.metadata()?;
        read.push(((meta.dev(), meta.ino()), index));
    }
    // What took its name a moment ago is read if it was opened.
    let (_, index) = read.iter().rfind(|(other, _)| *other == which).ok_or(io::ErrorKind::NotFound)?;
    let mut head = [0; size_of::<Head>()];
    index.read_exact_at(&mut head, 0).map(|()| head)
}
