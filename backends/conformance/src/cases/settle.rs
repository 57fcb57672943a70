//! The rules of `settle`.

use fsnap_backend::{ErrorKind, ImageState};

use crate::failure::{During, Verdict, ensure, refused};
use crate::{Site, crash, samples};

pub(super) fn settle_returns_the_snapshot(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    // Taken and settled by the site, which compares the two.
    let first = site.snapshot(&live)?;
    live.apply(&samples::small_changed())?;
    let second = site.snapshot(&live)?;
    ensure!(first.identity != second.identity, "two snapshots have the identity {}", first.identity);
    site.reopen()?;
    for snapshot in [&first, &second, &first] {
        let settled = site.store.settle(&snapshot.at).during("settle in a store opened again")?;
        ensure!(settled == *snapshot, "snapshot returned {snapshot:?}, settle later {settled:?}");
    }
    Ok(())
}

pub(super) fn settle_refuses_partial(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let unused = site.never_made(&live)?;
    refused("settle where nothing was made", ErrorKind::NotFound, site.store.settle(&unused))?;
    site.store.prime(&live.volume, &unused)?;
    refused("settle after prime alone", ErrorKind::NotFound, site.store.settle(&unused))?;

    // Snapshots that are cut short before each change that they make.
    crash::cut_short(site, &live, |site, at| {
        let state = site.state(at)?;
        if state != Some(ImageState::Whole) {
            refused("settle of a partial image", ErrorKind::NotFound, site.store.settle(at))?;
        }
        site.store.delete(at).during("delete what a killed snapshot left")?;
        ensure!(site.state(at)?.is_none(), "delete left what a killed snapshot had left ({state:?})");
        Ok(())
    })
}
