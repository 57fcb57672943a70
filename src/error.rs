//! What can go wrong in fsnap, in terms that its users can act on.

use std::io;
use std::path::PathBuf;

use crate::catalog;
use crate::checkpoint::{CheckpointId, PathText};
use crate::name::Name;

/// The result of fsnap's library calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something that fsnap was asked to do was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The catalog could not be used.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// A backend failed.
    #[error(transparent)]
    Backend(#[from] fsnap_backend::Error),
    /// Freezing or thawing failed.
    #[error(transparent)]
    Quiesce(#[from] crate::quiesce::Error),
    /// Looking at processes failed.
    #[error(transparent)]
    Processes(#[from] crate::processes::Error),
    /// Mounting failed.
    #[error(transparent)]
    Mount(#[from] crate::mount::Error),
    /// Serving a file system failed.
    #[cfg(feature = "fuse")]
    #[error(transparent)]
    Fuse(#[from] crate::fuse::session::Error),
    /// The engine, or what it left, is not as it must be.
    #[error(transparent)]
    Engine(#[from] crate::engine::Error),
    /// A name is not a name.
    #[error(transparent)]
    InvalidName(#[from] crate::name::InvalidName),
    /// No checkpoint answers to this reference.
    #[error("no checkpoint {reference:?}{}", candidates(.near))]
    NoSuchCheckpoint {
        /// What the user wrote.
        reference: String,
        /// What may have been meant.
        near: Vec<String>,
    },
    /// No tag of that name.
    #[error("no tag {name:?}{}", candidates(.near))]
    NoSuchTag {
        /// What the user wrote.
        name: String,
        /// The tags that there are.
        near: Vec<String>,
    },
    /// Several checkpoints answer to this reference.
    #[error("{reference:?} is ambiguous: it begins {}", list(.candidates))]
    Ambiguous {
        /// What the user wrote.
        reference: String,
        /// Those that it may mean.
        candidates: Vec<String>,
    },
    /// The reference is not of any known form.
    #[error("{reference:?} is no reference to a checkpoint: {reason}")]
    BadReference {
        /// What the user wrote.
        reference: String,
        /// Why not.
        reason: &'static str,
    },
    /// A checkpoint has no such ancestor.
    #[error("{reference:?} does not exist: {} before {}", came(*.depth), .id.short())]
    TooFarBack {
        /// What the user wrote.
        reference: String,
        /// The checkpoint counted from.
        id: CheckpointId,
        /// How many there are before it.
        depth: usize,
    },
    /// No volume of that name or path.
    #[error("no volume {name:?} is registered{}", candidates(.near))]
    NoSuchVolume {
        /// What the user wrote.
        name: String,
        /// The volumes that there are.
        near: Vec<String>,
    },
    /// The file system does not have the past state of a volume any more, or never had.
    #[error("{volume} has no state {past}: {span}")]
    NoSuchState {
        /// The volume.
        volume: Name,
        /// What the user wrote.
        past: String,
        /// What there is.
        span: String,
    },
    /// No branch of that name.
    #[error("no branch {name:?}{}", candidates(.near))]
    NoSuchBranch {
        /// What the user wrote.
        name: String,
        /// The branches that there are.
        near: Vec<String>,
    },
    /// No store for a thin pool of that name.
    #[error("fsnap has made no pool {name:?}, and keeps nothing in it{}", candidates(.near))]
    NoSuchPool {
        /// What the user wrote.
        name: String,
        /// The pools that have a store.
        near: Vec<String>,
    },
    /// The name is in use.
    #[error("{what} {name} exists already{}", .by.as_ref().map(|by| format!(": {by}")).unwrap_or_default())]
    NameTaken {
        /// What has the name: "the branch".
        what: &'static str,
        /// The name.
        name: Name,
        /// More about what has it.
        by: Option<String>,
    },
    /// A volume may not lie inside another.
    #[error("{dir} cannot be a volume: {reason} the volume {other} at {path}")]
    Overlap {
        /// The refused directory.
        dir: PathText,
        /// How they overlap.
        reason: &'static str,
        /// The registered volume.
        other: Name,
        /// Where it is.
        path: PathText,
    },
    /// A store may not lie in a volume.
    #[error(
        "{place} cannot hold a store: it lies inside the volume {volume} at {path}, whose snapshots would hold the store"
    )]
    NotAPlace {
        /// The refused place.
        place: PathText,
        /// The volume.
        volume: Name,
        /// Where it is.
        path: PathText,
    },
    /// The directory cannot be registered.
    #[error("{dir} cannot be a volume: {reason}")]
    NotAVolume {
        /// The refused directory.
        dir: PathText,
        /// Why.
        reason: String,
    },
    /// What lies where a volume was registered is none any more.
    #[error("the volume {volume} is not there: {source}")]
    VolumeAway {
        /// The volume.
        volume: Name,
        /// What its backend says.
        source: fsnap_backend::Error,
    },
    /// The backend failed at a member of a checkpoint.
    #[error("no snapshot of {volume}: {source}")]
    NoSnapshot {
        /// The volume.
        volume: Name,
        /// What its backend says.
        source: fsnap_backend::Error,
    },
    /// The store of a volume's snapshots is not where it was.
    #[error("the snapshots of {} are out of reach: {source}", list(&.volumes.iter().map(Name::to_string).collect::<Vec<_>>()))]
    StoreAway {
        /// Those whose snapshots it holds.
        volumes: Vec<Name>,
        /// What its backend says.
        source: fsnap_backend::Error,
    },
    /// The processes can write to no registered volume.
    #[error("{why}")]
    NothingReached {
        /// Why not.
        why: String,
    },
    /// There is nothing to take a snapshot of.
    #[error("{why}")]
    NothingToTake {
        /// Why not.
        why: String,
    },
    /// The processes can write to what would be in no snapshot, and the settings forbid that.
    #[error("the processes can write to what the checkpoint would not hold: {what}")]
    Outside {
        /// What.
        what: String,
    },
    /// A file without a name is left to fsnap by the engine, and cannot be kept.
    #[error("the content of {path}, which has no name any more, is not kept: {reason}")]
    NotKept {
        /// Where it was.
        path: PathText,
        /// Why not.
        reason: String,
    },
    /// Two files without names that the engine cannot tell apart.
    #[error(
        "{one} and {other} have no names any more, and one inode number on one mount: the engine would take one for the other"
    )]
    Doubles {
        /// Where one was.
        one: PathText,
        /// Where the other was.
        other: PathText,
    },
    /// A mapped file without a name, which the engine cannot reach without root.
    #[error(
        "process {pid} has mapped a file whose name is gone, {path}, and the kernel lets nobody but root look at that: the engine cannot save it"
    )]
    OutOfReach {
        /// The process.
        pid: i32,
        /// What the kernel calls the file.
        path: PathText,
    },
    /// The engine has left out a file that has a name, or that fsnap does not find.
    #[error(
        "the engine has left {key} out of its images, as it was told to; but that is no file without a name any more"
    )]
    LeftOut {
        /// What the engine calls it.
        key: String,
    },
    /// The volume is not the tree that was registered.
    #[error("the volume {volume} at {path} is not the tree that was registered: expected {expected}, found {found}")]
    WrongVolume {
        /// The volume.
        volume: Name,
        /// Its path.
        path: PathText,
        /// What was registered.
        expected: fsnap_backend::Identity,
        /// What is there.
        found: fsnap_backend::Identity,
    },
    /// A process would be restored onto files that are not those of its checkpoint.
    #[error("{path} does not show the files of checkpoint {}: expected {expected}, found {found}", .checkpoint.short())]
    WrongFiles {
        /// Where the process will look.
        path: PathText,
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The engine's images are in a volume that the checkpoint snapshots.
    #[error(
        "the image directory {images} lies inside the volume {volume} at {path}, so that every snapshot would hold the images"
    )]
    ImagesInVolume {
        /// The image directory.
        images: PathText,
        /// The volume.
        volume: Name,
        /// Its path.
        path: PathText,
    },
    /// Others need what was to be removed.
    #[error("checkpoint {} is needed by {}", .id.short(), branches(.by))]
    Needed {
        /// The checkpoint.
        id: CheckpointId,
        /// The branches that grew from it.
        by: Vec<Name>,
    },
    /// Processes use a branch that was to be removed.
    #[error("the branch {name} is in use: {users}")]
    BranchInUse {
        /// The branch.
        name: Name,
        /// Who uses it.
        users: String,
    },
    /// Something is mounted among the files of a branch that was to be removed.
    #[error("the branch {name} is in use: something is mounted at {point}")]
    MountedInBranch {
        /// The branch.
        name: Name,
        /// Where.
        point: PathText,
    },
    /// The engine asked for the end of a checkpoint that it did not begin.
    #[error(
        "no checkpoint was begun by the engine, process {engine}, with the images in {images}: the hook was not called before the freeze, or its checkpoint was undone"
    )]
    NotBegun {
        /// The engine's process.
        engine: String,
        /// The image directory.
        images: PathText,
    },
    /// The engine named another process tree when it was frozen than when the checkpoint was begun: who writes besides would be told wrongly.
    #[error(
        "the checkpoint with the images in {images} was begun for the tree of process {begun}, and not of {called}"
    )]
    OtherTree {
        /// The root that was named first.
        begun: i32,
        /// The one that was named now.
        called: i32,
        /// The image directory.
        images: PathText,
    },
    /// An earlier checkpoint was taken for these images, and could not be sealed.
    #[error("an earlier checkpoint with the images in {images} is not sealed yet")]
    Unsealed {
        /// The image directory.
        images: PathText,
    },
    /// The checkpoint was taken without an engine.
    #[error("checkpoint {} has no process image", .id.short())]
    NoProcessImage {
        /// The checkpoint.
        id: CheckpointId,
    },
    /// Nobody looked at the processes of the checkpoint, if there were any.
    #[error("no processes are recorded with checkpoint {}", .id.short())]
    NoProcesses {
        /// The checkpoint.
        id: CheckpointId,
    },
    /// The image directory holds another checkpoint's process image by now.
    #[error("the image directory {images} belongs to {found}, not to checkpoint {}", .id.short())]
    ImagesReplaced {
        /// The checkpoint that was to be restored.
        id: CheckpointId,
        /// The image directory.
        images: PathText,
        /// What it holds.
        found: String,
    },
    /// A branch has no files at the moment: it is written through a mount, and nothing shows it.
    #[error("branch {name} is not shown anywhere: `fsnap mount DIR` shows it")]
    NotShown {
        /// The branch.
        name: Name,
    },
    /// The branch could not be made: the backend has no writable clones, and no overlay can be kept here.
    #[error("an overlay cannot be kept in {dir}: {reason}")]
    NoOverlay {
        /// The directory.
        dir: PathText,
        /// Why not.
        reason: String,
    },
    /// No run of that name.
    #[error("no run {name:?}{}", candidates(.near))]
    NoSuchRun {
        /// What the user wrote.
        name: String,
        /// The runs that there are.
        near: Vec<String>,
    },
    /// The run was to be removed, and still lives.
    #[error("the run {name} still runs")]
    RunLives {
        /// The run.
        name: Name,
    },
    /// The start of the run was cut short, and recovery could not undo it.
    #[error("the start of the run {name} was cut short, and is not undone yet")]
    RunHalfDone {
        /// The run.
        name: Name,
    },
    /// The run has no processes yet.
    #[error("the run {name} is still being started: try again in a moment")]
    RunStarting {
        /// The run.
        name: Name,
    },
    /// The run was started in a pid namespace that does not show from here, such as another run's.
    #[error("the run {name} lives in a pid namespace that cannot be seen from here")]
    RunElsewhere {
        /// The run.
        name: Name,
    },
    /// The run is the one that fsnap was called in: it cannot see what waits for the processes there, itself among them.
    #[error("the run {name} is the one that this command is part of")]
    RunAround {
        /// The run.
        name: Name,
    },
    /// The run has no processes any more.
    #[error("the run {name} has ended")]
    RunEnded {
        /// The run.
        name: Name,
    },
    /// The first process of a run has ended, and others go on without it.
    #[error(
        "the command of the run {name} has ended and left other processes behind, which cannot be saved as one tree"
    )]
    RunHasNoRoot {
        /// The run.
        name: Name,
    },
    /// The checkpoint is not one of a run.
    #[error("checkpoint {} is not of a run", .id.short())]
    NotOfARun {
        /// The checkpoint.
        id: CheckpointId,
    },
    /// The processes of the checkpoint were a run: they have files, and places for files, that only a run has.
    #[error("checkpoint {} holds the run {name}, which goes on as a run and not otherwise", .id.short())]
    IsOfARun {
        /// The checkpoint.
        id: CheckpointId,
        /// The run that was saved.
        name: Name,
    },
    /// The record of a run cannot be used.
    #[error("{path} cannot be used: {reason}")]
    BadRun {
        /// The file.
        path: PathText,
        /// Why not.
        reason: String,
    },
    /// What is installed cannot call a hook.
    #[error("no hook can be installed: {reason}")]
    NoHooks {
        /// Why not.
        reason: String,
    },
    /// fsnap's own part of the engine's checkpoint failed.
    #[error("{said}")]
    HookFailed {
        /// What it said.
        said: String,
    },
    /// The work was not done within the time allowed.
    #[error("{what} took longer than {seconds} s")]
    Deadline {
        /// What.
        what: String,
        /// The limit, in seconds.
        seconds: f64,
    },
    /// The backend is unknown, or was not compiled in.
    #[error("no backend {name:?}: this fsnap has {}", list(.known))]
    NoSuchBackend {
        /// What was asked for.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// The configuration cannot be used.
    #[error("the configuration {} cannot be used: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {action} {object}: {source}")]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        object: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Several things went wrong.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; and "))]
    Several(Vec<Error>),
}

impl Error {
    /// Makes one error of those that happened; `None` if none did.
    pub fn of_all(mut errors: Vec<Error>) -> Option<Self> {
        match errors.len() {
            0 => None,
            1 => errors.pop(),
            _ => Some(Self::Several(errors)),
        }
    }

    /// What a backend said, if one did and it is left to stand by itself.
    pub fn backend(&self) -> Option<&fsnap_backend::Error> {
        match self {
            Self::Backend(error) | Self::NoSnapshot { source: error, .. } | Self::StoreAway { source: error, .. } => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Says which member of a checkpoint it was that a backend failed at.
    pub(crate) fn at_member(self, volume: &Name) -> Self {
        match self {
            Self::Backend(source) => Self::NoSnapshot { volume: volume.clone(), source },
            other => other,
        }
    }

    /// Adds the failure of the undoing, if any, to the failure that made it necessary.
    pub fn and_undo(self, undone: Result<()>) -> Self {
        match undone {
            Ok(()) => self,
            Err(undo) => Self::Several(vec![self, undo]),
        }
    }
}

/// Says what was tried, and on what, when a system call fails.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, object: impl AsRef<std::path::Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, object: impl AsRef<std::path::Path>) -> Result<T> {
        let object = crate::printable(object.as_ref().as_os_str());
        self.map_err(|source| Error::Io { action, object, source: source.into() })
    }
}

fn came(depth: usize) -> String {
    match depth {
        0 => "no checkpoint comes".into(),
        1 => "only one checkpoint comes".into(),
        several => format!("only {several} checkpoints come"),
    }
}

fn list(of: &[String]) -> String {
    of.join(", ")
}

fn candidates(near: &[String]) -> String {
    const SHOWN: usize = 12;
    let (shown, more) = near.split_at(near.len().min(SHOWN));
    match more.len() {
        _ if near.is_empty() => String::new(),
        0 => format!(": there is {}", shown.join(", ")),
        more => format!(": there is {}, and {more} more", shown.join(", ")),
    }
}

fn branches(by: &[Name]) -> String {
    let names: Vec<&str> = by.iter().map(Name::as_str).collect();
    format!("the branch{} {}", if names.len() == 1 { "" } else { "es" }, names.join(", "))
}
