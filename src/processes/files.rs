//! The files that a process has in use.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, StatxFlags};

use super::mounts::Device;
use super::proc_dir::{ProcDir, link_in, numbers_in, parse, read_all, unless_gone};
use super::sys;
use super::view::{Located, View, Views};

/// In what way a process can write to a file, or to the directory it lies in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// A descriptor open for writing.
    Descriptor(i32),
    /// A shared mapping that may be written.
    Mapping,
    /// Its working directory.
    Cwd,
    /// Its root directory.
    Root,
    /// A descriptor of a directory.
    Directory(i32),
    /// A writable mount that it sees.
    Mount(PathBuf),
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Descriptor(number) => write!(f, "has descriptor {number} open for writing"),
            Self::Mapping => f.write_str("has a shared mapping that it can write to"),
            Self::Cwd => f.write_str("has its working directory there"),
            Self::Root => f.write_str("has its root directory there"),
            Self::Directory(number) => write!(f, "has a directory open as descriptor {number}"),
            Self::Mount(point) => write!(f, "can reach it through the mount at {point:?}"),
        }
    }
}

/// A file in use: how, by what name, and where it lies.
#[derive(Debug)]
pub(crate) struct InUse {
    pub(crate) how: How,
    pub(crate) path: PathBuf,
    pub(crate) located: Located,
    /// `st_dev` of a file whose place is unknown.
    pub(crate) device: Option<u64>,
}

/// Where a process's files lie, and where it matters.
#[derive(Debug)]
pub(crate) struct Lens<'a> {
    /// The process's mounts.
    pub(crate) view: &'a View,
    /// All that is known of other processes'.
    pub(crate) views: &'a Views,
    /// The file systems that are looked for: descriptors of files that surely lie on another are passed over.
    pub(crate) devices: &'a [Device],
}

/// Shows `visit` every file that the process has open or mapped for writing, until it says `false`.
pub(crate) fn visit_writable(
    process: &ProcDir,
    lens: &Lens<'_>,
    visit: &mut dyn FnMut(InUse) -> bool,
) -> io::Result<()> {
    if visit_descriptors(process, lens, false, visit)? {
        visit_mappings(process, lens, visit)?;
    }
    Ok(())
}

/// Shows `visit` those, and the directories below which the process could make or open files without another look-up
/// from the root: its working directory, its root, its descriptors of directories.
pub(crate) fn visit_all(process: &ProcDir, lens: &Lens<'_>, visit: &mut dyn FnMut(InUse) -> bool) -> io::Result<()> {
    if !visit_descriptors(process, lens, true, visit)? || !visit_mappings(process, lens, visit)? {
        return Ok(());
    }
    for (name, how) in [("cwd", How::Cwd), ("root", How::Root)] {
        let path = process.link(name)?;
        if lens.view.resolve(&path).is_none_or(|mount| mount.writable) {
            let located = lens.views.locate(lens.view, &path, None);
            let device = if located == Located::Unknown {
                target_of(process, name).ok().map(|target| target.device)
            } else {
                None
            };
            if !visit(InUse { how, path, located, device }) {
                break;
            }
        }
    }
    Ok(())
}

fn visit_descriptors(
    process: &ProcDir,
    lens: &Lens<'_>,
    directories: bool,
    visit: &mut dyn FnMut(InUse) -> bool,
) -> io::Result<bool> {
    let dir = process.open_dir("fd")?;
    for number in numbers_in(&dir)? {
        let name = number.to_string();
        // The owner's bits of the link itself tell how the file is open, and cost neither an open nor a look at it.
        let Ok(link) = rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let writable = link.st_mode & 0o200 != 0;
        if !writable && !directories {
            continue;
        }
        // `None`: it was closed meanwhile.
        let Some(target) = unless_gone(target_of(&dir, &name))? else { continue };
        let how = match target.kind {
            FileType::Directory if !writable => How::Directory(number),
            // What is written to these goes elsewhere.
            FileType::Socket | FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice => continue,
            _ if writable => How::Descriptor(number),
            _ => continue,
        };
        let mount = target.mount.and_then(|mount| lens.view.table.by_id(mount));
        let read_only = matches!(how, How::Directory(_)) && mount.is_some_and(|mount| !mount.writable);
        if read_only || mount.is_some_and(|mount| !lens.devices.contains(&mount.root.device)) {
            continue;
        }
        // Asked last, since it costs the most.
        let Some(path) = unless_gone(link_in(&dir, &name))? else { continue };
        if !path.is_absolute() {
            continue; // An eventfd and its like.
        }
        let located = lens.views.locate(lens.view, &path, target.mount);
        let device = (located == Located::Unknown).then_some(target.device);
        if !visit(InUse { how, path, located, device }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a link of a process leads to.
pub(super) struct Target {
    pub(super) kind: FileType,
    /// The id of the mount through which it was opened.
    pub(super) mount: Option<u64>,
    pub(super) device: u64,
    pub(super) inode: u64,
    /// It has no name, and will never have one again.
    pub(super) unlinked: bool,
}

/// `AT_STATX_DONT_SYNC` takes what the kernel knows and asks no server. The mount is told by Linux 5.8 and later.
pub(super) fn target_of(dir: impl AsFd, link: &str) -> io::Result<Target> {
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::NLINK | StatxFlags::MNT_ID;
    let ask = |wanted| rustix::fs::statx(&dir, link, AtFlags::STATX_DONT_SYNC, wanted);
    // Of a file on another user's FUSE mount the kernel tells the device only, and only if nothing else is asked for.
    let found = ask(wanted).or_else(|_| ask(StatxFlags::empty()))?;
    let told = |what| StatxFlags::from_bits_retain(found.stx_mask).contains(what);
    Ok(Target {
        kind: FileType::from_raw_mode(found.stx_mode.into()),
        mount: told(StatxFlags::MNT_ID).then_some(found.stx_mnt_id),
        device: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        unlinked: told(StatxFlags::NLINK) && found.stx_nlink == 0,
    })
}

fn visit_mappings(process: &ProcDir, lens: &Lens<'_>, visit: &mut dyn FnMut(InUse) -> bool) -> io::Result<bool> {
    let maps = process.open("maps")?;
    if sys::maps_files_for_writing(&maps) == Some(false) {
        return Ok(true);
    }
    let content = read_all(maps)?;
    let mut last = None;
    for mapping in content.split(|&byte| byte == b'\n').filter_map(shared_writable) {
        // The pieces of one file's mapping follow each other.
        if last.replace((mapping.device, mapping.inode)) == Some((mapping.device, mapping.inode)) {
            continue;
        }
        let path = mapping.path();
        let located = lens.views.locate_mapped(lens.view, &path, mapping.device);
        if !visit(InUse { how: How::Mapping, path, located, device: None }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A line of `/proc/PID/maps` that stands for a shared mapping which may be written.
fn shared_writable(line: &[u8]) -> Option<Mapping<'_>> {
    Mapping::parse(line).filter(|mapping| mapping.writable && mapping.shared)
}

/// A line of `/proc/PID/maps` that stands for a piece of a file.
pub(super) struct Mapping<'a> {
    /// First address and end, as the directory `map_files` names it.
    pub(super) range: &'a str,
    pub(super) writable: bool,
    pub(super) shared: bool,
    pub(super) device: Device,
    pub(super) inode: u64,
    /// The file's name, with the kernel's escapes.
    name: &'a [u8],
}

impl<'a> Mapping<'a> {
    pub(super) fn parse(line: &'a [u8]) -> Option<Self> {
        // address perms offset dev inode, then blanks up to a fixed column, then the name.
        let mut fields = line.splitn(6, |&byte| byte == b' ');
        let (range, permissions) = (fields.next()?, fields.next()?);
        let mut device = fields.nth(1)?.split(|&byte| byte == b':');
        let inode = fields.next()?;
        // Most lines have none, or one in brackets.
        let name = fields.next()?.trim_ascii_start();
        if name.first() != Some(&b'/') {
            return None;
        }
        let mut hex = || u32::from_str_radix(std::str::from_utf8(device.next()?).ok()?, 16).ok();
        Some(Self {
            range: std::str::from_utf8(range).ok()?,
            writable: permissions.get(1) == Some(&b'w'),
            shared: permissions.get(3) == Some(&b's'),
            device: Device { major: hex()?, minor: hex()? },
            inode: parse(inode)?,
            name,
        })
    }

    /// The file's name. Here the kernel escapes the end of a line and nothing else, not even a backslash: a name may look as if it had others.
    pub(super) fn path(&self) -> PathBuf {
        const ESCAPED: &[u8] = b"\\012";
        let (mut path, mut rest) = (Vec::with_capacity(self.name.len()), self.name);
        while let Some((&first, after)) = rest.split_first() {
            let newline = rest.strip_prefix(ESCAPED);
            path.push(if newline.is_some() { b'\n' } else { first });
            rest = newline.unwrap_or(after);
        }
        OsString::from_vec(path).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_mappings_of_files_count() {
        let shared = b"7f0c7a000000-7f0c7a001000 rw-s 00000000 fe:0a 1234                       /srv/db/a b (deleted)";
        let found = shared_writable(shared).unwrap();
        assert_eq!((found.device, found.inode), (Device { major: 0xfe, minor: 0x0a }, 1234));
        assert_eq!(found.path().as_os_str(), "/srv/db/a b (deleted)");
        for other in [
            &b"7f0c7a000000-7f0c7a001000 rw-p 00000000 fe:0a 1234                       /srv/db/a"[..],
            b"7f0c7a000000-7f0c7a001000 r--s 00000000 fe:0a 1234                       /srv/db/a",
            b"7f0c7a000000-7f0c7a001000 rw-s 00000000 00:00 0",
            b"7f0c7a000000-7f0c7a001000 rw-s 00000000 00:0d 5                          anon_inode:[perf_event]",
            b"",
        ] {
            assert!(shared_writable(other).is_none(), "{}", String::from_utf8_lossy(other));
        }
    }

    /// Else a file beside a volume passed for one within it.
    #[test]
    fn a_name_that_looks_escaped_is_taken_as_it_is() {
        let line = b"7f0c7a000000-7f0c7a001000 rw-s 00000000 fe:0a 1234    /srv/db\\057x\\012y";
        assert_eq!(Mapping::parse(line).unwrap().path().as_os_str(), "/srv/db\\057x\ny");
    }
}
