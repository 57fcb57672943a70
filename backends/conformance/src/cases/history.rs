//! The rules of `history` and `pin`.

use std::collections::BTreeSet;
use std::fs::File;

use fsnap_backend::{ErrorKind, ImageKind, Locator, Moment, Source};

use crate::failure::{During, Failure, Verdict, ensure, refused};
use crate::op::Op;
use crate::site::LiveVolume;
use crate::{Listing, Site, samples};

/// The numbers of three states, and what the volume held in each.
fn three_states(site: &Site<'_>) -> Verdict<(LiveVolume, Vec<(u64, Listing)>)> {
    let mut live = site.volume("volume")?;
    let mut states = Vec::new();
    let last = vec![Op::Write(b"file".to_vec(), 0, samples::noise(4, 100))];
    for ops in [samples::small(), samples::small_changed(), last] {
        live.apply(&ops)?;
        File::open(&live.dir)?.sync_all().during("sync the volume")?;
        rustix::fs::syncfs(&live.volume).during("sync the file system of the volume")?;
        let number = history(site, &live)?.last().map(|moment| moment.number);
        states.push((number.ok_or_else(|| Failure::new("history has no state"))?, live.listing()));
    }
    Ok((live, states))
}

fn history(site: &Site<'_>, live: &LiveVolume) -> Verdict<Vec<Moment>> {
    site.store.history(&live.volume).during("history")
}

fn pin(site: &mut Site<'_>, live: &LiveVolume, number: u64) -> Verdict<Locator> {
    let at = site.reserve(Source::Volume(&live.volume))?;
    let pinned = site.store.pin(&live.volume, number, &at).during("pin")?;
    let settled = site.store.settle(&at).during("settle of what was pinned")?;
    ensure!(pinned == settled && pinned.at == at, "pin at {at} returned {pinned:?}, settle {settled:?}");
    Ok(at)
}

/// The snapshots of this store that are named as the reason why the state stays.
fn kept(site: &Site<'_>, live: &LiveVolume, number: u64) -> Verdict<BTreeSet<Locator>> {
    let moment = history(site, live)?.into_iter().find(|moment| moment.number == number);
    Ok(moment.map(|moment| moment.kept.snapshots().iter().cloned().collect()).unwrap_or_default())
}

pub(super) fn history_is_in_order(site: &mut Site<'_>) -> Verdict {
    let (live, states) = three_states(site)?;
    for _ in 0..2 {
        let listed: Vec<u64> = history(site, &live)?.iter().map(|moment| moment.number).collect();
        ensure!(listed.is_sorted_by(|a, b| a < b), "the numbers of the history do not rise: {listed:?}");
        site.reopen()?;
    }
    let numbers: Vec<u64> = states.iter().map(|(number, _)| *number).collect();
    ensure!(numbers.is_sorted_by(|a, b| a < b), "later states have no larger numbers: {numbers:?}");
    Ok(())
}

pub(super) fn history_needs_a_keeper(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let at = site.reserve(Source::Volume(&live.volume))?;
    let before = site.images()?;
    refused("history", ErrorKind::Unsupported, site.store.history(&live.volume))?;
    refused("pin", ErrorKind::Unsupported, site.store.pin(&live.volume, 1, &at))?;
    site.expect_unchanged(&before, "pin")
}

pub(super) fn pin_is_of_that_state(site: &mut Site<'_>) -> Verdict {
    let (live, states) = three_states(site)?;
    let mut pinned = Vec::new();
    // Not in the order in which they were.
    for (number, listing) in [&states[1], &states[0], &states[2]] {
        pinned.push((pin(site, &live, *number)?, listing));
    }
    for _ in 0..2 {
        for (at, listing) in &pinned {
            site.expect(at, listing, "a pinned state")?;
        }
        site.expect_images(pinned.iter().map(|(at, _)| (at, ImageKind::Snapshot)))?;
        site.reopen()?;
    }
    site.expect_live(&live, "the volume whose states were pinned")
}

pub(super) fn pin_repeats(site: &mut Site<'_>) -> Verdict {
    let (live, states) = three_states(site)?;
    let (number, listing) = &states[0];
    let at = pin(site, &live, *number)?;
    let first = site.store.settle(&at)?;
    for _ in 0..2 {
        let again = site.store.pin(&live.volume, *number, &at).during("pin, repeated")?;
        ensure!(again == first, "a repeated pin returned {again:?} instead of {first:?}");
        site.expect_images([(&at, ImageKind::Snapshot)])?;
        site.reopen()?;
    }
    site.expect(&at, listing, "a state that was pinned twice")
}

pub(super) fn pin_is_counted(site: &mut Site<'_>) -> Verdict {
    let (live, states) = three_states(site)?;
    let (number, listing) = &states[0];
    let mut left = BTreeSet::new();
    for _ in 0..3 {
        left.insert(pin(site, &live, *number)?);
    }
    while let Some(gone) = left.first().cloned() {
        let named = kept(site, &live, *number)?;
        ensure!(named == left, "history names {named:?} as what keeps a state, there should be {left:?}");
        for at in &left {
            site.expect(at, listing, "one of several snapshots of a state")?;
        }
        site.store.delete(&gone).during("delete of one of several snapshots of a state")?;
        left.remove(&gone);
        site.expect_images(left.iter().map(|at| (at, ImageKind::Snapshot)))?;
    }
    let named = kept(site, &live, *number)?;
    ensure!(named.is_empty(), "history names {named:?}, which were deleted");
    Ok(())
}

pub(super) fn pin_missing(site: &mut Site<'_>) -> Verdict {
    let (live, states) = three_states(site)?;
    let at = site.reserve(Source::Volume(&live.volume))?;
    let before = site.images()?;
    let never = states[2].0 + (1 << 40);
    refused("pin of a state that never was", ErrorKind::NotFound, site.store.pin(&live.volume, never, &at))?;
    site.expect_unchanged(&before, "pin of a state that never was")
}
