//! fsnap's backend for any directory on any file system, without privileges.
//!
//! # The idea
//!
//! A snapshot is a tree of *records*, one for each directory, and *contents*, one for each regular file. Both are shared
//! by all snapshots that have them in common: a record is named by its hash and holds the hashes of the records below
//! it, and a content never changes. The second snapshot of a tree therefore costs a walk that compares what `statx(2)`
//! says with the record before, a content for each file that changed, and a record for each directory on the way to it.
//! Nothing is made for what did not change, not even an inode.
//!
//! # Code map
//!
//! * `store`: the store on disk, and which locks order what; `lock`: one of them; `format`: the specification of its files; `record`, `manifest`: what
//!   they hold; `pack`: where records are written.
//! * `volume`: which directory can be a volume, and which is the same one.
//! * `walk`: the comparing walk, and when a file counts as unchanged; `crew`: two threads going through a tree;
//!   `maker`: taking a file's content, shared, copied or as a patch; `delta`: making a patch; `patch`: reading one;
//!   `content`: reading, copying, comparing and summing contents; `chunks`: the sums of large ones, carried over from one
//!   version to the next; `extents`: where both have the same blocks.
//! * `snapshot`: `prime` and `snapshot`; `settle`: making one durable; `tree`: reading one; `restore`: cloning
//!   one; `verify`: checking one; `sweep`: removing one, and what nobody needs any more.
//! * `sys`: calls without a safe wrapper.
//!
//! # Invariants
//!
//! * A snapshot is whole when, and only when, its manifest is in `snapshots`. What the manifest leads to is written before
//!   it, and removed after it.
//! * A record or content is never written twice. New snapshots share only with settled ones.
//! * Between `prime` and `settle` nothing waits for the disk.
//! * A file of a volume is touched through [`fsnap_backend::beneath`] alone. (The crate `walkdir` is not used: it walks
//!   by paths, which a hostile process can bend while the walk is on its way.)
//!
//! # What is not kept
//!
//! Access times count as of the last change of the file. Inode flags (`chattr`) are not kept, and the immutable and
//! append-only ones are named as omissions. What another file system mounted inside the volume holds is not kept, and is
//! named. Without privileges, a clone has our owner, and device nodes and other users' files that we may not read are
//! omitted and named.

mod chunks;
mod content;
mod crew;
mod delta;
mod extents;
mod format;
mod lock;
mod maker;
mod manifest;
mod pack;
mod patch;
mod record;
mod restore;
mod settle;
mod snapshot;
mod store;
mod sweep;
mod sys;
mod tree;
mod verify;
mod volume;
mod walk;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{
    Backend, Damage, Image, ImageKind, ImageState, Locator, MountSpec, Result, Snapshot, Source, StoreInfo, Volume,
};

pub use store::{Options, Store};

/// The backend's name.
const KIND: &str = "rsync";

impl Backend for Store {
    fn store(&self) -> &StoreInfo {
        &self.inner.info
    }

    fn adopt(&self, dir: &Path) -> Result<Volume> {
        volume::adopt(&self.inner, dir)
    }

    fn reserve(&self, source: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator> {
        let prefix = match source {
            Source::Volume(_) => "s",
            Source::Snapshot(_) => "v",
        };
        loop {
            let locator = format!("{prefix}-{}", record::BatchId(store::random()?));
            let locator = locator.parse().expect("a letter, a dash and hex digits are a locator");
            if !known.contains(&locator) {
                return Ok(locator);
            }
        }
    }

    fn prime(&self, volume: &Volume, at: &Locator) -> Result<()> {
        snapshot::prime(&self.inner, volume, at)
    }

    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        snapshot::snapshot(&self.inner, volume, at)
    }

    fn settle(&self, at: &Locator) -> Result<Snapshot> {
        settle::settle(&self.inner, at)
    }

    fn clone_snapshot(&self, snapshot: &Snapshot, at: &Locator) -> Result<()> {
        restore::clone_snapshot(&self.inner, snapshot, at)
    }

    fn list(&self) -> Result<Vec<Image>> {
        let mut images = list_snapshots(&self.inner)?;
        images.extend(list_volumes(&self.inner)?);
        Ok(images)
    }

    fn activate(&self, at: &Locator) -> Result<MountSpec> {
        if store::is_volume(at) {
            let dir = self.inner.path("volumes", at.as_str());
            return if dir.is_dir() { Ok(MountSpec::Bind { dir, read_only: false }) } else { Err(store::no_image(at)) };
        }
        let manifest = self.inner.whole_at(at)?;
        Ok(MountSpec::Tree(Arc::new(tree::Tree::open(self.inner.clone(), manifest.root, at)?)))
    }

    fn deactivate(&self, at: &Locator) -> Result<()> {
        // Nothing is held for an active image.
        let ours = store::is_snapshot(at) || store::is_volume(at);
        if ours { Ok(()) } else { Err(store::no_image(at)) }
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>> {
        verify::verify(&self.inner, snapshot)
    }

    fn beside(&self) -> Option<PathBuf> {
        Some(self.inner.dir.join(store::BESIDE))
    }

    fn delete(&self, at: &Locator) -> Result<()> {
        sweep::delete(&self.inner, at)
    }
}

fn list_snapshots(store: &store::Inner) -> Result<Vec<Image>> {
    let image = |at: Locator, state| Image { at, kind: ImageKind::Snapshot, state };
    let mut images = Vec::new();
    let mut seen = BTreeSet::new();
    for at in store.names("snapshots")?.into_iter().filter_map(|name| Locator::try_from(name).ok()) {
        seen.insert(at.clone());
        if !store::is_snapshot(&at) {
            images.push(image(at, ImageState::Foreign));
            continue;
        }
        // A manifest that cannot be read is still an image that was made: it is listed, and can be deleted.
        let whole = store.whole_at(&at).is_ok();
        images.push(image(at, if whole { ImageState::Whole } else { ImageState::Partial }));
    }
    let begun = store.snapshots_in("partials")?.into_iter().filter(|at| !seen.contains(at));
    images.extend(begun.map(|at| image(at, ImageState::Partial)));
    Ok(images)
}

fn list_volumes(store: &store::Inner) -> Result<Vec<Image>> {
    let image = |at, state| Image { at, kind: ImageKind::Volume, state };
    let mut images = Vec::new();
    let names: BTreeSet<String> = store.names("volumes")?.into_iter().collect();
    for name in &names {
        let unfinished = name.strip_suffix(".part").filter(|at| at.parse().is_ok_and(|at| store::is_volume(&at)));
        if let Some(at) = unfinished {
            let at: Locator = at.parse().expect("it was one above");
            if !names.contains(at.as_str()) {
                images.push(image(at, ImageState::Partial));
            }
        } else if let Ok(at) = Locator::try_from(name.clone()) {
            let links_of = name.strip_suffix(".links").is_some_and(|at| names.contains(&format!("{at}.part")));
            let state = if store::is_volume(&at) { ImageState::Whole } else { ImageState::Foreign };
            images.extend((!links_of).then(|| image(at, state)));
        }
    }
    Ok(images)
}
