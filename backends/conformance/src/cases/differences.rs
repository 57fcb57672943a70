//! The rule of `differences`.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use fsnap_backend::{FileKind, Snapshot, Source};

use crate::failure::{During, Failure, Verdict, ensure};
use crate::op::Op;
use crate::view::View;
use crate::{Listing, Site, samples};

pub(super) fn differences_miss_nothing(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    let path = |text: &str| text.as_bytes().to_vec();
    live.apply(&samples::small())?;
    for (name, seed) in [("large", 11), ("same", 12), ("shorter", 13)] {
        live.apply(&[Op::Create(path(name)), Op::Write(path(name), 0, samples::noise(seed, 1 << 20))])?;
    }
    let old = site.snapshot(&live)?;
    live.apply(&samples::small_changed())?;
    live.apply(&[
        Op::Write(path("large"), 0, samples::noise(14, 1)),
        Op::Write(path("large"), 300_000, samples::noise(15, 100)),
        Op::Write(path("large"), (1 << 20) - 1, vec![b'x']),
        Op::Truncate(path("shorter"), 500_000),
    ])?;
    let new = site.snapshot(&live)?;
    check(site, &old, Source::Snapshot(&new), &new_view(site, &new)?)?;
    // Nobody has flushed these.
    live.apply(&[
        Op::Write(path("large"), 600_000, samples::noise(16, 100)),
        Op::Punch(path("large"), 65_536, 65_536),
    ])?;
    check(site, &old, Source::Volume(&live.volume), &View::At(live.dir.clone()))?;
    check(site, &new, Source::Volume(&live.volume), &View::At(live.dir.clone()))?;
    site.store.deactivate(&new.at).during("deactivate")
}

fn new_view(site: &Site<'_>, snapshot: &Snapshot) -> Verdict<View> {
    Ok(View::carry_out(&site.store.activate(&snapshot.at).during("activate")?)?)
}

/// Compares every file that both have outside of the parts that are told.
fn check(site: &Site<'_>, old: &Snapshot, new: Source<'_>, seen: &View) -> Verdict {
    let told = site.store.differences(old, new).during("differences")?;
    let told = told.ok_or_else(|| Failure::new("differences are not known, and the fixture says they are"))?;
    let before = new_view(site, old)?;
    let (Some(a), Some(b)) = (before.dir(), seen.dir()) else {
        return Err(Failure::new("differences are of files that the kernel mounts, and there is no directory"));
    };
    for (path, _) in Listing::of(a)?.items().filter(|(_, item)| item.kind == FileKind::File) {
        let name = Path::new(std::ffi::OsStr::from_bytes(path));
        let (a, b) = (a.join(name), b.join(name));
        if !b.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
            continue;
        }
        let ranges = told.ranges(&File::open(&a)?, &File::open(&b)?).during("ranges")?;
        let Some(ranges) = ranges else { continue };
        outside_is_equal(&fs::read(a)?, &fs::read(b)?, &ranges).during(path.escape_ascii())?;
    }
    drop(before);
    site.store.deactivate(&old.at).during("deactivate")
}

fn outside_is_equal(old: &[u8], new: &[u8], ranges: &[Range<u64>]) -> Verdict {
    let ordered = ranges.iter().all(|range| range.start < range.end) && ranges.is_sorted_by(|a, b| a.end <= b.start);
    ensure!(ordered, "the ranges are not in order: {ranges:?}");
    ensure!(old.len() == new.len(), "its length changed, and only {ranges:?} are told");
    let ends = ranges.iter().map(|range| range.end as usize);
    let starts = ranges.iter().map(|range| range.start as usize);
    for (from, to) in std::iter::once(0).chain(ends).zip(starts.chain([old.len()])) {
        let missed = (from..to).find(|&at| old[at] != new[at]);
        ensure!(missed.is_none(), "byte {} differs, and is in no range that is told", missed.unwrap_or_default());
    }
    Ok(())
}
