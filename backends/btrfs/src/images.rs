//! The images of a store: finding them under their names, capturing and removing them.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use fsnap_backend::{Error, Identity, ImageKind, ImageState, IoContext, Locator, Result, Snapshot, Volume, beneath};
use rustix::fs::{FlockOperation, Mode, RenameFlags};
use rustix::io::Errno;

use crate::group::{self, Group};
use crate::nested::{self, Nested};
use crate::refusal::{explained, is_admin};
use crate::store::{ImageDir, Store, identity, on_btrfs};
use crate::sys::{self, SubvolumeInfo};
use crate::{mounts, remove};

/// What lies under the name of a snapshot.
pub(crate) enum Found {
    Nothing,
    /// A read-only subvolume.
    Plain(OwnedFd, SubvolumeInfo),
    /// The snapshots of a volume and of what is nested in it, and what the kernel says of the first.
    Group(Group, SubvolumeInfo),
    /// What a call that was cut short has left.
    Partial,
    /// It was whole once.
    Damaged(&'static str),
    /// Not of fsnap's making.
    Foreign,
}

impl ImageDir {
    /// The directory of the images of a kind.
    pub(crate) fn of(kind: ImageKind) -> Self {
        match kind {
            ImageKind::Snapshot => Self::Snapshots,
            ImageKind::Volume => Self::Volumes,
        }
    }

    /// What the locators of its images begin with.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Snapshots => "s-",
            Self::Volumes => "v-",
        }
    }

    /// Whether `reserve` could have made this locator.
    pub(crate) fn owns(self, at: &Locator) -> bool {
        let digits = at.as_str().strip_prefix(self.prefix());
        digits
            .is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|byte| b"0123456789abcdef".contains(&byte)))
    }
}

/// The name of an image that is not whole.
pub(crate) fn hidden(at: &Locator) -> String {
    format!(".{at}")
}

pub(crate) fn no_image(at: &Locator) -> Error {
    Error::NotFound { what: format!("a whole image {at} of this btrfs store") }
}

impl Store {
    pub(crate) fn dir(&self, dir: ImageDir) -> &OwnedFd {
        match dir {
            ImageDir::Snapshots => &self.snapshots,
            ImageDir::Volumes => &self.volumes,
        }
    }

    pub(crate) fn place_of(&self, dir: ImageDir, at: &Locator) -> PathBuf {
        self.place.join(dir.name()).join(at.as_str())
    }

    pub(crate) fn record(&self, at: &Locator, found: &SubvolumeInfo) -> Snapshot {
        Snapshot { at: at.clone(), identity: identity(&self.file_system, found), omissions: Vec::new() }
    }

    /// Looks what lies under the name of a snapshot.
    pub(crate) fn find(&self, at: &Locator) -> Result<Found> {
        if !ImageDir::Snapshots.owns(at) {
            return Err(no_image(at));
        }
        let place = self.place_of(ImageDir::Snapshots, at);
        let dir = match open_image(&self.snapshots, at.as_str()).context("open", &place)? {
            Opened::Dir(dir) => dir,
            Opened::NoDir => return Ok(Found::Foreign),
            Opened::Nothing => {
                return Ok(match open_image(&self.snapshots, &hidden(at)).context("open", &place)? {
                    Opened::Nothing => Found::Nothing,
                    Opened::Dir(_) => Found::Partial,
                    Opened::NoDir => Found::Foreign,
                });
            }
        };
        let (group, root) = match nested::is_root(&dir).context("read the attributes of", &place)? {
            true => (None, dir),
            false => match Group::load(dir).and_then(|group| group.open_part(0).map(|root| (group, root))) {
                Ok((group, root)) => (Some(group), root),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Found::Damaged("its first part is missing"));
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Ok(Found::Damaged("a record of its parts is not one that fsnap writes"));
                }
                Err(error) => return Err(error).context("read the parts of", place),
            },
        };
        let found = sys::info(&root).context("identify", place)?;
        Ok(match group {
            _ if !found.read_only => Found::Damaged("somebody made it writable, and it may have changed since"),
            Some(group) => Found::Group(group, found),
            None => Found::Plain(root, found),
        })
    }

    /// Opens a recorded snapshot, if it is whole and the recorded one.
    pub(crate) fn whole(&self, snapshot: &Snapshot) -> Result<Found> {
        let found = self.find(&snapshot.at)?;
        match &found {
            Found::Plain(_, info) | Found::Group(_, info) => {
                let there = identity(&self.file_system, info);
                if there != snapshot.identity {
                    let expected = snapshot.identity.clone();
                    return Err(Error::WrongIdentity { what: self.shown(&snapshot.at), expected, found: there });
                }
                Ok(found)
            }
            Found::Damaged(reason) => Err(self.damaged(&snapshot.at, reason)),
            Found::Nothing | Found::Partial | Found::Foreign => Err(no_image(&snapshot.at)),
        }
    }

    pub(crate) fn shown(&self, at: &Locator) -> String {
        format!("the snapshot {}", self.place_of(ImageDir::Snapshots, at).display())
    }

    pub(crate) fn damaged(&self, at: &Locator, reason: &str) -> Error {
        Error::Damaged { what: self.shown(at), reason: reason.to_owned() }
    }

    /// What `list` says of an image; `None` if there is none.
    pub(crate) fn state(&self, dir: ImageDir, at: &Locator) -> Result<Option<ImageState>> {
        if dir == ImageDir::Snapshots {
            return Ok(match self.find(at)? {
                Found::Nothing => None,
                Found::Plain(..) | Found::Group(..) => Some(ImageState::Whole),
                Found::Partial | Found::Damaged(_) => Some(ImageState::Partial),
                Found::Foreign => Some(ImageState::Foreign),
            });
        }
        let place = self.place_of(dir, at);
        Ok(match open_image(&self.volumes, at.as_str()).context("open", &place)? {
            Opened::Dir(root) if nested::is_root(&root).context("open", &place)? => Some(ImageState::Whole),
            Opened::Dir(_) | Opened::NoDir => Some(ImageState::Foreign),
            Opened::Nothing => match open_image(&self.volumes, &hidden(at)).context("open", &place)? {
                Opened::Dir(root) if nested::is_root(&root).context("open", &place)? => Some(ImageState::Partial),
                Opened::Dir(_) | Opened::NoDir => Some(ImageState::Foreign),
                Opened::Nothing => None,
            },
        })
    }

    /// A locator that shows something foreign, and that no method takes.
    pub(crate) fn foreign(&self, dir: ImageDir, name: &OsStr) -> Result<Option<Locator>> {
        let prefix = format!("foreign:{}:", dir.name());
        let readable = name.to_str().and_then(|name| format!("{prefix}{name}").parse().ok());
        if readable.is_some() {
            return Ok(readable);
        }
        // Its name fits no locator; its number does, and is as much its own.
        let number = beneath::open_dir(self.dir(dir), name).and_then(|file| match nested::is_root(&file)? {
            true => Ok(format!("subvolume-{}", sys::info(&file)?.id)),
            false => Err(Errno::NOTDIR.into()),
        });
        let number = number.or_else(|_| Ok(format!("inode-{}", beneath::stat(self.dir(dir), name)?.ino)));
        match number {
            Err::<_, io::Error>(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            number => Ok(format!("{prefix}{}", number.context("look at", self.place.join(dir.name()).join(name))?)
                .parse()
                .ok()),
        }
    }

    /// Checks that the volume's path still leads to the volume, and tells what it is.
    pub(crate) fn check(&self, volume: &Volume) -> Result<SubvolumeInfo> {
        let (dir, what) = (volume.dir(), format!("the directory {}", volume.dir().display()));
        let replaced = |found| Error::WrongIdentity { what: what.clone(), expected: volume.identity().clone(), found };
        let no_subvolume = || replaced(Identity::new("no btrfs subvolume"));
        let here = match beneath::open_root(dir) {
            Ok(here) => here,
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT) => return Err(Error::NotFound { what }),
                Some(Errno::LOOP | Errno::NOTDIR) => return Err(no_subvolume()),
                _ => return Err(error).context("open", dir),
            },
        };
        if !on_btrfs(&here).context("find the file system of", dir)? || !nested::is_root(&here).context("open", dir)? {
            return Err(no_subvolume());
        }
        let file_system = sys::file_system(&here).context("identify the file system of", dir)?;
        let found = sys::info(&here).context("identify", dir)?;
        // A UUID is never given twice: if it is the same here, the pinned descriptor is on this very subvolume.
        match identity(&file_system, &found) {
            same if same == *volume.identity() => Ok(found),
            other => Err(replaced(other)),
        }
    }

    /// Captures a volume without nested subvolumes: the one ioctl.
    pub(crate) fn capture_plain(&self, volume: &Volume, at: &Locator) -> Result<SubvolumeInfo> {
        let name = OsStr::new(at.as_str());
        sys::snapshot(volume, &self.snapshots, name, true).map_err(|error| refused(error, volume))?;
        let place = || self.place_of(ImageDir::Snapshots, at);
        let root = beneath::open_dir(&self.snapshots, name).context("open", place())?;
        sys::info(root).context("identify", place())
    }

    /// Captures the volume, the subvolume `id`, and all that is nested in it, under the hidden name.
    pub(crate) fn capture_group(
        &self,
        volume: &Volume,
        id: u64,
        nested: &[Nested],
        at: &Locator,
    ) -> Result<SubvolumeInfo> {
        let name = hidden(at);
        let place = || self.place.join(ImageDir::Snapshots.name()).join(&name);
        match rustix::fs::mkdirat(&self.snapshots, &*name, Mode::RWXU) {
            Err(Errno::EXIST) => return Err(Error::Exists { what: place().display().to_string() }),
            made => made.context("make the directory", place())?,
        }
        let group = beneath::open_dir(&self.snapshots, OsStr::new(&name)).context("open", place())?;
        group::take(&group, volume, id, nested).map_err(|error| refused(error, volume))?;
        let group = Group { dir: group, parts: Vec::new() };
        let root = group.open_part(0).context("open a part of", place())?;
        sys::info(root).context("identify", place())
    }

    /// Gives an image that is complete now its own name.
    pub(crate) fn reveal(&self, dir: ImageDir, at: &Locator) -> Result<()> {
        rename(self.dir(dir), &hidden(at), at.as_str()).context("give its name to", self.place_of(dir, at))
    }

    /// Makes the view of a group, unless it is there.
    pub(crate) fn make_view(&self, group: &Group, at: &Locator) -> Result<()> {
        let place = self.place_of(ImageDir::Snapshots, at).join(group::VIEW);
        // Two may ask at once. The lock goes with the descriptor, also when the process is killed.
        lock(&group.dir).context("lock", &place)?;
        if beneath::stat(&group.dir, OsStr::new(group::VIEW)).is_ok() {
            return Ok(());
        }
        let hidden = OsStr::new(group::NEW_VIEW);
        let clear = || remove::subvolume(&group.dir, hidden).context("remove", place.with_file_name(hidden));
        clear()?;
        let made = group
            .assemble(&group.dir, hidden, true)
            .and_then(|()| rename(&group.dir, group::NEW_VIEW, group::VIEW))
            .and_then(|()| commit(&group.dir));
        match made.map_err(explained).context("put together", &place) {
            Ok(()) => Ok(()),
            Err(error) => Err(error.and_undo(clear())),
        }
    }

    /// Refuses to touch what somebody has mounted.
    pub(crate) fn check_unused(&self, dir: ImageDir, at: &Locator) -> Result<()> {
        let what = self.place_of(dir, at).display().to_string();
        let path = self.path_from_top(dir, at.as_str()).context("find the path of", &what)?;
        match mounts::user_of(&self.root, path) {
            Some(by) => Err(Error::Busy { what, by }),
            None => Ok(()),
        }
    }

    /// Removes an image, whole or partial, and whatever is nested in it; durably.
    pub(crate) fn remove(&self, dir: ImageDir, at: &Locator) -> Result<()> {
        let place = self.place_of(dir, at);
        let parent = self.dir(dir);
        let removed = (|| {
            remove_tree(parent, &hidden(at))?;
            if let Opened::Dir(root) = open_image(parent, at.as_str())? {
                let plain = nested::is_root(&root)? && sys::children(&root, sys::info(&root)?.id)?.is_empty();
                drop(root);
                if plain {
                    remove::subvolume(parent, OsStr::new(at.as_str()))?;
                } else {
                    // More than one step: what is left of it must not pass for whole.
                    rename(parent, at.as_str(), &hidden(at))?;
                    remove_tree(parent, &hidden(at))?;
                }
            }
            commit(parent)
        })();
        removed.map_err(|error| match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::PERM) if is_admin() => Error::Busy {
                what: place.display().to_string(),
                by: "it is the default subvolume, is being sent, or has an active swap file in it".to_owned(),
            },
            Some(Errno::NOTEMPTY) => Error::Busy {
                what: place.display().to_string(),
                by: "it holds what fsnap did not put there, or somebody keeps making subvolumes in it".to_owned(),
            },
            Some(Errno::BUSY | Errno::XDEV) => {
                Error::Busy { what: place.display().to_string(), by: "something is mounted on it".to_owned() }
            }
            _ => Error::Io { action: "remove", object: place.display().to_string(), source: explained(error) },
        })
    }
}

/// Removes the subvolume or the group `name` in `dir`; succeeds if it is not there.
fn remove_tree(dir: &OwnedFd, name: &str) -> io::Result<()> {
    match open_image(dir, name)? {
        Opened::Nothing => Ok(()),
        Opened::NoDir => Err(Errno::NOTDIR.into()),
        Opened::Dir(root) => match nested::is_root(&root)? {
            true => remove::subvolume(dir, OsStr::new(name)),
            false => {
                lock(&root)?;
                remove::group(dir, OsStr::new(name))
            }
        },
    }
}

/// What opening a name in a directory of images gave.
enum Opened {
    Nothing,
    Dir(OwnedFd),
    NoDir,
}

fn open_image(dir: &OwnedFd, name: &str) -> io::Result<Opened> {
    match beneath::open_dir(dir, OsStr::new(name)) {
        Ok(opened) => Ok(Opened::Dir(opened)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT) => Ok(Opened::Nothing),
            Some(Errno::NOTDIR | Errno::LOOP) => Ok(Opened::NoDir),
            _ => Err(error),
        },
    }
}

fn rename(dir: &OwnedFd, from: &str, to: &str) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE)?)
}

fn lock(dir: impl AsFd) -> io::Result<()> {
    loop {
        match rustix::fs::flock(&dir, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            locked => return Ok(locked?),
        }
    }
}

/// Says why the kernel does not capture a volume.
fn refused(error: io::Error, volume: &Volume) -> Error {
    let what = volume.dir().display().to_string();
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::TXTBSY) => Error::Busy { what, by: "a swap file in it is active: switch it off first".to_owned() },
        Some(Errno::STALE) => Error::Changed { path: volume.dir().to_owned() },
        Some(Errno::EXIST) => Error::Exists { what: format!("a snapshot of {what} under this locator") },
        _ => Error::Io { action: "make a snapshot of", object: what, source: explained(error) },
    }
}

/// Makes durable that a subvolume got another name in the directory `dir`, or was removed from it.
///
/// After such a change btrfs has no log that could tell of it: the fsync commits the whole transaction, and this process does so itself.
/// `BTRFS_IOC_START_SYNC` would ask the file system's own thread. That sleeps through it if it is asked while it ends another commit, and then
/// processes that stand wait for the next one: half a minute.
pub(crate) fn commit(dir: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fsync(dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_reserve_makes_is_a_locator() {
        let owns = |text: &str| ImageDir::Snapshots.owns(&text.parse().unwrap());
        assert!(owns("s-0123456789abcdef"));
        for other in
            ["v-0123456789abcdef", "s-0123456789ABCDEF", "s-0123456789abcde", "s-0123456789abcdef0", "s-", "snapshots"]
        {
            assert!(!owns(other), "{other:?} was taken");
        }
    }
}
