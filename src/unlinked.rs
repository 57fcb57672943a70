//! What a checkpoint keeps of files that have no name any more.
//!
//! A file that is open or mapped lives on without a name, and no snapshot of its volume has it. So its content is kept beside the snapshots: in a
//! [`Room`], a directory of the volume's store, on one file system with it, so that blocks are shared where that is possible; and else in the state
//! directory. [`design::unlinked_files`](crate::design::unlinked_files) says why, and what an engine is told.
//!
//! A room belongs to one checkpoint, from its intent to its removal, and a file in it is named after the device and inode that it had. Only fsnap's own
//! user can enter; what a process was allowed to do with the file is in the record, and not in the file's mode.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use fsnap_backend::{Content, Identity, Timestamp, WholeFile, beneath};
use rustix::fs::{FallocateFlags, Gid, Mode, Uid, XattrFlags};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointId, PathText};
use crate::processes::FilePlace;

/// A file that had no name any more at a checkpoint, and what became of its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptFile {
    /// Where it was when it had a name.
    #[serde(flatten)]
    pub place: FilePlace,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// The store in whose room the content is; `None`: the state directory's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<Identity>,
    /// What it was like.
    #[serde(default)]
    pub attributes: Attributes,
    /// What the engine calls it, if the process image lacks its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<String>,
    /// Why its content is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

impl KeptFile {
    /// The name of its content in the room.
    pub fn name(&self) -> String {
        name_of(self.device, self.inode)
    }
}

/// The name of a file's content in a room.
pub(crate) fn name_of(device: u64, inode: u64) -> String {
    format!("{device:x}-{inode:x}")
}

/// What a file without a name was like.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Attributes {
    /// Its length in bytes.
    pub size: u64,
    /// Permission, set-id and sticky bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Last access: seconds and nanoseconds.
    pub accessed: (i64, u32),
    /// Last change of the content.
    pub modified: (i64, u32),
    /// The extended attributes, access control lists and capabilities included; not the labels of security modules, which are the machine's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extended: Vec<ExtendedAttribute>,
}

/// One extended attribute of a file ([xattr(7)](https://man7.org/linux/man-pages/man7/xattr.7.html)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtendedAttribute {
    /// Its name, such as `user.comment`.
    pub name: PathText,
    /// Its value, which is any bytes.
    #[serde(with = "hex::serde")]
    pub value: Vec<u8>,
}

/// So many bytes of extended attributes are more than any file has that is not out to make fsnap's records long.
const MOST_EXTENDED: usize = 1 << 20;

impl Attributes {
    /// Those of an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let meta = beneath::stat_fd(file)?;
        let pair = |time: Timestamp| (time.seconds, time.nanoseconds);
        let (accessed, modified) = (pair(meta.atime), pair(meta.mtime));
        let extended = ExtendedAttribute::all_of(file)?;
        Ok(Self { size: meta.size, mode: meta.mode, uid: meta.uid, gid: meta.gid, accessed, modified, extended })
    }

    /// Gives them to an open file, whose content has to be there already.
    pub(crate) fn give_to(&self, file: &File) -> io::Result<()> {
        rustix::fs::fchown(file, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        // After the owner: a change of that takes set-id bits away.
        rustix::fs::fchmod(file, Mode::from_raw_mode(self.mode))?;
        // After both: they change lists, and take capabilities away.
        self.extended.iter().try_for_each(|attribute| attribute.give_to(file))?;
        let time = |(seconds, nanoseconds)| Timestamp { seconds, nanoseconds };
        beneath::set_times_fd(file, time(self.accessed), time(self.modified))
    }
}

impl ExtendedAttribute {
    /// Those of an open file that belong to it wherever it is.
    fn all_of(file: &File) -> io::Result<Vec<Self>> {
        let belongs = |name: &OsStr| {
            let name = name.as_bytes();
            name.starts_with(b"user.")
                || name.starts_with(b"trusted.")
                || [&b"security.capability"[..], b"system.posix_acl_access"].contains(&name)
        };
        let found = beneath::xattrs_fd(file)?.into_iter().filter(|(name, _)| belongs(name));
        let found: Vec<Self> = found.map(|(name, value)| Self { name: PathText(name.into()), value }).collect();
        let length: usize = found.iter().map(|one| one.name.as_path().as_os_str().len() + one.value.len()).sum();
        if length > MOST_EXTENDED {
            let reason = format!("its extended attributes have {} KiB", length >> 10);
            return Err(io::Error::new(ErrorKind::FileTooLarge, reason));
        }
        Ok(found)
    }

    fn give_to(&self, file: &File) -> io::Result<()> {
        let name = self.name.as_path().as_os_str();
        let set = rustix::fs::fsetxattr(file, name, &self.value, XattrFlags::empty());
        set.map_err(|source| {
            let source = io::Error::from(source);
            io::Error::new(source.kind(), format!("set the extended attribute {}: {source}", crate::printable(name)))
        })
    }
}

/// The directory in which the contents of one checkpoint's files without names are kept. Need not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    dir: PathBuf,
}

impl Room {
    /// The room of a checkpoint below `base`, a directory that only fsnap's user enters.
    pub(crate) fn of(base: &Path, checkpoint: &CheckpointId) -> Self {
        Self { dir: base.join(checkpoint.to_string()) }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Keeps the content of `source` as it is now, under that name; what was kept under it before makes that short.
    pub(crate) fn keep(&self, source: &File, name: &str) -> io::Result<()> {
        let dir = self.make()?;
        let name = OsStr::new(name);
        let kept = match beneath::open_file(&dir, name) {
            Ok(_) => reopen(&dir, name)?,
            Err(error) if error.kind() == ErrorKind::NotFound => beneath::create_file(&dir, name, 0o600)?,
            Err(error) => return Err(error),
        };
        let copied = copy(source, &kept);
        if copied.is_err() {
            // Half a content is none.
            let _ = rustix::fs::unlinkat(&dir, name, rustix::fs::AtFlags::empty());
        }
        copied
    }

    /// Opens a content that is kept.
    pub fn open(&self, name: &str) -> io::Result<File> {
        beneath::open_file(beneath::open_root(&self.dir)?, OsStr::new(name))
    }

    /// Makes the contents of these names durable, which must be there, and removes all others.
    pub(crate) fn settle(&self, names: &[String]) -> io::Result<()> {
        let dir = match beneath::open_root(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound && names.is_empty() => return Ok(()),
            dir => dir?,
        };
        if names.is_empty() {
            return self.remove();
        }
        for found in beneath::names(&dir)? {
            if !names.iter().any(|name| OsStr::new(name) == found) {
                rustix::fs::unlinkat(&dir, &found, rustix::fs::AtFlags::empty())?;
            }
        }
        for name in names {
            beneath::open_file(&dir, OsStr::new(name))?.sync_all()?;
        }
        for made in self.dir.ancestors().take(3) {
            File::open(made)?.sync_all()?;
        }
        Ok(())
    }

    /// Removes it with all that is in it; succeeds if there is none.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let (Some(base), Some(name)) = (self.dir.parent(), self.dir.file_name()) else { return Ok(()) };
        match beneath::open_root(base) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            base => beneath::remove_tree(base?, name),
        }
    }

    fn make(&self) -> io::Result<OwnedFd> {
        match beneath::open_root(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            dir => return dir,
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        beneath::open_root(&self.dir)
    }
}

/// For writing, what is known to be a regular file.
fn reopen(dir: &OwnedFd, name: &OsStr) -> io::Result<File> {
    use rustix::fs::OFlags;
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?.into())
}

/// So much is compared at once.
const BLOCK: usize = 1 << 20;
/// Of what differs, only pieces of this size are written: holes are no smaller.
const PIECE: usize = 4096;

/// Makes the content of `target` that of `source`: by sharing blocks, and else by writing what differs. Holes stay holes, and zeros become some where
/// the target had nothing.
pub(crate) fn copy(source: &File, target: &File) -> io::Result<()> {
    let size = source.metadata()?.size();
    // Blocks can be shared up to an end that is not a whole block only if the other file ends there as well.
    if target.metadata()?.size() > size {
        target.set_len(size)?;
    }
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let (from, to) = (WholeFile::new(source.try_clone()?)?, WholeFile::new(target.try_clone()?)?);
    let mut buffers = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut at = 0;
    while let Some(data) = from.data_after(at)? {
        empty(target, &to, at..data.start)?;
        write_differences(&from, target, data.clone(), &mut buffers)?;
        at = data.end;
    }
    empty(target, &to, at..size)?;
    target.set_len(size)
}

/// Makes that part a hole.
fn empty(target: &File, content: &WholeFile, part: Range<u64>) -> io::Result<()> {
    let mut at = part.start;
    while at < part.end
        && let Some(data) = content.data_after(at)?
        && data.start < part.end
    {
        let end = data.end.min(part.end);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(target, flags, data.start, end - data.start).is_err() {
            let zeros = vec![0; BLOCK];
            let mut zeroed = data.start;
            while zeroed < end {
                let length = BLOCK.min(usize::try_from(end - zeroed).unwrap_or(BLOCK));
                target.write_all_at(&zeros[..length], zeroed)?;
                zeroed += length as u64;
            }
        }
        at = end;
    }
    Ok(())
}

fn write_differences(
    from: &WholeFile,
    target: &File,
    part: Range<u64>,
    (ours, theirs): &mut (Vec<u8>, Vec<u8>),
) -> io::Result<()> {
    let mut at = part.start;
    while at < part.end {
        let length = BLOCK.min(usize::try_from(part.end - at).unwrap_or(BLOCK));
        let read = read_at(from.as_file(), &mut ours[..length], at)?;
        if read == 0 {
            // It was cut short meanwhile, by a process that runs.
            return Ok(());
        }
        let known = read_at(Some(target), &mut theirs[..read], at)?;
        // What it has not yet will be a hole: some file systems tell of none (NILFS2), and give out zeros as data.
        theirs[known..read].fill(0);
        let mut piece = 0;
        while ours[piece..read] != theirs[piece..read] {
            let differs = |piece: usize| {
                let part = piece..read.min(piece + PIECE);
                !part.is_empty() && ours[part.clone()] != theirs[part]
            };
            let begin = (piece..read).step_by(PIECE).find(|&piece| differs(piece)).unwrap_or(read);
            piece = (begin..read).step_by(PIECE).find(|&piece| !differs(piece)).unwrap_or(read);
            target.write_all_at(&ours[begin..piece], at + begin as u64)?;
        }
        at += read as u64;
    }
    Ok(())
}

/// Reads all the data of a file, and returns its length.
pub(crate) fn read_through(file: &File) -> io::Result<u64> {
    let content = WholeFile::new(file.try_clone()?)?;
    let mut buffer = vec![0; BLOCK];
    let mut at = 0;
    while let Some(data) = content.data_after(at)? {
        at = data.start;
        while at < data.end {
            let length = BLOCK.min(usize::try_from(data.end - at).unwrap_or(BLOCK));
            match read_at(Some(file), &mut buffer[..length], at)? {
                0 => return Ok(at),
                read => at += read as u64,
            }
        }
    }
    Ok(content.len())
}

fn read_at(file: Option<&File>, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let Some(file) = file else { return Ok(0) };
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Makes a file that has no name, in the directory `dir`.
pub(crate) fn make_nameless(dir: impl AsFd) -> io::Result<File> {
    use rustix::fs::OFlags;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(&dir, ".", flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => return Ok(file.into()),
        // Not every file system knows this.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let name = format!(".fsnap-{}", hex::encode(crate::random_bytes::<16>()?));
    let file = beneath::create_file(&dir, OsStr::new(&name), 0o600)?;
    rustix::fs::unlinkat(&dir, &*name, rustix::fs::AtFlags::empty())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever lay in the target, afterwards it is the source, and its holes are holes.
    #[test]
    fn what_was_copied_ahead_is_made_equal() {
        let temp = tempfile::tempdir().unwrap();
        let make = |name: &str, size: u64, pieces: &[(u64, &[u8])]| {
            let file = File::options().read(true).write(true).create_new(true).open(temp.path().join(name)).unwrap();
            file.set_len(size).unwrap();
            pieces.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
            file
        };
        let big = vec![7; 3 << 20];
        let source = make("source", 64 << 20, &[(0, b"begin"), (8 << 20, &big), ((64 << 20) - 3, b"end")]);
        let targets = [
            make("fresh", 0, &[]),
            make("longer", 80 << 20, &[(70 << 20, b"more"), (5 << 20, &big)]),
            make("shorter", 1 << 20, &[(1, b"x")]),
            make("nearly", 64 << 20, &[(0, b"begin"), (8 << 20, &big), (30 << 20, b"gone since")]),
        ];
        let content = fs::read(temp.path().join("source")).unwrap();
        for (target, name) in targets.iter().zip(["fresh", "longer", "shorter", "nearly"]) {
            copy(&source, target).unwrap();
            assert!(fs::read(temp.path().join(name)).unwrap() == content, "{name}");
            let (is, should) = (target.metadata().unwrap().blocks(), source.metadata().unwrap().blocks());
            assert!(is <= should + 64, "{name} has {is} blocks, and the source {should}");
        }
    }

    /// As holes are read where the file system tells of none: two GiB of them took as much room.
    #[test]
    fn zeros_that_are_given_out_as_data_take_no_room() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let zeros = vec![0; 16 << 20];
        source.write_all_at(&zeros, 0).unwrap();
        source.write_all_at(b"end", 16 << 20).unwrap();
        target.write_all_at(b"before", 3 << 20).unwrap();
        let from = WholeFile::new(source.try_clone().unwrap()).unwrap();
        let length = from.len();
        write_differences(&from, &target, 0..length, &mut (vec![0; BLOCK], vec![0; BLOCK])).unwrap();
        let mut content = vec![1; length as usize + 1];
        assert_eq!(read_at(Some(&target), &mut content, 0).unwrap() as u64, length);
        assert!(content.starts_with(&zeros) && content[zeros.len()..].starts_with(b"end"));
        assert!(target.metadata().unwrap().blocks() * 512 <= 64 << 10);
    }
}
