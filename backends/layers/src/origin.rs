//! What a tree began with, as its store notes it: so that its layers can be read when nobody serves it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use fsnap_backend::{Error, Identity, IoContext, Locator, Result, beneath};

use super::Below;

/// The file in a store.
const FILE: &str = "lower";

/// What a tree began with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A directory.
    Dir(PathBuf),
    /// A snapshot in some store.
    Image {
        /// The backend's name.
        backend: String,
        /// Where the store is, in the backend's words.
        place: PathBuf,
        /// What the store is.
        store: Identity,
        /// Where the snapshot is in it.
        at: Locator,
    },
}

/// How what a tree began with is opened, and let go of when it is open no more. Only who knows all backends can do so with images.
#[derive(Debug, Clone, Copy)]
pub struct Origins {
    /// Opens it.
    pub open: fn(&Origin) -> Result<Below>,
    /// Undoes what had to be done for that, unless somebody else has it open.
    pub let_go: fn(&Origin),
}

/// Directories, for which nothing has to be done.
pub(super) const DIRS: Origins = Origins { open: open_dir, let_go: |_| {} };

fn open_dir(origin: &Origin) -> Result<Below> {
    match origin {
        Origin::Dir(dir) => Ok(Below::Dir(beneath::open_root(dir).context("open", dir)?)),
        Origin::Image { at, .. } => Err(Error::NotFound { what: format!("a way to open the snapshot {at}") }),
    }
}

/// Notes what the tree in `store` begins with.
pub fn note(store: &Path, origin: &Origin) -> Result<()> {
    let text = match origin {
        Origin::Dir(dir) => [b"dir\n", dir.as_os_str().as_bytes()].concat(),
        Origin::Image { backend, place, store, at } => {
            [format!("image\n{backend}\n{}\n{at}\n", store.as_str()).as_bytes(), place.as_os_str().as_bytes()].concat()
        }
    };
    let path = store.join(FILE);
    if fs::read(&path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    let temporary = store.join("work").join(FILE);
    fs::write(&temporary, &text).context("write", &temporary)?;
    fs::rename(&temporary, &path).context("rename", &temporary)
}

/// What the tree in `store` began with.
pub(super) fn read(store: &Path) -> Result<Origin> {
    let path = store.join(FILE);
    let text = fs::read(&path).context("read", &path)?;
    let rest = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    let damaged = || Error::Damaged { what: path.display().to_string(), reason: "it cannot be read".into() };
    if let Some(dir) = text.strip_prefix(b"dir\n") {
        return Ok(Origin::Dir(rest(dir)));
    }
    let image = text.strip_prefix(b"image\n").ok_or_else(damaged)?;
    let fields: Vec<&[u8]> = image.splitn(4, |&byte| byte == b'\n').collect();
    let [backend, identity, at, place] = fields[..] else { return Err(damaged()) };
    let line = |bytes: &[u8]| std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| damaged());
    Ok(Origin::Image {
        backend: line(backend)?,
        place: rest(place),
        store: Identity::new(line(identity)?),
        at: line(at)?.parse().map_err(|_| damaged())?,
    })
}
