//! Finding, making and opening a store, and its layout on disk.
//!
//! ```text
//! .fsnap/               a subvolume of its own, 0700
//!   fsnap-store         the version of this layout
//!   snapshots/          one entry per snapshot: a read-only subvolume, or a directory of them (a group)
//!   volumes/            one entry per clone: a writable subvolume
//!   beside/             what fsnap keeps beside the images, if anything
//! ```
//!
//! An image under its own name is whole; while it takes more than one step to make or to remove, it lies under that
//! name with a dot before it. No step but the last gives it its name, and the first step of a removal takes it away.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use btrfsutil::subvolume::Subvolume;
use fsnap_backend::{
    Capabilities, Consistency, Error, FileKind, FileMeta, Identity, IoContext, Result, StoreInfo, beneath,
};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};
use rustix::fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::refusal::explained;
use crate::sys::{self, SubvolumeInfo, Uuid};
use crate::{KIND, mounts, nested};

/// The usual name of a store.
const NAME: &str = ".fsnap";
const VERSION_FILE: &str = "fsnap-store";
const VERSION: u32 = 1;
const FIRST_LINE: &str = "fsnap btrfs store, version ";
const SNAPSHOTS: &str = "snapshots";
const VOLUMES: &str = "volumes";
/// What callers keep beside the images.
pub(crate) const BESIDE: &str = "beside";

/// A btrfs file system's place for snapshots and clones of its subvolumes.
#[derive(Debug)]
pub struct Store {
    pub(crate) info: StoreInfo,
    /// An absolute path without symbolic links.
    pub(crate) place: PathBuf,
    pub(crate) root: OwnedFd,
    pub(crate) snapshots: OwnedFd,
    pub(crate) volumes: OwnedFd,
    pub(crate) file_system: Uuid,
    /// The store's own subvolume.
    pub(crate) id: u64,
}

impl Store {
    /// Tells where the store for the volume `dir` lies unless the user names another place: at the root of the mount
    /// through which `dir` is seen.
    ///
    /// Fails with [`ErrorKind::NotAVolume`](fsnap_backend::ErrorKind::NotAVolume) if `dir` is not the root of a writable
    /// btrfs subvolume, and with [`ErrorKind::Permission`](fsnap_backend::ErrorKind::Permission) without
    /// `CAP_SYS_ADMIN`, which btrfs asks of those who delete subvolumes and look for nested ones.
    pub fn probe(dir: &Path) -> Result<PathBuf> {
        let (root, found) = open_volume(dir)?;
        // The first privileged call that any snapshot makes.
        sys::children(&root, found.id).map_err(explained).context("look for subvolumes in", dir)?;
        let mut mount = dir.canonicalize().context("find the mount of", dir)?;
        while !is_mount_root(&mount).context("find the mount of", dir)? && mount.pop() {}
        Ok(mount.join(NAME))
    }

    /// Makes a store at `place`, an absolute path at which nothing is yet, or opens the one that is there.
    ///
    /// Whatever cut an earlier call short, another one finishes its work.
    pub fn create(place: &Path) -> Result<Self> {
        let (parent, place) = parent_of(place)?;
        let name = place.file_name().ok_or_else(|| not_a_store(&place, "it has no name"))?;
        if !on_btrfs(&parent).context("find the file system of", &place)? {
            return Err(not_a_store(&place, "its directory does not lie on btrfs"));
        }
        // Through the descriptor: whoever owns the directory above may rename it meanwhile.
        let through = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name);
        // The library keeps the kernel's answer in errno alone.
        let made = Subvolume::create(&*through, None).map_err(|_| io::Error::last_os_error());
        let fresh = match made {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(explained(error)).context("make the subvolume", &place),
        };
        if let Err(error) = furnish(&parent, name, &place) {
            if fresh {
                remove_empty(&parent, name);
            }
            return Err(error);
        }
        Self::open(&place)
    }

    /// Opens the store at `place`, an absolute path, and writes nothing.
    pub fn open(place: &Path) -> Result<Self> {
        let (parent, place) = parent_of(place)?;
        let name = place.file_name().ok_or_else(|| not_a_store(&place, "it has no name"))?;
        let root = open_root(&parent, name, &place)?;
        match read_version(&root).context("read the version of", &place)? {
            Some(VERSION) => {}
            Some(found) if found > VERSION => {
                let what = format!("the store {}", place.display());
                return Err(Error::NewerVersion { what, found, supported: VERSION });
            }
            _ => return Err(not_a_store(&place, "it has no file `fsnap-store` of fsnap's")),
        }
        let open = |name: &str| beneath::open_dir(&root, OsStr::new(name)).context("open", place.join(name));
        let (snapshots, volumes) = (open(SNAPSHOTS)?, open(VOLUMES)?);
        let own = sys::info(&root).context("identify", &place)?;
        let file_system = sys::file_system(&root).context("identify the file system of", &place)?;
        let info = StoreInfo {
            kind: KIND,
            identity: identity(&file_system, &own),
            capabilities: Capabilities {
                clones: true,
                constant_time_clones: true,
                xattrs: true,
                acls: true,
                ownership: true,
                mountable: true,
                verifies_contents: mounts::with_checksums(&root),
                // Buffered writes of running writers reach the trees in whatever order they are written out.
                live: Consistency::CrashConsistent,
            },
        };
        Ok(Self { info, place, root, snapshots, volumes, file_system, id: own.id })
    }

    /// The path of the image `name` from the top of the file system on, as the table of mounts shows it.
    pub(crate) fn path_from_top(&self, dir: ImageDir, name: &str) -> io::Result<PathBuf> {
        let mut parts = vec![OsString::from(name), OsString::from(dir.name())];
        let mut at = self.id;
        while at != sys::TOP_LEVEL {
            let link = sys::parent(&self.root, at)?.ok_or(Errno::NOENT)?;
            parts.push(link.name);
            parts.extend(sys::path_of(&self.root, link.id, link.dir)?.into_iter().rev());
            at = link.id;
        }
        parts.push("/".into());
        Ok(parts.into_iter().rev().collect())
    }
}

/// One of the two directories of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageDir {
    Snapshots,
    Volumes,
}

impl ImageDir {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Snapshots => SNAPSHOTS,
            Self::Volumes => VOLUMES,
        }
    }
}

/// Names a subvolume and no other; the top level of an old file system has no UUID, but only one such number.
pub(crate) fn identity(file_system: &Uuid, subvolume: &SubvolumeInfo) -> Identity {
    let own = match subvolume.uuid {
        uuid if uuid == Uuid::default() => format!("id-{}", subvolume.id),
        uuid => hyphenated(&uuid),
    };
    Identity::new(format!("btrfs:{}/{own}", hyphenated(file_system)))
}

fn hyphenated(uuid: &Uuid) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Opens the root of the subvolume `dir`, which must be able to be a volume.
pub(crate) fn open_volume(dir: &Path) -> Result<(OwnedFd, SubvolumeInfo)> {
    let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason: reason.to_owned() };
    let root = beneath::open_volume(dir, KIND)?;
    if !on_btrfs(&root).context("find the file system of", dir)? {
        return Err(refused("it does not lie on btrfs"));
    }
    if !nested::is_root(&root).context("read the attributes of", dir)? {
        return Err(refused(
            "it is a directory and not the root of a subvolume; make one with `btrfs subvolume create` and move the \
             files there",
        ));
    }
    let found = sys::info(&root).context("identify", dir)?;
    if found.read_only {
        return Err(refused("it is a read-only subvolume, which has no new states to capture"));
    }
    Ok((root, found))
}

pub(crate) fn on_btrfs(file: impl AsFd) -> io::Result<bool> {
    Ok(fstatfs(file)?.filesystem_type() == BTRFS_SUPER_MAGIC)
}

fn is_mount_root(path: &Path) -> io::Result<bool> {
    let root = beneath::open_root(path)?;
    let found = rustix::fs::statx(root, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn not_a_store(place: &Path, reason: &str) -> Error {
    Error::NotAStore { dir: place.to_owned(), kind: KIND, reason: reason.to_owned() }
}

/// Opens the directory above `place`, and says what `place` is called without symbolic links.
fn parent_of(place: &Path) -> Result<(OwnedFd, PathBuf)> {
    let (true, Some(above), Some(name)) = (place.is_absolute(), place.parent(), place.file_name()) else {
        return Err(not_a_store(place, "name it by an absolute path that ends in a name"));
    };
    let above = match above.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NotFound { what: above.display().to_string() });
        }
        above => above.context("find", place)?,
    };
    let parent = beneath::open_root(&above).context("open", &above)?;
    Ok((parent, above.join(name)))
}

/// Opens the store's subvolume; whoever could write to it could pass off his own files as snapshots.
fn open_root(parent: &OwnedFd, name: &OsStr, place: &Path) -> Result<OwnedFd> {
    let (root, meta) = open_subvolume(parent, name, place)?;
    let user = rustix::process::geteuid();
    if meta.uid != user.as_raw() && meta.uid != 0 || is_open_to_others(&meta) {
        return Err(not_a_store(place, "others than its user may write to it"));
    }
    Ok(root)
}

fn is_open_to_others(meta: &FileMeta) -> bool {
    meta.mode & 0o022 != 0
}

fn open_subvolume(parent: &OwnedFd, name: &OsStr, place: &Path) -> Result<(OwnedFd, FileMeta)> {
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
    if !on_btrfs(&root).context("find the file system of", place)? || meta.ino != sys::ROOT_INODE {
        return Err(not_a_store(place, "it exists and is not a btrfs subvolume; name a place where nothing is yet"));
    }
    Ok((root, meta))
}

/// Closes a new subvolume to others. The kernel makes it for all whom the umask does not keep out.
fn close(parent: &OwnedFd, name: &OsStr, place: &Path) -> Result<()> {
    let (root, meta) = open_subvolume(parent, name, place)?;
    let is_empty = || beneath::names(&root).map(|names| names.is_empty()).context("list", place);
    if !is_open_to_others(&meta) || meta.uid != rustix::process::geteuid().as_raw() || !is_empty()? {
        return Ok(());
    }
    rustix::fs::fchmod(&root, Mode::RWXU).context("close to others", place)?;
    // From now on nobody adds anything.
    if is_empty()? { Ok(()) } else { Err(not_a_store(place, "somebody has put files in it meanwhile; remove it")) }
}

/// Puts into a new subvolume what makes it a store, the version last.
fn furnish(parent: &OwnedFd, name: &OsStr, place: &Path) -> Result<()> {
    close(parent, name, place)?;
    let root = open_root(parent, name, place)?;
    if read_version(&root).context("read the version of", place)?.is_some() {
        return Ok(());
    }
    let strange = |name: &OsString| ![SNAPSHOTS, VOLUMES, VERSION_FILE].iter().any(|own| name == own);
    if beneath::names(&root).context("list", place)?.iter().any(strange) {
        return Err(not_a_store(place, "it has files in it; name a place where nothing is yet"));
    }
    let private = Mode::RWXU;
    rustix::fs::fchmod(&root, private).context("close to others", place)?;
    for name in [SNAPSHOTS, VOLUMES] {
        match rustix::fs::mkdirat(&root, name, private) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).context("make the directory", place.join(name)),
        }
    }
    write_version(&root).context("write the version of", place)?;
    rustix::fs::syncfs(&root).context("make durable", place)
}

/// Writes the version file; it has its name only once it is complete.
fn write_version(root: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file = std::fs::File::from(rustix::fs::openat(root, ".", flags, Mode::from_raw_mode(0o600))?);
    writeln!(file, "{FIRST_LINE}{VERSION}")?;
    file.sync_all()?;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(rustix::fs::CWD, unnamed, root, VERSION_FILE, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The version of the layout; `None` if there is no version file, or a strange one.
fn read_version(root: &OwnedFd) -> io::Result<Option<u32>> {
    let file = match beneath::open_file(root, OsStr::new(VERSION_FILE)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => return Ok(None),
        file => file?,
    };
    debug_assert_eq!(beneath::stat_fd(&file)?.kind, FileKind::File);
    let mut text = Vec::new();
    file.take(256).read_to_end(&mut text)?;
    let line = std::str::from_utf8(&text).ok().and_then(|text| text.strip_prefix(FIRST_LINE));
    Ok(line.and_then(|version| version.trim_end().parse().ok()))
}

/// Removes a store that could not be furnished; what is not empty stays, since another call may have gone on with it.
fn remove_empty(parent: &OwnedFd, name: &OsStr) {
    let Ok(root) = beneath::open_dir(parent, name) else { return };
    for name in [SNAPSHOTS, VOLUMES] {
        rustix::fs::unlinkat(&root, name, AtFlags::REMOVEDIR).ok();
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR).ok();
}
