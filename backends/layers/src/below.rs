//! What lies below, whichever way it is read: a file of a mounted file system, or one of a snapshot that the kernel cannot
//! mount.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use fsnap_backend::{Content, ErrorKind, FileMeta, data_in};
use rustix::fs::Stat;
use rustix::io::Errno;

use super::Result;

/// The number that says most of what a backend's error says.
pub(super) fn errno(error: fsnap_backend::Error) -> Errno {
    match &error {
        fsnap_backend::Error::Io { source, .. } => io_errno(source),
        _ => match error.kind() {
            ErrorKind::NotFound => Errno::NOENT,
            ErrorKind::Damaged => Errno::UCLEAN,
            ErrorKind::WrongIdentity => Errno::STALE,
            ErrorKind::Permission => Errno::ACCESS,
            ErrorKind::NoSpace => Errno::NOSPC,
            _ => Errno::IO,
        },
    }
}

pub(super) fn io_errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Attributes as `stat(2)` has them; `template` gives what they do not tell.
///
/// What a file takes on the disk is not told. Programs ask for holes only where there seem to be some: a large file seems
/// to have one.
pub(super) fn stat(meta: &FileMeta, template: Stat) -> Stat {
    const LARGE: u64 = 64 << 10;
    let mut stat = template;
    stat.st_ino = meta.ino;
    stat.st_mode = meta.kind.type_bits() | meta.mode;
    stat.st_nlink = meta.nlink.into();
    stat.st_uid = meta.uid;
    stat.st_gid = meta.gid;
    stat.st_rdev = meta.rdev;
    stat.st_size = meta.size.cast_signed();
    stat.st_blocks = (meta.size.div_ceil(512) - u64::from(meta.size >= LARGE)).cast_signed();
    (stat.st_atime, stat.st_atime_nsec) = (meta.atime.seconds, meta.atime.nanoseconds.into());
    (stat.st_mtime, stat.st_mtime_nsec) = (meta.mtime.seconds, meta.mtime.nanoseconds.into());
    (stat.st_ctime, stat.st_ctime_nsec) = (meta.ctime.seconds, meta.ctime.nanoseconds.into());
    stat
}

/// The content of a file of the lower.
#[derive(Debug)]
pub(super) enum LowerContent {
    /// With its length, which never changes.
    File(File, u64),
    Content(Box<dyn Content>),
}

impl LowerContent {
    /// The file that has exactly these bytes, if there is one.
    pub(super) fn as_file(&self) -> Option<&File> {
        match self {
            Self::File(file, _) => Some(file),
            Self::Content(content) => content.as_file(),
        }
    }

    pub(super) fn length(&self) -> u64 {
        match self {
            Self::File(_, length) => *length,
            Self::Content(content) => content.len(),
        }
    }

    /// Reads at `offset` as much as there is, up to the buffer's length.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        // Its end is known: nothing is asked for behind it.
        let rest = usize::try_from(self.length().saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = rest.min(buffer.len());
        let buffer = &mut buffer[..wanted];
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let read = match self {
                Self::File(file, _) => file.read_at(&mut buffer[done..], at),
                Self::Content(content) => content.read_at(&mut buffer[done..], at),
            };
            match read {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_errno(&error)),
            }
        }
        Ok(done)
    }

    /// Fills the buffer; an error at the end of the file.
    pub(super) fn read_exact(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        if self.read(buffer, offset)? == buffer.len() { Ok(()) } else { Err(Errno::IO) }
    }

    /// The first range at or after `at` that is no hole; another may follow it at once.
    pub(super) fn data_after(&self, at: u64) -> Result<Option<Range<u64>>> {
        match self {
            Self::File(file, length) => data_in(file, *length, at).map_err(|error| io_errno(&error)),
            Self::Content(content) => {
                let data = content.data_after(at).map_err(|error| io_errno(&error))?;
                Ok(data.map(|data| data.start.max(at)..data.end))
            }
        }
    }
}
