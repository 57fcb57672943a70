//! A control group as a set of processes.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::mounts::MountTable;
use super::proc_dir::{ProcDir, parse};
use super::{Error, Result};

/// A control group, by its directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    dir: PathBuf,
    version: CgroupVersion,
}

/// Which of the kernel's two interfaces a control group belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupVersion {
    /// One hierarchy per controller.
    V1,
    /// The unified hierarchy.
    V2,
}

impl Cgroup {
    /// Opens the control group at `path`: a directory in a mounted hierarchy, or a name within the unified one.
    ///
    /// The name is what `/proc/PID/cgroup` shows behind `0::`, such as `/system.slice/db.service`.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |reason: &str| Error::NotACgroup { path: path.into(), reason: reason.into() };
        if path.components().any(|part| part == std::path::Component::ParentDir) {
            return Err(refuse("a path with `..`"));
        }
        if let Some(version) = version_of(path).filter(|_| path.is_absolute()) {
            return Ok(Self { dir: path.into(), version });
        }
        let unified =
            unified_mount().ok_or_else(|| refuse("no such directory, and no unified hierarchy is mounted"))?;
        let dir = unified.join(path.strip_prefix("/").unwrap_or(path));
        match version_of(&dir) {
            Some(version) => Ok(Self { dir, version }),
            None => Err(refuse("it is neither a directory of a hierarchy nor a name in the unified one")),
        }
    }

    /// The control group of the unified hierarchy that the process is in, unless that is the root of it.
    pub(crate) fn of_process(pid: i32) -> Option<Self> {
        let content = ProcDir::of(pid).and_then(|dir| dir.read("cgroup")).ok()?;
        let name = content.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"0::/"))?;
        if name.is_empty() {
            return None;
        }
        use std::os::unix::ffi::OsStrExt;
        let dir = unified_mount()?.join(std::ffi::OsStr::from_bytes(name));
        version_of(&dir).map(|version| Self { dir, version })
    }

    /// Whether all processes of a control group of the unified hierarchy stand, for it or one above is frozen.
    pub(crate) fn is_frozen(&self) -> bool {
        fs::read_to_string(self.dir.join("cgroup.events")).is_ok_and(|events| says_frozen(&events))
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Which interface it belongs to.
    pub fn version(&self) -> CgroupVersion {
        self.version
    }

    /// The pids in the control group and in those below it.
    pub(crate) fn pids(&self) -> Result<BTreeSet<i32>> {
        let mut pids = BTreeSet::new();
        let mut dirs = vec![self.dir.clone()];
        while let Some(dir) = dirs.pop() {
            let is_top = dir == self.dir;
            match read_pids(&dir, &mut pids).and_then(|()| push_children(&dir, &mut dirs)) {
                // A control group below that was removed meanwhile has no processes any more.
                Err(error) if !is_top && super::proc_dir::is_gone(&error) => {}
                Err(error) if !is_top && error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {}
                Err(source) => return Err(Error::Read { object: dir, source }),
                Ok(()) => {}
            }
        }
        Ok(pids)
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dir)
    }
}

/// Whether `cgroup.events` says that all stand.
pub(crate) fn says_frozen(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

fn read_pids(dir: &Path, pids: &mut BTreeSet<i32>) -> io::Result<()> {
    let content = fs::read(dir.join("cgroup.procs"))?;
    // The kernel writes 0 for a process of another pid namespace; it has no pid here to be named by.
    pids.extend(content.split(|&byte| byte == b'\n').filter_map(parse::<i32>).filter(|&pid| pid > 0));
    Ok(())
}

fn push_children(dir: &Path, dirs: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            dirs.push(entry.path());
        }
    }
    Ok(())
}

/// Which interface the directory belongs to, told by its file system ([statfs(2)]) and not by its name.
///
/// [statfs(2)]: https://man7.org/linux/man-pages/man2/statfs.2.html
fn version_of(dir: &Path) -> Option<CgroupVersion> {
    let found = nix::sys::statfs::statfs(dir).ok()?;
    let version = match found.filesystem_type() {
        nix::sys::statfs::CGROUP2_SUPER_MAGIC => CgroupVersion::V2,
        nix::sys::statfs::CGROUP_SUPER_MAGIC => CgroupVersion::V1,
        _ => return None,
    };
    dir.join("cgroup.procs").exists().then_some(version)
}

fn unified_mount() -> Option<PathBuf> {
    let table = MountTable::of_self().ok()?;
    table.iter().find(|mount| mount.fstype == b"cgroup2").map(|mount| mount.point.clone())
}
