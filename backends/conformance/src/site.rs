//! A fresh store and volumes, in which one case runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{
    Backend, Capabilities, Identity, Image, ImageKind, ImageState, Locator, MountSpec, Snapshot, Source, Volume,
};

use crate::failure::{During, Verdict, ensure};
use crate::op::Op;
use crate::view::View;
use crate::{Fixture, Listing, Model, Suite, samples};

/// One store, opened, with its volumes beside it.
pub struct Site<'a> {
    /// The name of the suite, by which a child process finds the fixture again.
    pub suite: &'static str,
    /// The backend's fixture.
    pub fixture: &'a dyn Fixture,
    /// The opened store.
    pub store: Arc<dyn Backend>,
    /// The directory that holds the store and the volumes.
    pub dir: PathBuf,
    /// Where the store lies.
    pub place: PathBuf,
    /// The locators that the caller has recorded.
    pub known: BTreeSet<Locator>,
}

/// A live volume, and the model of what it must hold.
#[derive(Debug)]
pub struct LiveVolume {
    /// Where it lies.
    pub dir: PathBuf,
    /// As the backend adopted it.
    pub volume: Volume,
    /// What it must hold.
    pub model: Model,
}

impl LiveVolume {
    /// Changes the volume and its model.
    pub fn apply<'a>(&mut self, ops: impl IntoIterator<Item = &'a Op>) -> Verdict {
        for op in ops {
            self.model.apply(op).during(format_args!("{op:.100?}"))?;
        }
        Ok(())
    }

    /// What it must hold now.
    pub fn listing(&self) -> Listing {
        self.model.listing()
    }
}

impl<'a> Site<'a> {
    /// Makes a store in the fresh directory `dir`.
    pub fn new(suite: &'a Suite, dir: &Path) -> Verdict<Self> {
        Self::of(suite.name(), suite.fixture(), dir)
    }

    /// Makes another store, in a directory below.
    pub fn another(&self, name: &str) -> Verdict<Self> {
        Self::of(self.suite, self.fixture, &self.dir.join(name))
    }

    fn of(suite: &'static str, fixture: &'a dyn Fixture, dir: &Path) -> Verdict<Self> {
        fs::create_dir(dir).during(dir.display())?;
        let place = dir.join("store");
        let store = fixture.create_store(&place).during("make a store")?;
        Ok(Self { suite, fixture, store, dir: dir.to_owned(), place, known: BTreeSet::new() })
    }

    /// What the store can do.
    pub fn capabilities(&self) -> Capabilities {
        self.store.store().capabilities
    }

    /// Closes the store and opens it again.
    pub fn reopen(&mut self) -> Verdict {
        self.store = self.fixture.open_store(&self.place).during("open the store again")?;
        Ok(())
    }

    /// [`samples::rich`], as far as the file system of the volumes can hold it.
    pub fn rich(&self) -> Vec<Op> {
        let ops = samples::rich(&self.capabilities());
        if self.fixture.reports_holes() { ops } else { samples::without_holes(ops) }
    }

    /// Makes and adopts an empty volume.
    pub fn volume(&self, name: &str) -> Verdict<LiveVolume> {
        let dir = self.dir.join(name);
        self.fixture.make_volume(&dir).during(format_args!("make the volume {}", dir.display()))?;
        let volume = self.store.adopt(&dir).during("adopt")?;
        let model = Model::of_empty(&dir)?;
        Ok(LiveVolume { dir, volume, model })
    }

    /// Reserves a locator and records it, as a coordinator does.
    pub fn reserve(&mut self, source: Source<'_>) -> Verdict<Locator> {
        let at = self.store.reserve(source, &self.known).during("reserve")?;
        self.known.insert(at.clone());
        Ok(at)
    }

    /// Takes a snapshot as a coordinator does: reserve, prime, snapshot, settle.
    pub fn snapshot(&mut self, live: &LiveVolume) -> Verdict<Snapshot> {
        let at = self.reserve(Source::Volume(&live.volume))?;
        self.store.prime(&live.volume, &at).during("prime")?;
        self.snapshot_at(&live.volume, &at)
    }

    /// Takes a snapshot without prime.
    pub fn snapshot_at(&self, volume: &Volume, at: &Locator) -> Verdict<Snapshot> {
        let snapshot = self.store.snapshot(volume, at).during("snapshot")?;
        ensure!(snapshot.at == *at, "a snapshot at {at} says that it is at {}", snapshot.at);
        ensure!(snapshot.omissions.is_empty(), "the snapshot omits {:?}", snapshot.omissions);
        let settled = self.store.settle(at).during("settle")?;
        ensure!(settled == snapshot, "snapshot returned {snapshot:?}, settle {settled:?}");
        Ok(snapshot)
    }

    /// Clones `snapshot`.
    pub fn clone_of(&mut self, snapshot: &Snapshot) -> Verdict<Locator> {
        let at = self.reserve(Source::Snapshot(snapshot))?;
        self.store.clone_snapshot(snapshot, &at).during("clone_snapshot")?;
        Ok(at)
    }

    /// Activates the clone at `at` and adopts it as a volume that must hold what `expected` says.
    ///
    /// The recipe stays carried out as long as the view lives.
    pub fn adopt_clone(&self, at: &Locator, expected: &Listing) -> Verdict<(LiveVolume, View)> {
        let view = View::carry_out(&self.store.activate(at).during("activate")?)?;
        let Some(dir) = view.dir().map(Path::to_owned) else {
            return Err(crate::Failure::new("a clone's recipe is a tree, which cannot be written"));
        };
        let volume = self.store.adopt(&dir).during("adopt the clone")?;
        let model = Model::of_listing(expected, &dir)?;
        Ok((LiveVolume { dir, volume, model }, view))
    }

    /// Reads the image at `at` through its recipe.
    pub fn read(&self, at: &Locator) -> Verdict<Listing> {
        let view = View::carry_out(&self.store.activate(at).during("activate")?)?;
        let listing = self.seen(view.listing().during("read the image")?);
        drop(view);
        self.store.deactivate(at).during("deactivate")?;
        Ok(listing)
    }

    /// What was read, without what the file system makes of holes.
    fn seen(&self, listing: Listing) -> Listing {
        if self.fixture.reports_holes() { listing } else { listing.with_zeros_as_holes() }
    }

    /// The token of the root of the image at `at`, if it is a tree that has one.
    pub fn token(&self, at: &Locator) -> Verdict<Option<[u8; 32]>> {
        let token = match self.store.activate(at).during("activate")? {
            MountSpec::Tree(tree) => tree.token(),
            MountSpec::Bind { .. } | MountSpec::Mount { .. } => None,
        };
        self.store.deactivate(at).during("deactivate")?;
        Ok(token)
    }

    /// Requires that the image at `at` holds what `expected` says; `what` names the image.
    pub fn expect(&self, at: &Locator, expected: &Listing, what: &str) -> Verdict {
        expected.expect(&self.read(at).during(what)?, &self.capabilities(), what)
    }

    /// Requires that a live volume holds what its model says.
    pub fn expect_live(&self, live: &LiveVolume, what: &str) -> Verdict {
        live.listing().expect(&self.seen(Listing::of(&live.dir).during(what)?), &self.capabilities(), what)
    }

    /// The images that fsnap made, sorted; nothing may be listed twice.
    pub fn images(&self) -> Verdict<Vec<Image>> {
        let mut images = self.store.list().during("list")?;
        images.retain(|image| image.state != ImageState::Foreign);
        images.sort();
        let places: BTreeSet<&Locator> = images.iter().map(|image| &image.at).collect();
        ensure!(places.len() == images.len(), "an image is listed twice: {images:?}");
        Ok(images)
    }

    /// The state in which the image at `at` is listed, if it is.
    pub fn state(&self, at: &Locator) -> Verdict<Option<ImageState>> {
        Ok(self.images()?.into_iter().find(|image| image.at == *at).map(|image| image.state))
    }

    /// Requires that exactly these whole images are listed.
    pub fn expect_images<'b>(&self, expected: impl IntoIterator<Item = (&'b Locator, ImageKind)>) -> Verdict {
        let whole = |(at, kind): (&Locator, ImageKind)| Image { at: at.clone(), kind, state: ImageState::Whole };
        let mut expected: Vec<Image> = expected.into_iter().map(whole).collect();
        expected.sort();
        let images = self.images()?;
        ensure!(images == expected, "listed are {images:?}, there should be {expected:?}");
        Ok(())
    }

    /// Requires that the images are those that `before` holds: that a refused call has left nothing behind.
    pub fn expect_unchanged(&self, before: &[Image], call: &str) -> Verdict {
        let now = self.images()?;
        ensure!(now == before, "{call} failed and changed the list from {before:?} to {now:?}");
        Ok(())
    }

    /// Locators of the right form that no image of this store ever had.
    pub fn never_made(&mut self, live: &LiveVolume) -> Verdict<Locator> {
        self.reserve(Source::Volume(&live.volume))
    }

    /// The snapshot with another identity than its own.
    pub fn forged(snapshot: &Snapshot) -> Snapshot {
        let identity = Identity::new(format!("{}0", snapshot.identity.as_str()));
        Snapshot { identity, ..snapshot.clone() }
    }
}
