//! The rules of `list`.

use fsnap_backend::ImageKind;

use crate::Site;
use crate::failure::{Verdict, ensure};
use crate::op::Op;
use crate::samples;

pub(super) fn list_is_complete(site: &mut Site<'_>) -> Verdict {
    site.expect_images([])?;
    let made = make_some(site)?;
    site.expect_images(made.iter().map(|(at, kind)| (at, *kind)))?;
    let (gone, rest) = made.split_first().expect("some were made");
    site.store.delete(&gone.0)?;
    site.expect_images(rest.iter().map(|(at, kind)| (at, *kind)))
}

pub(super) fn list_survives_reopening(site: &mut Site<'_>) -> Verdict {
    let made = make_some(site)?;
    let before = site.images()?;
    site.reopen()?;
    let after = site.images()?;
    ensure!(after == before, "before: {before:?}, opened again: {after:?}");
    site.expect_images(made.iter().map(|(at, kind)| (at, *kind)))
}

/// Snapshots of two volumes, and a clone where the store can.
fn make_some(site: &mut Site<'_>) -> Verdict<Vec<(fsnap_backend::Locator, ImageKind)>> {
    let mut made = Vec::new();
    for name in ["volume", "other"] {
        let mut live = site.volume(name)?;
        live.apply(&samples::small())?;
        for number in 0..2 {
            live.apply(&[Op::Truncate(b"file".to_vec(), number)])?;
            made.push((site.snapshot(&live)?.at, ImageKind::Snapshot));
        }
    }
    if site.capabilities().clones {
        let (at, _) = &made[1];
        let snapshot = site.store.settle(at)?;
        made.push((site.clone_of(&snapshot)?, ImageKind::Volume));
    }
    Ok(made)
}
