//! Restores that are under way, and those that were cut short.
//!
//! Each is a directory in `restores` of the state directory, named like its branch, from before the branch is made until somebody is told of
//! it. It holds a lock, an `untold` and an `init`, as that of a run does that is being started, and is undone by the same rules. When the
//! `untold` goes, the branch and the processes are the user's; what may still lie there is of no meaning.
//!
//! A container has no `init`: its runtime ends it. The runtime has the lock, too, and keeps it when fsnap is killed.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::untold::{Abandoned, Untold, lock_idle, names_in};
use super::{Place, remove};
use crate::engine::Container;
use crate::error::IoContext;
use crate::name::Name;
use crate::{Error, Result};

/// All restores that are under way in a state directory, those of runs' copies excepted.
#[derive(Debug, Clone)]
pub struct Restores {
    dir: PathBuf,
}

impl Restores {
    /// Those of the state directory `state`.
    pub fn of(state: &Path) -> Self {
        Self { dir: state.join("restores") }
    }

    /// Begins a restore onto a branch of that name, which is not there yet; fails if another begins, or began and could not be undone.
    ///
    /// What it restores may be a `container`, which its runtime ends.
    pub fn create(&self, branch: &Name, container: Option<Container>) -> Result<Place> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).context("make the directory", &self.dir)?;
        let _alone = self.alone()?;
        let path = self.dir.join(branch.as_str());
        if path.exists() {
            let by = Some("it is under way, or `fsnap recover` says why it could not be undone".to_owned());
            return Err(Error::NameTaken { what: "a restore onto the branch", name: branch.clone(), by });
        }
        fs::DirBuilder::new().mode(0o700).create(&path).context("make the directory", &path)?;
        let lock = File::open(&path).context("open", &path)?;
        lock.lock().context("lock", &path)?;
        let place = Place { path, lock, container, note: None };
        place.write_untold(None)?;
        Ok(place)
    }

    /// Whether a restore onto a branch of that name is under way.
    pub fn is_taken(&self, branch: &Name) -> bool {
        self.dir.join(branch.as_str()).exists()
    }

    /// The branches of all of them.
    pub(crate) fn names(&self) -> Vec<Name> {
        names_in(&self.dir, |_| true)
    }

    /// Takes the restore onto that branch, if it was abandoned, and ends what there still is of its processes.
    ///
    /// One of which somebody was told, or may have been told before the machine stopped, leaves only its directory, which is removed.
    pub(crate) fn take_abandoned(&self, branch: &Name) -> Result<Option<Abandoned>> {
        let place = self.dir.join(branch.as_str());
        let idle = {
            // Whoever makes the directory has locked it by then.
            let _alone = self.alone()?;
            lock_idle(&place)
        };
        let Some(lock) = idle else { return Ok(None) };
        match Untold::read(&place)? {
            Some(untold) => Abandoned::take(place, lock, untold),
            None => remove(&place).map(|()| None),
        }
    }

    /// Waits for others that begin a restore, or look whether one was abandoned.
    fn alone(&self) -> Result<File> {
        let all = File::open(&self.dir).context("open", &self.dir)?;
        all.lock().context("lock", &self.dir)?;
        Ok(all)
    }
}
