//! The store on disk: its places, its locks, its small files, and reading records from it.
//!
//! # Locks
//!
//! Two locks, taken in this order and released in any:
//!
//! 1. `sweep.lock`, exclusive: one removal at a time.
//! 2. `lock`, shared by whoever begins a snapshot, for as long as it takes to choose the snapshot that the new one
//!    shares with and to write that down; exclusive by a removal, for as long as it takes to move a manifest away. A
//!    removal's long part holds only the first, so a snapshot never waits for it: what it may share with is live, for
//!    the removal counts what every begun snapshot wrote down.
//!
//! Besides, `batches/<batch>` is locked exclusively by the call that writes to it, and a manifest is locked shared by
//! who clones its snapshot; both make a removal fail with `Busy`.
//!
//! Files here belong to fsnap alone (the directory's mode is 0700), so they are used by their paths.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fsnap_backend::{
    Capabilities, Consistency, Error, ErrorKind, Identity, IoContext, Locator, Result, Snapshot, StoreInfo, beneath,
};
use rustix::fs::Access;

use crate::KIND;
use crate::format::{self, Malformed, Writer};
use crate::lock::Lock;
use crate::manifest::{Manifest, Partial};
use crate::record::{self, BatchId, ContentRef, Form, Record, RecordRef};
use crate::settle::is_of_this_boot;

const STORE_MAGIC: &[u8; 8] = b"fsnapSTO";
const HEADER: &str = "fsnap-store";
const PLACES: [&str; 6] = ["batches", "partials", "snapshots", "doomed", "hints", "volumes"];
/// What callers keep beside the images.
pub(crate) const BESIDE: &str = "beside";
const LOCKS: [&str; 2] = ["lock", "sweep.lock"];

/// How many record files stay open for reading.
const OPEN_BATCHES: usize = 64;

/// A directory that holds snapshots of any directories.
///
/// Cheap to clone: all clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

/// What is decided about a store when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The length in bytes from which a file that changed is kept as the difference to its version before, where blocks
    /// cannot be shared.
    pub deltas_from: u64,
}

impl Default for Options {
    /// Differences from 1 MiB: for what is smaller, a copy costs less than looking for one.
    fn default() -> Self {
        Self { deltas_from: 1 << 20 }
    }
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) dir: PathBuf,
    pub(crate) descriptor: OwnedFd,
    /// Device and inode of `dir`.
    pub(crate) place: (u64, u64),
    pub(crate) info: StoreInfo,
    /// How long a file must be to be kept as the difference to its version before.
    pub(crate) deltas_from: u64,
    records: Mutex<HashMap<BatchId, Arc<File>>>,
}

impl Store {
    /// Tells whether `dir` can be a volume, and where its store lies unless the user names another place: beside it,
    /// in `.fsnap`, where contents can be shared if the file system can share them.
    ///
    /// Fails with [`ErrorKind::NotAVolume`] for what is no directory, has nothing beside it, or has nothing beside it
    /// that we may write to: name a place for the store then.
    pub fn probe(dir: &Path) -> Result<PathBuf> {
        let refused = |reason: String| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason };
        crate::volume::open(dir)?;
        let parent = dir.parent().ok_or_else(|| refused("there is nothing beside it to hold a store".into()))?;
        let place = parent.join(".fsnap");
        let writable = if place.is_dir() { &place } else { parent };
        rustix::fs::access(writable, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
            refused(format!("a store would lie in {}, which cannot be written: {error}", writable.display()))
        })?;
        Ok(place)
    }

    /// Makes a store at `place`, whose parent must exist, or opens the one that fsnap made there before.
    ///
    /// Fails with [`ErrorKind::NotAStore`] if something else is there.
    pub fn create(place: &Path) -> Result<Self> {
        Self::create_with(place, Options::default())
    }

    /// Like [`Store::create`]; a store that is there already keeps the options that it was made with.
    pub fn create_with(place: &Path, options: Options) -> Result<Self> {
        let refused = |reason: &str| Error::NotAStore { dir: place.to_owned(), kind: KIND, reason: reason.to_owned() };
        if !place.is_absolute() {
            return Err(refused("its path is not absolute"));
        }
        match fs::DirBuilder::new().mode(0o700).create(place) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match Self::open(place) {
                    Err(Error::NotAStore { .. }) if Self::is_unfinished(place)? => {}
                    opened => return opened,
                };
            }
            failed => failed.context("make the directory", place)?,
        }
        for name in PLACES {
            match fs::DirBuilder::new().mode(0o700).create(place.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    Err(error).context("make the directory", place.join(name))?;
                }
                _ => {}
            }
        }
        for name in LOCKS {
            let path = place.join(name);
            private_file().append(true).create(true).open(&path).context("make", &path)?;
        }
        // The header comes last: a directory without it is no store yet.
        let mut header = Writer::default();
        header.raw(&random()?);
        header.varint(options.deltas_from);
        let path = place.join(HEADER);
        write_file(&path, &format::seal(STORE_MAGIC, header), true)?;
        if let Some(parent) = place.parent() {
            sync_dir(parent)?;
        }
        Self::open(place)
    }

    /// Whether an earlier `create` was cut short here, or nothing was done at all.
    fn is_unfinished(place: &Path) -> Result<bool> {
        for entry in fs::read_dir(place).context("list", place)? {
            let name = entry.context("list", place)?.file_name();
            let ours = PLACES.iter().chain(&LOCKS).any(|known| name == **known);
            if !ours && !name.to_string_lossy().starts_with(&format!(".{HEADER}")) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Opens the store at `place` and changes nothing.
    ///
    /// Fails with [`ErrorKind::NotFound`] where nothing is, with [`ErrorKind::NotAStore`] for another directory, and
    /// with [`ErrorKind::NewerVersion`] for a store of a later release.
    pub fn open(place: &Path) -> Result<Self> {
        let refused = |reason: &str| Error::NotAStore { dir: place.to_owned(), kind: KIND, reason: reason.to_owned() };
        if !place.is_absolute() {
            return Err(refused("its path is not absolute"));
        }
        let dir = fs::canonicalize(place).context("open the store", place)?;
        let descriptor = match beneath::open_root(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Err(refused("it is no directory")),
            opened => opened.context("open the store", &dir)?,
        };
        let path = dir.join(HEADER);
        let bytes = match read_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(refused("it has no file fsnap-store")),
            bytes => bytes?,
        };
        if !bytes.starts_with(STORE_MAGIC) {
            return Err(refused("its file fsnap-store is not one of this backend"));
        }
        let mut reader = format::unseal(STORE_MAGIC, &bytes, &path)?;
        let header = reader.array().and_then(|id| {
            // A store of a release that knew no differences has no such field, and goes on without them.
            let deltas_from = if reader.is_empty() { u64::MAX } else { reader.varint()? };
            Ok((BatchId(id), deltas_from))
        });
        let header = header.and_then(|header| reader.end().map(|()| header));
        let (id, deltas_from) = header.map_err(|malformed| malformed.of(path.display().to_string()))?;
        let found = beneath::look_fd(&descriptor).context("read the attributes of", &dir)?;
        let capabilities = Capabilities {
            clones: true,
            constant_time_clones: false,
            xattrs: true,
            acls: true,
            ownership: is_root(),
            mountable: false,
            verifies_contents: true,
            live: Consistency::Fuzzy,
        };
        let info = StoreInfo { kind: KIND, identity: Identity::new(format!("rsync:{id}")), capabilities };
        let place = (found.device, found.meta.ino);
        let records = Mutex::default();
        Ok(Self { inner: Arc::new(Inner { dir, descriptor, place, info, deltas_from, records }) })
    }
}

impl Inner {
    pub(crate) fn path(&self, place: &str, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(place).join(name)
    }

    pub(crate) fn manifest_path(&self, at: &Locator) -> PathBuf {
        self.path("snapshots", at.as_str())
    }

    pub(crate) fn partial_path(&self, at: &Locator) -> PathBuf {
        self.path("partials", at.as_str())
    }

    pub(crate) fn batch_dir(&self, batch: BatchId) -> PathBuf {
        self.path("batches", batch.to_string())
    }

    pub(crate) fn content_path(&self, content: &ContentRef) -> PathBuf {
        let (chunk, name) = content_name(content.number, content.form);
        self.batch_dir(content.batch).join(chunk).join(name)
    }

    /// Removes a content and what lies beside it; what is read without it goes first.
    pub(crate) fn remove_content(&self, content: &ContentRef) -> Result<()> {
        remove_file(&crate::chunks::path_of(self, content))?;
        remove_file(&self.content_path(content))
    }

    /// Locks the store while a snapshot begins.
    pub(crate) fn begin_lock(&self) -> Result<Lock> {
        Lock::shared(&self.dir.join("lock"))
    }

    /// Locks the store while a snapshot is withdrawn.
    pub(crate) fn withdraw_lock(&self) -> Result<Lock> {
        Lock::exclusive(&self.dir.join("lock"))
    }

    /// Locks out other removals.
    pub(crate) fn sweep_lock(&self) -> Result<Lock> {
        Lock::exclusive(&self.dir.join("sweep.lock"))
    }

    /// Waits for the call that writes to a batch, and locks it.
    pub(crate) fn wait_for_batch(&self, batch: BatchId) -> Result<Lock> {
        Lock::exclusive(&self.batch_dir(batch))
    }

    /// Locks a batch for the call that writes to it.
    pub(crate) fn lock_batch(&self, batch: BatchId, at: &Locator) -> Result<Lock> {
        Lock::try_exclusive(&self.batch_dir(batch), || format!("the snapshot {at}"), "it is being taken")
    }

    /// Reads a small file that is a frame; `None` if it is not there.
    pub(crate) fn read_frame<T>(
        &self,
        path: &Path,
        magic: &[u8; 8],
        decode: impl FnOnce(format::Reader<'_>) -> format::Parsed<T>,
    ) -> Result<Option<T>> {
        let bytes = match read_file(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        let reader = format::unseal(magic, &bytes, path)?;
        decode(reader).map(Some).map_err(|malformed| malformed.of(path.display().to_string()))
    }

    /// The manifest at `at`, if there is one.
    pub(crate) fn manifest(&self, at: &Locator) -> Result<Option<Manifest>> {
        self.read_frame(&self.manifest_path(at), Manifest::MAGIC, Manifest::decode)
    }

    /// The manifest of a snapshot that the caller knows, if it is whole and the one that is there.
    pub(crate) fn whole(&self, snapshot: &Snapshot) -> Result<Manifest> {
        let manifest = self.whole_at(&snapshot.at)?;
        if manifest.identity() != snapshot.identity {
            return Err(Error::WrongIdentity {
                what: format!("the snapshot {}", snapshot.at),
                expected: snapshot.identity.clone(),
                found: manifest.identity(),
            });
        }
        Ok(manifest)
    }

    /// The manifest of a whole snapshot.
    pub(crate) fn whole_at(&self, at: &Locator) -> Result<Manifest> {
        let manifest = if is_snapshot(at) { self.manifest(at)? } else { None };
        // What an earlier start of the system left unsettled may have lost its contents.
        let usable = |found: &Manifest| found.unsettled.as_ref().is_none_or(is_of_this_boot);
        manifest.filter(usable).ok_or_else(|| no_image(at))
    }

    /// The snapshot that was begun at `at`, if one was.
    pub(crate) fn partial(&self, at: &Locator) -> Result<Option<Partial>> {
        self.read_frame(&self.partial_path(at), Partial::MAGIC, Partial::decode)
    }

    /// The names in one of the store's places, sorted.
    pub(crate) fn names(&self, place: &str) -> Result<Vec<String>> {
        let path = self.dir.join(place);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).context("list", &path)? {
            // What is not UTF-8 is no locator, and not ours.
            names.extend(entry.context("list", &path)?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The locators of all snapshots that have a file in `place`.
    pub(crate) fn snapshots_in(&self, place: &str) -> Result<Vec<Locator>> {
        let names = self.names(place)?.into_iter().filter_map(|name| Locator::try_from(name).ok());
        Ok(names.filter(is_snapshot).collect())
    }

    /// The newest settled snapshot of a volume, if there is one.
    ///
    /// The hint spares reading all manifests; it is believed only as far as the manifest bears it out.
    pub(crate) fn newest_of(&self, volume: &Identity) -> Result<Option<(Locator, Manifest)>> {
        let settled = |at: &Locator| match self.manifest(at) {
            Ok(manifest) => Ok(manifest.filter(|found| found.unsettled.is_none() && &found.volume == volume)),
            // It is not built upon; `verify` tells of it.
            Err(Error::Damaged { .. } | Error::NewerVersion { .. }) => Ok(None),
            Err(error) => Err(error),
        };
        if let Ok(hint) = fs::read_to_string(self.hint_path(volume))
            && let Ok(at) = Locator::try_from(hint)
            && is_snapshot(&at)
            && let Some(manifest) = settled(&at)?
        {
            return Ok(Some((at, manifest)));
        }
        let mut newest: Option<(Locator, Manifest)> = None;
        for at in self.snapshots_in("snapshots")? {
            if let Some(manifest) = settled(&at)?
                && newest.as_ref().is_none_or(|(_, newest)| newest.taken < manifest.taken)
            {
                newest = Some((at, manifest));
            }
        }
        Ok(newest)
    }

    pub(crate) fn hint_path(&self, volume: &Identity) -> PathBuf {
        self.path("hints", blake3::hash(volume.as_str().as_bytes()).to_hex().as_str())
    }

    /// Reads a record and checks its hash.
    pub(crate) fn record(&self, at: &RecordRef) -> Result<Record> {
        let bytes = self.record_bytes(at)?;
        record::decode(&bytes).map_err(|malformed| malformed.of(format!("the record {}+{}", at.batch, at.offset)))
    }

    fn record_bytes(&self, at: &RecordRef) -> Result<Vec<u8>> {
        let what = || format!("the record {}+{}", at.batch, at.offset);
        let path = self.batch_dir(at.batch).join("records");
        let file = self.records_of(at.batch, &path)?;
        let length = file.metadata().context("read the attributes of", &path)?.len();
        if at.offset.checked_add(at.length.into()).is_none_or(|end| end > length) {
            return Err(Malformed("it lies beyond the end of its file").of(what()));
        }
        let mut bytes = vec![0; at.length as usize];
        file.read_exact_at(&mut bytes, at.offset).context("read", &path)?;
        if blake3::hash(&bytes).as_bytes() != &at.hash {
            return Err(Malformed("its hash is wrong").of(what()));
        }
        Ok(bytes)
    }

    fn records_of(&self, batch: BatchId, path: &Path) -> Result<Arc<File>> {
        let mut open = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(&batch) {
            return Ok(file.clone());
        }
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Malformed("its file is missing").of(path.display().to_string()));
            }
            opened => Arc::new(opened.context("open", path)?),
        };
        if open.len() >= OPEN_BATCHES {
            open.clear();
        }
        open.insert(batch, file.clone());
        Ok(file)
    }

    /// Forgets the open files of a batch that is removed, so that its space is free.
    pub(crate) fn forget(&self, batch: BatchId) {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).remove(&batch);
    }

    /// Makes everything that was written to the store's file system durable.
    pub(crate) fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(self.descriptor.as_fd()).context("make durable", &self.dir)
    }
}

/// The directory, within the batch's, and the name of the file that keeps a content.
pub(crate) fn content_name(number: u64, form: Form) -> (String, String) {
    let suffix = if form == Form::Patch { ".patch" } else { "" };
    (format!("{:x}", number >> 8), format!("{:02x}{suffix}", number & 0xff))
}

/// A locator of a snapshot of this backend: `s-` and 32 hex digits.
pub(crate) fn is_snapshot(at: &Locator) -> bool {
    has_form(at, "s-")
}

/// A locator of a clone of this backend: `v-` and 32 hex digits.
pub(crate) fn is_volume(at: &Locator) -> bool {
    has_form(at, "v-")
}

fn has_form(at: &Locator, prefix: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    at.as_str().strip_prefix(prefix).is_some_and(|id| id.len() == 32 && id.bytes().all(digit))
}

pub(crate) fn no_image(at: &Locator) -> Error {
    Error::NotFound { what: format!("a whole image at {at}") }
}

/// Whether we may give files to other owners; what a store can keep depends on it.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(crate) fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags).context("read", "random bytes")?;
    }
    Ok(bytes)
}

pub(crate) fn private_file() -> fs::OpenOptions {
    let mut options = File::options();
    options.mode(0o600);
    options
}

pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context("read", path)
}

/// Writes a file under its final name in one step: it is there as a whole or not at all.
///
/// Not `durable`, a power cut may leave it empty; its readers notice by its hash.
pub(crate) fn write_file(path: &Path, bytes: &[u8], durable: bool) -> Result<()> {
    let (dir, name) = (path.parent().unwrap_or(Path::new("/")), path.file_name().unwrap_or_default());
    // A leading dot is no locator, so an unfinished file is never taken for an image.
    let unfinished = dir.join(format!(".{}-{}", name.to_string_lossy(), BatchId(random()?)));
    let written = (|| {
        let mut file = private_file().write(true).create_new(true).open(&unfinished).context("make", &unfinished)?;
        file.write_all(bytes).context("write", &unfinished)?;
        if durable {
            file.sync_all().context("make durable", &unfinished)?;
        }
        fs::rename(&unfinished, path).context("put in place", path)
    })();
    written.map_err(|error| error.and_undo(remove_file(&unfinished)))?;
    if durable { sync_dir(dir) } else { Ok(()) }
}

/// Removes what [`write_file`] left of a snapshot's files when it was killed; nobody else may be writing them.
pub(crate) fn remove_unfinished(store: &Inner, at: &Locator) -> Result<()> {
    let start = format!(".{at}-");
    for path in [store.manifest_path(at), store.partial_path(at)] {
        let dir = path.parent().unwrap_or(&path);
        for entry in fs::read_dir(dir).context("list", dir)? {
            let name = entry.context("list", dir)?.file_name();
            if name.as_encoded_bytes().starts_with(start.as_bytes()) {
                remove_file(&dir.join(name))?;
            }
        }
    }
    Ok(())
}

pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).context("make durable", dir)
}

/// Removes a file; succeeds if it is not there.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.context("remove", path),
    }
}
