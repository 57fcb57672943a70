//! From a name to an opened backend; the only file that names them all.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Backend, Error as BackendError};

use crate::volume::StoreRecord;
use crate::{Error, Result};

type Opened = fsnap_backend::Result<Arc<dyn Backend>>;

/// One storage technology that was compiled in.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name as users write it.
    pub name: &'static str,
    /// Tells whether a directory can be a volume, and where its store lies by default.
    pub probe: fn(&Path) -> fsnap_backend::Result<PathBuf>,
    create: fn(&Path) -> Opened,
    open: fn(&Path) -> Opened,
}

macro_rules! kind {
    ($name:literal, $store:ty) => {
        Kind {
            name: $name,
            probe: |dir| <$store>::probe(dir),
            create: |place| Ok(Arc::new(<$store>::create(place)?)),
            open: |place| Ok(Arc::new(<$store>::open(place)?)),
        }
    };
}

/// Every backend that was compiled in; the first that can hold a directory is the one for it.
pub const KINDS: &[Kind] = &[
    #[cfg(feature = "btrfs")]
    kind!("btrfs", fsnap_btrfs::Store),
    #[cfg(feature = "dm-thin")]
    kind!("dm-thin", fsnap_dm_thin::Store),
    #[cfg(feature = "nilfs2")]
    kind!("nilfs2", fsnap_nilfs2::Store),
    #[cfg(feature = "rsync")]
    kind!("rsync", fsnap_rsync::Store),
];

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
        Ok((self.open)(place)?)
    }
}

/// Opens a recorded store, and makes sure that it is the recorded one.
pub fn open(record: &StoreRecord) -> Result<Arc<dyn Backend>> {
    let backend = Kind::named(&record.backend)?.open(record.place.as_path())?;
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
