//! Reading a whole tree, so that whatever cannot be read is found.
//!
//! Where the file system has checksums of contents, every block is compared with its own.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::Advice;
use rustix::io::Errno;

use crate::{Content, Damage, Dir, DirTree, Entry, Error, FileKind, IoContext, Result};

/// So many directories on the way down stay open; one further up is opened again when its turn comes, so that no tree
/// is so deep that it takes all descriptors.
const KEPT_OPEN: usize = 64;

/// How much is read at once.
const CHUNK: usize = 1 << 20;

/// Reads everything in the tree `root` and names what is damaged; `prefix` is put before each path.
///
/// `shown` names the tree in messages. What is cached is read from the disk again.
pub fn read_all(root: OwnedFd, shown: &Path, prefix: &[OsString]) -> Result<Vec<Damage>> {
    let root = DirTree::from_descriptor(root, shown);
    let mut reader = Reader { path: prefix.to_vec(), damage: Vec::new(), buffer: vec![0; CHUNK] };
    let below = reader.directory(&root)?;
    let mut levels = vec![Level { dir: Some(Box::new(root)), below }];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.below.pop() else {
            levels.pop();
            reader.path.pop();
            continue;
        };
        if level.dir.is_none() {
            let again = reopen(&levels, &reader.path[prefix.len()..]);
            let Some(dir) = reader.undamaged(OsStr::new(""), again)? else { continue };
            levels.last_mut().map(|level| level.dir.insert(dir));
        }
        let opened = levels.last().and_then(|level| level.dir.as_ref()).map(|dir| dir.open_dir(&name)).transpose();
        let Some(dir) = reader.undamaged(&name, opened)?.flatten() else { continue };
        reader.path.push(name);
        let below = reader.directory(&*dir)?;
        levels.push(Level { dir: Some(dir), below });
        // The root stays: all others can be opened from it.
        if let Some(far) = levels.len().checked_sub(KEPT_OPEN + 1).filter(|&far| far > 0) {
            levels[far].dir = None;
        }
    }
    Ok(reader.damage)
}

/// One directory on the way down, and the names of those in it that were not read yet.
struct Level {
    dir: Option<Box<dyn Dir>>,
    below: Vec<OsString>,
}

fn reopen(levels: &[Level], path: &[OsString]) -> Result<Box<dyn Dir>> {
    let root = levels.first().and_then(|level| level.dir.as_ref());
    let (Some(root), Some((first, rest))) = (root, path.split_first()) else {
        return Err(io::Error::from(Errno::INVAL)).context("open again", "the root of the snapshot");
    };
    rest.iter().try_fold(root.open_dir(first)?, |dir, name| dir.open_dir(name))
}

struct Reader {
    /// The path of the directory that is being read.
    path: Vec<OsString>,
    damage: Vec<Damage>,
    buffer: Vec<u8>,
}

impl Reader {
    /// Reads all that is directly in `dir`, and returns the names of its directories.
    fn directory(&mut self, dir: &dyn Dir) -> Result<Vec<OsString>> {
        self.undamaged(OsStr::new(""), dir.own_xattrs())?;
        let entries = self.undamaged(OsStr::new(""), dir.entries())?.unwrap_or_default();
        let mut below = Vec::new();
        for Entry { name, meta } in entries {
            self.undamaged(&name, dir.xattrs(&name))?;
            match meta.kind {
                FileKind::Dir => below.push(name),
                FileKind::File => {
                    let opened = dir.open_file(&name);
                    if let Some(content) = self.undamaged(&name, opened)? {
                        let read = self.read(&*content).context("read", dir_entry(&self.path, &name));
                        self.undamaged(&name, read)?;
                    }
                }
                FileKind::Symlink => {
                    self.undamaged(&name, dir.read_link(&name))?;
                }
                FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => {}
            }
        }
        Ok(below)
    }

    fn read(&mut self, content: &dyn Content) -> io::Result<()> {
        if let Some(file) = content.as_file() {
            // What is cached was right once; the disk is what is asked about.
            rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?;
        }
        let mut from = 0;
        while let Some(data) = content.data_after(from)? {
            from = data.start;
            while from < data.end {
                let length = CHUNK.min(usize::try_from(data.end - from).unwrap_or(CHUNK));
                match content.read_at(&mut self.buffer[..length], from)? {
                    0 => return Ok(()),
                    read => from += read as u64,
                }
            }
        }
        Ok(())
    }

    /// Notes damage of `name` in the current directory; any other failure is no answer about the snapshot.
    fn undamaged<T>(&mut self, name: &OsStr, read: Result<T>) -> Result<Option<T>> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(Error::Io { source, .. }) if is_damage(&source) => {
                let path = dir_entry(&self.path, name);
                // One file has one line, however many of its parts cannot be read.
                if self.damage.last().is_none_or(|last| last.path != path) {
                    self.damage.push(Damage { path, what: format!("cannot be read: {source}") });
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// What file systems answer for a wrong checksum (EIO) and for a structure that cannot be (EUCLEAN).
fn is_damage(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw_os_error), Some(Errno::IO | Errno::UCLEAN))
}

fn dir_entry(dir: &[OsString], name: &OsStr) -> OsString {
    let mut path = OsString::new();
    for part in dir.iter().map(OsString::as_os_str).chain([name]).filter(|part| !part.is_empty()) {
        if !path.is_empty() {
            path.push("/");
        }
        path.push(part);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_disk_can_be_damaged() {
        assert!(is_damage(&Errno::IO.into()));
        assert!(!is_damage(&Errno::MFILE.into()));
        assert!(!is_damage(&Errno::ACCESS.into()));
    }

    #[test]
    fn a_tree_deeper_than_the_descriptors_kept_is_read_to_its_end() {
        let temp = tempfile::tempdir().unwrap();
        let mut at = temp.path().to_owned();
        for level in 0..3 * KEPT_OPEN {
            // A second directory, which is read on the way back up.
            std::fs::create_dir(at.join("z")).unwrap();
            std::fs::write(at.join("z/file"), level.to_string()).unwrap();
            at.push("a");
            std::fs::create_dir(&at).unwrap();
        }
        let root = crate::beneath::open_root(temp.path()).unwrap();
        assert_eq!(read_all(root, temp.path(), &[]).unwrap(), []);
        // Only descriptors of this tree: other tests run in this process, too.
        let open =
            std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        assert_eq!(open.filter(|path| path.starts_with(temp.path())).count(), 0);
    }

    #[test]
    fn paths_are_counted_from_the_root() {
        let parts = ["a".into(), "b".into()];
        assert_eq!(dir_entry(&parts, OsStr::new("c")), "a/b/c");
        assert_eq!(dir_entry(&[], OsStr::new("")), "");
    }
}
