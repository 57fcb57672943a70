//! A snapshot of a volume with nested subvolumes: several snapshots in one directory.
//!
//! ```text
//! s-0123456789abcdef/     under the name .s-… until every part is there
//!   0                     the snapshot of the volume's root
//!   1  1.at               that of a nested subvolume, and where it belongs
//!   2  2.at
//!   view                  all of them put together, read-only; under the name .view until it is whole
//! ```
//!
//! The parts are what was captured; they are read-only from the first moment and never touched again. The view is made
//! of them after the frozen window, and can be made again. It cannot be captured as such: a read-only snapshot takes no
//! other subvolume into itself, and one that is made writable first needs a commit more per subvolume while the
//! writers stand.
//!
//! A record `N.at` is a symbolic link that leads nowhere: its text is `PARENT INODE ro|rw NAME`, where the directory
//! `INODE` of part `PARENT` holds it as `NAME`. A link's text is metadata, and so the commit that ends each snapshot
//! ioctl makes it durable, without an fsync in the frozen window.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use fsnap_backend::{FileKind, Timestamp, beneath};
use rustix::fs::{AtFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::nested::{self, Nested};
use crate::sys;

/// All parts put together, read-only.
pub(crate) const VIEW: &str = "view";
/// A view that is being made.
pub(crate) const NEW_VIEW: &str = ".view";

/// An opened group.
#[derive(Debug)]
pub(crate) struct Group {
    /// The directory that holds the parts.
    pub(crate) dir: OwnedFd,
    /// Where the parts 1, 2, … belong; part 0 is the root.
    pub(crate) parts: Vec<Part>,
}

/// Where a part belongs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The part that it lies in, whose number is smaller.
    parent: usize,
    /// The inode number of the directory that holds it there.
    dir: u64,
    /// What was captured refuses writes, and so will its clones.
    read_only: bool,
    /// Its name in that directory.
    name: OsString,
}

/// Captures `volume`, the subvolume `id`, and all that is `nested` in it, as the parts of `group`, an empty directory.
///
/// Each subvolume is opened just before its snapshot is made, so that their number is not bounded by that of
/// descriptors; next to the commit of each ioctl the time is nothing.
pub(crate) fn take(group: &OwnedFd, volume: impl AsFd, id: u64, nested: &[Nested]) -> io::Result<()> {
    let holds = nested::containers(nested.iter().map(|nested| nested.parent));
    let mut roots = vec![Some(nested::unobstructed(&volume)?)];
    for (number, each) in (1..).zip(nested) {
        let container_id = each.parent.checked_sub(1).map_or(id, |index| nested[index].id);
        let container = roots[each.parent].as_ref().ok_or(Errno::INVAL)?;
        let root = nested::open(container, container_id, each)?;
        let read_only = sys::info(&root)?.read_only;
        let part = Part { parent: each.parent, dir: each.dir, read_only, name: each.name.clone() };
        rustix::fs::symlinkat(part.record(), group, record_name(number))?;
        sys::snapshot(&root, group, &part_name(number), true)?;
        roots.push(holds[number].then_some(root));
    }
    sys::snapshot(volume, group, &part_name(0), true)
}

impl Group {
    /// Reads the records of a group that is open as `dir`.
    pub(crate) fn load(dir: OwnedFd) -> io::Result<Self> {
        let mut parts = Vec::new();
        loop {
            let number = parts.len() + 1;
            match beneath::read_link(&dir, &record_name(number)) {
                Ok(record) => {
                    let part = Part::parse(&record).filter(|part| part.parent < number);
                    parts.push(part.ok_or(io::ErrorKind::InvalidData)?);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self { dir, parts }),
                Err(error) => return Err(error),
            }
        }
    }

    /// Opens the root of a part.
    pub(crate) fn open_part(&self, number: usize) -> io::Result<OwnedFd> {
        beneath::open_dir(&self.dir, &part_name(number))
    }

    /// The path of a part below the volume's root.
    pub(crate) fn path(&self, number: usize) -> io::Result<Vec<OsString>> {
        let Some(part) = number.checked_sub(1).map(|index| &self.parts[index]) else { return Ok(Vec::new()) };
        let mut path = self.path(part.parent)?;
        let container = self.open_part(part.parent)?;
        path.extend(sys::path_of(&container, sys::info(&container)?.id, part.dir)?);
        path.push(part.name.clone());
        Ok(path)
    }

    /// Puts writable snapshots of all parts together as `name` in `dest`, or read-only ones.
    ///
    /// Requires that nobody else reaches `name` yet. A call that is cut short leaves a tree there that is to be removed.
    pub(crate) fn assemble(&self, dest: impl AsFd, name: &OsStr, read_only: bool) -> io::Result<()> {
        let holds = nested::containers(self.parts.iter().map(|part| part.parent));
        sys::snapshot(self.open_part(0)?, &dest, name, false)?;
        let mut roots = vec![Some(beneath::open_dir(dest, name)?)];
        for (number, part) in (1..).zip(&self.parts) {
            let captured = self.open_part(number)?;
            let container = roots[part.parent].as_ref().ok_or(io::ErrorKind::InvalidData)?;
            // Taken as writable if others are to be put in.
            let sealed = (read_only || part.read_only) && !holds[number];
            let root = put(&captured, container, part, sealed)?;
            roots.push(holds[number].then_some(root));
        }
        for (number, root) in roots.iter().enumerate().rev() {
            let was_read_only = number.checked_sub(1).is_some_and(|index| self.parts[index].read_only);
            if let Some(root) = root.as_ref().filter(|_| read_only || was_read_only) {
                sys::set_read_only(root, true)?;
            }
        }
        Ok(())
    }
}

/// Puts a snapshot of `captured` where `container` has a placeholder for it, and returns its root.
fn put(captured: &OwnedFd, container: &OwnedFd, part: &Part, read_only: bool) -> io::Result<OwnedFd> {
    // The container is a snapshot of the one in which the inode was recorded: the number is the same.
    let dir = nested::open_inode(container, sys::info(container)?.id, part.dir)?;
    let before = beneath::stat_fd(&dir)?;
    let there = beneath::stat(&dir, &part.name)?;
    if (there.kind, there.ino) != (FileKind::Dir, sys::PLACEHOLDER_INODE) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    rustix::fs::unlinkat(&dir, &part.name, AtFlags::REMOVEDIR)?;
    sys::snapshot(captured, &dir, &part.name, read_only)?;
    let root = beneath::open_dir(&dir, &part.name)?;
    let times = Timestamps { last_access: timespec(before.atime), last_modification: timespec(before.mtime) };
    rustix::fs::futimens(&dir, &times)?;
    Ok(root)
}

fn timespec(time: Timestamp) -> Timespec {
    Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() }
}

impl Part {
    fn record(&self) -> OsString {
        let access = if self.read_only { "ro" } else { "rw" };
        let mut text = OsString::from(format!("{} {} {access} ", self.parent, self.dir));
        text.push(&self.name);
        text
    }

    fn parse(record: &OsStr) -> Option<Self> {
        let mut fields = record.as_bytes().splitn(4, |&byte| byte == b' ');
        let mut text = || std::str::from_utf8(fields.next()?).ok();
        let parent = text()?.parse().ok()?;
        let dir = text()?.parse().ok()?;
        let read_only = match text()? {
            "ro" => true,
            "rw" => false,
            _ => return None,
        };
        let name = fields.next().filter(|name| !matches!(*name, b"" | b"." | b"..") && !name.contains(&b'/'))?;
        Some(Self { parent, dir, read_only, name: OsString::from_vec(name.to_vec()) })
    }
}

fn part_name(number: usize) -> OsString {
    number.to_string().into()
}

fn record_name(number: usize) -> OsString {
    format!("{number}.at").into()
}

/// What a name in a group's directory stands for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Member {
    /// A part or a view: a subvolume.
    Tree,
    /// A record.
    Record,
}

/// Tells what a name in a group's directory stands for; `None` if fsnap makes no such name.
pub(crate) fn member(name: &OsStr) -> Option<Member> {
    let number = |text: &str| text.parse::<usize>().is_ok_and(|number| number.to_string() == text);
    match name.to_str()? {
        VIEW | NEW_VIEW => Some(Member::Tree),
        text if number(text) => Some(Member::Tree),
        text => text.strip_suffix(".at").is_some_and(number).then_some(Member::Record),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_any_name() {
        for name in [&b"plain"[..], b"two words", b"new\nline", b"\xff\xfe", b" "] {
            let name = OsString::from_vec(name.to_vec());
            let part = Part { parent: 3, dir: 257, read_only: name.len() > 2, name };
            assert_eq!(Part::parse(&part.record()), Some(part));
        }
    }

    #[test]
    fn a_record_that_fsnap_could_not_have_made_is_refused() {
        let long = format!("{} 256 rw x", "9".repeat(40));
        for bad in
            ["", "0 256 rw", "0 256 rw ", "0 256 rw ..", "0 256 rw a/b", "0 256 rx a", "-1 256 rw a", "x 1 rw a", &long]
        {
            assert_eq!(Part::parse(OsStr::new(bad)), None, "{bad:?} was taken");
        }
    }

    #[test]
    fn only_fsnaps_own_names_are_members() {
        for tree in ["0", "17", "view", ".view"] {
            assert_eq!(member(OsStr::new(tree)), Some(Member::Tree));
        }
        assert_eq!(member(OsStr::new("17.at")), Some(Member::Record));
        for foreign in ["", "00", "+1", "1.at.at", ".at", "views", "a", "99999999999999999999999"] {
            assert_eq!(member(OsStr::new(foreign)), None, "{foreign:?}");
        }
    }
}
