//! Files in use that have no name any more: no snapshot holds them, and a process that has one can be asked for it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use super::files::target_of;
use super::observer::has_mark;
use super::{FilePlace, MappedFile, Medium, Observation, OpenKind};
use crate::checkpoint::PathText;

/// A regular file in use that has no name any more, and will never have one again.
#[derive(Debug, Clone)]
pub struct Unlinked {
    /// Where it was when it had a name.
    pub place: FilePlace,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// The mount through which it was opened.
    pub mount: Option<u64>,
    /// What its file system keeps its files on.
    pub medium: Medium,
    /// Whose it is: the index of a process.
    pub(super) process: usize,
    /// The link to it in the directory of the process.
    pub(super) link: String,
}

impl Unlinked {
    /// Whether opening it asks nobody but this kernel; of a volume's file, the snapshot asks as well.
    pub fn can_be_opened(&self) -> bool {
        self.place.volume.is_some() || matches!(self.medium, Medium::Disk | Medium::Memory)
    }
}

impl Observation {
    /// The files that have no name any more, each once.
    pub fn unlinked(&self) -> &[Unlinked] {
        &self.unlinked
    }

    /// Opens one of them for reading, whatever it is open for in the process.
    pub fn open(&self, unlinked: &Unlinked) -> io::Result<File> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "it is not open any more");
        let dir = self.dirs.get(unlinked.process).and_then(Option::as_ref).ok_or_else(gone)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, &unlinked.link, flags, Mode::empty())?;
        let found = rustix::fs::fstat(&file)?;
        // Under that number there may be another by now, if the process runs.
        let is_it = (found.st_dev, found.st_ino) == (unlinked.device, unlinked.inode)
            && FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
        if is_it { Ok(file.into()) } else { Err(gone()) }
    }

    /// Two files without names that have one number on one mount, as files of two subvolumes of a btrfs can: who knows a file by
    /// these takes one for the other, even to copy it.
    pub fn doubles(&self) -> Option<[&Unlinked; 2]> {
        let mut known: HashMap<_, &Unlinked> = HashMap::new();
        self.unlinked.iter().find_map(|unlinked| {
            let other = known.insert((unlinked.mount?, unlinked.inode), unlinked)?;
            (other.device != unlinked.device).then_some([other, unlinked])
        })
    }

    /// A file that a process has mapped, that has no name any more, and that this user cannot reach: not even to save the process.
    pub fn out_of_reach(&self) -> Option<(i32, &PathText)> {
        let mapped =
            self.record.processes.iter().flat_map(|process| process.mapped.iter().map(|file| (process.pid, file)));
        let lost = |pid: i32, file: &MappedFile| {
            let path = file.place.path.as_path();
            let below = path.strip_prefix("/").unwrap_or(path);
            // A file may be *named* so.
            has_mark(path)
                && rustix::fs::lstat(Path::new(&format!("/proc/{pid}/root")).join(below))
                    .map_or(true, |found| found.st_ino != file.inode)
        };
        let mut lost = mapped.filter(|(pid, file)| !file.place.unlinked && lost(*pid, file));
        lost.next().map(|(pid, file)| (pid, &file.place.path))
    }

    /// Whether the processes have another file in use that has the same number on the same mount: two subvolumes of one btrfs
    /// can show such two, and who knows a file by its mount and its number takes one for the other.
    pub fn has_namesake(&self, unlinked: &Unlinked) -> bool {
        let same = |one: &Unlinked| (one.mount, one.inode) == (unlinked.mount, unlinked.inode);
        if self.unlinked.iter().any(|one| one.device != unlinked.device && same(one)) {
            return true;
        }
        self.record.processes.iter().enumerate().any(|(index, process)| {
            let other = |fd: i32| {
                let dir = self.dirs.get(index)?.as_ref()?;
                target_of(dir, &format!("fd/{fd}")).ok().filter(|target| target.device != unlinked.device)?.mount
            };
            let number = unlinked.inode;
            process.files.iter().filter(|file| file.kind == OpenKind::File && file.inode == number).any(|file| {
                file.device != unlinked.device && other(file.fd).is_none_or(|mount| Some(mount) == unlinked.mount)
            }) || process.mapped.iter().any(|file| file.inode == number && !file.place.unlinked)
        })
    }
}
