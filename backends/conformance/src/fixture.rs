//! What the suite needs to know of a backend.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Backend, Capabilities, Locator, Result};

/// A backend, on one kind of file system, as the suite sees it.
///
/// A fixture is a small value without state: the suite makes it again in the child processes that it kills.
pub trait Fixture: Send + Sync {
    /// The capabilities that every store of this fixture has. Pinned here, so that a change of them is noticed.
    fn capabilities(&self) -> Capabilities;

    /// The names of the cases that cannot run here. Pinned, so that a case that stops running is noticed.
    fn ignored(&self) -> &'static [&'static str] {
        &[]
    }

    /// Makes the directory in which all stores and volumes of one run lie.
    ///
    /// Called once per run, when the first case needs it. The suite runs in a mount namespace of its own if it has the
    /// privilege, so a fixture may mount what it likes. The returned value is dropped when all is over; a
    /// [`tempfile::TempDir`] is one.
    fn workplace(&self) -> io::Result<Workplace>;

    /// Makes a store at `place`, a path in the workplace at which nothing exists.
    fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>>;

    /// Opens the store at `place` again.
    fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>>;

    /// Makes an empty directory at `dir` that can be a volume of a store in the same workplace.
    fn make_volume(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir(dir)
    }

    /// Removes such a directory and everything in it.
    fn remove_volume(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir_all(dir)
    }

    /// Moves such a directory to another place of the same workplace.
    fn move_volume(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Whether the file system of the volumes tells holes from zeros to those who read, and can punch them.
    ///
    /// Where it does not, files are read whole: the suite makes no large sparse ones, and does not ask whether holes
    /// were kept.
    fn reports_holes(&self) -> bool {
        true
    }

    /// Whether the file system of the volumes keeps past states by itself.
    fn keeps_history(&self) -> bool {
        false
    }

    /// Whether the store knows where two states of a volume differ.
    fn tells_differences(&self) -> bool {
        false
    }

    /// How to damage a content below fsnap, if that can be done; [`flip_a_byte_below`](crate::flip_a_byte_below) does
    /// it for stores that keep contents as plain files.
    fn damage(&self) -> Option<Damage> {
        None
    }

    /// How to put something into a volume that its snapshot cannot keep, if there is such a thing;
    /// [`mount_below`](crate::mount_below) does it for stores that say so of other file systems mounted in the volume.
    ///
    /// Not needed for stores without the capability of ownership, where a device node is such a thing.
    fn unkeepable(&self) -> Option<Unkeepable> {
        None
    }

    /// How many random histories are run, unless `PROPTEST_CASES` says otherwise.
    fn histories(&self) -> u32 {
        24
    }

    /// How many times each call is killed at most; more system calls than that are sampled evenly.
    fn kills(&self) -> u32 {
        60
    }
}

/// The directory in which stores and volumes lie, gone when dropped.
pub type Workplace = Box<dyn AsRef<Path> + Send + Sync>;

/// Changes a byte of the content `needle` that the image at the locator holds, in the store at the path, so that the
/// store itself cannot notice it being done.
pub type Damage = fn(place: &Path, at: &Locator, needle: &[u8]) -> io::Result<()>;

/// Puts a thing into the volume at `dir` that a snapshot of it cannot keep, and returns its path below the volume's root.
pub type Unkeepable = fn(dir: &Path) -> io::Result<PathBuf>;

/// A [`Damage`] for stores whose contents lie as they are in regular files below the store's place.
///
/// Finds one file that holds the needle and changes a byte of it, leaving the file's time of change as it was.
pub fn flip_a_byte_below(place: &Path, _at: &Locator, needle: &[u8]) -> io::Result<()> {
    let mut pending = vec![place.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file() && flip_in(&entry.path(), needle)? {
                return Ok(());
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no file below {} holds the content", place.display())))
}

fn flip_in(path: &Path, needle: &[u8]) -> io::Result<bool> {
    let content = fs::read(path)?;
    let Some(offset) = content.windows(needle.len()).position(|window| window == needle) else { return Ok(false) };
    let modified = fs::metadata(path)?.modified()?;
    let permissions = fs::metadata(path)?.permissions();
    // Contents may be kept read-only, and their owner is not always root.
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let file = fs::OpenOptions::new().write(true).open(path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[!content[offset]], offset as u64)?;
    file.set_modified(modified)?;
    file.set_permissions(permissions)?;
    Ok(true)
}

/// An [`Unkeepable`]: another file system is mounted on a directory of the volume. The suite unmounts it.
pub fn mount_below(dir: &Path) -> io::Result<PathBuf> {
    let path = PathBuf::from("mounted");
    fs::create_dir(dir.join(&path))?;
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", dir.join(&path), "tmpfs", flags, None)?;
    fs::write(dir.join(&path).join("elsewhere"), "not in the volume")?;
    Ok(path)
}
