//! The mount table of a process, and where in a file system a path of it leads.
//!
//! A file is known here by its [`Place`]: the file system's device and the path from the file system's own root. That
//! is the one description which does not depend on who looks: bind mounts, mount namespaces and changed roots all show the same
//! place under other paths. `st_dev` would not do, since btrfs gives each subvolume one of its own.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

use super::proc_dir::{parse, read_all, unescape};

/// The device of a file system, as the mount table gives it.
pub(crate) type Device = (u32, u32);

/// The file systems whose files are on another machine.
pub(super) const NETWORK: &[&[u8]] = &[
    b"9p",
    b"afs",
    b"ceph",
    b"cifs",
    b"coda",
    b"gfs2",
    b"lustre",
    b"ncpfs",
    b"nfs",
    b"nfs4",
    b"ocfs2",
    b"orangefs",
    b"smb3",
];

/// Where a file lies: in which file system, and at what path from that file system's own root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) path: PathBuf,
}

impl Place {
    /// Whether this is `other`, or lies below it.
    pub(crate) fn is_beneath(&self, other: &Self) -> bool {
        self.device == other.device && self.path.starts_with(&other.path)
    }
}

/// One line of `/proc/PID/mountinfo` ([proc_pid_mountinfo(5)]).
///
/// [proc_pid_mountinfo(5)]: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
#[derive(Debug, Clone)]
pub(crate) struct Mount {
    pub(crate) id: i32,
    parent: i32,
    /// The place that it shows.
    pub(crate) root: Place,
    /// Where it is mounted, from the root of the process whose table this is.
    pub(crate) point: PathBuf,
    pub(crate) writable: bool,
    pub(crate) fstype: Vec<u8>,
    /// What it is said to come from.
    pub(crate) source: PathBuf,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let dash = fields.iter().skip(6).position(|&field| field == b"-")? + 6;
        let mut device = fields.get(2)?.split(|&byte| byte == b':');
        let device = (parse(device.next()?)?, parse(device.next()?)?);
        let is_rw = |options: &[u8]| options.split(|&byte| byte == b',').any(|option| option == b"rw");
        Some(Self {
            id: parse(fields.first()?)?,
            parent: parse(fields.get(1)?)?,
            root: Place { device, path: unescape(fields.get(3)?) },
            point: unescape(fields.get(4)?),
            writable: is_rw(fields.get(5)?) && fields.get(dash + 3).is_some_and(|options| is_rw(options)),
            fstype: fields.get(dash + 1)?.to_vec(),
            source: unescape(fields.get(dash + 2)?),
        })
    }

    /// Whether a look at its files may wait for a server, or for ever.
    pub(crate) fn may_hang(&self) -> bool {
        let kind = self.fstype.as_slice();
        kind.starts_with(b"fuse") || kind == b"autofs" || NETWORK.contains(&kind)
    }

    /// The place of what this mount shows at `path`, which is at or below the mount point.
    pub(crate) fn place(&self, path: &Path) -> Option<Place> {
        let below = path.strip_prefix(&self.point).ok()?;
        Some(Place { device: self.root.device, path: join(&self.root.path, below) })
    }
}

/// Joins without the trailing slash that joining an empty path would leave.
pub(crate) fn join(base: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() { base.into() } else { base.join(below) }
}

/// Where the calling thread sees file systems of this type that come from `source`, in the order of the table.
pub(crate) fn mounted_from(fstype: &str, source: &Path) -> io::Result<Vec<PathBuf>> {
    let table = MountTable::of_self()?;
    let found = table.iter().filter(|mount| mount.fstype == fstype.as_bytes() && mount.source == source);
    Ok(found.map(|mount| mount.point.clone()).collect())
}

/// The table of the calling thread, as the kernel writes it.
pub(crate) fn own_mountinfo() -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    read_all(rustix::fs::openat(CWD, "/proc/thread-self/mountinfo", flags, Mode::empty())?)
}

/// All mounts that a process sees.
#[derive(Debug)]
pub(crate) struct MountTable {
    mounts: Vec<Mount>,
    by_id: HashMap<i32, usize>,
    by_parent: HashMap<i32, Vec<usize>>,
    root: Option<usize>,
}

impl MountTable {
    /// The table of the calling thread.
    pub(crate) fn of_self() -> io::Result<Self> {
        Ok(Self::parse(&own_mountinfo()?))
    }

    /// Parses the content of a `mountinfo` file.
    pub(crate) fn parse(content: &[u8]) -> Self {
        let mounts: Vec<Mount> = content.split(|&byte| byte == b'\n').filter_map(Mount::parse).collect();
        let by_id: HashMap<i32, usize> = mounts.iter().enumerate().map(|(index, mount)| (mount.id, index)).collect();
        let mut by_parent: HashMap<i32, Vec<usize>> = HashMap::new();
        for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| mount.parent != mount.id) {
            by_parent.entry(mount.parent).or_default().push(index);
        }
        let is_root = |mount: &Mount| {
            mount.point == Path::new("/") && (mount.parent == mount.id || !by_id.contains_key(&mount.parent))
        };
        let root = mounts.iter().position(is_root);
        Self { mounts, by_id, by_parent, root }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Mount> {
        self.mounts.iter()
    }

    /// The mount with this id: `mnt_id` of `/proc/PID/fdinfo/N`.
    pub(crate) fn by_id(&self, id: i32) -> Option<&Mount> {
        self.by_id.get(&id).map(|&index| &self.mounts[index])
    }

    /// The mount on which a walk to `path` ends: what lies below a mount point, or under a later mount, is hidden.
    ///
    /// `path` has no symbolic links and no `..`; it comes from the kernel.
    pub(crate) fn resolve(&self, path: &Path) -> Option<&Mount> {
        let mut at = self.root?;
        // Each step goes to a child, and the kernel's mounts form a tree; the bound is for a table read in pieces.
        for _ in 0..self.mounts.len() {
            let children = self.by_parent.get(&self.mounts[at].id).map_or(&[][..], Vec::as_slice);
            let next = children
                .iter()
                .copied()
                .filter(|&child| path.starts_with(&self.mounts[child].point))
                // A walk starts on the root's own mount, whatever was mounted over it later.
                .filter(|&child| self.mounts[child].point != Path::new("/"))
                .min_by_key(|&child| self.mounts[child].point.components().count());
            match next {
                Some(child) => at = child,
                None => break,
            }
        }
        Some(&self.mounts[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n\
40 27 0:50 /@db /srv/db rw,relatime shared:7 - btrfs /dev/loop0 rw,subvol=/@db\n\
41 27 0:50 / /mnt/top rw,relatime - btrfs /dev/loop0 rw\n\
42 27 0:50 /@db/sub /mnt/with\\040blank ro,relatime - btrfs /dev/loop0 rw\n\
43 40 0:60 / /srv/db/tmp rw - tmpfs tmpfs rw\n\
44 43 0:61 / /srv/db/tmp rw - fuse.sshfs host: rw,user_id=0\n\
45 27 8:1 / /ro rw - ext4 /dev/sda1 ro\n\
garbage\n46 27 0:99\n";

    fn resolve(path: &str) -> i32 {
        MountTable::parse(TABLE).resolve(Path::new(path)).unwrap().id
    }

    #[test]
    fn a_walk_ends_on_the_mount_that_covers_the_others() {
        assert_eq!(resolve("/"), 27);
        assert_eq!(resolve("/srv/dbx"), 27);
        assert_eq!(resolve("/srv/db"), 40);
        assert_eq!(resolve("/srv/db/a/b"), 40);
        assert_eq!(resolve("/srv/db/tmp"), 44);
        assert_eq!(resolve("/srv/db/tmp/x"), 44);
        assert_eq!(resolve("/mnt/with blank/x"), 42);
    }

    #[test]
    fn one_place_is_seen_under_several_paths() {
        let table = MountTable::parse(TABLE);
        let place = |id: i32, path: &str| table.by_id(id).unwrap().place(Path::new(path)).unwrap();
        assert_eq!(place(40, "/srv/db/sub/f"), place(41, "/mnt/top/@db/sub/f"));
        assert_eq!(place(40, "/srv/db/sub/f"), place(42, "/mnt/with blank/f"));
        assert!(place(42, "/mnt/with blank").is_beneath(&place(40, "/srv/db")));
        assert!(!place(43, "/srv/db/tmp").is_beneath(&place(40, "/srv/db")));
    }

    #[test]
    fn writable_is_what_both_the_mount_and_the_file_system_allow() {
        let table = MountTable::parse(TABLE);
        assert!(table.by_id(40).unwrap().writable);
        assert!(!table.by_id(42).unwrap().writable);
        assert!(!table.by_id(45).unwrap().writable);
        assert!(table.by_id(44).unwrap().may_hang() && !table.by_id(43).unwrap().may_hang());
    }

    #[test]
    fn the_kernels_own_table_is_understood() {
        let table = MountTable::of_self().unwrap();
        let lines = std::fs::read("/proc/thread-self/mountinfo").unwrap();
        assert_eq!(table.iter().count(), lines.iter().filter(|&&byte| byte == b'\n').count());
        assert_eq!(table.resolve(Path::new("/proc/1")).unwrap().fstype, b"proc");
    }
}
