//! Processes: who they are, which of them belong together, and what they can write to.
//!
//! Everything here is read from `/proc` ([proc(5)]). Most of it is read while the processes run, so the answer is one of an instant that
//! has passed. Two things keep that harmless: a process is always named by a [`ProcessId`], which a reused pid does not
//! equal, and whatever must hold at the snapshot's instant is read while they stand frozen ([`FrozenTree`], [`Outlook::observe`]). A process
//! that ends in the middle of a scan is left out of it quietly: it can no longer write.
//!
//! Which file holds what: `tree`, who belongs together; `reach`, what a tree can write to; `writers`, who else writes; `observer` makes a
//! `record` of a standing tree, and `audit` says what of that lies outside the volumes; `view` and `mounts`, what a path means to a process;
//! `proc_dir` and `census`, `/proc` itself.
//!
//! `/proc` also holds what hostile processes put there: names of any bytes, mounts that never answer. So its files are
//! parsed as bytes, paths are compared as the kernel's mount table states them, and nothing is opened or
//! examined on a mount whose server could keep fsnap waiting.
//!
//! [proc(5)]: https://man7.org/linux/man-pages/man5/proc.5.html

mod audit;
mod census;
mod cgroup;
mod credentials;
mod diff;
mod files;
mod mounts;
mod observer;
mod pattern;
mod proc_dir;
mod process_id;
mod reach;
mod record;
mod sockets;
mod space;
mod sys;
mod tree;
mod unlinked;
mod view;
mod writers;

use std::io;
use std::path::PathBuf;

pub use audit::{AuditRules, Medium, Outside, Policy, Via};
use census::Census;
pub(crate) use cgroup::says_frozen;
pub use cgroup::{Cgroup, CgroupVersion};
#[cfg(feature = "fuse")]
pub(crate) use credentials::Author;
pub use diff::{ProcessChange, process_changes};
pub use files::How;
pub(crate) use mounts::uncovered;
pub use observer::{Observation, Outlook, observe};
pub use pattern::{InvalidPattern, Pattern};
pub use process_id::{BootTicks, ProcessId};
pub use reach::{Candidate, CandidateKind, Reach, reach, users, users_elsewhere};
pub use record::{FilePlace, InVolume, MappedFile, OpenFile, OpenKind, ProcessRecord, TreeRecord};
pub(crate) use space::{init_seen_from_outside, pid_space};
pub(crate) use tree::own_descendants;
pub use tree::{FrozenTree, Member, Tree};
pub use unlinked::Unlinked;
pub use writers::{Writer, WriterScan, writers, writers_at};

/// The result of a look at processes.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why processes could not be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such process, or its pid belongs to another one now.
    #[error("there is no process {pid}: it has ended, or was never there")]
    Gone {
        /// The pid that was asked for.
        pid: i32,
    },
    /// The path names no control group.
    #[error("{path:?} is not a control group: {reason}")]
    NotACgroup {
        /// The path that was asked for.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The system refused to tell.
    #[error("cannot read {object:?}: {source}")]
    Read {
        /// What was read.
        object: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Every process that fsnap can see, its own and the kernel's threads included.
pub fn all() -> Result<Vec<ProcessId>> {
    let pids = proc_dir::all_pids().map_err(|source| Error::Read { object: "/proc".into(), source })?;
    Ok(pids.into_iter().filter_map(|pid| ProcessId::of(pid).ok()).collect())
}
