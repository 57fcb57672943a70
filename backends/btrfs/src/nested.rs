//! The subvolumes below a volume's root: they are part of the volume, though btrfs leaves them out of its snapshot.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use fsnap_backend::beneath;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use crate::sys;

/// One subvolume below a root, and where it hangs.
///
/// Named by inode and not by path: a renamed directory above it changes nothing here, and inode numbers are the same in
/// every snapshot of the subvolume that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nested {
    /// Its number in the file system.
    pub(crate) id: u64,
    /// What contains it: 0 for the root, `k` for the `k`-th of the list, counted from 1.
    pub(crate) parent: usize,
    /// The inode number of the directory that holds it.
    pub(crate) dir: u64,
    /// Its name there.
    pub(crate) name: OsString,
}

/// Lists what is nested below the subvolume `root`, containers before what they contain, leaving out `except` and
/// everything in it.
///
/// Asks the file system's own list of subvolumes: the cost follows their number, and none can be overlooked behind a
/// mount point or a rename.
pub(crate) fn list(file: impl AsFd, root: u64, except: Option<u64>) -> io::Result<Vec<Nested>> {
    let mut found: Vec<Nested> = Vec::new();
    let mut parent = 0;
    while parent <= found.len() {
        let id = parent.checked_sub(1).map_or(root, |index| found[index].id);
        for link in sys::children(&file, id)? {
            if Some(link.id) != except {
                found.push(Nested { id: link.id, parent, dir: link.dir, name: link.name });
            }
        }
        parent += 1;
    }
    Ok(found)
}

/// Which of the containers (0 for the root, `k` for the `k`-th) contain something.
pub(crate) fn containers(parents: impl ExactSizeIterator<Item = usize>) -> Vec<bool> {
    let mut holds = vec![false; parents.len() + 1];
    for parent in parents {
        holds[parent] = true;
    }
    holds
}

/// Opens the tree of `root` free of what is mounted over its directories.
///
/// A nested subvolume may lie below a mount point, or be one; a private copy of the mount shows what lies underneath.
pub(crate) fn unobstructed(root: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(root, "", flags)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(tree, ".", flags, Mode::empty())?)
}

/// Opens the directory `inode` of the subvolume `tree`, whose root is `root`.
pub(crate) fn open_inode(root: impl AsFd, tree: u64, inode: u64) -> io::Result<OwnedFd> {
    let mut at = root.as_fd().try_clone_to_owned()?;
    for name in sys::path_of(&root, tree, inode)? {
        at = beneath::open_dir(&at, &name)?;
    }
    match beneath::stat_fd(&at)?.ino == inode {
        true => Ok(at),
        // Somebody renamed a directory on the way.
        false => Err(Errno::STALE.into()),
    }
}

/// Opens the root of the live subvolume `nested`; `container` is the root of the one that contains it, with the id
/// `container_id`.
///
/// Somebody may rename directories on the way all the time: the search is then begun anew, at most [`RACES`] times, and
/// fails with `ESTALE` in the end. Another subvolume is never returned, and no symbolic link followed.
pub(crate) fn open(container: impl AsFd, container_id: u64, nested: &Nested) -> io::Result<OwnedFd> {
    for _ in 0..RACES {
        let opened = open_inode(&container, container_id, nested.dir)
            .and_then(|dir| beneath::open_dir(dir, &nested.name))
            .and_then(|root| Ok((is_root(&root)? && sys::info(&root)?.id == nested.id).then_some(root)));
        match opened {
            Ok(Some(root)) => return Ok(root),
            Ok(None) => {}
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => {}
                _ => return Err(error),
            },
        }
    }
    Err(Errno::STALE.into())
}

/// How often a way is searched anew that was changed while it was gone.
const RACES: usize = 1000;

/// Whether the open directory is the root of a subvolume; `file` must lie on btrfs.
pub(crate) fn is_root(file: impl AsFd) -> io::Result<bool> {
    Ok(beneath::stat_fd(file)?.ino == sys::ROOT_INODE)
}
