//! The rules of `activate` and `deactivate`.

use std::io;
use std::path::Path;

use fsnap_backend::{ErrorKind, MountSpec, Timestamp};
use rustix::io::Errno;

use crate::failure::{Failure, Verdict, ensure, refused};
use crate::op::{Live, Op};
use crate::view::View;
use crate::{Site, samples};

pub(super) fn activate_refuses_writes(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let expected = live.listing();
    let snapshot = site.snapshot(&live)?;
    let spec = site.store.activate(&snapshot.at)?;
    match &spec {
        MountSpec::Bind { read_only, .. } | MountSpec::Mount { read_only, .. } => {
            ensure!(*read_only, "the recipe of a snapshot is not read-only: {spec:?}");
        }
        // There is no call that could write through it.
        MountSpec::Tree(_) => {}
    }
    let view = View::carry_out(&spec)?;
    if let Some(dir) = view.dir() {
        refuses_writes(dir)?;
    }
    drop(view);
    site.store.deactivate(&snapshot.at)?;
    site.expect(&snapshot.at, &expected, "the snapshot after writes were tried")
}

fn refuses_writes(dir: &Path) -> Verdict {
    let live = Live::open(dir)?;
    let path = |text: &str| text.as_bytes().to_vec();
    for op in [
        Op::Create(path("new")),
        Op::MakeDir(path("new dir")),
        Op::Write(path("file"), 0, b"x".to_vec()),
        Op::Truncate(path("file"), 0),
        Op::Remove(path("file")),
        Op::Rename(path("file"), path("renamed")),
        Op::Link(path("file"), path("linked")),
        Op::Chmod(path("file"), 0o777),
        Op::Chmod(Vec::new(), 0o777),
        Op::Touch(path("file"), Timestamp::default()),
    ] {
        let result: io::Result<()> = live.apply(&op);
        match result {
            Err(error) if error.raw_os_error() == Some(Errno::ROFS.raw_os_error()) => {}
            Err(error) => return Err(Failure::new(format!("{op:?} failed, but not with EROFS: {error}"))),
            Ok(()) => return Err(Failure::new(format!("a snapshot was changed by {op:?}"))),
        }
    }
    Ok(())
}

pub(super) fn activate_missing(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let unused = site.never_made(&live)?;
    let before = site.images()?;
    refused("activate where nothing was made", ErrorKind::NotFound, site.store.activate(&unused))?;
    site.expect_unchanged(&before, "activate where nothing was made")?;
    let snapshot = site.snapshot(&live)?;
    site.store.delete(&snapshot.at)?;
    refused("activate of what was deleted", ErrorKind::NotFound, site.store.activate(&snapshot.at))
}

pub(super) fn deactivate_is_idempotent(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let expected = live.listing();
    let snapshot = site.snapshot(&live)?;
    site.store.deactivate(&snapshot.at)?;
    let (first, second) = (site.store.activate(&snapshot.at)?, site.store.activate(&snapshot.at)?);
    // Debug shows every field; two trees have nothing to compare but their contents.
    let tree = matches!(first, MountSpec::Tree(_));
    let (first, second) = (format!("{first:?}"), format!("{second:?}"));
    ensure!(tree || first == second, "activated twice: first {first}, then {second}");
    for _ in 0..2 {
        site.store.deactivate(&snapshot.at)?;
    }
    let unused = site.never_made(&live)?;
    site.store.deactivate(&unused)?;
    site.expect(&snapshot.at, &expected, "the snapshot after deactivate")
}
