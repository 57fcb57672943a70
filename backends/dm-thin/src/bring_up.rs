//! Pools for those who have none: making one, bringing it up after a restart, and the volumes in it.
//!
//! The two devices of a pool are sparse files behind loop devices, or the two parts of one block device:
//!
//! ```text
//! DIR/data, DIR/metadata     files; each is attached to a loop device, which goes with the pool
//! DEVICE                     metadata from its first sector on, then data
//! ```
//!
//! What cannot be found again from these is in the store's settings. The pool answers with an error when it is full, and
//! does not wait: a writer that waits could not be stopped for a snapshot either.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use fsnap_backend::{Backend, Error, IoContext, Result, beneath};
use rustix::fs::{AtFlags, FlockOperation};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::KIND;
use crate::dm::{By, Mapper, Number, Target};
use crate::pool::{Pool, ThinId};
use crate::record::random_id;
use crate::sign::{self, Superblock};
use crate::store::{FILE, Settings, Store, VOLUMES, is_made, make, read, write};
use crate::superblock::FileSystem;

pub(crate) const SECTOR: u64 = 512;

/// The blocks that a pool shares and copies, in sectors: 64 KiB.
pub(crate) const BLOCK: u64 = 128;

/// What a pool stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Two files.
    Files {
        /// Of the data.
        data: PathBuf,
        /// Of the metadata.
        metadata: PathBuf,
    },
    /// One block device, of which the first sectors hold the metadata.
    Device {
        /// The device.
        device: PathBuf,
        /// So many sectors hold the metadata.
        metadata: u64,
        /// And so many after them the data; all that are left, if not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data: Option<u64>,
    },
}

impl Backing {
    fn metadata(&self) -> &Path {
        let (Self::Files { metadata: on, .. } | Self::Device { device: on, .. }) = self;
        on
    }

    fn data(&self) -> &Path {
        let (Self::Files { data: on, .. } | Self::Device { device: on, .. }) = self;
        on
    }
}

/// A pool that is to be made.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What device-mapper is to call it.
    pub name: String,
    /// A directory for its files, or a block device.
    pub on: PathBuf,
    /// The room for data in bytes; all of a device, if not given.
    pub size: Option<u64>,
    /// Where its store lies.
    pub place: PathBuf,
}

/// A volume that fsnap made in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolVolume {
    pub(crate) id: ThinId,
    /// Its length in sectors.
    pub(crate) length: u64,
    /// The file system that was made on it.
    pub file_system: FileSystem,
}

impl PoolVolume {
    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.length * SECTOR
    }
}

/// The metadata that so much data wants: 64 bytes for each block, and room for snapshots.
pub(crate) fn metadata_for(data: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    let bytes = data / (BLOCK * SECTOR) * 64;
    bytes.next_multiple_of(MIB).clamp(32 * MIB, 15 << 30)
}

impl Store {
    /// Makes a pool and its store.
    pub fn create_pool(plan: &Plan) -> Result<Self> {
        let mapper = Mapper::open()?;
        check_name(&plan.name)?;
        if is_made(&plan.place)? {
            return Err(Error::Exists {
                what: format!("the pool {}, whose store is {},", plan.name, plan.place.display()),
            });
        }
        if mapper.find(By::Name(&plan.name))?.is_some() {
            return Err(Error::Exists { what: By::Name(&plan.name).to_string() });
        }
        let kind = fs::metadata(&plan.on).map(|meta| meta.file_type());
        let backing = match kind {
            Ok(kind) if kind.is_block_device() => divide(&plan.on, plan.size)?,
            Ok(kind) if kind.is_dir() => make_files(&plan.on, plan.size)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_files(&plan.on, plan.size)?,
            Ok(_) => {
                let reason = "it is neither a directory nor a block device".to_owned();
                return Err(Error::NotAStore { dir: plan.on.clone(), kind: KIND, reason });
            }
            Err(error) => return Err(error).context("look at", &plan.on),
        };
        let mut settings = Settings::new(&plan.name, "")?;
        settings.pool_uuid = format!("FSNAP-POOL-{}", settings.uuid);
        settings.backing = Some(backing.clone());
        let made = make(&plan.place, &settings).and_then(|()| Self::open(&plan.place));
        made.map_err(|error| error.and_undo(undo(&mapper, &plan.place, &settings, &backing)))
    }

    /// Takes the pool down; what is in it stays, and comes back when the store is opened.
    ///
    /// Fails with [`ErrorKind::Unsupported`](fsnap_backend::ErrorKind::Unsupported) for a pool that fsnap did not make: it could not bring
    /// that up again.
    pub fn stop_pool(self) -> Result<()> {
        self.check_made_here("take a pool down")?;
        self.stop_volumes()?;
        self.stop_images().map_err(|error| error.and_undo(self.start_volumes()))?;
        remove_pool(&self.mapper, &self.settings)
    }

    /// Removes the pool that fsnap made, and everything in it; refused as long as there is an image or a volume in use.
    pub fn remove_pool(self) -> Result<()> {
        let what = self.pool.to_string();
        let backing = self.check_made_here("remove a pool")?.clone();
        let held = match self.records.list()?.len() {
            0 => None,
            1 => Some("a snapshot or clone; remove its checkpoint first".to_owned()),
            images => Some(format!("{images} snapshots and clones; remove their checkpoints first")),
        };
        if let Some(by) = held {
            return Err(Error::Busy { what, by });
        }
        self.stop_volumes()?;
        let foreign = self.list()?.len();
        if foreign > 0 {
            let devices = if foreign == 1 { "thin device" } else { "thin devices" };
            let busy = Error::Busy { what, by: format!("{foreign} {devices} that others have in use") };
            return Err(busy.and_undo(self.start_volumes()));
        }
        undo(&self.mapper, &self.place, &self.settings, &backing)
    }

    pub(crate) fn check_made_here(&self, action: &'static str) -> Result<&Backing> {
        self.settings.backing.as_ref().ok_or_else(|| {
            let reason = format!("fsnap did not make {}: do it by what made it", self.pool);
            Error::Unsupported { kind: KIND, action, reason }
        })
    }

    /// The volumes that fsnap made in the pool, by name.
    pub fn volumes(&self) -> Result<Vec<(String, PoolVolume)>> {
        let dir = beneath::open_dir(&self.root, OsStr::new(VOLUMES)).context("open", self.place.join(VOLUMES))?;
        volumes(&dir, &self.place)
    }

    /// The node of a volume's device.
    pub fn volume_node(&self, name: &str) -> Result<PathBuf> {
        let device = self.mapper.find(By::Name(&volume_device(&self.pool.name, name)))?;
        let device = device.ok_or_else(|| Error::NotFound { what: format!("the volume {name} of {}", self.pool) })?;
        Ok(device.number.named_node(&device.name))
    }

    /// Removes a volume that fsnap made, and its device; its snapshots stay. Busy while it is mounted.
    pub fn remove_volume(&self, name: &str) -> Result<()> {
        let dir = beneath::open_dir(&self.root, OsStr::new(VOLUMES)).context("open", self.place.join(VOLUMES))?;
        let (_, volume) = volumes(&dir, &self.place)?
            .into_iter()
            .find(|(known, _)| known == name)
            .ok_or_else(|| Error::NotFound { what: format!("the volume {name} of {}", self.pool) })?;
        self.stop_volume(name)?;
        self.pool.delete(&self.mapper, volume.id)?;
        let remove = || {
            rustix::fs::unlinkat(&dir, name, AtFlags::empty())?;
            rustix::fs::fsync(&dir)
        };
        remove().context("remove", self.place.join(VOLUMES).join(name))
    }

    pub(crate) fn stop_volume(&self, name: &str) -> Result<()> {
        let device = volume_device(&self.pool.name, name);
        match self.mapper.remove(&device) {
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                let what = format!("the volume {name} of {}", self.pool);
                Err(Error::Busy { what, by: "it is mounted, or its device is open".to_owned() })
            }
            removed => removed.context("remove", By::Name(&device).to_string()),
        }
    }

    /// Makes the devices of the volumes, as far as they are not there.
    pub fn start_volumes(&self) -> Result<()> {
        start_volumes(&self.mapper, &self.pool, &self.settings, &self.volumes()?)
    }

    /// Takes the devices of all volumes away, or of none.
    fn stop_volumes(&self) -> Result<()> {
        let stopped = self.volumes()?.iter().try_for_each(|(name, _)| self.stop_volume(name));
        stopped.map_err(|error| error.and_undo(self.start_volumes()))
    }

    fn stop_images(&self) -> Result<()> {
        self.records.list()?.keys().try_for_each(|at| self.stop(at))
    }

    /// A number that no image and no volume of this store has.
    pub(crate) fn free_id(&self) -> Result<ThinId> {
        let images = self.records.list()?;
        let volumes = self.volumes()?;
        loop {
            let id = random_id()?;
            let of_image = images.keys().filter_map(crate::Form::of).any(|form| form.id == id);
            if !of_image && volumes.iter().all(|(_, volume)| volume.id != id) {
                return Ok(id);
            }
        }
    }
}

/// Brings the pool of a store up, and its volumes, and signs it; does nothing if it is up and signed.
pub(crate) fn start(
    mapper: &Mapper,
    root: &OwnedFd,
    place: &Path,
    settings: &mut Settings,
    backing: &Backing,
) -> Result<()> {
    let is_up = || Ok::<_, Error>(mapper.find(By::Name(&settings.pool))?.is_some_and(|device| device.active));
    if is_up()? && settings.started && settings.signed {
        return Ok(());
    }
    // Two may open the store at once.
    let lock = beneath::open_dir(root, OsStr::new(VOLUMES)).context("open", place.join(VOLUMES))?;
    flock(&lock, FlockOperation::LockExclusive).context("lock", place)?;
    let started = if is_up()? { Ok(()) } else { start_locked(mapper, &lock, place, settings, backing) };
    let signed = started.and_then(|()| note_start(mapper, root, place, settings));
    flock(&lock, FlockOperation::Unlock).context("unlock", place)?;
    signed
}

/// Remembers that the pool was up, and signs it, if neither was done before.
fn note_start(mapper: &Mapper, root: &OwnedFd, place: &Path, settings: &mut Settings) -> Result<()> {
    // As another call has left them meanwhile.
    if let Some(read) = read(root).context("read the settings of", place)? {
        *settings = read;
    }
    if !settings.started {
        settings.started = true;
        write(root, settings).context("write", place.join(FILE))?;
    }
    let pool = if settings.signed { None } else { Pool::named(mapper, &settings.pool)? };
    if let Some(pool) = pool.filter(|pool| pool.uuid == settings.pool_uuid)
        && sign::sign(mapper, settings, &pool)?
    {
        settings.signed = true;
        write(root, settings).context("write", place.join(FILE))?;
    }
    Ok(())
}

fn flock(dir: &OwnedFd, operation: FlockOperation) -> io::Result<()> {
    loop {
        match rustix::fs::flock(dir, operation) {
            Err(Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}

fn start_locked(mapper: &Mapper, dir: &OwnedFd, place: &Path, settings: &Settings, backing: &Backing) -> Result<()> {
    let name = settings.pool.as_str();
    // What a killed call left holds the pool's devices.
    remove_pool(mapper, settings)?;
    let superblock = if settings.started { Some(check_backing(place, settings, backing)?) } else { None };
    let parts = match Parts::attach(mapper, name, &settings.uuid, backing) {
        Ok(parts) => parts,
        Err(error) => return Err(error.and_undo(remove_pool(mapper, settings))),
    };
    let blocks = parts.data_length / BLOCK;
    let table = |blocks: u64| pool_table(parts.metadata, parts.data, blocks);
    if let Some(superblock) = superblock {
        let data = backing.data();
        let checked = if blocks < superblock.blocks {
            let shrunk = format!("it has room for {blocks} blocks, and the pool has {}", superblock.blocks);
            Err(io::Error::other(shrunk)).context("bring up", format!("the pool {name} on {}", data.display()))
        } else if settings.signed {
            sign::check_data(mapper, settings, place, data, &table(superblock.blocks))
        } else {
            Ok(())
        };
        if let Err(error) = checked {
            return Err(error.and_undo(parts.release()).and_undo(remove_pool(mapper, settings)));
        }
    }
    let table = table(blocks);
    let started = mapper.make(name, &settings.pool_uuid, &[table], false);
    // The pool holds its devices now; the files are let go with it.
    let released = parts.release();
    if let Err(error) = started.map(drop).and(released) {
        return Err(error.and_undo(remove_pool(mapper, settings)));
    }
    let pool = Pool::named(mapper, name)?.ok_or_else(|| Error::NotFound { what: By::Name(name).to_string() })?;
    start_volumes(mapper, &pool, settings, &volumes(dir, place)?)
}

/// The table of a pool with so many blocks of data.
pub(crate) fn pool_table(metadata: Number, data: Number, blocks: u64) -> Target {
    let text = format!("{metadata} {data} {BLOCK} {} 1 error_if_no_space", blocks / 20);
    Target { length: blocks * BLOCK, kind: "thin-pool".into(), text }
}

/// Refuses to bring up a pool on what does not hold its metadata, and reads them.
///
/// The kernel makes a new pool wherever it finds zeroes, and btrfs, for one, begins with 64 KiB of them. What a loop device
/// leads to, and a device that has no lasting name, may be another one after a start of the machine.
fn check_backing(place: &Path, settings: &Settings, backing: &Backing) -> Result<Superblock> {
    let on = backing.metadata();
    let read = Superblock::read(on).and_then(|found| {
        found.ok_or_else(|| {
            io::Error::other(
                "it is no part of a pool: set up again what the pool was made on, if that has another name now",
            )
        })
    });
    let found = read.context("bring up", format!("the pool {} on {}", settings.pool, on.display()))?;
    sign::check_metadata(settings, place, on, &found)?;
    Ok(found)
}

/// The two devices of a pool.
struct Parts {
    metadata: Number,
    data: Number,
    /// In sectors.
    data_length: u64,
    /// Loop devices, to be let go once the pool has them open.
    loops: Vec<PathBuf>,
}

impl Parts {
    fn attach(mapper: &Mapper, pool: &str, store: &str, backing: &Backing) -> Result<Self> {
        match backing {
            Backing::Files { data, metadata } => {
                let mut parts = Self {
                    metadata: Number { major: 0, minor: 0 },
                    data: Number { major: 0, minor: 0 },
                    data_length: 0,
                    loops: Vec::new(),
                };
                for (file, number) in [(metadata, &mut parts.metadata), (data, &mut parts.data)] {
                    let device = losetup(&[OsStr::new("--find"), OsStr::new("--show"), file.as_os_str()])?;
                    parts.loops.push(device.clone());
                    *number = Number::of(fs::metadata(&device).context("look at", &device)?.rdev());
                }
                parts.data_length = fs::metadata(data).context("look at", data)?.len() / SECTOR;
                Ok(parts)
            }
            Backing::Device { device, metadata, data: wanted } => {
                let all = length_of(device)?;
                // No more than there is: how much the pool needs is compared later.
                let Some(data) = all.checked_sub(*metadata).map(|rest| wanted.unwrap_or(rest).min(rest)) else {
                    let shrunk = io::Error::other("it has become smaller than the pool's metadata");
                    return Err(shrunk).context("use", device);
                };
                let number = Number::of(fs::metadata(device).context("look at", device)?.rdev());
                let part = |name: String, from: u64, length: u64| {
                    let uuid = part_uuid(store, &name);
                    let target = Target { length, kind: "linear".into(), text: format!("{number} {from}") };
                    mapper.make(&name, &uuid, &[target], false).map(|made| made.number)
                };
                Ok(Self {
                    metadata: part(format!("{pool}-metadata"), 0, *metadata)?,
                    data: part(format!("{pool}-data"), *metadata, data)?,
                    data_length: data,
                    loops: Vec::new(),
                })
            }
        }
    }

    /// Lets the loop devices go with their last user.
    fn release(&self) -> Result<()> {
        self.loops.iter().try_for_each(|device| losetup(&[OsStr::new("--detach"), device.as_os_str()]).map(drop))
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // Detached already, unless something failed; an error then says no more.
        for device in &self.loops {
            let _ = Command::new("losetup").arg("--detach").arg(device).output();
        }
    }
}

/// Runs losetup(8) and returns what it prints.
pub(crate) fn losetup(arguments: &[&OsStr]) -> Result<PathBuf> {
    run(Command::new("losetup").args(arguments)).map(PathBuf::from)
}

pub(crate) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().context("run", &program)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
    }
    // What is wrong, without all that the program could be told instead.
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let said: Vec<_> = said.lines().take_while(|line| !line.starts_with("Usage:")).collect();
    let said = said.join("\n").trim().to_owned();
    Err(io::Error::other(format!("{}: {said}", output.status))).context("run", program)
}

pub(crate) fn length_of(device: &Path) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    let bytes = File::open(device).and_then(|mut file| file.seek(SeekFrom::End(0))).context("measure", device)?;
    Ok(bytes / SECTOR)
}

/// Makes the two files of a pool in `dir`.
fn make_files(dir: &Path, size: Option<u64>) -> Result<Backing> {
    let Some(size) = size else {
        let reason = "say how large a pool of files is to be, with --size".to_owned();
        return Err(Error::NotAStore { dir: dir.to_owned(), kind: KIND, reason });
    };
    fs::create_dir_all(dir).context("make the directory", dir)?;
    let dir = dir.canonicalize().context("find", dir)?;
    let (data, metadata) = (dir.join("data"), dir.join("metadata"));
    let size = size.next_multiple_of(BLOCK * SECTOR);
    let make = |path: &Path, length| {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.set_len(length)?;
        file.sync_all()
    };
    let make = |path: &Path, length| match make(path, length) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::Exists { what: format!("the file {}", path.display()) })
        }
        made => made.context("make the file", path),
    };
    make(&metadata, metadata_for(size))?;
    match make(&data, size) {
        Ok(()) => Ok(Backing::Files { data, metadata }),
        Err(error) => Err(error.and_undo(fs::remove_file(&metadata).context("remove", &metadata))),
    }
}

/// Divides a block device in two; refuses one that holds anything.
fn divide(device: &Path, size: Option<u64>) -> Result<Backing> {
    let device = lasting_name(device).context("find", device)?;
    let refused = |reason: String| Error::NotAStore { dir: device.clone(), kind: KIND, reason };
    let signature = Command::new("blkid").args(["-p", "-o", "value", "-s", "TYPE"]).arg(&device).output();
    let signature = signature.context("run", "blkid")?;
    if !signature.stdout.is_empty() {
        let found = String::from_utf8_lossy(&signature.stdout).trim().escape_debug().to_string();
        return Err(refused(format!("it holds {found}; empty it by `wipefs` if that is no longer needed")));
    }
    let all = length_of(&device)? * SECTOR;
    let data = size.map(|size| size.next_multiple_of(BLOCK * SECTOR) / SECTOR);
    let metadata = metadata_for(size.unwrap_or(all)) / SECTOR;
    let room = (all / SECTOR).saturating_sub(metadata);
    if room < data.unwrap_or(BLOCK) {
        return Err(refused(match data {
            None => "it is too small for a pool".to_owned(),
            Some(_) => {
                let has = (room * SECTOR) >> 20;
                format!("besides the metadata of such a pool it has room for {has} MiB of data; give a smaller --size")
            }
        }));
    }
    // The kernel makes new metadata where it finds nothing but zeroes.
    let file = match OpenOptions::new().write(true).custom_flags(libc_excl()).open(&device) {
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            return Err(refused("it is in use: mounted, or a part of something else".to_owned()));
        }
        file => file.context("open", &device)?,
    };
    file.write_all_at(&[0; 4096], 0).and_then(|()| file.sync_all()).context("write to", &device)?;
    Ok(Backing::Device { device, metadata, data })
}

/// A path that leads to the device after a restart as well, as far as there is one: numbers like that of `/dev/dm-3` are given anew.
///
/// It is the device-mapper name, or else a name by which udev knows the hardware or the content.
fn lasting_name(device: &Path) -> io::Result<PathBuf> {
    let real = device.canonicalize()?;
    let number = |path: &Path| fs::metadata(path).map(|meta| meta.rdev());
    let wanted = number(&real)?;
    let mapped = fs::read_to_string(format!("/sys/dev/block/{}/dm/name", Number::of(wanted)));
    if let Ok(name) = mapped {
        return Ok(Number::of(wanted).named_node(name.trim_end()));
    }
    for dir in ["/dev/disk/by-id", "/dev/disk/by-partuuid", "/dev/disk/by-path"] {
        let links = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        // Of several the same one, whatever order they are listed in.
        if let Some(found) = links.filter(|link| number(link).is_ok_and(|found| found == wanted)).min() {
            return Ok(found);
        }
    }
    Ok(real)
}

/// Opening a block device with it fails as long as somebody uses the device.
fn libc_excl() -> i32 {
    rustix::fs::OFlags::EXCL.bits() as i32
}

/// Takes a pool down, and removes what it stood on and its store.
fn undo(mapper: &Mapper, place: &Path, settings: &Settings, backing: &Backing) -> Result<()> {
    remove_pool(mapper, settings)?;
    if let Backing::Files { data, metadata } = backing {
        for file in [data, metadata] {
            match fs::remove_file(file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.context("remove", file)?,
            }
        }
    }
    match fs::remove_dir_all(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.context("remove", place),
    }
}

/// Takes a pool down with what it lies on, as far as they are the store's.
fn remove_pool(mapper: &Mapper, settings: &Settings) -> Result<()> {
    sign::end_trial(mapper, settings)?;
    remove_own(mapper, &settings.pool_uuid)?;
    let part = |part: &str| part_uuid(&settings.uuid, &format!("{}-{part}", settings.pool));
    ["data", "metadata"].iter().try_for_each(|name| remove_own(mapper, &part(name)))
}

fn part_uuid(store: &str, name: &str) -> String {
    format!("FSNAP-{store}-{name}")
}

/// Removes a device of that UUID, if there is one: its name may be somebody else's as well.
pub(crate) fn remove_own(mapper: &Mapper, uuid: &str) -> Result<()> {
    let Some(device) = mapper.find(By::Uuid(uuid))? else { return Ok(()) };
    match mapper.remove(&device.name) {
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            Err(Error::Busy { what: By::Name(&device.name).to_string(), by: "thin devices in it are in use".into() })
        }
        removed => removed.context("remove", By::Name(&device.name).to_string()),
    }
}

pub(crate) fn volumes(dir: &OwnedFd, place: &Path) -> Result<Vec<(String, PoolVolume)>> {
    let mut found = Vec::new();
    for name in beneath::names(dir).context("list", place.join(VOLUMES))? {
        let Some(name) = name.to_str().filter(|name| check_name(name).is_ok()) else { continue };
        let path = place.join(VOLUMES).join(name);
        let file = beneath::open_file(dir, OsStr::new(name)).context("open", &path)?;
        let record = serde_json::from_reader(file).map_err(|error| Error::Damaged {
            what: format!("the record {}", path.display()),
            reason: error.to_string(),
        })?;
        found.push((name.to_owned(), record));
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

pub(crate) fn volume_device(pool: &str, name: &str) -> String {
    format!("{pool}-volume-{name}")
}

fn start_volumes(mapper: &Mapper, pool: &Pool, settings: &Settings, volumes: &[(String, PoolVolume)]) -> Result<()> {
    volumes.iter().try_for_each(|(name, volume)| start_volume(mapper, pool, &settings.uuid, name, volume).map(drop))
}

pub(crate) fn start_volume(
    mapper: &Mapper,
    pool: &Pool,
    store: &str,
    name: &str,
    volume: &PoolVolume,
) -> Result<PathBuf> {
    let device = volume_device(&pool.name, name);
    let uuid = format!("FSNAP-{store}-volume-{name}");
    let table = pool.table(volume.id, volume.length);
    let made = match mapper.find(By::Name(&device))? {
        Some(found) if found.active => found,
        Some(_) => mapper
            .load(&device, &[table], false)
            .and_then(|()| mapper.start(&device))
            .context("start", By::Name(&device).to_string())?,
        None => mapper.make(&device, &uuid, &[table], false)?,
    };
    Ok(made.number.named_node(&device))
}

pub(crate) fn check_name(name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if (1..=48).contains(&name.len()) && !name.starts_with(['.', '-']) && name.bytes().all(allowed) {
        return Ok(());
    }
    let reason = format!("{name:?} is no name: up to 48 of [A-Za-z0-9._-], not beginning with a dot or a dash");
    Err(Error::Unsupported { kind: KIND, action: "use that name", reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_grow_with_the_data() {
        assert_eq!(metadata_for(1 << 30), 32 << 20);
        assert_eq!(metadata_for(1 << 40), 1 << 30);
        assert_eq!(metadata_for(1 << 50), 15 << 30);
    }

    #[test]
    fn names_lead_nowhere() {
        for bad in ["", ".", "..", "a/b", "-rf", "a b", &"x".repeat(49)] {
            assert!(check_name(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(check_name("data-1.x_y").is_ok());
    }
}
