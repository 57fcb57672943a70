//! Orders the catalog and the backends, so that what the catalog says is true after every crash.
//!
//! It is the only code that calls both. Each operation has a file of its own and the same form: *intent, act, result*.
//! The intent is durable before anything outside changes; the result replaces it in one transaction; and
//! [`recover`](Coordinator::recover) finishes or undoes every intent whose author is gone.
//!
//! Architecture Invariant: no backend is called while a catalog transaction is open, and no image is deleted that an
//! intent does not name.
//!
//! A checkpoint: `targets`, which volumes; `checkpoint`, begin and seal; `window`, what is done in between; with `search`, who else writes, and
//! `unlinked`, files without names. A branch: `branch` makes it, `overlay` mounts it, `written` is for those that only `fsnap mount` shows,
//! `restore` brings processes onto it. `recover` is what every command begins with. `open` reads a snapshot, for `diff` and `verify`. `register`,
//! `history`, `tags` and `remove` are what their names say.

mod branch;
mod checkpoint;
mod diff;
mod history;
mod open;
mod overlay;
mod recover;
mod register;
mod remove;
mod restore;
mod search;
mod tags;
mod targets;
mod unlinked;
mod verify;
mod window;
mod written;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use fsnap_backend::{Backend, ErrorKind, Identity, Locator, Source, Volume};

use crate::catalog::{Access, Catalog, Doomed, ImageRef};
use crate::checkpoint::PathText;
use crate::name::Name;
use crate::progress::{Progress, Silent, Underway, Work};
use crate::{Error, Result, stores};

pub use checkpoint::{Begun, Request};
pub use diff::{Change, ChangeKind, Side, Skipped};
pub use history::{Pinned, time_of};
pub use open::open_snapshot;
#[cfg(feature = "fuse")]
pub(crate) use open::{activate, mount_snapshot};
pub use recover::{Recovered, Stray};
pub use register::{Registered, Registration, proposed_place, volume_dir};
pub use restore::{RestoreRequest, RunRequest};
pub use search::{Audit, WriterSearch, find_writers};
pub use targets::Target;
pub use verify::Finding;
pub use window::Window;
pub use written::Shown;

/// The coordinator, on an open catalog.
#[derive(Debug)]
pub struct Coordinator {
    catalog: Catalog,
    stores: RefCell<BTreeMap<Identity, Arc<dyn Backend>>>,
    /// Where branches are that have to be mounted.
    homes: PathBuf,
    options: stores::Options,
    progress: Arc<dyn Progress>,
}

impl Coordinator {
    /// Opens the catalog in the directory `state`; recovers nothing.
    ///
    /// `patience` bounds every wait for another fsnap.
    pub fn open(state: &Path, access: Access, patience: Duration) -> Result<Self> {
        let catalog = Catalog::open(state, access, patience)?;
        let (homes, options) = (state.join("branches"), stores::Options::default());
        Ok(Self { catalog, stores: RefCell::default(), homes, options, progress: Arc::new(Silent) })
    }

    /// Mounts new branches below `dir` instead of the directory `branches` beside the catalog, and keeps there what differs
    /// in overlays.
    pub fn keep_branches_in(&mut self, dir: &Path) {
        dir.clone_into(&mut self.homes);
    }

    /// Opens stores with these options.
    pub fn open_stores_with(&mut self, options: stores::Options) {
        self.options = options;
    }

    /// Tells `progress` of long work from now on.
    pub fn report_to(&mut self, progress: Arc<dyn Progress>) {
        self.progress = progress;
    }

    fn begin_work(&self, work: Work, steps: impl Into<Option<usize>>) -> Underway<'_> {
        Underway::new(self.progress.as_ref(), work, steps)
    }

    /// The catalog.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Chooses a place for a new image, at which no image is recorded.
    ///
    /// Looks the place up, and does not hand the store all that is recorded: a checkpoint costs the same beside ten thousand others.
    fn reserve(&self, store: &dyn Backend, source: Source<'_>) -> Result<Locator> {
        let mut known = BTreeSet::new();
        loop {
            let at = store.reserve(source, &known)?;
            if !self.catalog.is_held(&store.store().identity, &at)? {
                return Ok(at);
            }
            known.insert(at);
        }
    }

    /// Opens the store of that identity, once.
    fn store(&self, identity: &Identity) -> Result<Arc<dyn Backend>> {
        if let Some(open) = self.stores.borrow().get(identity) {
            return Ok(Arc::clone(open));
        }
        let record = self.catalog.store(identity)?.ok_or_else(|| {
            Error::Backend(fsnap_backend::Error::NotFound { what: format!("the store {identity}, in the catalog,") })
        })?;
        let backend = stores::open(&record, &self.options).map_err(|error| self.away(identity, error))?;
        self.stores.borrow_mut().insert(identity.clone(), Arc::clone(&backend));
        Ok(backend)
    }

    /// Says whose snapshots are out of reach when their store is not where it was: its path alone may tell a user nothing.
    fn away(&self, store: &Identity, error: Error) -> Error {
        use ErrorKind::{NotAStore, NotFound, WrongIdentity};
        let source = match error {
            Error::Backend(source) if matches!(source.kind(), NotFound | NotAStore | WrongIdentity) => source,
            other => return other,
        };
        let registered = self.catalog.volumes().unwrap_or_default().into_iter();
        let mut volumes: Vec<_> =
            registered.filter(|volume| volume.store == *store).map(|volume| volume.name).collect();
        if volumes.is_empty() {
            // They are forgotten, and their snapshots are not.
            let members = self.catalog.checkpoints().unwrap_or_default().into_iter().flat_map(|found| found.members);
            let names = members.filter(|member| member.store == *store).map(|member| member.volume);
            volumes = names.collect::<BTreeSet<_>>().into_iter().collect();
        }
        if volumes.is_empty() { source.into() } else { Error::StoreAway { volumes, source } }
    }

    /// Unmounts and deletes overlays and images; goes on after a failure, and returns all failures as one.
    fn delete(&self, doomed: &Doomed) -> Result<()> {
        let work = self.begin_work(Work::Deleting, doomed.overlays.len() + doomed.images.len());
        let delete = |image: &ImageRef| -> Result<()> {
            let store = self.store(&image.store)?;
            store.deactivate(&image.at)?;
            store.delete(&image.at)?;
            work.step();
            Ok(())
        };
        // First what lies over the images.
        let overlays = doomed.overlays.iter().filter_map(|dir| {
            let removed = overlay::remove(dir.as_path());
            work.step();
            removed.err()
        });
        let mut errors: Vec<_> = overlays.collect();
        errors.extend(doomed.rooms.iter().filter_map(|room| self.remove_room(room).err()));
        errors.extend(doomed.images.iter().filter_map(|image| delete(image).err()));
        Error::of_all(errors).map_or(Ok(()), Err)
    }
}

/// Opens a volume and makes sure that it is the tree that was recorded.
fn adopt(backend: &dyn Backend, volume: &Name, path: &PathText, expected: &Identity) -> Result<Volume> {
    let opened = backend.adopt(path.as_path()).map_err(|error| match error.kind() {
        // It was one when it was registered.
        ErrorKind::NotAVolume | ErrorKind::NotFound => Error::VolumeAway { volume: volume.clone(), source: error },
        _ => error.into(),
    })?;
    if opened.identity() != expected {
        return Err(Error::WrongVolume {
            volume: volume.clone(),
            path: path.clone(),
            expected: expected.clone(),
            found: opened.identity().clone(),
        });
    }
    Ok(opened)
}

/// Runs `work` on every item side by side, and returns all results, in order, or all errors as one.
fn side_by_side<I: Sync, T: Send>(items: &[I], work: impl Fn(&I) -> Result<T> + Sync) -> Result<Vec<T>> {
    let Some((first, others)) = items.split_first() else { return Ok(Vec::new()) };
    let results: Vec<Result<T>> = std::thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = others.iter().map(|item| scope.spawn(move || work(item))).collect();
        let joined =
            |thread: ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        std::iter::once(work(first)).chain(running.into_iter().map(joined)).collect()
    });
    let (done, failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    match Error::of_all(failed.into_iter().filter_map(Result::err).collect()) {
        Some(error) => Err(error),
        None => Ok(done.into_iter().filter_map(Result::ok).collect()),
    }
}
