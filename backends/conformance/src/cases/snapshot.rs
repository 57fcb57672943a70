//! The rules of `prime` and `snapshot`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use fsnap_backend::{ErrorKind, ImageKind, ImageState, Source, Timestamp};
use rustix::mount::UnmountFlags;

use crate::failure::{During, Failure, Verdict, ensure, refused};
use crate::listing::Difference;
use crate::model::{is_at_or_below, parent};
use crate::op::Op;
use crate::{Listing, Site, samples, sys};

pub(super) fn prime_is_optional(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let unprimed = site.reserve(Source::Volume(&live.volume))?;
    site.snapshot_at(&live.volume, &unprimed)?;
    site.expect(&unprimed, &live.listing(), "a snapshot without prime")?;

    live.apply(&samples::small_changed())?;
    let primed = site.reserve(Source::Volume(&live.volume))?;
    for _ in 0..2 {
        site.store.prime(&live.volume, &primed).during("prime")?;
        ensure!(site.state(&primed)? != Some(ImageState::Whole), "prime alone made a whole image");
    }
    site.snapshot_at(&live.volume, &primed)?;
    site.expect(&primed, &live.listing(), "a snapshot with prime, twice")
}

pub(super) fn prime_fixes_nothing(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let path = |text: &str| text.as_bytes().to_vec();
    live.apply(&[Op::Create(path("back dated")), Op::Write(path("back dated"), 0, b"before".to_vec())])?;
    let dated = Timestamp { seconds: 1_500_000_000, nanoseconds: 5 };
    live.apply(&[Op::Touch(path("back dated"), dated)])?;

    for changes in [samples::small_changed(), hidden_changes(dated)] {
        let at = site.reserve(Source::Volume(&live.volume))?;
        site.store.prime(&live.volume, &at).during("prime")?;
        live.apply(&changes)?;
        site.snapshot_at(&live.volume, &at)?;
        site.expect(&at, &live.listing(), "a snapshot of a volume that changed after prime")?;
    }
    Ok(())
}

/// Changes that leave sizes and times as they were, and removals.
fn hidden_changes(dated: Timestamp) -> Vec<Op> {
    let path = |text: &str| text.as_bytes().to_vec();
    vec![
        Op::Write(path("back dated"), 0, b"after!".to_vec()),
        Op::Touch(path("back dated"), dated),
        Op::Rename(path("dir/inner"), path("dir/moved")),
        Op::Remove(path("other name")),
        Op::Rename(path("dir"), path("directory")),
        Op::Remove(path("empty")),
        Op::MakeDir(path("empty")),
        Op::Truncate(path("file"), 6_000),
    ]
}

pub(super) fn snapshot_is_complete(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    let empty = site.snapshot(&live)?;
    let nothing = live.listing();
    live.apply(&site.rich())?;
    site.expect_live(&live, "the volume itself (the suite is at fault, or its file system)")?;
    let everything = live.listing();
    let full = site.snapshot(&live)?;
    site.expect_live(&live, "the volume after its snapshot")?;
    site.expect(&full.at, &everything, "the snapshot")?;

    // The second builds on the first, where a backend shares what did not change.
    live.apply(&changes_everywhere(site))?;
    let second = site.snapshot(&live)?;
    site.expect(&second.at, &live.listing(), "the second snapshot")?;
    site.expect(&full.at, &everything, "the first snapshot after the second")?;
    site.expect(&empty.at, &nothing, "the snapshot of the empty volume")
}

/// Small changes to what [`samples::rich`] makes, one of each kind.
fn changes_everywhere(site: &Site<'_>) -> Vec<Op> {
    let path = |text: &str| text.as_bytes().to_vec();
    let mut ops = vec![
        Op::Write(path("contents/a terabyte"), 7, b"x".to_vec()),
        Op::Write(path("contents/holes"), 2 << 20, b"in a hole".to_vec()),
        Op::Punch(path("contents/300001"), 4096, 8192),
        Op::Truncate(path("contents/65536"), 100),
        Op::Write(path("links/two"), 4, b"FILE".to_vec()),
        Op::Remove(path("links/one")),
        Op::Rename(path("many"), path("links/many")),
        Op::Remove(path("links/fifo again")),
        Op::Chmod(path("deep"), 0o700),
        Op::Rename(path("contents/1"), path("contents/4095")),
        Op::Touch(path("links/dangling"), Timestamp { seconds: 5, nanoseconds: 5 }),
    ];
    if site.capabilities().xattrs {
        ops.push(Op::SetXattr(path("attributes/with xattrs"), "user.plain".into(), b"other".to_vec()));
        ops.push(Op::RemoveXattr(path("attributes/with many"), "user.number-7".into()));
        ops.push(Op::RemoveXattr(path("attributes"), "user.of-a-directory".into()));
    }
    if site.capabilities().acls {
        ops.push(Op::SetXattr(path("attributes/with an ACL"), "system.posix_acl_access".into(), samples::acl(77)));
    }
    if site.fixture.reports_holes() { ops } else { samples::without_holes(ops) }
}

pub(super) fn snapshot_has_fresh_writes(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    let path = |text: &str| text.as_bytes().to_vec();
    let names = ["overwritten", "stored to", "appended to"];
    for name in names {
        live.apply(&[Op::Create(path(name)), Op::Write(path(name), 0, vec![b'.'; 20_000])])?;
    }
    // So that the next snapshots have something old to show by mistake.
    site.snapshot(&live)?;

    // Open all the while, as a process that is frozen in the middle of its work has them.
    let open = names.map(|name| live.model.live().open_file(name.as_bytes()));
    let [overwritten, stored, appended] = open;
    let (overwritten, stored, appended) = (overwritten?, stored?, appended?);
    live.apply(&[Op::Create(path("empty")), Op::MakeDir(path("dir")), Op::Symlink(path("link"), path("0"))])?;
    for round in 0..10_u64 {
        let at = site.reserve(Source::Volume(&live.volume))?;
        if round % 2 == 0 {
            // Twice in so short a time that both may get the same time stamp.
            live.apply(&attributes_only(site, b"before"))?;
            site.store.prime(&live.volume, &at).during("prime")?;
            live.apply(&attributes_only(site, b"beyond"))?;
        }
        let number = round.to_le_bytes();
        overwritten.write_all_at(&number, 0)?;
        sys::store_through_mapping(&stored, 4096 + 8 * round, &number)?;
        appended.write_all_at(&number, 20_000 + 8 * round)?;
        site.snapshot_at(&live.volume, &at)?;

        let image = site.read(&at)?;
        let volume = Listing::of(&live.dir)?;
        volume.expect(&image, &site.capabilities(), format_args!("the snapshot of round {round}"))?;
        // The volume was read after the snapshot; that it holds the numbers is checked on its own.
        let size = image.get(b"appended to").map(|item| item.content.len());
        ensure!(size == Some(20_008 + 8 * round), "round {round}: what was appended is not there: {size:?}");
    }
    Ok(())
}

/// Changes to `empty`, `dir`, `link` and the root that move nothing but the time of change.
fn attributes_only(site: &Site<'_>, value: &[u8; 6]) -> Vec<Op> {
    let path = |text: &str| text.as_bytes().to_vec();
    let mut ops = vec![Op::Remove(path("link")), Op::Symlink(path("link"), value.to_vec())];
    if site.capabilities().xattrs {
        let set = |path| Op::SetXattr(path, "user.fresh".into(), value.to_vec());
        ops.extend([path("empty"), path("dir"), path("")].map(set));
    }
    ops
}

pub(super) fn snapshot_is_independent(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let mapped = live.model.live().open_file(b"file")?;
    let before = live.listing();
    let snapshot = site.snapshot(&live)?;
    live.apply(&samples::small_changed())?;
    sys::store_through_mapping(&mapped, 9_000, b"by an old descriptor")?;
    site.expect(&snapshot.at, &before, "the snapshot after the volume changed")?;

    let dir = live.dir.clone();
    drop((live, mapped));
    site.fixture.remove_volume(&dir)?;
    site.expect(&snapshot.at, &before, "the snapshot after the volume was removed")?;
    site.reopen()?;
    site.expect(&snapshot.at, &before, "the snapshot after the volume was removed and the store opened again")
}

pub(super) fn snapshot_omits_aloud(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let planted = match site.fixture.unkeepable() {
        Some(plant) => plant(&live.dir).during("plant what cannot be kept")?,
        None => {
            live.apply(&[Op::CharDevice(b"device".to_vec(), 1, 3)])?;
            "device".into()
        }
    };
    let mounted = MountedPlant { dir: live.dir.join(&planted) };
    let at = site.reserve(Source::Volume(&live.volume))?;
    let snapshot = site.store.snapshot(&live.volume, &at).during("snapshot")?;
    drop(mounted);
    let planted = planted.as_os_str().as_bytes();
    let named = |path: &[u8]| snapshot.omissions.iter().any(|omission| omission.path.as_bytes() == path);
    ensure!(named(planted), "{} is not among the omissions {:?}", planted.escape_ascii(), snapshot.omissions);
    let settled = site.store.settle(&at).during("settle")?;
    ensure!(settled == snapshot, "snapshot returned {snapshot:?}, settle {settled:?}");

    // Nothing is missing but what was named. The directory that the thing was planted in changed with it.
    let differences = live.listing().differences(&site.read(&at)?, &site.capabilities());
    let silent = |difference: &&Difference| {
        let omitted = |path: &str| is_at_or_below(&difference.path, path.as_bytes());
        difference.path != parent(planted) && !snapshot.omissions.iter().any(|omission| omitted(&omission.path))
    };
    match differences.iter().find(silent) {
        Some(difference) => Err(Failure::new(format!("this is not named among the omissions: {difference}"))),
        None => Ok(()),
    }
}

/// A planted thing that may be a mount, which must be gone when its volume is removed.
struct MountedPlant {
    dir: PathBuf,
}

impl Drop for MountedPlant {
    fn drop(&mut self) {
        // Fails for things that are no mount, as it should.
        let _ = rustix::mount::unmount(&self.dir, UnmountFlags::DETACH);
    }
}

pub(super) fn snapshot_repeats(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let before = live.listing();
    let first = site.snapshot(&live)?;
    let again = site.store.snapshot(&live.volume, &first.at).during("snapshot at the same locator")?;
    ensure!(again == first, "repeated, {first:?} became {again:?}");
    site.expect_images([(&first.at, ImageKind::Snapshot)])?;
    site.expect(&first.at, &before, "the repeated snapshot")?;

    // A snapshot never changes, not even by a repeated call.
    live.apply(&samples::small_changed())?;
    site.reopen()?;
    let volume = site.store.adopt(&live.dir)?;
    let again = site.store.snapshot(&volume, &first.at).during("snapshot at the same locator, after a change")?;
    ensure!(again == first, "repeated after a change of the volume, {first:?} became {again:?}");
    site.expect_images([(&first.at, ImageKind::Snapshot)])?;
    site.expect(&first.at, &before, "the snapshot that was repeated after a change of the volume")
}

pub(super) fn snapshot_refuses_another_volume(site: &mut Site<'_>) -> Verdict {
    for replaced_by_rename in [false, true] {
        let mut live = site.volume("volume")?;
        live.apply(&samples::small())?;
        let at = site.reserve(Source::Volume(&live.volume))?;
        if replaced_by_rename {
            site.fixture.move_volume(&live.dir, &site.dir.join("moved away"))?;
        } else {
            site.fixture.remove_volume(&live.dir)?;
        }
        site.fixture.make_volume(&live.dir)?;
        fs::write(live.dir.join("another"), "volume")?;
        let another = Listing::of(&live.dir)?;

        let before = site.images()?;
        let result = site.store.snapshot(&live.volume, &at);
        refused("snapshot of a volume whose directory was replaced", ErrorKind::WrongIdentity, result)?;
        let kept: BTreeSet<_> = site.images()?.into_iter().filter(|i| i.state == ImageState::Whole).collect();
        ensure!(kept.iter().all(|image| before.contains(image)), "the refused snapshot is there: {kept:?}");
        site.store.delete(&at)?;
        site.expect_unchanged(&before, "snapshot of another volume")?;
        let now = Listing::of(&live.dir)?;
        another.expect(&now, &site.capabilities(), "the other volume after the refused snapshot")?;
        site.fixture.remove_volume(&live.dir)?;
    }
    Ok(())
}
