//! Runs whose start was cut short: whoever began it was killed before the run could be told of.
//!
//! The processes of such a run end by themselves, or are ended here; its record and the branch that was made for it are of use to nobody.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::{RUN_RECORD, RunRecord, Runs, remove};
use crate::Result;
use crate::checkpoint::CheckpointId;
use crate::engine::{Init, Whereabouts};
use crate::error::IoContext;
use crate::name::Name;
use crate::processes::ProcessId;

/// The file that says so.
pub(super) const UNTOLD: &str = "untold";
/// Longer than a killed process takes to end on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// What there is of a run that nobody was told of.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Untold {
    /// The boot in which it was started. After a power cut the file may be there again, of a run that has worked for long.
    boot: String,
    /// Whether a branch may have been recorded for it.
    branch: bool,
}

impl Untold {
    pub(super) fn new(branch: bool) -> Result<Self> {
        let boot = crate::boot_id().context("read", "the boot's id")?;
        Ok(Self { boot, branch })
    }
}

/// A run that nobody was told of, and that nobody starts any more. Nobody else begins one of its name as long as this is there.
#[derive(Debug)]
pub(crate) struct Abandoned {
    /// The branch that may have been made for it: its name, the checkpoint that it grew from, and a time after which it was made.
    pub(crate) branch: Option<(Name, CheckpointId, jiff::Timestamp)>,
    place: PathBuf,
    _lock: File,
}

impl Runs {
    /// The names of those that were not told of: they are being started, or were abandoned.
    pub(crate) fn untold(&self) -> Vec<Name> {
        let names = fs::read_dir(self.dir()).into_iter().flatten().flatten().filter_map(|entry| {
            let is_untold = entry.path().join(UNTOLD).symlink_metadata().is_ok();
            entry.file_name().to_str()?.parse::<Name>().ok().filter(|_| is_untold)
        });
        let mut names: Vec<Name> = names.collect();
        names.sort();
        names
    }

    /// Takes the run of that name, if it was abandoned, and ends what there still is of its processes.
    pub(crate) fn take_abandoned(&self, name: &Name) -> Result<Option<Abandoned>> {
        let place = self.dir().join(name.as_str());
        // One that has gone meanwhile, or that somebody starts, is none.
        let Some(lock) = File::open(&place).ok().filter(|place| place.try_lock().is_ok()) else { return Ok(None) };
        let read = |name: &str| match fs::read(place.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("read", place.join(name)),
        };
        let Some(untold) = read(UNTOLD)?.and_then(|bytes| serde_json::from_slice::<Untold>(&bytes).ok()) else {
            return Ok(None);
        };
        if untold.boot != Untold::new(false)?.boot {
            return Ok(None);
        }
        match Init::read(&place).map(|init| init.find(&place)) {
            Some(Whereabouts::Here(init)) => end(init).context("end", format!("the run {name}"))?,
            // Whoever sees it ends it.
            Some(Whereabouts::Elsewhere) => return Ok(None),
            Some(Whereabouts::Nowhere) | None => {}
        }
        let record = read(RUN_RECORD)?.map(|bytes| RunRecord::parse(&bytes, &place.join(RUN_RECORD))).transpose()?;
        let branch = record.filter(|_| untold.branch).and_then(|r| Some((r.branch?, r.checkpoint?, r.since)));
        Ok(Some(Abandoned { branch, place, _lock: lock }))
    }
}

impl Abandoned {
    /// Removes what is left of the run itself.
    pub(crate) fn remove(self) -> Result<()> {
        remove(&self.place)
    }
}

/// Kills the init, with which all in its pid namespace end, and waits until it has ended.
fn end(init: ProcessId) -> io::Result<()> {
    let Ok(process) = init.open() else { return Ok(()) };
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    init.ends_within(Some(PATIENCE))?.then_some(()).ok_or_else(|| io::ErrorKind::TimedOut.into())
}
