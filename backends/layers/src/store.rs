//! The directory that keeps every change of a branch.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::data::Gate;
use super::lower::{Below, Lower};
use super::object::{self, Object, SAFE};
use super::{Result, copy_up, merge};

/// Why a branch could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another server has the store.
    #[error("{store:?} is in use by another server (process {by}): unmount it first, with `fsnap umount`")]
    Locked {
        /// The store.
        store: PathBuf,
        /// Its process id, as it wrote it down.
        by: String,
    },
    /// The directory has other things in it.
    #[error("{store:?} is neither empty nor a store of this kind: name another directory")]
    NotAStore {
        /// The directory.
        store: PathBuf,
    },
    /// The store was written by a later release.
    #[error("{store:?} has format {found:?}; this fsnap reads format {VERSION}")]
    Version {
        /// The store.
        store: PathBuf,
        /// What it says of itself.
        found: String,
    },
    /// A system call failed.
    #[error("cannot {action} {object:?}: {source}")]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        object: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

const VERSION: &str = "fsnap-overlay 1\n";
/// How long a server that was just unmounted may take to end, or somebody who only merges layers.
pub(super) const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 3 });
/// How long whoever has the lock may take to say what for.
const MOMENT: Duration = Duration::from_millis(50);

/// What a store is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To serve it, until it is unmounted.
    Serve,
    /// To do something that is done in a moment.
    Merge,
}

/// Stands behind the process id in a lock that is held for a moment only.
const MERGES: &str = " merges";

/// The store of one tree, opened by its server. Not the [`Store`](super::Store) of images, which tells of each only in which tree it is.
#[derive(Debug)]
pub(super) struct TreeStore {
    pub(super) dir: Arc<OwnedFd>,
    upper: Arc<OwnedFd>,
    /// `None` where nothing is written.
    work: Option<Arc<OwnedFd>>,
    index: Arc<OwnedFd>,
    /// Held for as long as the store is open by the one who writes it, or a sealed state is read.
    _lock: Option<OwnedFd>,
    made: u64,
    /// The namespace of private attributes.
    keys: Keys,
    /// A hole in a file of the upper can be told from zeros.
    pub(super) sparse: bool,
    /// The unit in which holes are found, in bytes.
    pub(super) block: u64,
    /// Makes the numbers of new files others than those below.
    pub(super) salt: u64,
    pub(super) gate: Arc<Gate>,
    /// Nothing in it is written, nor opened so.
    pub(super) read_only: bool,
    /// Files can share blocks.
    pub(super) shares: bool,
}

/// The names of fsnap's own extended attributes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys {
    prefix: &'static str,
}

impl Keys {
    fn own(self, name: &str) -> OsString {
        format!("{}fsnap.{name}", self.prefix).into()
    }
    /// Nothing of the lower shows through this directory.
    pub(super) fn opaque(self) -> OsString {
        format!("{}overlay.opaque", self.prefix).into()
    }
    /// The path of the lower directory that belongs to this one.
    pub(super) fn redirect(self) -> OsString {
        format!("{}overlay.redirect", self.prefix).into()
    }
    /// The number of the lower file that this one was.
    pub(super) fn origin(self) -> OsString {
        self.own("origin")
    }
    /// How many names the file still has in the lower alone.
    pub(super) fn links(self) -> OsString {
        self.own("links")
    }
    /// Holes before this offset stand for the content of the lower file at this path.
    pub(super) fn partial(self) -> OsString {
        self.own("partial")
    }
    /// This empty file stands for a device node that the kernel would take for a whiteout.
    pub(super) fn node(self) -> OsString {
        self.own("node")
    }

    /// Whether files of this kind can bear attributes of fsnap's own: users' attributes are for regular files and directories.
    pub(super) fn can_mark(self, kind: FileType) -> bool {
        self.prefix != "user." || matches!(kind, FileType::RegularFile | FileType::Directory)
    }

    /// Under which name a user's attribute is kept; `None` if users have none of that name.
    pub(super) fn kept(self, name: &OsStr) -> Option<OsString> {
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(self.prefix)) else {
            return Some(name.to_owned());
        };
        match rest.strip_prefix("overlay.") {
            Some(_) => Some(format!("{}fsnap.user.{rest}", self.prefix).into()),
            None if rest.starts_with("fsnap.") => None,
            None => Some(name.to_owned()),
        }
    }

    /// Under which name users see what is kept in the upper; `None` if they do not.
    pub(super) fn shown(self, name: &OsStr) -> Option<OsString> {
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(self.prefix)) else {
            return Some(name.to_owned());
        };
        match rest.strip_prefix("fsnap.user.") {
            Some(own) => Some(format!("{}{own}", self.prefix).into()),
            None if rest.starts_with("fsnap.") || rest.starts_with("overlay.") => None,
            None => Some(name.to_owned()),
        }
    }
}

/// The directory of paths that are too long for an attribute.
const REFS: &str = "refs";
/// Longer paths are kept in a file of their own: the smallest limit for an attribute's value is about 4,000 bytes.
const LONGEST_INLINE: usize = 1000;

impl TreeStore {
    /// Goes on with another layer; returns the store as it was, for reading.
    pub(super) fn replace_layer(&mut self, upper: Arc<OwnedFd>, index: Arc<OwnedFd>) -> Self {
        let before = self.reading(self.upper.clone(), self.index.clone());
        (self.upper, self.index) = (upper, index);
        before
    }

    /// The same store with that layer, for reading.
    pub(super) fn reading(&self, upper: Arc<OwnedFd>, index: Arc<OwnedFd>) -> Self {
        Self {
            dir: self.dir.clone(),
            upper,
            work: None,
            index,
            _lock: None,
            made: 0,
            keys: self.keys,
            sparse: self.sparse,
            block: self.block,
            salt: self.salt,
            gate: self.gate.clone(),
            read_only: true,
            shares: self.shares,
        }
    }

    pub(super) fn keys(&self) -> Keys {
        self.keys
    }
    pub(super) fn upper_root(&self) -> Arc<OwnedFd> {
        self.upper.clone()
    }
    /// Where things are made before they are put in place.
    pub(super) fn work(&self) -> Result<Arc<OwnedFd>> {
        self.work.clone().ok_or(Errno::ROFS)
    }
    pub(super) fn index(&self) -> Arc<OwnedFd> {
        self.index.clone()
    }

    /// A name in `work` that nothing has.
    pub(super) fn fresh(&mut self) -> OsString {
        self.made += 1;
        format!("{:x}", self.made).into()
    }

    /// Makes a path fit for an attribute.
    pub(super) fn shorten(&mut self, path: Vec<u8>) -> Result<Vec<u8>> {
        if path.len() <= LONGEST_INLINE {
            return Ok(path);
        }
        let name = blake3::hash(&path).to_hex();
        let refs = object::open_dir(&self.dir, OsStr::new(REFS))?;
        if object::find_at(&refs, OsStr::new(name.as_str()))?.is_none() {
            let (work, temporary) = (self.work()?, self.fresh());
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | SAFE;
            let mut file = File::from(rustix::fs::openat(&work, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
            let written = file.write_all(&path).and_then(|()| file.sync_all());
            written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            rustix::fs::renameat(&work, &temporary, &refs, name.as_str())?;
            rustix::fs::fsync(rustix::fs::openat(&refs, ".", OFlags::RDONLY | SAFE, Mode::empty())?)?;
        }
        Ok(format!("#{name}").into_bytes())
    }

    /// The path that `shorten` was given.
    pub(super) fn lengthen(&self, path: Vec<u8>) -> Result<Vec<u8>> {
        use std::io::Read;
        use std::os::unix::ffi::OsStrExt;
        let Some(name) = path.strip_prefix(b"#") else { return Ok(path) };
        let refs = object::open_dir(&self.dir, OsStr::new(REFS))?;
        let file = rustix::fs::openat(&refs, OsStr::from_bytes(name), OFlags::RDONLY | SAFE, Mode::empty())?;
        let mut long = Vec::new();
        File::from(file).read_to_end(&mut long).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(long)
    }
}

/// What a store of this kind may have in it.
const PARTS: [&str; 15] = [
    "lock",
    "version",
    "upper",
    "work",
    "index",
    REFS,
    "layers",
    "live",
    "lower",
    "holds",
    "identity",
    "images",
    "abandoned",
    "merge",
    "reading",
];

pub(super) fn failed<'a>(action: &'static str, object: &'a Path) -> impl Fn(Errno) -> Error + 'a {
    move |error| Error::Io { action, object: object.to_owned(), source: error.into() }
}

/// The lower and its store.
pub(super) type Opened = (Lower, TreeStore);

/// Opens the lower and its store; makes a new one where there is none.
pub(super) fn open(below: Below, store: &Path, purpose: Purpose, patience: Duration) -> Result<Opened, Error> {
    rustix::fs::mkdir(store, Mode::RWXU).or_else(exists_already).map_err(failed("make the directory", store))?;
    let dir = rustix::fs::openat(CWD, store, OFlags::RDONLY | OFlags::DIRECTORY | SAFE, Mode::empty());
    let dir = dir.map_err(failed("open the directory", store))?;
    let lock = lock(&dir, store, purpose, patience)?;
    let version = version(&dir, store)?;

    merge::recover(&dir).map_err(failed("finish the merging of layers of", store))?;
    let keys = keys_of_ours();
    let part = |name: &'static str| {
        rustix::fs::mkdirat(&dir, name, Mode::RWXU).or_else(exists_already)?;
        object::open_dir(&dir, OsStr::new(name)).map(Arc::new)
    };
    let parts = || {
        part(REFS)?;
        Ok((part("work")?, part("index")?))
    };
    let (work, index) = parts().map_err(failed("make a directory in", store))?;
    // What an earlier server had prepared and not put in place.
    let emptied = object::names(work.as_fd())
        .map_err(std::io::Error::from)
        .and_then(|names| names.iter().try_for_each(|(name, _)| fsnap_backend::beneath::remove_tree(&work, name)));
    emptied.map_err(|source| Error::Io { action: "empty the work directory of", object: store.into(), source })?;
    let mut lower = Lower::new(below, &dir).map_err(failed("examine the lower of", store))?;
    if !version {
        // The upper's root is made like any other directory that is copied up, and the version says that it is there.
        let mut prepare = || {
            rustix::fs::mkdirat(&work, "root", Mode::RWXU)?;
            let (from, to) = (lower.dir(&lower.root())?, Object::at(work.clone(), "root"));
            copy_up::copy_attributes(&from, &to, keys)?;
            to.set_times(&object::times_of(&from.stat()?))?;
            match rustix::fs::renameat_with(&work, "root", &dir, "upper", rustix::fs::RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => Ok(()),
                done => done,
            }?;
            // A store may have been made to note images in before the tree was.
            if read_file(&dir, "identity")?.is_none() {
                write_file(&dir, "identity", format!("{}\n", random()?).as_bytes())?;
            }
            write_file(&dir, "version", VERSION.as_bytes())?;
            rustix::fs::fsync(&dir)
        };
        prepare().map_err(failed("make a store in", store))?;
    }
    if read_file(&dir, "identity").map_err(failed("read the identity of", store))?.is_none() {
        let named = random().and_then(|random| write_file(&dir, "identity", format!("{random}\n").as_bytes()));
        named.map_err(failed("write the identity of", store))?;
    }
    let upper = object::open_dir(&dir, OsStr::new("upper")).map_err(failed("open the upper of", store))?;
    let (sparse, block, shares) = probe(&work).map_err(failed("examine", store))?;
    let salt = salt(&dir, &lower).map_err(failed("read the identity of", store))?;
    let dir = Arc::new(dir);
    let gate = Arc::new(Gate::new(dir.clone()));
    let upper = Arc::new(upper);
    let store = TreeStore {
        dir,
        upper,
        work: Some(work),
        index,
        _lock: Some(lock.into()),
        made: 0,
        keys,
        sparse,
        block,
        salt,
        gate,
        read_only: false,
        shares,
    };
    Ok((lower, store))
}

/// Opens the lowest layer of a store for reading; whoever writes above is not disturbed, and layers up to `number` are not merged
/// meanwhile.
pub(super) fn open_to_read(below: Below, store: &Path, number: u64) -> Result<Opened, Error> {
    let dir = rustix::fs::openat(CWD, store, OFlags::RDONLY | OFlags::DIRECTORY | SAFE, Mode::empty());
    let dir = Arc::new(dir.map_err(failed("open the directory", store))?);
    if !version(&dir, store)? {
        return Err(Error::NotAStore { store: store.into() });
    }
    let reading = merge::read_up_to(&dir, store, number)?;
    let part = |name: &str| object::open_dir(&dir, OsStr::new(name)).map(Arc::new);
    let open = || {
        let lower = Lower::new(below, &dir)?;
        let gate = Arc::new(Gate::new(dir.clone()));
        let (sparse, block, salt) =
            (true, rustix::fs::fstatvfs(&dir)?.f_bsize.clamp(4096, 1 << 20), salt(&dir, &lower)?);
        let (upper, index) = (part("upper")?, part("index")?);
        let keys = keys_of_ours();
        let store = TreeStore {
            dir: dir.clone(),
            upper,
            work: None,
            index,
            _lock: Some(reading),
            made: 0,
            keys,
            sparse,
            block,
            salt,
            gate,
            read_only: true,
            shares: false,
        };
        Ok((lower, store))
    };
    open().map_err(failed("open", store))
}

pub(super) fn keys_of_ours() -> Keys {
    Keys { prefix: if rustix::process::geteuid().is_root() { "trusted." } else { "user." } }
}

/// Replaces a small file as a whole. Not synced.
pub(super) fn write_file(dir: &OwnedFd, name: &str, content: &[u8]) -> Result<()> {
    let temporary = format!("work/{name}");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | SAFE;
    let mut file = File::from(rustix::fs::openat(dir, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
    let written = file.write_all(content).and_then(|()| if name == "version" { file.sync_all() } else { Ok(()) });
    written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    rustix::fs::renameat(dir, &temporary, dir, name)
}

/// Reads a small file; `None` if there is none.
pub(super) fn read_file(dir: &OwnedFd, name: &str) -> Result<Option<String>> {
    use std::io::Read;
    let file = match rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::NONBLOCK | SAFE, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        file => File::from(file?),
    };
    let mut text = String::new();
    let read = file.take(1 << 16).read_to_string(&mut text);
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(Some(text.trim_end().to_owned()))
}

/// Digits that nobody can guess or repeat.
pub(super) fn random() -> Result<String> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Tells the numbers of new files from those that layers below have: 19 bits above inode numbers of ordinary size.
fn salt(dir: &OwnedFd, lower: &Lower) -> Result<u64> {
    if !lower.is_tree() {
        return Ok(0);
    }
    let identity = read_file(dir, "identity")?.unwrap_or_default();
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&blake3::hash(identity.as_bytes()).as_bytes()[..4]);
    Ok(((u64::from_le_bytes(bytes) % 0x7_ffff) + 1) << 33)
}

fn exists_already(error: Errno) -> Result<()> {
    if error == Errno::EXIST { Ok(()) } else { Err(error) }
}

/// Takes the store for this process.
///
/// Waits so long for a server, and always for who only merges layers.
pub(super) fn lock(dir: &OwnedFd, store: &Path, purpose: Purpose, patience: Duration) -> Result<File, Error> {
    use std::io::Seek;
    let io =
        |action: &'static str| move |source: std::io::Error| Error::Io { action, object: store.join("lock"), source };
    let foreign = object::names(dir.as_fd()).map_err(|error| io("list")(error.into()))?;
    if foreign.iter().any(|(name, _)| !PARTS.iter().any(|own| name == own)) {
        return Err(Error::NotAStore { store: store.into() });
    }
    let flags = OFlags::RDWR | OFlags::CREATE | SAFE;
    let file = rustix::fs::openat(dir, "lock", flags, Mode::RUSR | Mode::WUSR);
    let mut file = File::from(file.map_err(|error| io("open")(error.into()))?);
    let begun = Instant::now();
    while let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if error != Errno::WOULDBLOCK {
            return Err(io("lock")(error.into()));
        }
        let mut said = [0; 32];
        let length = std::os::unix::fs::FileExt::read_at(&file, &mut said, 0).map_err(io("read"))?;
        let by = String::from_utf8_lossy(&said[..length]).trim().to_owned();
        let patience = match purpose {
            _ if by.ends_with(MERGES) => PATIENCE,
            Purpose::Serve => patience.max(MOMENT),
            Purpose::Merge => patience,
        };
        if begun.elapsed() >= patience {
            return Err(Error::Locked { store: store.into(), by });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let note = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}{}", std::process::id(), if purpose == Purpose::Merge { MERGES } else { "" })
    };
    note(&mut file).map_err(io("write"))?;
    Ok(file)
}

/// Whether the store was made already.
fn version(dir: &OwnedFd, store: &Path) -> Result<bool, Error> {
    use std::io::Read;
    let file = match rustix::fs::openat(dir, "version", OFlags::RDONLY | SAFE, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(false),
        file => {
            file.map_err(|error| Error::Io { action: "open", object: store.join("version"), source: error.into() })?
        }
    };
    let mut found = String::new();
    let read = File::from(file).take(100).read_to_string(&mut found);
    read.map_err(|source| Error::Io { action: "read", object: store.join("version"), source })?;
    match found.as_str() {
        VERSION => Ok(true),
        // The version is written last: a store without it was never used.
        "" => Ok(false),
        _ => Err(Error::Version { store: store.into(), found: found.trim().to_owned() }),
    }
}

/// Whether the upper's file system tells where holes are, and in which unit; and whether its files can share blocks.
fn probe(work: &OwnedFd) -> Result<(bool, u64, bool)> {
    let block = rustix::fs::fstatvfs(work)?.f_bsize.clamp(4096, 1 << 20);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | SAFE;
    let file = rustix::fs::openat(work, "probe", flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::unlinkat(work, "probe", AtFlags::empty())?;
    rustix::fs::ftruncate(&file, 4 * block)?;
    rustix::io::pwrite(&file, &vec![0; block as usize], block)?;
    let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0));
    let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(block));
    let other = rustix::fs::openat(work, "probe", flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::unlinkat(work, "probe", AtFlags::empty())?;
    let shares = rustix::fs::ioctl_ficlone(&other, &file).is_ok();
    Ok((data == Ok(block) && hole == Ok(2 * block), block, shares))
}

impl super::Tree {
    /// Sets one of fsnap's own attributes.
    pub(super) fn mark(&self, object: &Object, key: OsString, value: &[u8]) -> Result<()> {
        object.set_xattr(key, value, XattrFlags::empty())
    }

    /// Puts a whiteout at `name`, over whatever is there but a directory.
    pub(super) fn white_out(&mut self, dir: &OwnedFd, name: &OsStr, replace: bool) -> Result<()> {
        if !replace {
            return rustix::fs::mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0);
        }
        let (work, temporary) = (self.store.work()?, self.store.fresh());
        rustix::fs::mknodat(&work, &temporary, FileType::CharacterDevice, Mode::empty(), 0)?;
        rustix::fs::renameat(&work, &temporary, dir, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever merges has the store for a moment, in which a first look at the tree must not fail.
    #[test]
    fn a_server_waits_for_who_only_merges() {
        let base = tempfile::tempdir().unwrap();
        let dir = fsnap_backend::beneath::open_root(base.path()).unwrap();
        let take = |purpose| lock(&dir, base.path(), purpose, Duration::ZERO);
        let merging = take(Purpose::Merge).unwrap();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| take(Purpose::Serve));
            // Longer than a server would be waited for.
            std::thread::sleep(4 * MOMENT);
            drop(merging);
            let serving = server.join().unwrap().expect("it waits");
            let refused = take(Purpose::Serve).unwrap_err().to_string();
            assert!(refused.contains(&format!("process {})", std::process::id())), "{refused}");
            assert!(matches!(take(Purpose::Merge), Err(Error::Locked { .. })));
            drop(serving);
        });
    }
}
