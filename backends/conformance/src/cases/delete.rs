//! The rules of `delete`.

use std::fs;

use fsnap_backend::{ErrorKind, ImageKind, Locator};

use crate::failure::{During, Failure, Verdict, ensure, refused};
use crate::op::Op;
use crate::{Site, samples};

pub(super) fn delete_is_idempotent(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let unused = site.never_made(&live)?;
    let before = site.images()?;
    site.store.delete(&unused).during("delete of what was only reserved")?;
    site.expect_unchanged(&before, "delete of nothing")?;
    let snapshot = site.snapshot(&live)?;
    for _ in 0..2 {
        site.store.delete(&snapshot.at).during("delete, twice")?;
    }
    site.reopen()?;
    site.store.delete(&snapshot.at).during("delete in a store opened again")?;
    site.expect_images([])
}

pub(super) fn delete_leaves_relatives(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let mut kept = Vec::new();
    for number in 0..4 {
        live.apply(&[Op::Write(b"file".to_vec(), 1000 * number, samples::noise(number, 100))])?;
        kept.push((site.snapshot(&live)?, live.listing()));
    }
    let mut clones = Vec::new();
    if site.capabilities().clones {
        for (snapshot, listing) in &kept[2..] {
            clones.push((site.clone_of(snapshot)?, listing.clone()));
        }
    }
    // The middle, the oldest, the newest; a clone after its snapshot.
    for index in [1, 0, 1] {
        let (gone, _) = kept.remove(index);
        match site.store.delete(&gone.at) {
            // Allowed where a clone needs its snapshot.
            Err(error) if error.kind() == ErrorKind::Busy && !clones.is_empty() => {}
            deleted => deleted.during("delete")?,
        }
        for (snapshot, listing) in &kept {
            site.expect(&snapshot.at, listing, "a snapshot after another was deleted")?;
            let damage = site.store.verify(snapshot)?;
            ensure!(damage.is_empty(), "a snapshot is damaged after another was deleted: {damage:?}");
        }
        for (clone, listing) in &clones {
            site.expect(clone, listing, "a clone after a snapshot was deleted")?;
        }
        site.expect_live(&live, "the volume after a snapshot was deleted")?;
    }
    if !clones.is_empty() {
        let (gone, _) = clones.remove(0);
        site.store.delete(&gone).during("delete of a clone")?;
        for (at, listing) in kept.iter().map(|(s, listing)| (&s.at, listing)).chain(clones.iter().map(|(a, l)| (a, l)))
        {
            site.expect(at, listing, "an image after a clone was deleted")?;
        }
    }
    Ok(())
}

pub(super) fn delete_frees_the_locator(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let (gone, kept) = (site.snapshot(&live)?, {
        live.apply(&samples::small_changed())?;
        site.snapshot(&live)?
    });
    site.store.delete(&gone.at)?;
    for _ in 0..2 {
        ensure!(site.state(&gone.at)?.is_none(), "what was deleted is still listed");
        refused("settle of what was deleted", ErrorKind::NotFound, site.store.settle(&gone.at))?;
        site.expect_images([(&kept.at, ImageKind::Snapshot)])?;
        site.reopen()?;
    }
    // And it can be used again.
    let again = site.snapshot_at(&live.volume, &gone.at)?;
    site.expect(&again.at, &live.listing(), "a snapshot at a locator that was freed")
}

pub(super) fn delete_touches_only_its_own(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let snapshot = site.snapshot(&live)?;
    let before = site.images()?;
    let longest = "x".repeat(128);
    for foreign in ["no.such:scheme:here", "fsnap-conformance", "0:0:0:0", "a..b", &longest] {
        let result = site.store.delete(&locator(foreign)?);
        refused(&format!("delete of {foreign}"), ErrorKind::NotFound, result)?;
        site.expect_unchanged(&before, "delete of a foreign locator")?;
    }
    // Whatever else lies where the store lies: its own files, and a stranger's.
    let bystander = site.place.join("a-strangers-file");
    fs::write(&bystander, "keep me")?;
    for entry in fs::read_dir(&site.place)? {
        let name = entry?.file_name();
        let Some(at) = name.to_str().and_then(|name| locator(name).ok()).filter(|at| !site.known.contains(at)) else {
            continue;
        };
        if let Ok(()) = site.store.delete(&at) {
            ensure!(site.place.join(&name).symlink_metadata().is_ok(), "delete of {at} removed a file of the store");
        }
    }
    ensure!(fs::read(&bystander).is_ok_and(|text| text == b"keep me"), "delete removed a stranger's file");
    site.reopen()?;
    site.expect_images([(&snapshot.at, ImageKind::Snapshot)])?;
    site.expect(&snapshot.at, &live.listing(), "the snapshot after deletes of foreign locators")
}

fn locator(text: &str) -> Verdict<Locator> {
    text.parse().map_err(|error| Failure::new(format!("{error}")))
}
