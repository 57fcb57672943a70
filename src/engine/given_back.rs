//! Files without names that come back: CRIU inherits each as a descriptor, and opens it anew for whoever had it.
//!
//! Each restore makes files of its own, which never have a name: so two restores of one checkpoint share nothing, and nothing is left when the
//! last process closes them. They lie on the branch, where the next checkpoint finds them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use fsnap_backend::beneath;
use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::os_text;
use super::stage::Failure;
use crate::unlinked::{Attributes, copy, make_nameless};

/// A file without a name that the images lack.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GivenBack {
    /// What the engine calls it.
    pub external: String,
    /// The file with its content.
    #[serde(with = "os_text")]
    pub content: PathBuf,
    /// The mount point of the volume that it was in.
    #[serde(with = "os_text")]
    pub root: PathBuf,
    /// Where it was below that; the directory need not be there any more.
    #[serde(with = "os_text")]
    pub below: PathBuf,
    /// What it was like.
    pub attributes: Attributes,
}

/// Besides the contents and the files that come back, a stage has some descriptors.
const SPARE: u64 = 64;

/// Opens the contents.
pub(super) fn open_all(returned: &[GivenBack]) -> Result<Vec<File>, Failure> {
    let limit = getrlimit(Resource::Nofile);
    let needed = 2 * returned.len() as u64 + SPARE;
    if limit.current.is_some_and(|current| current < needed) {
        let more = Rlimit { current: limit.maximum, ..limit };
        setrlimit(Resource::Nofile, more)
            .map_err(|error| Failure::step("open as many files as had no name")(error.into()))?;
    }
    returned.iter().map(GivenBack::open).collect()
}

/// Makes the files, in the mounts as they are now, for the engine to inherit.
pub(super) fn make_all(returned: &[GivenBack], contents: Vec<File>) -> Result<Vec<File>, Failure> {
    returned.iter().zip(contents).map(|(given, content)| given.make(&content)).collect()
}

impl GivenBack {
    fn open(&self) -> Result<File, Failure> {
        let open = || {
            let (Some(dir), Some(name)) = (self.content.parent(), self.content.file_name()) else {
                return Err(std::io::ErrorKind::InvalidInput.into());
            };
            beneath::open_file(beneath::open_root(dir)?, name)
        };
        open().map_err(Failure::step(format!("open what was kept of {:?}", self.below)))
    }

    fn make(&self, content: &File) -> Result<File, Failure> {
        let make = || {
            let file = make_nameless(self.directory()?)?;
            copy(content, &file)?;
            self.attributes.give_to(&file)?;
            rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
            Ok(file)
        };
        make().map_err(Failure::step(format!("bring back the file {:?}, which has no name", self.below)))
    }

    /// The directory that it was in, or the nearest above that is there. The files may be anybody's: no link is followed.
    fn directory(&self) -> std::io::Result<OwnedFd> {
        let mut dir = beneath::open_root(&self.root)?;
        for component in self.below.parent().unwrap_or(Path::new("")).components() {
            let Component::Normal(name) = component else { break };
            match beneath::open_dir(&dir, name) {
                Ok(below) => dir = below,
                Err(_) => break,
            }
        }
        Ok(dir)
    }
}
