//! From a name to an opened backend; the only file that names them all.

use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(feature = "fuse")]
use fsnap_backend::Identity;
use fsnap_backend::{Backend, Error as BackendError};
use serde::Deserialize;

use crate::volume::StoreRecord;
use crate::{Error, Result};

type Opened = fsnap_backend::Result<Arc<dyn Backend>>;

/// What users set for all stores of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Stores in thin pools.
    pub dm_thin: Room,
}

/// How much of a thin pool must be free before an image is made in it, in percent; what is not set, the store says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Room {
    /// Of its data space.
    pub free_data: Option<u8>,
    /// Of its metadata space.
    pub free_metadata: Option<u8>,
}

/// Thin pools: making, finding and removing them.
#[cfg(feature = "dm-thin")]
pub mod pools {
    pub use fsnap_dm_thin::{FileSystem, Fill, Limits, Mode, Plan, PoolState, PoolVolume, STORES, Store, survey};
}

/// Copy-on-write trees over whatever a store holds.
#[cfg(feature = "fuse")]
pub mod layers {
    pub use fsnap_layers::*;
}

/// Whether images need what a branch that is given up has written; then it stays until the last of them is deleted.
pub fn is_needed(dir: &Path) -> Result<bool> {
    #[cfg(feature = "fuse")]
    return Ok(fsnap_layers::abandon(dir)?);
    #[cfg(not(feature = "fuse"))]
    {
        let _ = dir;
        Ok(false)
    }
}

/// One storage technology that was compiled in.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name as users write it.
    pub name: &'static str,
    /// Tells whether a directory can be a volume, and where its store lies by default.
    pub probe: fn(&Path) -> fsnap_backend::Result<PathBuf>,
    create: fn(&Path) -> Opened,
    open: fn(&Path, &Options) -> Opened,
}

macro_rules! kind {
    ($name:literal, $store:ty) => {
        kind!($name, $store, |place, _| Ok(Arc::new(<$store>::open(place)?)))
    };
    ($name:literal, $store:ty, $open:expr) => {
        Kind {
            name: $name,
            probe: |dir| <$store>::probe(dir),
            create: |place| Ok(Arc::new(<$store>::create(place)?)),
            open: $open,
        }
    };
}

/// Every backend that was compiled in; the first that can hold a directory is the one for it.
pub const KINDS: &[Kind] = &[
    #[cfg(feature = "btrfs")]
    kind!("btrfs", fsnap_btrfs::Store),
    #[cfg(feature = "dm-thin")]
    kind!("dm-thin", fsnap_dm_thin::Store, open_in_pool),
    #[cfg(feature = "nilfs2")]
    kind!("nilfs2", fsnap_nilfs2::Store),
    // Before the one that takes any directory: a tree that is written copy-on-write is one, too.
    #[cfg(feature = "fuse")]
    kind!("layers", fsnap_layers::Store, open_layers),
    #[cfg(feature = "rsync")]
    kind!("rsync", fsnap_rsync::Store),
];

#[cfg(feature = "fuse")]
fn open_layers(place: &Path, _: &Options) -> Opened {
    Ok(Arc::new(fsnap_layers::Store::open_with(place, ORIGINS)?))
}

/// What copy-on-write trees began with, whatever backend keeps it.
#[cfg(feature = "fuse")]
const ORIGINS: layers::Origins = layers::Origins { open: open_origin, let_go: let_go_of_origin };

#[cfg(feature = "fuse")]
fn open_origin(origin: &layers::Origin) -> fsnap_backend::Result<layers::Below> {
    use crate::fuse::lower;
    let failed = |at: &dyn std::fmt::Display, error: String| BackendError::Io {
        action: "open what the tree began with,",
        object: at.to_string(),
        source: std::io::Error::other(error),
    };
    match origin {
        layers::Origin::Dir(dir) => lower::of_dir(dir).map_err(|error| failed(&dir.display(), error.to_string())),
        layers::Origin::Image { backend, place, store, at } => store_of(backend, place, store)
            .and_then(|store| lower::of_image(store.as_ref(), at))
            .map_err(|error| match error {
                // The system's answer stays one: that no descriptor is left, say.
                Error::Backend(error @ BackendError::Io { .. }) => error,
                error => failed(at, error.to_string()),
            }),
    }
}

/// It may be in use by others, or its store may be gone: then nothing is left to do here.
#[cfg(feature = "fuse")]
fn let_go_of_origin(origin: &layers::Origin) {
    if let layers::Origin::Image { backend, place, store, at } = origin {
        let _ = store_of(backend, place, store).map(|store| store.deactivate(at));
    }
}

#[cfg(feature = "fuse")]
fn store_of(backend: &str, place: &Path, identity: &Identity) -> Result<Arc<dyn Backend>> {
    let place = crate::checkpoint::PathText(place.to_owned());
    open(&StoreRecord { identity: identity.clone(), backend: backend.to_owned(), place }, &Options::default())
}

impl Kind {
    /// The backend of that name.
    pub fn named(name: &str) -> Result<&'static Self> {
        KINDS.iter().find(|kind| kind.name == name).ok_or_else(|| Error::NoSuchBackend {
            name: name.to_owned(),
            known: KINDS.iter().map(|kind| kind.name.to_owned()).collect(),
        })
    }

    /// Makes a store at `place`, or opens the one that is there.
    pub fn create(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok((self.create)(place)?)
    }

    /// Opens the store at `place`; changes nothing.
    pub fn open(&self, place: &Path) -> Result<Arc<dyn Backend>> {
        Ok((self.open)(place, &Options::default())?)
    }
}

#[cfg(feature = "dm-thin")]
fn open_in_pool(place: &Path, options: &Options) -> Opened {
    let mut store = fsnap_dm_thin::Store::open(place)?;
    let (said, set) = (store.limits(), options.dm_thin);
    store.keep_free(fsnap_dm_thin::Limits {
        free_data: set.free_data.unwrap_or(said.free_data),
        free_metadata: set.free_metadata.unwrap_or(said.free_metadata),
    });
    Ok(Arc::new(store))
}

/// Sets going whatever this process has stopped for a snapshot: for a signal handler, right before the process ends.
pub fn release_at_once() {
    #[cfg(feature = "dm-thin")]
    fsnap_dm_thin::resume_at_once();
}

/// Opens a recorded store, and makes sure that it is the recorded one.
pub fn open(record: &StoreRecord, options: &Options) -> Result<Arc<dyn Backend>> {
    let backend = (Kind::named(&record.backend)?.open)(record.place.as_path(), options)?;
    let found = &backend.store().identity;
    if *found != record.identity {
        return Err(Error::Backend(BackendError::WrongIdentity {
            what: format!("the {} store at {}", record.backend, record.place),
            expected: record.identity.clone(),
            found: found.clone(),
        }));
    }
    Ok(backend)
}
