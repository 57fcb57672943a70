//! Finding, making and opening a store, and its layout on disk.
//!
//! ```text
//! /var/lib/fsnap/dm-thin/POOL/   0700; the usual place
//!   fsnap-store                  JSON: the version, the store's UUID, its pool, the limits, how the pool is brought up
//!   begun/ images/ leaving/      one record per image
//!   suspended/                   a note for each device that is suspended just now
//!   volumes/                     a record for each volume that fsnap made in its pool
//!   new-volume                   a note, while a volume is being made
//!   metadata-copy                a note, while the pool's metadata are read
//! ```
//!
//! The store lies beside the pool and not in it: a thin pool has room for blocks, and for no word about them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use fsnap_backend::{Capabilities, Consistency, Error, Identity, IoContext, Result, StoreInfo, beneath};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::KIND;
use crate::bring_up::{self, Backing};
use crate::dm::Mapper;
use crate::guard::Guards;
use crate::pool::{Fill, Limits, Pool};
use crate::record::{Records, Stage, random_hex};
use crate::suspend::{self, Notes};
use crate::volume::{Known, Live};

/// Where stores lie unless the user names another place.
pub const STORES: &str = "/var/lib/fsnap/dm-thin";

pub(crate) const FILE: &str = "fsnap-store";
const VERSION: u32 = 1;
const LONGEST: u64 = 1 << 16;

/// The directory of the volumes that fsnap made.
pub(crate) const VOLUMES: &str = "volumes";

/// What makes a directory a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    version: u32,
    /// Random.
    pub(crate) uuid: String,
    /// The pool, by device-mapper's name.
    pub(crate) pool: String,
    /// The pool's device-mapper UUID, empty if it has none.
    pub(crate) pool_uuid: String,
    #[serde(default)]
    pub(crate) limits: Limits,
    /// How the pool is brought up after a restart, if fsnap made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backing: Option<Backing>,
    /// The pool was up once: what it stands on has metadata to be kept.
    #[serde(default)]
    pub(crate) started: bool,
    /// Its data and metadata say that they are the pool's.
    #[serde(default)]
    pub(crate) signed: bool,
}

impl Settings {
    pub(crate) fn new(pool: &str, pool_uuid: &str) -> Result<Self> {
        Ok(Self {
            version: VERSION,
            uuid: random_hex(16)?,
            pool: pool.to_owned(),
            pool_uuid: pool_uuid.to_owned(),
            limits: Limits::default(),
            backing: None,
            started: false,
            signed: false,
        })
    }
}

/// A place for records of the snapshots and clones in one thin pool, with that pool.
#[derive(Debug)]
pub struct Store {
    pub(crate) info: StoreInfo,
    /// An absolute path without symbolic links.
    pub(crate) place: PathBuf,
    pub(crate) root: OwnedFd,
    pub(crate) settings: Settings,
    pub(crate) mapper: Mapper,
    pub(crate) pool: Pool,
    pub(crate) records: Records,
    pub(crate) notes: Notes,
    pub(crate) guards: Guards,
    pub(crate) known: Known,
}

impl Store {
    /// Tells where the store for the volume `dir` lies unless the user names another place: in a directory of the pool's
    /// name below [`STORES`].
    ///
    /// Fails with [`ErrorKind::NotAVolume`](fsnap_backend::ErrorKind::NotAVolume) if `dir` is not the mount point of a
    /// file system on a thin device.
    pub fn probe(dir: &Path) -> Result<PathBuf> {
        let (_, live) = Live::open(&Mapper::open()?, None, dir)?;
        Ok(Path::new(STORES).join(live.pool.name))
    }

    /// Makes a store at `place`, an absolute path at which nothing is yet, or opens the one that is there.
    ///
    /// The pool of a new store is the one whose device-mapper name is the last part of `place`.
    pub fn create(place: &Path) -> Result<Self> {
        let name = place.file_name().and_then(OsStr::to_str);
        let name = name.ok_or_else(|| not_a_store(place, "its last part has to be the name of a thin pool"))?;
        Self::create_for(place, name)
    }

    /// Makes a store at `place` for the pool of that name, or opens the one that is there.
    pub fn create_for(place: &Path, pool: &str) -> Result<Self> {
        if !is_made(place)? {
            let mapper = Mapper::open()?;
            let pool = find_pool(&mapper, place, pool)?;
            make(place, &Settings::new(&pool.name, &pool.uuid)?)?;
        }
        Self::open(place)
    }

    /// Opens the store at `place`, an absolute path.
    ///
    /// Brings its pool up, if fsnap made that, resumes what a killed call left suspended, and undoes what one left of a new volume; changes
    /// nothing else.
    pub fn open(place: &Path) -> Result<Self> {
        if !place.is_absolute() {
            return Err(not_a_store(place, "name it by an absolute path"));
        }
        let (root, mut settings) = open_root(place)?;
        let place = place.canonicalize().context("find", place)?;
        let mapper = Mapper::open()?;
        let notes = Notes::open(&root, &place)?;
        // First of all: whatever else fails, nobody has to wait any longer.
        notes.resume_left_behind(&mapper)?;
        if let Some(backing) = settings.backing.clone() {
            bring_up::start(&mapper, &root, &place, &mut settings, &backing)?;
        }
        let pool = find_pool(&mapper, &place, &settings.pool)?;
        if pool.uuid != settings.pool_uuid {
            return Err(Error::WrongIdentity {
                what: pool.to_string(),
                expected: Identity::new(settings.pool_uuid.clone()),
                found: Identity::new(pool.uuid),
            });
        }
        let info = StoreInfo {
            kind: KIND,
            identity: Identity::new(format!("{KIND}:{}", settings.uuid)),
            capabilities: Capabilities {
                clones: true,
                constant_time_clones: true,
                xattrs: true,
                acls: true,
                ownership: true,
                mountable: true,
                verifies_contents: false,
                // The suspension stops every writer at once, and writes out what each had written.
                live: Consistency::PointInTime,
            },
        };
        let records = Records::open(&root, &place)?;
        let (guards, known) = (Guards::default(), Known::default());
        let store = Self { info, place, root, settings, mapper, pool, records, notes, guards, known };
        store.release_left_behind()?;
        store.undo_volume_left_behind();
        Ok(store)
    }

    /// How full its pool is.
    pub fn fill(&self) -> Result<Fill> {
        self.pool.fill(&self.mapper, true)
    }

    /// The bytes of one of its pool's data blocks.
    pub fn block(&self) -> Result<u64> {
        self.pool.block(&self.mapper)
    }

    /// How much must be free in its pool before an image is made.
    pub fn limits(&self) -> Limits {
        self.settings.limits
    }

    /// The device-mapper name of its pool.
    pub fn pool_name(&self) -> &str {
        &self.pool.name
    }

    /// Wants so much to be free in its pool before an image is made, as long as it is open.
    pub fn keep_free(&mut self, limits: Limits) {
        self.settings.limits = limits;
    }

    /// Sets how much must be free in its pool before an image is made.
    pub fn set_limits(&mut self, limits: Limits) -> Result<()> {
        let settings = Settings { limits, ..self.settings.clone() };
        write(&self.root, &settings).context("write", self.place.join(FILE))?;
        self.settings = settings;
        Ok(())
    }
}

/// Resumes what killed calls left suspended by the records of the store at `place`; needs no pool.
///
/// Tells the names of the devices. For whoever finds out that a store cannot be opened.
pub fn resume_left_behind(place: &Path) -> Result<Vec<String>> {
    let (root, _) = open_root(place)?;
    Notes::open(&root, place)?.resume_left_behind(&Mapper::open()?)
}

fn find_pool(mapper: &Mapper, place: &Path, name: &str) -> Result<Pool> {
    let pool = Pool::named(mapper, name)?
        .ok_or_else(|| Error::NotFound { what: format!("the thin pool {}", name.escape_debug()) })?;
    match pool.owner() {
        Some(why) => Err(not_a_store(place, &format!("{pool} is not for fsnap: {why}"))),
        None => Ok(pool),
    }
}

fn not_a_store(place: &Path, reason: &str) -> Error {
    Error::NotAStore { dir: place.to_owned(), kind: KIND, reason: reason.to_owned() }
}

/// Whether there is a store at `place`.
pub(crate) fn is_made(place: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(place.join(FILE)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).context("look at", place.join(FILE)),
    }
}

/// Opens a store's directory; whoever could write to it could pass off other devices as snapshots.
pub(crate) fn open_root(place: &Path) -> Result<(OwnedFd, Settings)> {
    let root = match beneath::open_root(place) {
        Ok(root) => root,
        Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT) => return Err(Error::NotFound { what: format!("the store {}", place.display()) }),
            Some(Errno::LOOP | Errno::NOTDIR) => return Err(not_a_store(place, "it is not a directory")),
            _ => return Err(error).context("open", place),
        },
    };
    let meta = beneath::stat_fd(&root).context("read the attributes of", place)?;
    let user = rustix::process::geteuid();
    if meta.uid != user.as_raw() && meta.uid != 0 || meta.mode & 0o022 != 0 {
        return Err(not_a_store(place, "others than its user may write to it"));
    }
    let settings = read(&root).context("read the settings of", place)?;
    settings.ok_or_else(|| not_a_store(place, "it has no file `fsnap-store` of fsnap's")).and_then(|settings| {
        if settings.version > VERSION {
            let what = format!("the store {}", place.display());
            return Err(Error::NewerVersion { what, found: settings.version, supported: VERSION });
        }
        Ok((root, settings))
    })
}

/// Makes the directories of a store, and then the file that makes it one.
pub(crate) fn make(place: &Path, settings: &Settings) -> Result<()> {
    if !place.is_absolute() {
        return Err(not_a_store(place, "name it by an absolute path"));
    }
    if let Some(parent) = place.parent() {
        private_dirs(parent).context("make the directory", parent)?;
    }
    let new = private_dir(place).context("make the directory", place)?;
    let root = beneath::open_root(place).context("open", place)?;
    let own = |name: &OsStr| {
        Stage::ALL.iter().any(|stage| *name == *stage.dir())
            || [suspend::DIR, VOLUMES].iter().any(|dir| *name == **dir)
            || name.as_encoded_bytes().starts_with(b".new-")
    };
    if !new && beneath::names(&root).context("list", place)?.iter().any(|name| !own(name)) {
        return Err(not_a_store(place, "it has files in it; name a place where nothing is yet"));
    }
    for name in Stage::ALL.map(Stage::dir).into_iter().chain([suspend::DIR, VOLUMES]) {
        private_dir(&place.join(name)).context("make the directory", place.join(name))?;
    }
    write(&root, settings).context("write", place.join(FILE))
}

fn private_dir(path: &Path) -> io::Result<bool> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn private_dirs(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

pub(crate) fn read(root: &OwnedFd) -> io::Result<Option<Settings>> {
    let file = match beneath::open_file(root, OsStr::new(FILE)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => return Ok(None),
        file => file?,
    };
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text).ok())
}

/// Writes the settings; they have their name only once they are complete, and durable.
pub(crate) fn write(root: &OwnedFd, settings: &Settings) -> io::Result<()> {
    write_json(root, FILE, settings)
}

/// Writes a value as the file `name`, which is the old one or the new one at any moment.
pub(crate) fn write_json(dir: &OwnedFd, name: &str, value: &impl Serialize) -> io::Result<()> {
    let hidden = format!(".new-{name}-{}", random_hex(4).map_err(io::Error::other)?);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(rustix::fs::openat(dir, &*hidden, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.sync_all()?;
    rustix::fs::renameat(dir, &*hidden, dir, name)?;
    Ok(rustix::fs::fsync(dir)?)
}
