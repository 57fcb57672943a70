//! What a checkpoint knows of its processes.
//!
//! A [`TreeRecord`] is kept with the checkpoint, and read years later, perhaps from a catalog that somebody else has
//! written to: so it has a version, every path in it is kept byte for byte, and a path below a volume is believed only
//! when it [stays below it](InVolume::is_sound).

use serde::{Deserialize, Serialize};

use super::Outside;
use crate::checkpoint::PathText;
use crate::name::Name;

/// The newest version of the record.
const VERSION: u32 = 1;

/// A tree of processes as it stood at a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRecord {
    version: u32,
    /// The processes, by pid.
    pub processes: Vec<ProcessRecord>,
    /// What they could write to that the checkpoint does not hold.
    #[serde(default)]
    pub outside: Vec<Outside>,
    /// How much more of that the settings said to leave out.
    #[serde(default)]
    pub ignored: usize,
    /// They had more files in use than are recorded.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut_off: bool,
}

impl TreeRecord {
    /// A record of no process.
    pub(super) fn new() -> Self {
        Self { version: VERSION, processes: Vec::new(), outside: Vec::new(), ignored: 0, cut_off: false }
    }

    /// Whether this fsnap understands it, and nothing in it leads out of a volume.
    pub(crate) fn is_sound(&self) -> bool {
        let places = self.processes.iter().flat_map(|process| {
            let dirs = [&process.cwd, &process.root, &process.program].into_iter().flatten();
            let dirs = dirs.filter_map(|dir| dir.volume.as_ref());
            dirs.chain(process.files.iter().filter_map(|file| file.place.volume.as_ref()))
                .chain(process.mapped.iter().filter_map(|file| file.place.volume.as_ref()))
        });
        self.version == VERSION && places.into_iter().all(InVolume::is_sound)
    }

    /// The process that had this pid.
    pub fn process(&self, pid: i32) -> Option<&ProcessRecord> {
        self.processes.iter().find(|process| process.pid == pid)
    }
}

/// One process as it stood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its pid, in fsnap's pid namespace.
    pub pid: i32,
    /// When it started, in clock ticks since boot: two processes with one pid have two of these.
    pub start_time: u64,
    /// The pid of its parent.
    pub parent: i32,
    /// The name it gave itself, with control characters replaced.
    pub command: String,
    /// Its command line, as far as it could be read in time.
    #[serde(default)]
    pub arguments: Vec<PathText>,
    /// Its working directory.
    pub cwd: Option<FilePlace>,
    /// Its root directory.
    pub root: Option<FilePlace>,
    /// The file of its program.
    pub program: Option<FilePlace>,
    /// Its descriptors, by number.
    #[serde(default)]
    pub files: Vec<OpenFile>,
    /// The files that it has mapped into its memory.
    #[serde(default)]
    pub mapped: Vec<MappedFile>,
    /// Why its files are not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unread: Option<String>,
}

impl ProcessRecord {
    /// The files that it has locked and mapped as well: CRIU sets the lock before it maps the file, closes what it mapped it by, and thereby
    /// [lets go of the lock](crate::design::runs).
    pub fn locks_that_get_lost(&self) -> Vec<&FilePlace> {
        let mut lost: Vec<&FilePlace> = Vec::new();
        for file in self.files.iter().filter(|file| file.locked) {
            if self.mapped.iter().any(|mapped| mapped.place == file.place) && !lost.contains(&&file.place) {
                lost.push(&file.place);
            }
        }
        lost
    }
}

/// Where a file was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePlace {
    /// Its path in the words of its own mount namespace; of what has none, what the kernel calls it, such as `pipe:[7]`.
    pub path: PathText,
    /// Where in the checkpoint it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<InVolume>,
    /// It had no name any more: it is in no snapshot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unlinked: bool,
}

/// A place in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InVolume {
    /// The volume.
    pub name: Name,
    /// The path from the volume's root; empty for the root itself.
    pub path: PathText,
}

impl InVolume {
    /// Whether the path stays below the volume's root.
    pub fn is_sound(&self) -> bool {
        let mut components = self.path.as_path().components();
        components.all(|component| matches!(component, std::path::Component::Normal(_)))
    }
}

/// An open descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// Its number.
    pub fd: i32,
    /// The file.
    #[serde(flatten)]
    pub place: FilePlace,
    /// What it is.
    pub kind: OpenKind,
    /// How it is open: the flags of open(2).
    pub flags: u32,
    /// Where the next read or write begins.
    pub offset: u64,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// The process holds a lock of fcntl(2) on a part of the file: one that belongs to the process, and not to the descriptor.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub locked: bool,
}

impl OpenFile {
    /// Whether it can be written through.
    pub fn is_writable(&self) -> bool {
        let flags = rustix::fs::OFlags::from_bits_retain(self.flags);
        !flags.contains(rustix::fs::OFlags::PATH) && self.flags & 0o3 != 0
    }

    /// How it is open, in one word: `r`, `w`, `rw`, or `-` for a descriptor that neither reads nor writes, or of which that is not known.
    pub fn access(&self) -> &'static str {
        let flags = rustix::fs::OFlags::from_bits_retain(self.flags);
        match self.flags & 0o3 {
            _ if self.kind == OpenKind::Socket => "rw",
            _ if self.kind == OpenKind::Other || flags.contains(rustix::fs::OFlags::PATH) => "-",
            0 => "r",
            1 => "w",
            _ => "rw",
        }
    }
}

/// What a descriptor is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OpenKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A fifo or a pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// Something of the kernel's, such as an event queue.
    Other,
}

/// A file mapped into memory, all of its pieces as one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// The file.
    #[serde(flatten)]
    pub place: FilePlace,
    /// What is written to a piece of it is written to the file.
    pub shared: bool,
    /// A piece of it may be written.
    pub writable: bool,
    /// The file system's device, as the mount table has it.
    pub device: u64,
    /// The inode.
    pub inode: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(volume_path: &str) -> FilePlace {
        let volume = InVolume { name: "db".parse().unwrap(), path: PathText(volume_path.into()) };
        FilePlace { path: PathText("/srv/db/x".into()), volume: Some(volume), unlinked: false }
    }

    fn process() -> ProcessRecord {
        ProcessRecord {
            pid: 7,
            start_time: 1,
            parent: 1,
            command: "a".into(),
            arguments: Vec::new(),
            cwd: Some(place("")),
            root: None,
            program: None,
            files: Vec::new(),
            mapped: Vec::new(),
            unread: None,
        }
    }

    #[test]
    fn a_record_that_leads_out_of_a_volume_is_not_believed() {
        let of = |process: ProcessRecord| TreeRecord { processes: vec![process], ..TreeRecord::new() };
        let file = |path| OpenFile {
            fd: 3,
            place: place(path),
            kind: OpenKind::File,
            flags: 0,
            offset: 0,
            device: 0,
            inode: 0,
            locked: false,
        };
        let mapped = |path| MappedFile { place: place(path), shared: true, writable: true, device: 0, inode: 0 };
        assert!(of(process()).is_sound());
        assert!(of(ProcessRecord { files: vec![file("a/b")], mapped: vec![mapped("c")], ..process() }).is_sound());
        for bad in ["../etc", "a/../../etc", "/etc"] {
            assert!(!of(ProcessRecord { cwd: Some(place(bad)), ..process() }).is_sound(), "{bad}");
            assert!(!of(ProcessRecord { root: Some(place(bad)), ..process() }).is_sound(), "{bad}");
            assert!(!of(ProcessRecord { program: Some(place(bad)), ..process() }).is_sound(), "{bad}");
            assert!(!of(ProcessRecord { files: vec![file(bad)], ..process() }).is_sound(), "{bad}");
            assert!(!of(ProcessRecord { mapped: vec![mapped(bad)], ..process() }).is_sound(), "{bad}");
        }
        assert!(!TreeRecord { version: VERSION + 1, ..of(process()) }.is_sound(), "a newer one");
    }

    #[test]
    fn how_a_descriptor_is_open_is_told() {
        let open = |flags, kind| OpenFile {
            fd: 3,
            place: place("a"),
            kind,
            flags,
            offset: 0,
            device: 0,
            inode: 0,
            locked: false,
        };
        let file = |flags| open(flags, OpenKind::File);
        let told = [0o0, 0o1, 0o2, 0o2002, 0o10000000].map(|flags| (file(flags).access(), file(flags).is_writable()));
        assert_eq!(told, [("r", false), ("w", true), ("rw", true), ("rw", true), ("-", false)]);
        // Their flags are not read.
        assert_eq!([OpenKind::Socket, OpenKind::Other].map(|kind| open(0, kind).access()), ["rw", "-"]);
    }
}
