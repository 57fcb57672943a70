//! The rules of `adopt`.

use std::fs;
use std::os::unix::fs::symlink;

use fsnap_backend::ErrorKind;

use crate::Site;
use crate::failure::{Verdict, ensure, refused};
use crate::samples;

pub(super) fn adopt_identifies(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    let first = live.volume.identity().clone();
    live.apply(&samples::small())?;
    site.snapshot(&live)?;
    live.apply(&samples::small_changed())?;
    site.reopen()?;
    let again = site.store.adopt(&live.dir)?.identity().clone();
    ensure!(again == first, "the same tree was {first} and is now {again}");

    let other = site.volume("other")?;
    ensure!(*other.volume.identity() != first, "two trees have the identity {first}");

    // With the first one's inode free again, a file system likes to use its number for the next.
    let dir = live.dir.clone();
    drop(live);
    site.fixture.remove_volume(&dir)?;
    site.fixture.make_volume(&dir)?;
    let new = site.store.adopt(&dir)?.identity().clone();
    ensure!(new != first, "the tree was removed and made again, and is still {first}");
    Ok(())
}

pub(super) fn adopt_refuses_symlinks(site: &mut Site<'_>) -> Verdict {
    let live = site.volume("volume")?;
    let link = site.dir.join("link");
    symlink(&live.dir, &link)?;
    refused("adopt of a symbolic link to a volume", ErrorKind::NotAVolume, site.store.adopt(&link))?;
    let dangling = site.dir.join("dangling");
    symlink("nowhere", &dangling)?;
    refused("adopt of a dangling symbolic link", ErrorKind::NotAVolume, site.store.adopt(&dangling))?;

    let file = site.dir.join("file");
    fs::write(&file, "no directory")?;
    refused("adopt of a regular file", ErrorKind::NotAVolume, site.store.adopt(&file))?;
    let fifo = site.dir.join("fifo");
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0)?;
    refused("adopt of a fifo", ErrorKind::NotAVolume, site.store.adopt(&fifo))
}

pub(super) fn adopt_missing(site: &mut Site<'_>) -> Verdict {
    let missing = site.dir.join("missing");
    refused("adopt of nothing", ErrorKind::NotFound, site.store.adopt(&missing))?;
    refused("adopt below nothing", ErrorKind::NotFound, site.store.adopt(&missing.join("below")))?;
    ensure!(!missing.exists(), "adopt made {}", missing.display());
    Ok(())
}
