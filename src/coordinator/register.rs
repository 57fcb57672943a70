//! Puts a directory under fsnap's care.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Backend, ErrorKind};
use rustix::fs::{Access, access};

use super::Coordinator;
use crate::checkpoint::PathText;
use crate::error::IoContext;
use crate::name::Name;
use crate::stores::{KINDS, Kind};
use crate::volume::{RegisteredVolume, StoreRecord};
use crate::{Error, Result};

/// What the user asked for.
#[derive(Debug, Default)]
pub struct Registration {
    /// The directory.
    pub dir: PathBuf,
    /// The volume's name; the directory's, if none was given.
    pub name: Option<Name>,
    /// The backend's name; the first that can hold the directory, if none was given.
    pub backend: Option<String>,
    /// Where the store is to be; the backend's choice, if none was given.
    pub store: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug)]
pub struct Registered {
    /// The volume.
    pub volume: RegisteredVolume,
    /// Its store.
    pub store: Arc<dyn Backend>,
    /// Where the store is.
    pub place: PathBuf,
    /// Why each backend before the chosen one could not hold the directory.
    pub passed_over: Vec<(&'static str, Error)>,
}

impl Coordinator {
    /// Begins to track a directory as a volume.
    pub fn register(&self, wanted: Registration) -> Result<Registered> {
        let dir = volume_dir(&wanted.dir, self.catalog.state(), &self.catalog.volumes()?)?;
        let shown = crate::mount::served(self.catalog.state()).context("examine", &dir)?;
        if shown.iter().any(|mount| dir.starts_with(mount)) {
            let reason =
                "it is in a mount of this catalog: a branch there is taken by `fsnap checkpoint --branch`".into();
            return Err(Error::NotAVolume { dir: PathText(dir), reason });
        }
        let name = match wanted.name {
            Some(name) => name,
            None => name_of(&dir)?,
        };
        if let Some(taken) = self.catalog.volume(&name)? {
            let by = Some(format!("at {}; choose another with --name", taken.path));
            return Err(Error::NameTaken { what: "the volume", name, by });
        }
        if let Some(place) = &wanted.store {
            self.check_place(place)?;
        }
        self.check_no_store_in(&dir)?;
        let kinds = match wanted.backend.as_deref() {
            None | Some("auto") => KINDS.iter().collect(),
            Some(name) => vec![Kind::named(name)?],
        };
        let mut passed_over = Vec::new();
        for kind in kinds {
            match self.open_for(kind, &dir, wanted.store.as_deref(), &name) {
                Ok((store, place)) => {
                    let volume = self.record(name, &dir, kind.name, store.as_ref(), &place)?;
                    return Ok(Registered { volume, store, place, passed_over });
                }
                Err(error) => passed_over.push((kind.name, error)),
            }
        }
        let errors: Vec<Error> = passed_over.into_iter().map(|(_, error)| error).collect();
        Err(Error::of_all(errors)
            .unwrap_or(Error::NotAVolume { dir: PathText(dir), reason: "no backend is compiled in".into() }))
    }

    /// Refuses a place for a store inside a registered volume: that volume's snapshots would hold the store.
    fn check_place(&self, place: &Path) -> Result<()> {
        let absolute = std::path::absolute(place).context("resolve", place)?;
        let Some(there) = there(&absolute) else { return Ok(()) };
        match self.catalog.volumes()?.into_iter().find(|volume| there.starts_with(volume.path.as_path())) {
            Some(volume) => Err(Error::NotAPlace { place: PathText(absolute), volume: volume.name, path: volume.path }),
            None => Ok(()),
        }
    }

    /// Refuses a directory with a store in it that is but a directory, so that every snapshot would hold that, too.
    pub fn check_no_store_in(&self, dir: &Path) -> Result<()> {
        let stores = self.catalog.stores()?;
        let inside = |store: &&StoreRecord| {
            store.place.as_path().starts_with(dir) && Kind::named(&store.backend).is_ok_and(takes_any_place)
        };
        match stores.iter().find(inside) {
            Some(store) => {
                let reason = format!("the store {} lies in it, and every snapshot would hold that, too", store.place);
                Err(Error::NotAVolume { dir: PathText(dir.to_owned()), reason })
            }
            None => Ok(()),
        }
    }

    /// Opens the store for `dir`, or makes one: at `place` if the user named one, else at the first place that will do.
    fn open_for(
        &self,
        kind: &Kind,
        dir: &Path,
        place: Option<&Path>,
        name: &Name,
    ) -> Result<(Arc<dyn Backend>, PathBuf)> {
        let usual = (kind.probe)(dir).map_err(Error::from);
        if let Some(place) = place {
            let place = outside(dir, place)?;
            return match usual {
                Err(error) if !takes_any_place(kind) => Err(error),
                _ => adopt_into(kind, dir, place),
            };
        }
        let opened = usual.and_then(|usual| match adopt_into(kind, dir, usual.clone()) {
            Err(Error::Backend(error)) if error.kind() == ErrorKind::NotAStore => {
                adopt_into(kind, dir, beside(usual, kind))
            }
            opened => opened,
        });
        match opened {
            Err(error) if takes_any_place(kind) => {
                let place = own_place(self.catalog.state(), name);
                let parent = place.parent().unwrap_or(self.catalog.state());
                let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
                // The first failure is the one that the user can do something about.
                made.ok().and_then(|()| adopt_into(kind, dir, place).ok()).ok_or(error)
            }
            opened => opened,
        }
    }

    fn record(
        &self,
        name: Name,
        dir: &Path,
        kind: &str,
        store: &dyn Backend,
        place: &Path,
    ) -> Result<RegisteredVolume> {
        let identity = store.adopt(dir)?.identity().clone();
        let record = StoreRecord {
            identity: store.store().identity.clone(),
            backend: kind.to_owned(),
            place: PathText(place.to_owned()),
        };
        let path = PathText(dir.to_owned());
        let volume = RegisteredVolume { name, path, identity, store: record.identity.clone() };
        if !self.catalog.add_volume(&volume, &record)? {
            return Err(Error::NameTaken { what: "the volume", name: volume.name, by: None });
        }
        Ok(volume)
    }

    /// Forgets a volume; its checkpoints and branches stay.
    pub fn unregister(&self, name: &Name) -> Result<()> {
        if self.catalog.forget_volume(name)? { Ok(()) } else { Err(self.no_such_volume(name.as_str())) }
    }

    /// The error for a volume that is not there, naming those that are.
    pub fn no_such_volume(&self, name: &str) -> Error {
        let near = self.catalog.volumes().unwrap_or_default();
        let near = near.iter().map(|volume| volume.name.to_string()).collect();
        Error::NoSuchVolume { name: name.to_owned(), near }
    }
}

/// The absolute path of a directory that may become a volume: it exists, is no symbolic link, holds none of fsnap's
/// state, and overlaps none of `volumes`.
///
/// `state` is fsnap's own directory, which need not exist yet.
pub fn volume_dir(dir: &Path, state: &Path, volumes: &[RegisteredVolume]) -> Result<PathBuf> {
    let meta = std::fs::symlink_metadata(dir).context("open the directory", dir)?;
    let refuse = |reason: &str| Err(Error::NotAVolume { dir: PathText(dir.to_owned()), reason: reason.to_owned() });
    if meta.is_symlink() {
        return refuse("it is a symbolic link; name the directory that it leads to");
    }
    if !meta.is_dir() {
        return refuse("it is not a directory");
    }
    let dir = dir.canonicalize().context("resolve", dir)?;
    if dir == Path::new("/") {
        return refuse("it is the root of everything, fsnap's own state included");
    }
    if there(state).is_some_and(|there| there.starts_with(&dir)) {
        return refuse("fsnap's own state lies in it; set FSNAP_STATE to a directory elsewhere");
    }
    for volume in volumes {
        let other = volume.path.as_path();
        let reason = match (dir.starts_with(other), other.starts_with(&dir)) {
            (true, true) => "it is",
            (true, false) => "it lies inside",
            (false, true) => "it contains",
            (false, false) => continue,
        };
        let (other, path) = (volume.name.clone(), volume.path.clone());
        return Err(Error::Overlap { dir: PathText(dir), reason, other, path });
    }
    Ok(dir)
}

/// Where `init` would put the store of a directory; the error says why the backend cannot hold the directory.
///
/// `state` is fsnap's own directory.
pub fn proposed_place(kind: &Kind, dir: &Path, state: &Path) -> Result<PathBuf> {
    match (kind.probe)(dir) {
        Ok(usual) => match kind.open(&usual) {
            Err(Error::Backend(error)) if usual.exists() && error.kind() == ErrorKind::NotAStore => {
                Ok(beside(usual, kind))
            }
            _ => Ok(usual),
        },
        Err(_) if takes_any_place(kind) && std::fs::read_dir(dir).is_ok() && may_hold(state) => {
            Ok(own_place(state, &name_of(dir)?))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a store can be made in any directory, so that the usual place is a proposal.
fn takes_any_place(kind: &Kind) -> bool {
    kind.name == "rsync"
}

/// Where a store goes if another backend was first at the usual place.
fn beside(usual: PathBuf, kind: &Kind) -> PathBuf {
    let mut place = usual.into_os_string();
    place.push(format!("-{}", kind.name));
    place.into()
}

/// Where a store goes if this user may not write at the usual place.
fn own_place(state: &Path, name: &Name) -> PathBuf {
    state.join("stores").join(name.as_str())
}

/// Makes a store at `place`, or opens the one that is there, and makes sure that it takes `dir`.
fn adopt_into(kind: &Kind, dir: &Path, place: PathBuf) -> Result<(Arc<dyn Backend>, PathBuf)> {
    let store = kind.create(&place)?;
    store.adopt(dir)?;
    Ok((store, place))
}

/// The absolute path of a place for a store; refused, before anything is made, if it lies in the volume.
fn outside(dir: &Path, place: &Path) -> Result<PathBuf> {
    let place = std::path::absolute(place).context("resolve", place)?;
    if there(&place).is_some_and(|there| there.starts_with(dir)) {
        let reason = format!("the store {} would lie in it, and every snapshot would hold all others", PathText(place));
        return Err(Error::NotAVolume { dir: PathText(dir.to_owned()), reason });
    }
    Ok(place)
}

/// Whether this user may make something in the directory, or make the directory.
fn may_hold(dir: &Path) -> bool {
    there(dir).is_some_and(|there| access(there, Access::WRITE_OK | Access::EXEC_OK).is_ok())
}

/// The real path of what there is of a path: all of it, or the nearest directory above.
fn there(path: &Path) -> Option<PathBuf> {
    path.ancestors().find_map(|above| above.canonicalize().ok())
}

fn name_of(dir: &Path) -> Result<Name> {
    let last = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Name::derive_from(&last).ok_or_else(|| Error::NotAVolume {
        dir: PathText(dir.to_owned()),
        reason: "no name can be made of it; give one with --name".into(),
    })
}
