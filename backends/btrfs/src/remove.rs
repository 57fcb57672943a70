//! Removing subvolumes together with what is nested in them.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use fsnap_backend::beneath;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use crate::group::{self, Member};
use crate::nested::{self, Nested};
use crate::sys;

/// How often what is nested is listed again, while somebody makes new subvolumes in a tree that is being removed.
const ROUNDS: usize = 16;

/// Removes the subvolume `name` in `dir` and all that is nested in it; succeeds if it is not there.
///
/// What is nested goes by its id, innermost first: its path belongs to whoever used the tree, and may change at any
/// moment. What stays undone, should the call be cut short, is still a subvolume of that name.
pub(crate) fn subvolume(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    let root = match beneath::open_dir(&dir, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        root => root?,
    };
    if !nested::is_root(&root)? {
        return Err(Errno::INVAL.into());
    }
    let id = sys::info(&root)?.id;
    for _ in 0..ROUNDS {
        empty(&root, id)?;
        match sys::destroy(&dir, name) {
            Err(error) if errno(&error) == Some(Errno::NOTEMPTY) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            destroyed => return destroyed,
        }
    }
    Err(Errno::NOTEMPTY.into())
}

/// Destroys what is nested in the subvolume `id`, whose root is `root`, as far as it was there at the start.
fn empty(root: &OwnedFd, id: u64) -> io::Result<()> {
    let below = nested::list(root, id, None)?;
    for victim in below.iter().rev() {
        let destroyed = sys::destroy_by_id(root, victim.id).or_else(|error| match errno(&error) {
            Some(Errno::ROFS) => {
                let (container, _) = open_container(root, id, &below, victim)?;
                sys::set_read_only(container, false)?;
                sys::destroy_by_id(root, victim.id)
            }
            // The kernel looks for its path, which is longer than the kernel can say.
            Some(Errno::NAMETOOLONG) => {
                let (container, container_id) = open_container(root, id, &below, victim)?;
                sys::set_read_only(&container, false)?;
                sys::destroy(nested::open_inode(container, container_id, victim.dir)?, &victim.name)
            }
            _ => Err(error),
        });
        match destroyed.map_err(|error| (errno(&error), error)) {
            // Gone or moved already, or it got a new child: the next round sees it.
            Ok(()) | Err((Some(Errno::NOENT | Errno::NOTEMPTY | Errno::STALE), _)) => {}
            Err((_, error)) => return Err(error),
        }
    }
    Ok(())
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

/// Opens the root of the subvolume that contains `victim`, one of `below`, and tells its id.
fn open_container(root: &OwnedFd, id: u64, below: &[Nested], victim: &Nested) -> io::Result<(OwnedFd, u64)> {
    let mut line = Vec::new();
    let mut at = victim.parent;
    while let Some(index) = at.checked_sub(1) {
        line.push(&below[index]);
        at = below[index].parent;
    }
    let mut container = nested::unobstructed(root)?;
    let mut container_id = id;
    for next in line.into_iter().rev() {
        container = nested::open(&container, container_id, next)?;
        container_id = next.id;
    }
    Ok((container, container_id))
}

/// Removes the group `name` in `dir`, whole or partial; succeeds if it is not there.
///
/// What fsnap could not have put there stays, and with it the directory.
pub(crate) fn group(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    let group = match beneath::open_dir(&dir, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        group => group?,
    };
    for name in beneath::names(&group)? {
        match group::member(&name) {
            Some(Member::Tree) => subvolume(&group, &name)?,
            Some(Member::Record) => rustix::fs::unlinkat(&group, &name, AtFlags::empty())?,
            None => {}
        }
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        removed => Ok(removed?),
    }
}
