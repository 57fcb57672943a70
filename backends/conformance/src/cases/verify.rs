//! The rules of `verify`.

use std::os::unix::ffi::OsStrExt;

use crate::failure::{During, Failure, Verdict, ensure};
use crate::op::Op;
use crate::{Site, samples};

pub(super) fn verify_passes_whole_images(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&site.rich())?;
    let first = site.snapshot(&live)?;
    live.apply(&[Op::Write(b"contents/holes".to_vec(), 0, b"x".to_vec()), Op::Remove(b"links/one".to_vec())])?;
    let second = site.snapshot(&live)?;
    site.reopen()?;
    for snapshot in [first, second] {
        let damage = site.store.verify(&snapshot).during("verify")?;
        ensure!(damage.is_empty(), "an undamaged snapshot has damage: {damage:?}");
    }
    Ok(())
}

pub(super) fn verify_names_damage(site: &mut Site<'_>) -> Verdict {
    let Some(damage) = site.fixture.damage() else {
        return Err(Failure::new("the fixture has no way to damage a content"));
    };
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let needle = samples::noise(99, 5_000);
    let victim = b"dir/the victim".to_vec();
    live.apply(&[Op::Create(victim.clone()), Op::Write(victim.clone(), 0, needle.clone())])?;
    let snapshot = site.snapshot(&live)?;
    damage(&site.place, &snapshot.at, &needle).during("damage the content")?;
    site.reopen()?;
    let found = site.store.verify(&snapshot).during("verify")?;
    let paths: Vec<_> = found.iter().map(|damage| damage.path.as_bytes()).collect();
    ensure!(paths == [&victim[..]], "one byte of {:?} was changed, verify found {found:?}", victim.escape_ascii());
    Ok(())
}
