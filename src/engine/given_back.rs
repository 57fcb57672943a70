//! Files without names that come back: CRIU inherits each as a descriptor, and opens it anew for whoever had it.
//!
//! Each restore makes files of its own, which never have a name: so two restores of one checkpoint share nothing, and nothing is left when the
//! last process closes them. They lie on the branch, where the next checkpoint finds them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use fsnap_backend::beneath;
use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::os_text;
use super::stage::Failure;
use crate::unlinked::{Attributes, copy, make_nameless};

/// A file without a name that the images lack.
#[derive(Debug)]
pub struct GivenBack {
    /// What the engine calls it.
    pub external: String,
    /// Its content.
    pub content: File,
    /// The mount point of the volume that it was in.
    pub root: PathBuf,
    /// Where it was below that; the directory need not be there any more.
    pub below: PathBuf,
    /// What it was like.
    pub attributes: Attributes,
}

/// A [`GivenBack`] that can be sent to another process, as long as this one lives.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PlannedFile {
    pub(super) external: String,
    /// A link to the descriptor of fsnap.
    #[serde(with = "os_text")]
    content: PathBuf,
    #[serde(with = "os_text")]
    root: PathBuf,
    #[serde(with = "os_text")]
    below: PathBuf,
    attributes: Attributes,
}

/// A process has so many descriptors besides.
const BESIDES: u64 = 64;

/// Makes room for so many descriptors, as far as that is allowed.
pub(crate) fn allow_descriptors(count: usize) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < count as u64 + BESIDES) {
        // If it is not enough, the call that meets the limit says so.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}

impl PlannedFile {
    pub(super) fn new(given: &GivenBack) -> Self {
        Self {
            external: given.external.clone(),
            content: format!("/proc/{}/fd/{}", std::process::id(), given.content.as_raw_fd()).into(),
            root: given.root.clone(),
            below: given.below.clone(),
            attributes: given.attributes.clone(),
        }
    }

    /// Opens the content for a program that may not look at fsnap's descriptors: it inherits this one.
    ///
    /// That program is root in a user namespace that knows this user and no other. So the file becomes the user's own, without the
    /// set-id bits that were meant for somebody else.
    pub(super) fn open_for_heir(&mut self) -> io::Result<File> {
        let content = File::open(&self.content)?;
        rustix::io::fcntl_setfd(&content, FdFlags::empty())?;
        self.content = format!("/proc/self/fd/{}", content.as_raw_fd()).into();
        let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        if (self.attributes.uid, self.attributes.gid) != (user, group) {
            self.attributes.mode &= 0o1777;
        }
        (self.attributes.uid, self.attributes.gid) = (0, 0);
        Ok(content)
    }

    /// Makes the file, in the mounts as they are now, for the engine to inherit.
    fn make(&self, content: &File) -> io::Result<File> {
        let file = make_nameless(self.directory()?)?;
        copy(content, &file)?;
        self.attributes.give_to(&file)?;
        rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
        Ok(file)
    }

    /// The directory that it was in, or the nearest above that is there. The files may be anybody's: no link is followed.
    fn directory(&self) -> io::Result<OwnedFd> {
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

/// Opens the contents, before `/proc` is another.
pub(super) fn open_all(files: &[PlannedFile]) -> Result<Vec<File>, Failure> {
    allow_descriptors(2 * files.len());
    let open = |file: &PlannedFile| {
        File::open(&file.content).map_err(Failure::step(format!("open what was kept of {:?}", file.below)))
    };
    files.iter().map(open).collect()
}

/// Makes all files.
pub(super) fn make_all(files: &[PlannedFile], contents: Vec<File>) -> Result<Vec<File>, Failure> {
    let make = |(file, content): (&PlannedFile, File)| {
        let step = || format!("bring back the file {:?}, which has no name", file.below);
        file.make(&content).map_err(Failure::step(step()))
    };
    files.iter().zip(contents).map(make).collect()
}
