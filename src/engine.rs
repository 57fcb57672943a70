//! The programs that checkpoint and restore processes, and what they tell fsnap.
//!
//! An engine calls fsnap at certain moments of its own work; [`Phase`] is what all of them have in common. One file per engine
//! turns its environment into a phase, and its images into what fsnap must know of them. An image directory may have been made by
//! anybody: nothing in it is followed, trusted or read without a limit.
//!
//! In reading order: [`criu`], its hooks and its program; `images`, a directory of its images; `external`, which files they lack. A restore or
//! the start of a run goes from `restore` through a `stage` in new namespaces to a `program`, `confine` says what that can write to, and
//! `given_back` hands it files without names, and `timers` sets going what CRIU leaves still. A run is saved by `dump`, from which `relay` hands calls of the action script outside; `reasons`
//! tells why CRIU could not. For containers: [`bundle`], `container`, and [`drop_in`], the lines in CRIU's configuration. `os_text` and `sys` serve them all.

pub mod bundle;
mod confine;
mod container;
pub mod criu;
pub mod drop_in;
mod dump;
mod external;
mod given_back;
mod images;
pub(crate) mod os_text;
mod program;
mod reasons;
mod relay;
mod restore;
mod stage;
pub(crate) mod sys;
mod timers;

use std::path::{Path, PathBuf};
use std::{fmt, io};

pub use confine::{Confinement, Init, LOG, OUTPUT, SCRATCH, Whereabouts};
pub(crate) use confine::{SCRATCH_TYPE, is_locked};
pub use container::{Container, RuntimeKind};
pub use dump::{Action, Dump, Rest, run_dump_stage};
pub use external::key as external_key;
pub use given_back::GivenBack;
pub(crate) use given_back::allow_descriptors;
pub use images::{ANSWER_NAME, ImageRecord, Images, MemberRecord, RECORD_NAME};
pub use program::{Program, TerminalId, run_program};
pub use reasons::of as reasons_in;
pub use relay::{is_relay, run_relay};
pub use restore::{Ended, MountPlan, PidSpace, Restore, Restored, StageCommand, Start};
pub use stage::run_stage;
pub use timers::{arm as arm_timers, is_for_timers, run_for_timers};

/// The result of dealing with an engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where an engine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// A dump begins; the processes still run.
    Starting,
    /// The processes are frozen, and their images are complete.
    Frozen,
    /// A restore begins; there are no processes yet.
    Restoring,
    /// The processes are restored and do not run yet.
    Restored,
    /// The processes run again, dumped or restored.
    Resumed,
    /// The engine's own part failed after it had begun a dump; the processes run on.
    Failed,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Frozen => "frozen",
            Self::Restoring => "restoring",
            Self::Restored => "restored",
            Self::Resumed => "resumed",
            Self::Failed => "failed",
        })
    }
}

/// Why an engine could not be understood, or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The record names an engine that this release does not know.
    #[error("no engine {name:?} is known")]
    Unknown {
        /// The name.
        name: String,
    },
    /// A variable that the engine sets for its hooks is missing or makes no sense.
    #[error("{variable} {problem}: this command is an action script of CRIU (criu --action-script)")]
    Environment {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The directory of images cannot be opened.
    #[error("cannot open the image directory {dir:?}: {source}")]
    ImageDir {
        /// The directory.
        dir: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file of the image directory cannot be used.
    #[error("cannot use {file:?} in the image directory {dir:?}: {reason}")]
    ImageFile {
        /// The directory.
        dir: PathBuf,
        /// The file's name.
        file: &'static str,
        /// Why not.
        reason: String,
    },
    /// Others than root and fsnap's own user could have changed the images.
    #[error("the images in {dir:?} are not restored: {what}, who could have made them anything")]
    SharedImages {
        /// The directory.
        dir: PathBuf,
        /// What they can change.
        what: String,
    },
    /// The engine did not finish its dump.
    #[error("the images in {dir:?} are not complete: the dump has failed or still goes on ({reason})")]
    Incomplete {
        /// The directory.
        dir: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// fsnap's record beside the images was written by a later release.
    #[error("{} in {dir:?} has version {found}; this fsnap reads up to {supported}", RECORD_NAME)]
    NewerRecord {
        /// The directory.
        dir: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// There is no such program.
    #[error(
        "CRIU was not found: {}; install the package criu, or name the program by FSNAP_CRIU, or by `program` in the section \
         [criu] of the settings",
        named.as_ref().map_or_else(
            || "no directory of PATH has a program criu, nor has /usr/sbin".to_owned(),
            |named| format!("there is no program {}", crate::printable(named.as_os_str())),
        )
    )]
    NoCriu {
        /// What the settings say that it is; without, it was searched for.
        named: Option<PathBuf>,
    },
    /// The engine could not be started, or gave an answer that makes no sense.
    #[error("cannot run {program:?}: {source}")]
    Run {
        /// The program.
        program: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The bundle of a container cannot be used.
    #[error("cannot use the bundle in {dir:?}: {reason}")]
    Bundle {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A directory that the restore needs would be covered by a mount of it.
    #[error("{hidden:?} would be hidden by what is mounted on {by:?}: move it out of the volume")]
    Hidden {
        /// What would be hidden.
        hidden: PathBuf,
        /// The mount point.
        by: PathBuf,
    },
    /// A run was to begin in a directory that it cannot enter.
    #[error("cannot enter the directory {directory:?} in the run: {reason}")]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A step of the restore failed; nothing of it is left running.
    #[error("cannot {step}: {reason}")]
    Restore {
        /// What was tried.
        step: String,
        /// Why it failed.
        reason: String,
    },
    /// Processes of a run have left the tree that would be saved.
    #[error(
        "{} left the tree of process {root}, which alone is saved: start what they belong to in the foreground, or under a shell \
         that waits",
        strays.join(", ")
    )]
    Strays {
        /// The root of the tree.
        root: i32,
        /// The others.
        strays: Vec<String>,
    },
    /// The engine's dump failed; the processes run on.
    #[error("CRIU could not save the processes ({status}):{reasons}")]
    DumpFailed {
        /// How it ended.
        status: String,
        /// Why.
        reasons: Reasons,
    },
    /// The engine's restore failed; nothing of it is left running.
    #[error("CRIU could not restore the processes ({status}); the end of its log {log:?}:\n{tail}")]
    EngineFailed {
        /// How it ended.
        status: String,
        /// Its log.
        log: PathBuf,
        /// The last lines of its log.
        tail: String,
    },
}

/// Why a dump failed, in words that its user can act on; the engine's own where there are none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reasons(pub Vec<String>);

impl std::fmt::Display for Reasons {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|reason| write!(f, "\n{reason}"))
    }
}

/// The name of an engine that fsnap does not know, and that calls it as the [contract](crate::design::generic_door) says.
pub const GENERIC: &str = "generic";

/// Checks that the engine of that name has finished its images, as far as fsnap can tell.
pub fn complete(engine: &str, images: &Images) -> Result<()> {
    match engine {
        criu::NAME => criu::complete(images),
        // It calls when they are.
        GENERIC => Ok(()),
        name => Err(Error::Unknown { name: name.to_owned() }),
    }
}

/// What the engine of that name calls the files that it left out of its images, because it was told to.
pub fn external_files(engine: &str, images: &Images) -> Result<std::collections::BTreeSet<String>> {
    if engine == criu::NAME { external::files(images) } else { Ok(Default::default()) }
}

/// Whether the engine of that name finished its part of the checkpoint in `dir`.
pub fn is_complete(engine: &str, dir: &Path) -> bool {
    engine == criu::NAME && Images::open(dir).is_ok_and(|images| criu::complete(&images).is_ok())
}
