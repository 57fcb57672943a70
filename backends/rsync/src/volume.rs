//! Opening a directory as a volume, and what makes it the same one the next time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use fsnap_backend::{Error, ErrorKind, Identity, IoContext, Result, Volume, beneath};
use rustix::fs::{Mode, OFlags};

use crate::KIND;
use crate::store::Inner;
use crate::sys;

/// Opens `dir`, if it can be a volume at all.
pub(crate) fn open(dir: &Path) -> Result<OwnedFd> {
    let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason: reason.to_owned() };
    if !dir.is_absolute() {
        return Err(refused("its path is not absolute"));
    }
    // Taken apart and put together, so that a slash at the end does not make the kernel follow a link there.
    let path: PathBuf = dir.components().collect();
    match beneath::open_root(&path) {
        // O_DIRECTORY with O_NOFOLLOW answers ENOTDIR for a symbolic link, too.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(refused("it is no directory, or a symbolic link"))
        }
        opened => opened.context("open the volume", &path),
    }
}

/// Opens `dir` as a volume of this store.
pub(crate) fn adopt(store: &Inner, dir: &Path) -> Result<Volume> {
    let descriptor = open(dir)?;
    let refused = |reason: String| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason };
    let found = beneath::look_fd(&descriptor).context("read the attributes of", dir)?;
    let own = (found.device, found.meta.ino);
    if ancestors(store.descriptor.as_fd()).contains(&own) {
        let reason = format!("the store {} lies in it: every snapshot would hold all others", store.dir.display());
        return Err(refused(reason));
    }
    let above = ancestors(&descriptor);
    if let Some(levels) = above.iter().position(|&dir| dir == store.place) {
        let clones =
            beneath::look(&store.descriptor, "volumes".as_ref()).context("read the attributes of", &store.dir)?;
        // <store>/volumes/<locator> is two levels below, and a clone is as good a volume as any.
        if levels < 2 || above[levels - 1] != (clones.device, clones.meta.ino) {
            return Err(refused(format!("it lies in the store {}", store.dir.display())));
        }
    }
    let identity = identity(&descriptor).context("identify", dir)?;
    Ok(Volume::new(dir, identity, descriptor))
}

/// Checks that the path of a volume still leads to the directory that was adopted.
pub(crate) fn check(volume: &Volume) -> Result<()> {
    let here = match open(volume.dir()) {
        Err(error) if matches!(error.kind(), ErrorKind::NotAVolume) => {
            let found = Identity::new("something that is no directory");
            let what = format!("the volume {}", volume.dir().display());
            return Err(Error::WrongIdentity { what, expected: volume.identity().clone(), found });
        }
        opened => identity(opened?).context("identify", volume.dir())?,
    };
    if &here != volume.identity() {
        let what = format!("the volume {}", volume.dir().display());
        return Err(Error::WrongIdentity { what, expected: volume.identity().clone(), found: here });
    }
    Ok(())
}

/// The file system, the inode, and the inode's birth, since inode numbers are used again.
///
/// `f_fsid` alone will not do: XFS makes it of the device's number, which changes when the same file system is mounted
/// from another loop device. The UUID alone will not do either: every btrfs subvolume has the same root inode; there
/// `f_fsid` is of the UUID and the subvolume.
fn identity(dir: impl AsFd) -> io::Result<Identity> {
    let meta = beneath::stat_fd(&dir)?;
    let system = rustix::fs::fstatfs(&dir)?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let fsid = format!("{:x?}", system.f_fsid).replace(|c: char| !c.is_ascii_hexdigit(), "");
    let uuid = sys::file_system_uuid(&dir).map(|uuid| hex(&uuid));
    let file_system = match uuid {
        Some(uuid) if system.f_type as u64 != BTRFS => uuid,
        Some(uuid) => format!("{uuid}-{fsid}"),
        None => fsid,
    };
    let born = meta.btime.map_or(String::from("-"), |time| format!("{}.{:09}", time.seconds, time.nanoseconds));
    Ok(Identity::new(format!("{file_system}:{}:{born}", meta.ino)))
}

/// Device and inode of a directory and of all above it, as far as we may look.
fn ancestors(dir: impl AsFd) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut next = rustix::fs::openat(dir, ".", flags, Mode::empty());
    while let Ok(at) = next {
        let Ok(here) = beneath::look_fd(&at) else { break };
        let place = (here.device, here.meta.ino);
        if found.last() == Some(&place) {
            break;
        }
        found.push(place);
        next = rustix::fs::openat(&at, "..", flags, Mode::empty());
    }
    found
}

pub(crate) const BTRFS: u64 = 0x9123_683e;
pub(crate) const XFS: u64 = 0x5846_5342;

/// File systems of this kernel whose ctime follows every store into a shared mapping, once the page was written back
/// (see [`crate::walk`]). Memory file systems never write back; servers of network file systems have clocks of their
/// own, and FAT counts in two seconds: there, contents are compared.
const CTIME_TELLS: [u64; 6] = [
    0xef53, // ext2, ext3, ext4
    XFS,
    BTRFS,
    0xf2f5_2010, // F2FS
    0xca45_1a4e, // bcachefs
    0x3434,      // NILFS2
];

/// Whether an unchanged ctime means an unchanged content on the file system of `dir`.
pub(crate) fn ctime_tells(dir: impl AsFd) -> io::Result<bool> {
    Ok(CTIME_TELLS.contains(&(rustix::fs::fstatfs(dir)?.f_type as u64)))
}
