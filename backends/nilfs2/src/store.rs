//! Finding, making and opening a store, and its layout on disk.
//!
//! ```text
//! .fsnap-nilfs2/        a directory on any other file system, 0700
//!   fsnap-store         the version of this layout, and the store's identity
//!   snapshots/          one record per snapshot: a symbolic link that leads nowhere
//!   file-systems/       one empty file per NILFS2 that has ever had one; its lock
//! ```
//!
//! NILFS2 itself keeps the snapshots, and gives each a number and nothing else: no name, no label. So the store is but
//! the memory of whose they are. It lies outside of the volume, for else every snapshot would hold it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use fsnap_backend::{Capabilities, Consistency, Error, Identity, IoContext, Result, StoreInfo, beneath};
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::KIND;
use crate::file_system::open_volume;
use crate::record::LockFiles;

/// The usual name of a store.
const NAME: &str = ".fsnap-nilfs2";
const VERSION_FILE: &str = "fsnap-store";
/// One that is being written.
const NEW_VERSION_FILE: &str = "fsnap-store.new";
const VERSION: u32 = 1;
const FIRST_LINE: &str = "fsnap nilfs2 store, version ";
const SECOND_LINE: &str = "identity ";
const SNAPSHOTS: &str = "snapshots";
const FILE_SYSTEMS: &str = "file-systems";

/// The memory of which snapshots of NILFS2 file systems fsnap made.
#[derive(Debug)]
pub struct Store {
    pub(crate) info: StoreInfo,
    pub(crate) place: PathBuf,
    pub(crate) root: OwnedFd,
    pub(crate) snapshots: OwnedFd,
    pub(crate) file_systems: OwnedFd,
    pub(crate) lock_files: LockFiles,
}

impl Store {
    /// Tells where the store for the volume `dir` lies unless the user names another place: beside it.
    ///
    /// Fails with [`ErrorKind::NotAVolume`](fsnap_backend::ErrorKind::NotAVolume) if `dir` is not the root of a NILFS2
    /// that is mounted for writing.
    pub fn probe(dir: &Path) -> Result<PathBuf> {
        let (root, _) = open_volume(dir)?;
        let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason: reason.to_owned() };
        let beside = dir.canonicalize().context("find", dir)?;
        let beside =
            beside.parent().ok_or_else(|| refused("there is nothing beside it: name a place for the store"))?;
        let device = |file: &OwnedFd| Ok(beneath::look_fd(file)?.device);
        let above = beneath::open_root(beside).context("open", beside)?;
        let same: io::Result<bool> = device(&above).and_then(|above| Ok(above == device(&root)?));
        if same.context("examine", beside)? {
            return Err(refused("what lies beside it lies in it: name a place for the store on another file system"));
        }
        Ok(beside.join(NAME))
    }

    /// Makes a store at `place`, an absolute path at which nothing is yet, or opens the one that is there.
    ///
    /// Whatever cut an earlier call short, another one finishes its work.
    pub fn create(place: &Path) -> Result<Self> {
        let (parent, name) = parent_of(place)?;
        match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).context("make the directory", place),
        }
        furnish(&open_root(&parent, name, place)?, place)?;
        rustix::fs::fsync(&parent).context("make durable", place)?;
        Self::open(place)
    }

    /// Opens the store at `place`, an absolute path, and writes nothing.
    pub fn open(place: &Path) -> Result<Self> {
        let (parent, name) = parent_of(place)?;
        let root = open_root(&parent, name, place)?;
        let header = match read_header(&root).context("read the version of", place)? {
            Some(header) if header.version == VERSION => header,
            Some(Header { version: found, .. }) if found > VERSION => {
                let what = format!("the store {}", place.display());
                return Err(Error::NewerVersion { what, found, supported: VERSION });
            }
            _ => return Err(not_a_store(place, "it has no file `fsnap-store` of fsnap's")),
        };
        let open = |name: &str| beneath::open_dir(&root, OsStr::new(name)).context("open", place.join(name));
        let (snapshots, file_systems) = (open(SNAPSHOTS)?, open(FILE_SYSTEMS)?);
        let info = StoreInfo {
            kind: KIND,
            identity: Identity::new(format!("{KIND}-store:{}", header.identity)),
            capabilities: Capabilities {
                clones: false,
                constant_time_clones: false,
                xattrs: false,
                acls: false,
                ownership: true,
                mountable: true,
                // To make a checkpoint a snapshot is itself a change, after which the next one has another number.
                // The log has checksums, but the kernel compares them only when it recovers.
                verifies_contents: false,
                // A page that is stored to through a mapping gets into the log whenever it is written out.
                live: Consistency::CrashConsistent,
            },
        };
        let lock_files = LockFiles::default();
        Ok(Self { info, place: place.to_owned(), root, snapshots, file_systems, lock_files })
    }
}

fn not_a_store(place: &Path, reason: &str) -> Error {
    Error::NotAStore { dir: place.to_owned(), kind: KIND, reason: reason.to_owned() }
}

/// Opens the directory above `place`, and tells its name there.
fn parent_of(place: &Path) -> Result<(OwnedFd, &OsStr)> {
    let (true, Some(above), Some(name)) = (place.is_absolute(), place.parent(), place.file_name()) else {
        return Err(not_a_store(place, "name it by an absolute path that ends in a name"));
    };
    match beneath::open_root(above) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Error::NotFound { what: above.display().to_string() })
        }
        parent => Ok((parent.context("open", above)?, name)),
    }
}

/// Opens the store's directory; whoever could write to it could have fsnap remove the snapshots of others.
fn open_root(parent: &OwnedFd, name: &OsStr, place: &Path) -> Result<OwnedFd> {
    let root = match beneath::open_dir(parent, name) {
        Ok(root) => root,
        Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT) => return Err(Error::NotFound { what: format!("the store {}", place.display()) }),
            Some(Errno::LOOP | Errno::NOTDIR) => return Err(not_a_store(place, "it is not a directory")),
            // A store may be mounted by itself.
            Some(Errno::XDEV) => beneath::open_root(place).context("open", place)?,
            _ => return Err(error).context("open", place),
        },
    };
    let meta = beneath::stat_fd(&root).context("read the attributes of", place)?;
    let user = rustix::process::geteuid();
    if meta.uid != user.as_raw() && meta.uid != 0 || meta.mode & 0o022 != 0 {
        return Err(not_a_store(place, "others than its user may write to it"));
    }
    Ok(root)
}

/// Puts into a new directory what makes it a store, the version last.
fn furnish(root: &OwnedFd, place: &Path) -> Result<()> {
    if read_header(root).context("read the version of", place)?.is_some() {
        return Ok(());
    }
    let strange =
        |name: &std::ffi::OsString| ![SNAPSHOTS, FILE_SYSTEMS, NEW_VERSION_FILE].iter().any(|own| name == own);
    if beneath::names(root).context("list", place)?.iter().any(strange) {
        return Err(not_a_store(place, "it has files in it; name a place where nothing is yet"));
    }
    for name in [SNAPSHOTS, FILE_SYSTEMS] {
        match rustix::fs::mkdirat(root, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).context("make the directory", place.join(name)),
        }
    }
    write_header(root).context("write the version of", place)?;
    rustix::fs::fsync(root).context("make durable", place)
}

/// Writes the version file; it has its name only once it is complete.
fn write_header(root: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(root, NEW_VERSION_FILE, flags, Mode::from_raw_mode(0o600))?);
    writeln!(file, "{FIRST_LINE}{VERSION}\n{SECOND_LINE}{:016x}{:016x}", random()?, random()?)?;
    file.sync_all()?;
    match rustix::fs::renameat_with(root, NEW_VERSION_FILE, root, VERSION_FILE, RenameFlags::NOREPLACE) {
        // Another call came first.
        Err(Errno::EXIST) => Ok(rustix::fs::unlinkat(root, NEW_VERSION_FILE, AtFlags::empty())?),
        renamed => Ok(renamed?),
    }
}

/// A number that nobody can guess or repeat.
pub(crate) fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

#[derive(Debug, PartialEq, Eq)]
struct Header {
    version: u32,
    identity: String,
}

/// What the version file says; `None` if there is none, or a strange one.
fn read_header(root: &OwnedFd) -> io::Result<Option<Header>> {
    let file = match beneath::open_file(root, OsStr::new(VERSION_FILE)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => return Ok(None),
        file => file?,
    };
    let mut text = Vec::new();
    file.take(256).read_to_end(&mut text)?;
    Ok(std::str::from_utf8(&text).ok().and_then(parse_header))
}

fn parse_header(text: &str) -> Option<Header> {
    let mut lines = text.lines();
    let version = lines.next()?.strip_prefix(FIRST_LINE)?.parse().ok()?;
    let identity = lines.next().and_then(|line| line.strip_prefix(SECOND_LINE)).unwrap_or_default();
    let plain = identity.len() == 32 && identity.bytes().all(|byte| byte.is_ascii_hexdigit());
    (plain || version > VERSION).then(|| Header { version, identity: identity.to_owned() })
}

#[cfg(test)]
mod tests {
    use fsnap_backend::ErrorKind;

    use super::*;

    #[test]
    fn a_store_is_made_once_and_is_the_same_when_opened_again() {
        let temp = tempfile::tempdir().unwrap();
        let place = temp.path().join("store");
        let first = Store::create(&place).unwrap().info;
        assert_eq!(Store::create(&place).unwrap().info, first);
        assert_eq!(Store::open(&place).unwrap().info, first);
        assert_ne!(Store::create(&temp.path().join("other")).unwrap().info.identity, first.identity);
    }

    #[test]
    fn what_is_no_store_is_refused_by_name() {
        let temp = tempfile::tempdir().unwrap();
        let place = temp.path().join("place");
        let kind = |opened: Result<Store>| opened.unwrap_err().kind();
        assert_eq!(kind(Store::open(&place)), ErrorKind::NotFound);
        assert_eq!(kind(Store::create(&temp.path().join("missing/place"))), ErrorKind::NotFound);
        assert_eq!(kind(Store::create(Path::new("relative"))), ErrorKind::NotAStore);
        std::fs::create_dir(&place).unwrap();
        std::fs::write(place.join("a file"), "of a stranger").unwrap();
        assert_eq!(kind(Store::create(&place)), ErrorKind::NotAStore);
        std::fs::write(place.join(VERSION_FILE), format!("{FIRST_LINE}{}\n", VERSION + 1)).unwrap();
        assert_eq!(kind(Store::open(&place)), ErrorKind::NewerVersion);
        std::os::unix::fs::symlink("/etc", temp.path().join("link")).unwrap();
        assert_eq!(kind(Store::open(&temp.path().join("link"))), ErrorKind::NotAStore);
    }

    #[test]
    fn a_store_that_was_cut_short_is_finished() {
        let temp = tempfile::tempdir().unwrap();
        let place = temp.path().join("store");
        std::fs::create_dir_all(place.join(SNAPSHOTS)).unwrap();
        Store::create(&place).unwrap();
    }
}
