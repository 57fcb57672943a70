//! The rules of `reserve`.

use std::collections::BTreeSet;

use fsnap_backend::Source;

use crate::Site;
use crate::failure::{Verdict, ensure};
use crate::samples;

pub(super) fn reserve_is_new(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let first = site.snapshot(&live)?;
    for _ in 0..20 {
        let at = site.store.reserve(Source::Volume(&live.volume), &site.known)?;
        ensure!(site.known.insert(at.clone()), "{at} is in `known`");
        ensure!(at != first.at && site.state(&at)?.is_none(), "{at} is taken");
    }
    // A caller that lost its record must not be led onto an image either.
    let at = site.store.reserve(Source::Volume(&live.volume), &BTreeSet::new())?;
    ensure!(site.state(&at)?.is_none(), "with nothing known, {at} is taken");
    if site.capabilities().clones {
        let clone = site.clone_of(&first)?;
        let at = site.store.reserve(Source::Snapshot(&first), &site.known)?;
        ensure!(!site.known.contains(&at), "{at} is in `known`");
        ensure!(at != clone && site.state(&at)?.is_none(), "{at} is taken");
    }
    Ok(())
}

pub(super) fn reserve_shows_nothing(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let snapshot = site.snapshot(&live)?;
    live.apply(&samples::small_changed())?;
    let before = site.images()?;
    for source in [Source::Volume(&live.volume), Source::Snapshot(&snapshot)] {
        if matches!(source, Source::Volume(_)) || site.capabilities().clones {
            let at = site.reserve(source)?;
            let added: Vec<_> = site.images()?.into_iter().filter(|image| !before.contains(image)).collect();
            let whole = added.iter().any(|image| image.state == fsnap_backend::ImageState::Whole);
            ensure!(!whole, "reserve of {at} made {added:?} appear");
        }
    }
    site.expect_live(&live, "the volume after reserve")
}
