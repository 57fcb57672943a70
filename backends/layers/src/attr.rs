//! Attributes: what users see of a file, and their changes.

use rustix::fs::{FileType, Mode, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use super::lower::UPPER_NUMBERS;
use super::node::{Ino, ROOT};
use super::object::{self, Object};
use super::xattr::CAPABILITY;
use super::{Overlay, Result, Tree};

/// What users see of a file.
#[derive(Debug, Clone, Copy)]
pub struct Attr {
    /// Its number.
    pub ino: Ino,
    /// What kind of file it is.
    pub kind: FileType,
    /// The device that it stands for.
    pub rdev: u64,
    /// How many names it has; 1 for a directory.
    pub nlink: u32,
    /// The rest as the file system that holds it says.
    pub stat: Stat,
    /// It is in the upper.
    pub upper: bool,
}

/// A new time.
#[derive(Debug, Clone, Copy)]
pub enum SetTime {
    /// The moment of the change.
    Now,
    /// Seconds since 1970 and nanoseconds.
    At(i64, u32),
}

/// Which attributes are to change.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change {
    /// Permissions.
    pub mode: Option<u32>,
    /// The owner.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// The length.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the content.
    pub mtime: Option<SetTime>,
    /// Whoever changes it is not above set-id bits: a change of length takes them off.
    pub drop_privileges: bool,
    /// Nor is he in the file's group: so does a change of owner with the set-group-ID bit of a file that the group may not execute.
    pub outsider: bool,
}

impl Change {
    fn owner_stays(&self) -> bool {
        self.uid.is_none() && self.gid.is_none()
    }

    /// Nothing is to change.
    pub fn is_empty(&self) -> bool {
        self.owner_stays() && self.mode.is_none() && self.size.is_none() && self.atime.is_none() && self.mtime.is_none()
    }
}

impl Overlay {
    /// The attributes of a file.
    pub fn attr(&self, ino: Ino) -> Result<Attr> {
        self.tree().attr(ino)
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, ino: Ino) -> Result<std::ffi::OsString> {
        let mut tree = self.tree();
        if tree.node(ino)?.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let (object, keys) = (tree.object(ino)?, tree.store.keys());
        if tree.node(ino)?.upper
            && let Some(mock) = object.xattr(keys.node())?
        {
            return Ok(std::os::unix::ffi::OsStringExt::from_vec(tree.target_of(&mock)?));
        }
        object.read_link()
    }

    /// Changes attributes, and returns them all.
    pub fn change(&self, ino: Ino, change: &Change) -> Result<Attr> {
        let mut tree = self.tree();
        tree.copy_up(ino, change.size != Some(0))?;
        let object = tree.object(ino)?;
        // The kernel asks for a change of nothing where set-id bits and capabilities are to go: `chown` takes them off by itself.
        if !change.owner_stays() || change.is_empty() {
            object.chown(change.uid, change.gid)?;
            if change.outsider && object.stat().is_ok_and(|stat| stat.st_mode & 0o2000 != 0) {
                drop_privileges(&object, true)?;
            }
        }
        if let Some(mode) = change.mode {
            object.chmod(Mode::from_raw_mode(mode & 0o7777))?;
        }
        if let Some(size) = change.size {
            tree.content(ino)?.truncate(size)?;
            if change.drop_privileges {
                drop_privileges(&object, change.outsider)?;
            }
        }
        if change.atime.is_some() || change.mtime.is_some() {
            let spec = |time| match time {
                None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
                Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
                Some(SetTime::At(seconds, nanoseconds)) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
            };
            object.set_times(&Timestamps { last_access: spec(change.atime), last_modification: spec(change.mtime) })?;
        }
        tree.attr(ino)
    }

    /// Takes the set-id bits and capabilities off a file that somebody else has written to, who may be an outsider to its group.
    pub fn drop_privileges(&self, ino: Ino, outsider: bool) -> Result<()> {
        let mut tree = self.tree();
        let object = tree.object(ino)?;
        drop_privileges(&object, outsider)
    }
}

/// The set-id bits that a write by somebody else takes off: `setattr_should_drop_suidgid` of the kernel.
pub fn privileges(stat: &Stat, outsider: bool) -> u32 {
    let group = if outsider || stat.st_mode & 0o010 != 0 { 0o2000 } else { 0 };
    stat.st_mode & (0o4000 | group)
}

fn drop_privileges(object: &Object, outsider: bool) -> Result<()> {
    let stat = object.stat()?;
    let privileges = privileges(&stat, outsider);
    if privileges != 0 {
        object.chmod(Mode::from_raw_mode(stat.st_mode & 0o7777 & !privileges))?;
    }
    // To remove what is not there takes the privilege, too.
    if object.xattr(CAPABILITY)?.is_none() {
        return Ok(());
    }
    match object.remove_xattr(CAPABILITY) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        done => done,
    }
}

impl Tree {
    pub(super) fn attr(&mut self, ino: Ino) -> Result<Attr> {
        let object = self.object(ino)?;
        let stat = object.stat()?;
        let node = self.node(ino)?;
        let (upper, indexed) = (node.upper, node.index.is_some());
        // What is held of the lower keeps its names there, and a directory's are not counted.
        let uncounted = !upper || node.kind == FileType::Directory || node.nameless;
        let gone = ino != ROOT && node.names.is_empty() && uncounted;
        let mut attr = self.attr_of(ino, &object, stat, upper, indexed)?;
        if gone {
            attr.nlink = 0;
        }
        Ok(attr)
    }

    /// What users see of the file with this number, whose object has these attributes.
    pub(super) fn attr_of(&self, ino: Ino, object: &Object, stat: Stat, upper: bool, indexed: bool) -> Result<Attr> {
        let kind = object::kind_of(&stat);
        let mut attr = Attr { ino, kind, rdev: stat.st_rdev, nlink: stat.st_nlink as u32, stat, upper };
        if kind == FileType::Directory {
            attr.nlink = 1;
        } else if indexed {
            attr.nlink = u32::try_from(self.indexed_links(object, &stat)?).unwrap_or(0);
        }
        if upper
            && kind == FileType::RegularFile
            && stat.st_size == 0
            && let Some(mock) = object.xattr(self.store.keys().node())?
        {
            attr.rdev = 0;
            attr.kind = match mock.first() {
                Some(b'l') => FileType::Symlink,
                Some(b'p') => FileType::Fifo,
                Some(b's') => FileType::Socket,
                _ => FileType::CharacterDevice,
            };
            if attr.kind == FileType::Symlink {
                attr.stat.st_size = self.target_of(&mock)?.len() as i64;
                attr.stat.st_mode |= 0o777;
            }
        }
        Ok(attr)
    }

    /// Where the symbolic link leads to that a file stands for.
    fn target_of(&self, mock: &[u8]) -> Result<Vec<u8>> {
        let kept = self.store.lengthen(mock.get(2..).unwrap_or_default().to_vec())?;
        Ok(kept.get(1..).unwrap_or_default().to_vec())
    }

    /// How many names an indexed file has in the lower alone; less than none if it has names of sealed layers that are gone.
    pub(super) fn lower_links(&self, object: &Object) -> Result<i64> {
        let value = object.xattr(self.store.keys().links())?.unwrap_or_default();
        Ok(std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok()).unwrap_or(0))
    }

    /// How many names an indexed file has.
    pub(super) fn indexed_links(&self, object: &Object, stat: &Stat) -> Result<i64> {
        Ok(stat.st_nlink.cast_signed() - 1 + self.lower_links(object)?)
    }

    /// The number that users see for an object of the upper.
    pub(super) fn number_of(&self, object: &Object, stat: &Stat) -> Result<Ino> {
        let origin = match object.xattr(self.store.keys().origin())? {
            Some(value) => std::str::from_utf8(&value).ok().and_then(|text| u64::from_str_radix(text, 16).ok()),
            None => None,
        };
        Ok(origin.unwrap_or_else(|| self.own_number(stat)))
    }

    /// The number of a file that was made here.
    pub(super) fn own_number(&self, stat: &Stat) -> Ino {
        ((stat.st_ino ^ self.store.salt) & (UPPER_NUMBERS - 1)) | UPPER_NUMBERS
    }

    /// The number of a file of the lower.
    pub(super) fn number_below(&self, dir: &super::lower::LowerDir, stat: &Stat) -> Ino {
        match self.lower.number(dir, stat) {
            ROOT => ROOT | (1 << 51),
            number => number,
        }
    }
}

impl Overlay {
    /// Whether a write by anybody else would leave the file's mode and capabilities as they are.
    pub fn is_unprivileged(&self, ino: Ino) -> bool {
        let mut tree = self.tree();
        let Ok(object) = tree.object(ino) else { return false };
        object.stat().is_ok_and(|stat| stat.st_mode & 0o6000 == 0) && matches!(object.xattr(CAPABILITY), Ok(None))
    }
}
