//! The rules of the contract, on a btrfs file system of its own.

mod support;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use fsnap_backend::{Backend, Capabilities, Consistency, Locator, Result};
use fsnap_btrfs::Store;
use fsnap_conformance::{Damage, Fixture, Suite, Workplace};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use support::Disk;

struct OnLoop;

impl Fixture for OnLoop {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            clones: true,
            constant_time_clones: true,
            xattrs: true,
            acls: true,
            ownership: true,
            mountable: true,
            verifies_contents: true,
            live: Consistency::CrashConsistent,
        }
    }

    fn ignored(&self) -> &'static [&'static str] {
        // The store can clone; there is nothing in a subvolume that its snapshot does not keep; btrfs keeps no states by
        // itself; and where two differ is not asked.
        &[
            "clone_needs_the_capability",
            "snapshot_omits_aloud",
            "history_is_in_order",
            "pin_is_of_that_state",
            "pin_repeats",
            "pin_is_counted",
            "pin_missing",
            "differences_miss_nothing",
        ]
    }

    fn workplace(&self) -> io::Result<Workplace> {
        Ok(Box::new(Disk::sized(2 << 30, "")))
    }

    fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::create(place)?))
    }

    fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Store::open(place)?))
    }

    fn make_volume(&self, dir: &Path) -> io::Result<()> {
        support::make_subvolume(dir)
    }

    fn remove_volume(&self, dir: &Path) -> io::Result<()> {
        support::delete_subvolume(dir)
    }

    fn damage(&self) -> Option<Damage> {
        Some(flip_on_the_disk)
    }
}

/// Changes a byte of `needle` in the file that the loop device stands on.
fn flip_on_the_disk(place: &Path, _at: &Locator, needle: &[u8]) -> io::Result<()> {
    rustix::fs::syncfs(File::open(place)?)?;
    let image = OpenOptions::new().read(true).write(true).open(support::image_below(place))?;
    let mut from = 0;
    // The file is sparse: only what btrfs wrote is looked at. Contents begin at multiples of a block.
    while let Some(start) = found(rustix::fs::seek(&image, SeekFrom::Data(from)))? {
        from = rustix::fs::seek(&image, SeekFrom::Hole(start))?;
        let mut bytes = vec![0; (from - start) as usize];
        image.read_exact_at(&mut bytes, start)?;
        if let Some(at) = (0..bytes.len()).step_by(4096).find(|&at| bytes[at..].starts_with(needle)) {
            image.write_all_at(&[!needle[0]], start + at as u64)?;
            return image.sync_all();
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the content is not on the disk"))
}

fn found(seek: rustix::io::Result<u64>) -> io::Result<Option<u64>> {
    match seek {
        Err(Errno::NXIO) => Ok(None),
        found => Ok(Some(found?)),
    }
}

fn main() -> ExitCode {
    fsnap_conformance::main(vec![Suite::new("btrfs", OnLoop)])
}
