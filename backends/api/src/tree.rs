//! Reading a tree of files, wherever it is kept.

use std::any::Any;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;

use crate::Result;

/// Extended attributes: names and values, sorted by name. POSIX ACLs are `system.posix_acl_access` and `…_default`.
pub type Xattrs = Vec<(OsString, Vec<u8>)>;

/// One directory of a tree that can be read: of a live volume, of a mounted snapshot, of a store's own records.
///
/// Handles, not paths: a tree may be deeper than any path can say, and no lookup ever leaves it. Names are any bytes
/// but `/` and NUL. Nothing here follows a symbolic link.
///
/// A backend that is given a directory of its own can tell (`Any`), and read it by a shorter way.
pub trait Dir: Any + fmt::Debug + Send + Sync {
    /// The attributes of the directory itself.
    fn meta(&self) -> Result<FileMeta>;

    /// The extended attributes of the directory itself.
    fn own_xattrs(&self) -> Result<Xattrs>;

    /// All entries, sorted by the bytes of their names, without `.` and `..`.
    fn entries(&self) -> Result<Vec<Entry>>;

    /// One entry; `None` if there is no such name.
    fn entry(&self, name: &OsStr) -> Result<Option<Entry>>;

    /// Opens the directory `name`.
    fn open_dir(&self, name: &OsStr) -> Result<Box<dyn Dir>>;

    /// Opens the content of the regular file `name`.
    fn open_file(&self, name: &OsStr) -> Result<Box<dyn Content>>;

    /// The target of the symbolic link `name`, as it was written.
    fn read_link(&self, name: &OsStr) -> Result<OsString>;

    /// The extended attributes of the entry `name`, a symbolic link's own included.
    fn xattrs(&self, name: &OsStr) -> Result<Xattrs>;

    /// Tells the file systems that a tree is made of apart: numbers of files are unique in one of them only.
    ///
    /// For comparison with other directories that were opened from the same root, and for nothing else.
    fn file_system(&self) -> Result<u64> {
        Ok(0)
    }

    /// A token that two directories share only if everything in and below them is equal; `None` if not known.
    ///
    /// Lets a comparison skip what is the same without reading it.
    fn token(&self) -> Option<[u8; 32]> {
        None
    }
}

/// The content of a regular file, open for reading.
pub trait Content: fmt::Debug + Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads at `offset` into `buffer` and returns how many bytes there were; 0 only at the end or for an empty buffer.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The first range at or after `offset` that is not a hole; `None` if only holes follow. Another may follow it at once: to look
    /// for its end can be dear.
    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// The file that holds exactly these bytes, if there is one: it can be reflinked, or passed through.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// `lseek(2)` with `SEEK_DATA` or `SEEK_HOLE` in a content of that length, of which [`Content::data_after`] is given; `None` is `ENXIO`.
pub fn seek<E>(
    length: u64,
    offset: u64,
    hole: bool,
    data_after: impl Fn(u64) -> std::result::Result<Option<Range<u64>>, E>,
) -> std::result::Result<Option<u64>, E> {
    if offset >= length {
        return Ok(None);
    }
    let mut at = offset;
    loop {
        match data_after(at)? {
            None if hole => return Ok(Some(at)),
            None => return Ok(None),
            Some(data) if !hole => return Ok(Some(data.start.max(at))),
            Some(data) if data.start > at => return Ok(Some(at)),
            // The end of a file counts as a hole.
            Some(data) if data.end >= length => return Ok(Some(length)),
            Some(data) => at = data.end,
        }
    }
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name: any bytes but `/` and NUL.
    pub name: OsString,
    /// Its attributes.
    pub meta: FileMeta,
}

/// What `statx(2)` says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileMeta {
    /// What kind of file it is.
    pub kind: FileKind,
    /// Its number within the tree; two names of one file share it.
    pub ino: u64,
    /// How many names it has.
    pub nlink: u32,
    /// Permission, set-id and sticky bits: `07777` at the most.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The device that a device node stands for, as `makedev(3)` numbers it; 0 for others.
    pub rdev: u64,
    /// Length in bytes.
    pub size: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the content or the attributes.
    pub ctime: Timestamp,
    /// Birth, where the file system records it.
    pub btime: Option<Timestamp>,
}

/// What kind of file an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A UNIX-domain socket's node.
    Socket,
    /// A character device's node.
    CharDevice,
    /// A block device's node.
    BlockDevice,
}

impl FileKind {
    const ALL: [Self; 7] =
        [Self::File, Self::Dir, Self::Symlink, Self::Fifo, Self::Socket, Self::CharDevice, Self::BlockDevice];

    /// The bits of a file's mode that tell its kind, as inode(7) has them (`S_IFMT`).
    pub fn type_bits(self) -> u32 {
        match self {
            Self::File => 0o100_000,
            Self::Dir => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
        }
    }

    /// The kind that a file's mode tells.
    pub(crate) fn of_mode(mode: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_bits() == mode & 0o170_000)
    }
}

/// A moment: seconds since 1970, negative before it, and nanoseconds.
///
/// Not a `SystemTime`, whose arithmetic panics on the dates that hostile trees hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds, rounded towards the past.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}
