//! What is mounted where, as this process sees it.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};

use crate::dm::Number;

/// One line of `/proc/self/mountinfo` ([proc_pid_mountinfo(5)]).
///
/// [proc_pid_mountinfo(5)]: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    id: u64,
    /// The file system's number: that of its device, except for btrfs.
    pub(crate) device: Option<Number>,
    /// The mounted directory, below the file system's top.
    pub(crate) root: String,
    pub(crate) file_system: String,
    pub(crate) source: String,
    pub(crate) read_only: bool,
    /// The file system's own options.
    pub(crate) options: String,
}

/// How a directory is mounted.
#[derive(Debug)]
pub(crate) enum Place {
    /// It is the root of this mount.
    Root(Mount),
    /// It lies below the root of its mount.
    Below,
    /// Its mount is none that this process can see.
    Unknown,
}

/// Looks how `dir` is mounted.
pub(crate) fn place(dir: impl AsFd) -> io::Result<Place> {
    let found = rustix::fs::statx(dir, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    if !found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(Place::Below);
    }
    let text = fs::read("/proc/self/mountinfo")?;
    let mount = text.split(|&byte| byte == b'\n').filter_map(parse).find(|mount| mount.id == found.stx_mnt_id);
    Ok(mount.map_or(Place::Unknown, Place::Root))
}

fn parse(line: &[u8]) -> Option<Mount> {
    let line = String::from_utf8_lossy(line);
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ');
    let id = before.next()?.parse().ok()?;
    let device = before.nth(1).and_then(Number::parse);
    let root = before.next()?.to_owned();
    let options = before.nth(1)?;
    let mut after = after.split(' ');
    let (file_system, source) = (after.next()?.to_owned(), after.next()?.to_owned());
    let read_only = |options: &str| options.split(',').any(|option| option == "ro");
    let own = after.next().unwrap_or_default();
    let read_only = read_only(options) || read_only(own);
    Some(Mount { id, device, root, file_system, source, read_only, options: own.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let mount =
            parse(b"29 1 253:3 / /srv/a\\040b rw,relatime shared:1 - ext4 /dev/dm-3 rw,errors=remount-ro").unwrap();
        assert_eq!((mount.id, mount.device), (29, Number::parse("253:3")));
        assert_eq!((&*mount.root, &*mount.file_system, &*mount.source), ("/", "ext4", "/dev/dm-3"));
        assert!(!mount.read_only && mount.options == "rw,errors=remount-ro");
        assert!(parse(b"29 1 0:3 / /srv ro - xfs /dev/x rw").unwrap().read_only);
        assert!(parse(b"29 1 0:3 / /srv rw - xfs /dev/x ro").unwrap().read_only);
        assert_eq!(parse(b"29 1 0:3"), None);
    }
}
