//! A NILFS2 file system: told from others by its UUID, found on its device, and reached mounted or not.
//!
//! The ioctls need an open file of the file system. A volume has one; a snapshot has nothing but a record with a UUID, and its
//! file system may be mounted elsewhere, in another mount namespace, or not at all. So the device with that UUID is
//! looked for, and mounted once more, detached: that shares the file system that is mounted already, attaches nothing
//! anywhere, and ends with the descriptor.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use fsnap_backend::{Error, Identity, IoContext, Result, beneath, mounts};
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use crate::sys::Number;
use crate::{KIND, sys};

/// The file system's name, as mount(2) has it.
pub(crate) const FSTYPE: &str = "nilfs2";

/// What statfs(2) says of a NILFS2 (`NILFS_SUPER_MAGIC` in linux/magic.h), and the superblock of itself.
const MAGIC: u16 = 0x3434;

/// The inode number of the root directory (`NILFS_ROOT_INO` in linux/nilfs2_ondisk.h).
const ROOT_INODE: u64 = 2;

/// Where the superblock lies (`NILFS_SB_OFFSET_BYTES`), and in it the magic number and the UUID
/// (`struct nilfs_super_block` in linux/nilfs2_ondisk.h).
const SUPERBLOCK: u64 = 1024;
const MAGIC_AT: usize = 0x06;
const UUID_AT: usize = 0x98;

/// Names one file system for as long as it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Uuid([u8; 16]);

impl Uuid {
    /// Reads 32 hexadecimal digits.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let plain = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        plain.then(|| u128::from_str_radix(text, 16).ok()).flatten().map(|number| Self(number.to_be_bytes()))
    }

    /// That of the file system whose root the volume is.
    pub(crate) fn of(volume: &Identity) -> Option<Self> {
        Self::parse(volume.as_str().strip_prefix(KIND)?.strip_prefix(':')?)
    }

    /// What the volume is that this file system's root is.
    pub(crate) fn identity(self) -> Identity {
        Identity::new(format!("{KIND}:{self}"))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a file system is reached for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// To look at its checkpoints; if it is not mounted, nothing is written to it, not even its own recovery.
    Read,
    /// To change their modes.
    Write,
}

/// A file system that is reached, mounted at least as long as this lives.
#[derive(Debug)]
pub(crate) struct FileSystem {
    root: OwnedFd,
    pub(crate) device: PathBuf,
}

impl AsFd for FileSystem {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl FileSystem {
    /// Reaches the file system of that UUID; an I/O error, and never `NotFound`, if its device is not there.
    pub(crate) fn reach(uuid: Uuid, access: Access) -> Result<Self> {
        let device = find(uuid)?;
        // A file system that is mounted can be shared only as it is. This mount namespace may not show it.
        let busy = |error: &io::Error| error.raw_os_error() == Some(nix::libc::EBUSY);
        let (shared, alone) = (|| mount(&device, "", false), || mount(&device, "norecovery", true));
        let root = match access {
            Access::Read if is_mounted(&device) => shared().or_else(|e| if busy(&e) { alone() } else { Err(e) }),
            Access::Read => alone().or_else(|e| if busy(&e) { shared() } else { Err(e) }),
            Access::Write => shared().map_err(|error| if busy(&error) { Errno::ROFS.into() } else { error }),
        };
        let root = root.context("reach the NILFS2 file system on", &device)?;
        Ok(Self { root, device })
    }

    /// Reaches a file system of that UUID from which a snapshot is to be read: the one that is mounted, without a look at any
    /// other device, or else what [`FileSystem::reach`] finds.
    ///
    /// The caller compares the snapshot with its record, so that one in a copy of the file system is taken only if it is equal.
    pub(crate) fn reach_for_reading(uuid: Uuid) -> Result<Self> {
        let mounted = mounted(uuid).context("list", MOUNTED)?;
        match mounted.map(|device| mount(&device, "", false).map(|root| Self { root, device })) {
            Some(Ok(reached)) => Ok(reached),
            // It is mounted otherwise, or was unmounted meanwhile.
            Some(Err(_)) | None => Self::reach(uuid, Access::Read),
        }
    }

    /// Opens the root of a snapshot for reading, attached nowhere.
    pub(crate) fn open_snapshot(&self, number: Number) -> Result<OwnedFd> {
        mount(&self.device, &snapshot_options(number), true).context("mount a snapshot of", &self.device)
    }
}

/// The options by which a snapshot is mounted. Where nobody has the file system mounted, it is left as it is.
pub(crate) fn snapshot_options(number: Number) -> String {
    format!("cp={number},norecovery")
}

/// Mounts a device, detached, and opens the root; the mount goes with the descriptor.
fn mount(device: &Path, options: &str, read_only: bool) -> io::Result<OwnedFd> {
    let context = fsopen(FSTYPE, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device)?;
    if read_only {
        fsconfig_set_flag(&context, "ro")?;
    }
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, option)?,
        }
    }
    fsconfig_create(&context)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // The mount's own descriptor is of the kind that ioctls refuse (O_PATH).
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&mount, ".", flags, Mode::empty())?)
}

/// Opens `dir` as a volume: the root of a NILFS2 that is mounted for writing.
pub(crate) fn open_volume(dir: &Path) -> Result<(OwnedFd, Uuid)> {
    let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason: reason.to_owned() };
    let root = beneath::open_volume(dir, KIND)?;
    let no_nilfs = "it does not lie on NILFS2";
    if rustix::fs::fstatfs(&root).context("find the file system of", dir)?.f_type as u64 != u64::from(MAGIC) {
        return Err(refused(no_nilfs));
    }
    let found = beneath::stat_fd(&root).context("read the attributes of", dir)?;
    if found.ino != ROOT_INODE {
        return Err(refused(
            "it is not the root of its NILFS2 file system, which is captured as a whole; name the mount point",
        ));
    }
    match sys::next_number(&root) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOTTY) => return Err(refused(no_nilfs)),
        answered => answered.context("ask for the checkpoints of", dir)?,
    };
    if rustix::fs::fstatvfs(&root).context("examine", dir)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Err(refused("it is mounted read-only, and so has no new states to capture"));
    }
    let uuid = uuid_of(&root).context("identify the file system of", dir)?;
    Ok((root, uuid))
}

/// The UUID of the NILFS2 that an open file lies on.
pub(crate) fn uuid_of(file: impl AsFd) -> io::Result<Uuid> {
    let device = rustix::fs::fstat(file)?.st_dev;
    let path = match node_of(device) {
        None => devices()?.into_iter().find(|path| names(path, device)),
        found => found,
    };
    let path = path.ok_or_else(|| io::Error::new(ErrorKind::NotFound, "its device has no node in /dev"))?;
    read_uuid(&path)?.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "its device has no superblock of NILFS2"))
}

/// The device that holds the file system of that UUID.
fn find(uuid: Uuid) -> Result<PathBuf> {
    // What cannot be read (a disk that is gone, a device in use by others alone) holds no file system that can be used.
    let holds = |path: &PathBuf| read_uuid(path).ok().flatten() == Some(uuid);
    let all: Vec<_> = devices().context("list", "/proc/partitions")?.into_iter().filter(holds).collect();
    // One path of several to a disk, or a half of a mirror, shows what the device shows that stands on it. It is no copy, and cannot be
    // mounted while that device is there.
    let carries = |path: &PathBuf| all.iter().any(|other| stands_on(other, path));
    let mut found = all.iter().filter(|path| !carries(path)).cloned();
    let object = format!("the NILFS2 file system {uuid}");
    match (found.next(), found.next()) {
        (Some(device), None) => Ok(device),
        (None, _) => Err(io::Error::other("no device holds it: attach its device")).context("find", object),
        (Some(one), Some(other)) => {
            let why = format!("{} and {} both hold it: detach the copy", one.display(), other.display());
            Err(io::Error::other(why)).context("find", object)
        }
    }
}

/// Whether a device is made of another one, as those of device-mapper and MD are, or of what is made of that
/// (`slaves` in [sysfs-block]).
///
/// [sysfs-block]: https://www.kernel.org/doc/Documentation/ABI/stable/sysfs-block
fn stands_on(upper: &Path, lower: &Path) -> bool {
    let Ok(meta) = std::fs::metadata(upper) else { return false };
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    // None of a partition, and of a device that is gone.
    let Ok(below) = std::fs::read_dir(format!("/sys/dev/block/{major}:{minor}/slaves")) else { return false };
    below.flatten().any(|entry| {
        let below = Path::new("/dev").join(entry.file_name().to_string_lossy().replace('!', "/"));
        below == lower || stands_on(&below, lower)
    })
}

/// The kernel's list of the NILFS2 file systems that are mounted, wherever that is seen ([sysfs-fs-nilfs2]).
///
/// [sysfs-fs-nilfs2]: https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-fs-nilfs2
const MOUNTED: &str = "/sys/fs/nilfs2";

/// The device of the only file system of that UUID that is mounted.
fn mounted(uuid: Uuid) -> io::Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(MOUNTED) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let mut found = None;
    for entry in entries {
        let entry = entry?;
        // Not every entry is a file system, and one may be unmounted by now.
        let Ok(text) = std::fs::read_to_string(entry.path().join("uuid")) else { continue };
        if Uuid::parse(&text.trim_end().replace('-', "")) == Some(uuid) {
            let device = Path::new("/dev").join(entry.file_name().to_string_lossy().replace('!', "/"));
            if found.replace(device).is_some() {
                return Ok(None);
            }
        }
    }
    Ok(found)
}

/// Whether this mount namespace shows a mount of the device.
fn is_mounted(device: &Path) -> bool {
    let Ok(meta) = std::fs::metadata(device) else { return false };
    let wanted = mounts::Device::of(meta.rdev());
    mounts::own().is_ok_and(|mounts| mounts.iter().any(|mount| mount.root.device == wanted))
}

/// The nodes of all block devices that have a size ([proc(5)], `/proc/partitions`).
///
/// [proc(5)]: https://man7.org/linux/man-pages/man5/proc_partitions.5.html
fn devices() -> io::Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/partitions")?;
    let name = |line: &str| line.split_whitespace().nth(3).map(|name| Path::new("/dev").join(name.replace('!', "/")));
    Ok(text.lines().skip(2).filter_map(name).collect())
}

/// The device's node under the name that the kernel has for it; looked for, it would cost a call for each device.
fn node_of(device: u64) -> Option<PathBuf> {
    let number = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let kernels = std::fs::read_link(number).ok()?;
    let node = Path::new("/dev").join(kernels.file_name()?.to_str()?.replace('!', "/"));
    names(&node, device).then_some(node)
}

fn names(path: &Path, device: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == device)
}

/// The UUID in the superblock of a device, if that is one of NILFS2.
fn read_uuid(device: &Path) -> io::Result<Option<Uuid>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(device, flags, Mode::empty())?);
    if !file.metadata()?.file_type().is_block_device() {
        return Ok(None);
    }
    let mut block = [0; 1024];
    match file.read_exact_at(&mut block, SUPERBLOCK) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    Ok(uuid_in(&block))
}

fn uuid_in(block: &[u8; 1024]) -> Option<Uuid> {
    let magic = u16::from_le_bytes([block[MAGIC_AT], block[MAGIC_AT + 1]]);
    let uuid = block[UUID_AT..UUID_AT + 16].try_into().ok()?;
    (magic == MAGIC).then_some(Uuid(uuid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_back_and_garbage_is_not() {
        let uuid = Uuid(*b"0123456789abcdef");
        assert_eq!(Uuid::parse(&uuid.to_string()), Some(uuid));
        for bad in ["", "0", &"0".repeat(31), &"g".repeat(32), &"A".repeat(32), &"+".repeat(32), "../../etc"] {
            assert_eq!(Uuid::parse(bad), None, "{bad:?} was taken");
        }
    }

    #[test]
    fn only_a_superblock_of_nilfs2_has_a_uuid() {
        let mut block = [7; 1024];
        assert_eq!(uuid_in(&block), None);
        block[MAGIC_AT..MAGIC_AT + 2].copy_from_slice(&MAGIC.to_le_bytes());
        assert_eq!(uuid_in(&block), Some(Uuid([7; 16])));
    }

    #[test]
    fn a_directory_elsewhere_is_no_volume() {
        let error = open_volume(Path::new("/proc")).unwrap_err();
        assert_eq!(error.kind(), fsnap_backend::ErrorKind::NotAVolume);
    }
}
