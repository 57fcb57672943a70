//! The files that a process has in use.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, OFlags, StatxFlags};

use super::mounts::Device;
use super::proc_dir::{ProcDir, link_in, numbers_in, parse, read_all, unescape, unless_gone};
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

/// Shows `visit` every file that the process has open or mapped for writing, until it says `false`.
pub(crate) fn visit_writable(
    process: &ProcDir,
    view: &View,
    views: &Views,
    visit: &mut dyn FnMut(InUse) -> bool,
) -> io::Result<()> {
    if visit_descriptors(process, view, views, false, visit)? {
        visit_mappings(process, view, views, visit)?;
    }
    Ok(())
}

/// Shows `visit` those, and the directories below which the process could make or open files without another look-up
/// from the root: its working directory, its root, its descriptors of directories.
pub(crate) fn visit_all(
    process: &ProcDir,
    view: &View,
    views: &Views,
    visit: &mut dyn FnMut(InUse) -> bool,
) -> io::Result<()> {
    if !visit_descriptors(process, view, views, true, visit)? || !visit_mappings(process, view, views, visit)? {
        return Ok(());
    }
    for (name, how) in [("cwd", How::Cwd), ("root", How::Root)] {
        let path = process.link(name)?;
        if view.resolve(&path).is_none_or(|mount| mount.writable) {
            let located = views.locate(view, &path, None);
            let device = if located == Located::Unknown { device_of(process, name) } else { None };
            if !visit(InUse { how, path, located, device }) {
                break;
            }
        }
    }
    Ok(())
}

fn visit_descriptors(
    process: &ProcDir,
    view: &View,
    views: &Views,
    directories: bool,
    visit: &mut dyn FnMut(InUse) -> bool,
) -> io::Result<bool> {
    const O_DIRECTORY: u64 = OFlags::DIRECTORY.bits() as u64;
    let dir = process.open_dir("fd")?;
    for number in numbers_in(&dir)? {
        // `None`: it was closed meanwhile.
        let Some(path) = unless_gone(link_in(&dir, &number.to_string()))? else { continue };
        if !path.is_absolute() {
            continue; // A socket, a pipe, an eventfd: most of them.
        }
        // The owner's bits of the link itself tell how the file is open, and cost neither an open nor a look at it.
        let found = rustix::fs::statat(&dir, number.to_string(), AtFlags::SYMLINK_NOFOLLOW);
        let Ok(link) = found else { continue };
        let writable = link.st_mode & 0o200 != 0;
        if !writable && !directories {
            continue;
        }
        let info = unless_gone(process.read(&format!("fdinfo/{number}")))?;
        let Some((open_flags, mount)) = info.as_deref().and_then(parse_fdinfo) else { continue };
        let how = if writable {
            How::Descriptor(number)
        } else if open_flags & O_DIRECTORY != 0 {
            How::Directory(number)
        } else {
            continue;
        };
        let located = views.locate(view, &path, Some(mount));
        if matches!(how, How::Directory(_)) && view.table.by_id(mount).is_some_and(|mount| !mount.writable) {
            continue;
        }
        let device = if located == Located::Unknown { device_of(&dir, &number.to_string()) } else { None };
        if !visit(InUse { how, path, located, device }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The device of what a link leads to, on a mount that no table shows: a memfd's, a detached or a lazily unmounted one.
///
/// `AT_STATX_DONT_SYNC` takes what the kernel knows and asks no server.
fn device_of(dir: impl AsFd, link: &str) -> Option<u64> {
    let found = rustix::fs::statx(dir, link, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    Some(rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor))
}

/// The flags and the mount's id in `/proc/PID/fdinfo/N`.
fn parse_fdinfo(content: &[u8]) -> Option<(u64, i32)> {
    let field = |name: &[u8]| {
        let line = content.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(name))?;
        Some(line.trim_ascii())
    };
    let flags = u64::from_str_radix(std::str::from_utf8(field(b"flags:")?).ok()?, 8).ok()?;
    Some((flags, parse(field(b"mnt_id:")?)?))
}

fn visit_mappings(
    process: &ProcDir,
    view: &View,
    views: &Views,
    visit: &mut dyn FnMut(InUse) -> bool,
) -> io::Result<bool> {
    let maps = process.open("maps")?;
    if sys::maps_files_for_writing(&maps) == Some(false) {
        return Ok(true);
    }
    let content = read_all(maps)?;
    let mut last: &[u8] = b"";
    for (name, device) in content.split(|&byte| byte == b'\n').filter_map(shared_writable) {
        // The pieces of one file's mapping follow each other.
        if name == last {
            continue;
        }
        last = name;
        let path = unescape(name);
        let located = views.locate_mapped(view, &path, device);
        if !visit(InUse { how: How::Mapping, path, located, device: None }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The file and its device, of a line of `/proc/PID/maps` that stands for a shared mapping which may be written.
fn shared_writable(line: &[u8]) -> Option<(&[u8], Device)> {
    // address perms offset dev inode, then blanks up to a fixed column, then the name.
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let permissions = fields.nth(1)?;
    if permissions.get(1) != Some(&b'w') || permissions.get(3) != Some(&b's') {
        return None;
    }
    let mut device = fields.nth(1)?.split(|&byte| byte == b':');
    let mut hex = || u32::from_str_radix(std::str::from_utf8(device.next()?).ok()?, 16).ok();
    let device = (hex()?, hex()?);
    let name = fields.nth(1)?.trim_ascii_start();
    Path::new(OsStr::from_bytes(name)).is_absolute().then_some((name, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_mappings_of_files_count() {
        let shared = b"7f0c7a000000-7f0c7a001000 rw-s 00000000 fe:0a 1234                       /srv/db/a b (deleted)";
        assert_eq!(shared_writable(shared), Some((&b"/srv/db/a b (deleted)"[..], (0xfe, 0x0a))));
        for other in [
            &b"7f0c7a000000-7f0c7a001000 rw-p 00000000 fe:0a 1234                       /srv/db/a"[..],
            b"7f0c7a000000-7f0c7a001000 r--s 00000000 fe:0a 1234                       /srv/db/a",
            b"7f0c7a000000-7f0c7a001000 rw-s 00000000 00:00 0",
            b"7f0c7a000000-7f0c7a001000 rw-s 00000000 00:0d 5                          anon_inode:[perf_event]",
            b"",
        ] {
            assert_eq!(shared_writable(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn the_flags_of_a_descriptor_are_octal() {
        let info = b"pos:\t0\nflags:\t02100002\nmnt_id:\t27\nino:\t9\nlock:\t1: FLOCK  ADVISORY  WRITE 1 0:1:2 0 EOF\n";
        assert_eq!(parse_fdinfo(info), Some((0o2100002, 27)));
        assert_eq!(parse_fdinfo(b"pos:\t0\n"), None);
    }
}
