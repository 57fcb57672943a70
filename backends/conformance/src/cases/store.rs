//! The rules of `store`.

use crate::Site;
use crate::failure::{Verdict, ensure};
use crate::samples;

pub(super) fn store_is_stable(site: &mut Site<'_>) -> Verdict {
    let before = site.store.store().clone();
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    site.snapshot(&live)?;
    ensure!(*site.store.store() == before, "a snapshot changed {before:?} to {:?}", site.store.store());
    site.reopen()?;
    ensure!(*site.store.store() == before, "opened again, {before:?} is {:?}", site.store.store());

    let other = site.another("other")?;
    let (mine, others) = (&before.identity, &other.store.store().identity);
    ensure!(mine != others, "two stores have the identity {mine}");
    Ok(())
}
