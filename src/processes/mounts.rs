//! The mounts of a process, and where a path of it ends among them.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use fsnap_backend::mounts;
pub(crate) use fsnap_backend::mounts::{Device, Mount, Place};

use super::ProcessId;
use super::proc_dir::ProcDir;
use super::reach;

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

/// Whether a look at the mount's files may wait for a server, or for ever.
pub(crate) fn may_hang(mount: &Mount) -> bool {
    let kind = mount.fstype.as_slice();
    kind.starts_with(b"fuse") || kind == b"autofs" || NETWORK.contains(&kind)
}

/// The mounts that a process sees and that nothing covers.
pub(crate) fn uncovered(process: ProcessId) -> io::Result<Vec<Mount>> {
    let table = MountTable::of(&reach::open(process)?)?;
    let on_top = |mount: &&Mount| table.resolve(&mount.point).is_some_and(|top| top.id == mount.id);
    Ok(table.iter().filter(on_top).cloned().collect())
}

/// All mounts that a process sees.
#[derive(Debug)]
pub(crate) struct MountTable {
    mounts: Vec<Mount>,
    by_id: HashMap<u64, usize>,
    by_parent: HashMap<u64, Vec<usize>>,
    root: Option<usize>,
}

impl MountTable {
    /// The table of the calling thread.
    pub(crate) fn of_self() -> io::Result<Self> {
        Ok(Self::new(mounts::own()?))
    }

    /// The table that a process has.
    pub(crate) fn of(process: &ProcDir) -> io::Result<Self> {
        Ok(Self::new(mounts::read(process.open("mountinfo")?)?))
    }

    fn new(mounts: Vec<Mount>) -> Self {
        let by_id: HashMap<u64, usize> = mounts.iter().enumerate().map(|(index, mount)| (mount.id, index)).collect();
        let mut by_parent: HashMap<u64, Vec<usize>> = HashMap::new();
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
    pub(crate) fn by_id(&self, id: u64) -> Option<&Mount> {
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

    #[test]
    fn a_walk_ends_on_the_mount_that_covers_the_others() {
        let table = b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n\
            40 27 0:50 /@db /srv/db rw,relatime shared:7 - btrfs /dev/loop0 rw,subvol=/@db\n\
            42 27 0:50 /@db/sub /mnt/with\\040blank ro,relatime - btrfs /dev/loop0 rw\n\
            43 40 0:60 / /srv/db/tmp rw - tmpfs tmpfs rw\n\
            44 43 0:61 / /srv/db/tmp rw - fuse.sshfs host: rw,user_id=0\n";
        let table = MountTable::new(mounts::parse(table).collect());
        let resolve = |path: &str| table.resolve(Path::new(path)).unwrap().id;
        assert_eq!(resolve("/"), 27);
        assert_eq!(resolve("/srv/dbx"), 27);
        assert_eq!(resolve("/srv/db"), 40);
        assert_eq!(resolve("/srv/db/a/b"), 40);
        assert_eq!(resolve("/srv/db/tmp"), 44);
        assert_eq!(resolve("/srv/db/tmp/x"), 44);
        assert_eq!(resolve("/mnt/with blank/x"), 42);
        assert!(may_hang(table.by_id(44).unwrap()) && !may_hang(table.by_id(43).unwrap()));
    }

    #[test]
    fn a_walk_ends_in_the_kernels_own_table() {
        let table = MountTable::of_self().unwrap();
        assert_eq!(table.resolve(Path::new("/proc/1")).unwrap().fstype, b"proc");
    }
}
