//! A directory of an engine's images, which anybody may have made.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use fsnap_backend::{FileKind, FileMeta, Identity, Locator, beneath};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use serde::{Deserialize, Serialize};

use super::{Error, Result, os_text};

/// The name of fsnap's record in an image directory.
pub const RECORD_NAME: &str = "fsnap.json";

/// The name of what fsnap answered to the last call of its generic hook.
pub const ANSWER_NAME: &str = "fsnap_hook.json";

/// A record is written under this name first.
const UNFINISHED_RECORD: &str = ".fsnap.json.new";

/// Who may read it.
const RECORD_MODE: u32 = 0o600;

/// The newest version of the record.
const RECORD_VERSION: u32 = 1;

/// More than a record of a thousand volumes needs.
const RECORD_LIMIT: u64 = 1 << 20;

/// What fsnap writes beside an engine's images: which checkpoint they belong to, and how to tell its files from others.
///
/// It is a copy for those who find the images; the catalog decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRecord {
    /// The version of this format.
    version: u32,
    /// The checkpoint's id.
    pub checkpoint: String,
    /// One entry for each of its volumes.
    pub members: Vec<MemberRecord>,
}

/// One volume of a checkpoint, in an [`ImageRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberRecord {
    /// The volume's name.
    pub volume: String,
    /// Where the volume's root directory was.
    #[serde(with = "os_text")]
    pub path: PathBuf,
    /// The kind of its backend.
    pub backend: String,
    /// Which store holds the snapshot.
    pub store: Identity,
    /// Which volume it was.
    pub identity: Identity,
    /// Where in the store the snapshot is.
    pub at: Locator,
    /// Which snapshot it is.
    pub snapshot: Identity,
}

impl ImageRecord {
    /// A record of this format.
    pub fn new(checkpoint: impl Into<String>, members: Vec<MemberRecord>) -> Self {
        Self { version: RECORD_VERSION, checkpoint: checkpoint.into(), members }
    }
}

/// An engine's directory of images, pinned by a descriptor.
#[derive(Debug)]
pub struct Images {
    dir: OwnedFd,
    path: PathBuf,
    /// A file in it that has no name yet, for the next that is written.
    blank: RefCell<Option<File>>,
}

impl Images {
    /// Opens the directory of images at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        // A user's link to the directory is fine; what counts is what lies in it.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(CWD, path, flags, Mode::empty());
        let dir = opened.map_err(|error| Error::ImageDir { dir: path.into(), source: error.into() })?;
        Ok(Self::new(dir, path.into()))
    }

    pub(super) fn new(dir: OwnedFd, path: PathBuf) -> Self {
        Self { dir, path, blank: RefCell::new(None) }
    }

    /// The directory's path when it was opened: for messages and records.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes sure that nobody but root and fsnap's own user could put anything else into it: processes are made of what it holds, with all the
    /// rights that they had.
    ///
    /// fsnap's record alone does not tell: whoever owns the directory can move it beside other images.
    pub fn check_owner(&self) -> Result<()> {
        let shared = |what: String| Error::SharedImages { dir: self.path.clone(), what };
        let failed = |source| Error::ImageDir { dir: self.path.clone(), source };
        let ours = |uid| uid == 0 || uid == rustix::process::geteuid().as_raw();
        let check = |name: &OsStr, meta: FileMeta| {
            let name = crate::printable(name);
            if !ours(meta.uid) {
                return Err(shared(format!("{name} belongs to user {}", meta.uid)));
            }
            // Of a symbolic link, which CRIU makes to older images, the mode means nothing.
            let writable = meta.mode & 0o022 != 0 && meta.kind != FileKind::Symlink;
            if writable { Err(shared(format!("{name} can be written by other users"))) } else { Ok(()) }
        };
        check(OsStr::new("the directory"), beneath::stat_fd(&self.dir).map_err(failed)?)?;
        for name in beneath::names(&self.dir).map_err(failed)? {
            check(&name, beneath::stat(&self.dir, &name).map_err(failed)?)?;
        }
        Ok(())
    }

    /// Opens one of its files for reading.
    ///
    /// It must be a regular file of at most `limit` bytes which belongs to root or to the user that fsnap runs as; a symbolic link, a fifo or a stranger's
    /// file is refused without waiting for it.
    pub(super) fn file(&self, name: &'static str, limit: u64) -> Result<Option<File>> {
        let refuse = |reason: String| Error::ImageFile { dir: self.path.clone(), file: name, reason };
        let file = match beneath::open_file(&self.dir, OsStr::new(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
                return Err(refuse("it is a symbolic link".into()));
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                return Err(refuse("it is not a regular file".into()));
            }
            Err(error) => return Err(refuse(error.to_string())),
        };
        let meta = beneath::stat_fd(&file).map_err(|error| refuse(error.to_string()))?;
        if meta.uid != 0 && meta.uid != rustix::process::geteuid().as_raw() {
            return Err(refuse(format!("it belongs to user {}, who could change it at any time", meta.uid)));
        }
        if meta.size > limit {
            return Err(refuse(format!("it has {} bytes, more than the {limit} that are sensible", meta.size)));
        }
        Ok(Some(file))
    }

    /// Reads one of its files, under the same conditions.
    pub(crate) fn read(&self, name: &'static str, limit: u64) -> Result<Option<Vec<u8>>> {
        let refuse =
            |error: io::Error| Error::ImageFile { dir: self.path.clone(), file: name, reason: error.to_string() };
        let Some(file) = self.file(name, limit)? else { return Ok(None) };
        let mut content = Vec::new();
        // The file may have grown since it was examined.
        file.take(limit).read_to_end(&mut content).map_err(refuse)?;
        Ok(Some(content))
    }

    /// Reads fsnap's record, if there is one.
    pub fn record(&self) -> Result<Option<ImageRecord>> {
        let refuse = |reason: String| Error::ImageFile { dir: self.path.clone(), file: RECORD_NAME, reason };
        let Some(content) = self.read(RECORD_NAME, RECORD_LIMIT)? else { return Ok(None) };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let not_ours = |error: serde_json::Error| refuse(format!("it is not a record of fsnap: {error}"));
        let Versioned { version } = serde_json::from_slice(&content).map_err(not_ours)?;
        if version > RECORD_VERSION {
            return Err(Error::NewerRecord { dir: self.path.clone(), found: version, supported: RECORD_VERSION });
        }
        serde_json::from_slice(&content).map(Some).map_err(not_ours)
    }

    /// Makes the file for the next record ahead, without a name: on ext4, which has to look for an inode, that takes longer than all else.
    ///
    /// Nothing is left if it is never written. Where the file system cannot do it (`O_TMPFILE`, open(2)), the file is made when it is written.
    pub fn prepare(&self) {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let made = rustix::fs::openat(&self.dir, ".", flags, Mode::from_raw_mode(RECORD_MODE));
        self.blank.replace(made.ok().map(File::from));
    }

    /// Writes fsnap's record: the whole of it, or nothing.
    ///
    /// It is not forced to the disk, since processes are frozen meanwhile; the catalog has all of it.
    pub fn write_record(&self, record: &ImageRecord) -> Result<()> {
        let reason = |error: serde_json::Error| error.to_string();
        let refuse = |reason| Error::ImageFile { dir: self.path.clone(), file: RECORD_NAME, reason };
        let mut content = serde_json::to_vec_pretty(record).map_err(reason).map_err(refuse)?;
        content.push(b'\n');
        self.write(RECORD_NAME, &content)
    }

    /// Writes a file of fsnap's beside the engine's: the whole of it, or nothing.
    pub fn write(&self, name: &'static str, content: &[u8]) -> Result<()> {
        let refuse =
            |error: io::Error| Error::ImageFile { dir: self.path.clone(), file: name, reason: error.to_string() };
        self.replace(name, content).map_err(refuse)
    }

    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let unfinished = OsStr::new(UNFINISHED_RECORD);
        match rustix::fs::unlinkat(&self.dir, unfinished, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let mut file = self.make(unfinished)?;
        let written = file.write_all(content).and_then(|()| {
            Ok(rustix::fs::renameat_with(&self.dir, unfinished, &self.dir, name, RenameFlags::empty())?)
        });
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&self.dir, unfinished, AtFlags::empty());
        }
        written
    }

    /// The file that was prepared, or a new one, under that name.
    fn make(&self, name: &OsStr) -> io::Result<File> {
        if let Some(file) = self.blank.take() {
            // linkat(2): for AT_EMPTY_PATH, kernels before 6.10 want a capability. Without /proc, the file stays without a name.
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            if rustix::fs::linkat(CWD, link, &self.dir, name, AtFlags::SYMLINK_FOLLOW).is_ok() {
                return Ok(file);
            }
        }
        beneath::create_file(&self.dir, name, RECORD_MODE)
    }

    /// Removes fsnap's record, if there is one: its checkpoint was undone.
    pub fn remove_record(&self) -> Result<()> {
        self.remove(RECORD_NAME)
    }

    /// Removes a file of fsnap's, if there is one.
    pub fn remove(&self, name: &'static str) -> Result<()> {
        match rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => {
                Err(Error::ImageFile { dir: self.path.clone(), file: name, reason: io::Error::from(error).to_string() })
            }
        }
    }
}

impl AsFd for Images {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn record() -> ImageRecord {
        let member = MemberRecord {
            volume: "db".into(),
            path: "/srv/db".into(),
            backend: "btrfs".into(),
            store: Identity::new("s"),
            identity: Identity::new("v"),
            at: "7".parse().unwrap(),
            snapshot: Identity::new("n"),
        };
        ImageRecord::new("c0ffee", vec![member])
    }

    #[test]
    fn what_was_prepared_is_used_once_and_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let names = || fs::read_dir(temp.path()).unwrap().count();
        let images = Images::open(temp.path()).unwrap();
        images.prepare();
        assert_eq!(names(), 0);
        // None where the file system cannot do it.
        let prepared = images.blank.borrow().as_ref().map(|file| file.metadata().unwrap().ino());
        for (number, record) in [ImageRecord::new("first", vec![]), record()].iter().enumerate() {
            images.write_record(record).unwrap();
            assert_eq!(images.record().unwrap().as_ref(), Some(record));
            assert_eq!(names(), 1);
            let written = fs::metadata(temp.path().join(RECORD_NAME)).unwrap();
            assert_eq!(Some(written.ino()) == prepared, number == 0 && prepared.is_some());
            assert_eq!(written.mode() & 0o777, RECORD_MODE);
        }
        images.prepare();
        drop(images);
        assert_eq!(names(), 1);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let temp = tempfile::tempdir().unwrap();
        let images = Images::open(temp.path()).unwrap();
        assert_eq!(images.record().unwrap(), None);
        fs::write(temp.path().join(UNFINISHED_RECORD), "left by a crash").unwrap();
        images.write_record(&ImageRecord::new("first", vec![])).unwrap();
        images.write_record(&record()).unwrap();
        assert_eq!(images.record().unwrap(), Some(record()));
        let names: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [RECORD_NAME]);
        images.remove_record().unwrap();
        images.remove_record().unwrap();
        assert_eq!(images.record().unwrap(), None);
    }

    #[test]
    fn a_record_that_is_not_a_file_of_ours_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join(RECORD_NAME);
        let images = Images::open(temp.path()).unwrap();
        let reason = || match images.record() {
            Err(Error::ImageFile { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        symlink("/etc/passwd", &path).unwrap();
        assert_eq!(reason(), "it is a symbolic link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(reason(), "it is not a regular file");
        fs::remove_dir(&path).unwrap();
        rustix::fs::mkfifoat(CWD, &path, Mode::RUSR).unwrap();
        assert_eq!(reason(), "it is not a regular file");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "{}").unwrap();
        File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(reason().contains("more than"), "{}", reason());
        images.write_record(&record()).unwrap();
        std::os::unix::fs::chown(&path, Some(4242), None).unwrap();
        assert!(reason().contains("belongs to user 4242"), "{}", reason());
    }

    #[test]
    fn garbage_in_a_record_is_an_error_and_never_a_record() {
        let temp = tempfile::tempdir().unwrap();
        let images = Images::open(temp.path()).unwrap();
        let whole = serde_json::to_string(&record()).unwrap();
        let deep = "[".repeat(100_000);
        let mut bad: Vec<String> = (0..whole.len()).map(|end| whole[..end].to_owned()).collect();
        bad.extend([
            deep,
            whole.replace("\"7\"", "\"../7\""),
            whole.replace("\"version\":1", "\"version\":-1"),
            whole.replace("\"version\":1", "\"version\":1,\"more\":0"),
            whole.replace("/srv/db", "/srv\\u0000/db"),
        ]);
        for content in bad {
            fs::write(temp.path().join(RECORD_NAME), &content).unwrap();
            assert!(matches!(images.record(), Err(Error::ImageFile { .. })), "{content}");
        }
        fs::write(temp.path().join(RECORD_NAME), whole.replace("\"version\":1", "\"version\":2,\"more\":0")).unwrap();
        assert!(matches!(images.record(), Err(Error::NewerRecord { found: 2, supported: 1, .. })));
    }
}
