//! The rules of `clone_snapshot`.

use fsnap_backend::{ErrorKind, ImageKind, Source};

use crate::failure::{During, Verdict, ensure, refused};
use crate::op::Op;
use crate::{Site, samples};

pub(super) fn clone_is_equal(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&site.rich())?;
    let expected = live.listing();
    let snapshot = site.snapshot(&live)?;
    live.apply(&[Op::Remove(b"links/one".to_vec()), Op::Chmod(b"deep".to_vec(), 0o700)])?;
    let clone = site.clone_of(&snapshot)?;
    site.expect(&clone, &expected, "the clone")?;
    site.expect(&snapshot.at, &expected, "the snapshot after it was cloned")
}

pub(super) fn clone_is_isolated(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let expected = live.listing();
    let snapshot = site.snapshot(&live)?;
    let (first, second) = (site.clone_of(&snapshot)?, site.clone_of(&snapshot)?);
    let (mut writer, view) = site.adopt_clone(&first, &expected)?;
    writer.apply(&samples::small_changed())?;
    site.expect_live(&writer, "the clone that was written to")?;
    site.expect(&snapshot.at, &expected, "the snapshot after its clone was written to")?;
    site.expect(&second, &expected, "another clone after the first was written to")?;
    site.expect_live(&live, "the volume after a clone was written to")?;

    let written = writer.listing();
    live.apply(&[Op::Write(b"file".to_vec(), 0, b"in the volume".to_vec())])?;
    site.expect_live(&writer, "the clone after the volume was written to")?;
    drop((writer, view));
    site.store.deactivate(&first)?;
    site.reopen()?;
    site.expect(&first, &written, "the clone that was written to, activated again")
}

pub(super) fn clone_outlives_its_snapshot(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let expected = live.listing();
    let snapshot = site.snapshot(&live)?;
    let clone = site.clone_of(&snapshot)?;
    match site.store.delete(&snapshot.at) {
        Ok(()) => site.expect_images([(&clone, ImageKind::Volume)])?,
        Err(error) if error.kind() == ErrorKind::Busy => {
            site.expect_images([(&snapshot.at, ImageKind::Snapshot), (&clone, ImageKind::Volume)])?;
            site.expect(&snapshot.at, &expected, "the snapshot whose removal was refused")?;
        }
        Err(error) => return Err(error).during("delete of a snapshot that has a clone"),
    }
    site.expect(&clone, &expected, "the clone after its snapshot was deleted")?;
    site.reopen()?;
    let (mut writer, _view) = site.adopt_clone(&clone, &expected)?;
    writer.apply(&samples::small_changed())?;
    site.expect_live(&writer, "the clone, written to after its snapshot was deleted")
}

pub(super) fn clone_can_be_snapshotted(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let original = live.listing();
    let snapshot = site.snapshot(&live)?;
    let clone = site.clone_of(&snapshot)?;
    let (mut branch, _view) = site.adopt_clone(&clone, &original)?;
    ensure!(branch.volume.identity() != live.volume.identity(), "a clone has the identity of its snapshot's volume");
    branch.apply(&samples::small_changed())?;
    let changed = branch.listing();
    let of_clone = site.snapshot(&branch)?;
    branch.apply(&[Op::Remove(b"file".to_vec())])?;

    let grandchild = site.clone_of(&of_clone)?;
    site.expect(&snapshot.at, &original, "the first snapshot")?;
    site.expect(&of_clone.at, &changed, "the snapshot of the clone")?;
    site.expect(&grandchild, &changed, "the clone of the snapshot of the clone")?;
    site.expect_live(&branch, "the clone after its snapshot")
}

pub(super) fn clone_checks_identity(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let snapshot = site.snapshot(&live)?;
    let at = site.reserve(Source::Snapshot(&snapshot))?;
    let before = site.images()?;
    let result = site.store.clone_snapshot(&Site::forged(&snapshot), &at);
    refused("clone_snapshot with another identity", ErrorKind::WrongIdentity, result)?;
    site.expect_unchanged(&before, "clone_snapshot with another identity")
}

pub(super) fn clone_needs_the_capability(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let snapshot = site.snapshot(&live)?;
    let at = site.never_made(&live)?;
    let before = site.images()?;
    let result = site.store.clone_snapshot(&snapshot, &at);
    refused("clone_snapshot in a store that cannot clone", ErrorKind::Unsupported, result)?;
    site.expect_unchanged(&before, "clone_snapshot in a store that cannot clone")
}
