//! Runs and restores whose start was cut short: whoever began it was killed before it could be told of.
//!
//! The processes of such a run end by themselves, or are ended here; its record and the branch that was made for it are of use to nobody.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::{Runs, remove};
use crate::Result;
use crate::branch::Branch;
use crate::checkpoint::CheckpointId;
use crate::engine::{Container, Init, Whereabouts};
use crate::error::IoContext;
use crate::name::Name;
use crate::processes::{ProcessId, Tree};

/// The file that says so.
pub(super) const UNTOLD: &str = "untold";
/// The directory of notes about runs that may have one, in the state directory.
const STARTING: &str = "starting";
/// Longer than a killed process takes to end on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long what an engine forks may live before it is looked for again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What there is of a run or a restore that nobody was told of.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Untold {
    /// The boot in which it was started. After a power cut the file may be there again, of a run that has worked for long.
    boot: String,
    /// The branch that may have been recorded for it.
    #[serde(default)]
    made: Option<Made>,
    /// The container that may have been restored onto that branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    container: Option<Container>,
}

/// A branch that was made for a run or a restore alone.
///
/// Its time tells it from another that somebody made meanwhile under the same name, and from the same checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// Its name.
    pub(crate) name: Name,
    checkpoint: CheckpointId,
    time: jiff::Timestamp,
}

impl Made {
    /// Whether this is it, as the catalog records it.
    pub(crate) fn is(&self, found: &Branch) -> bool {
        *self == Self::from(found)
    }
}

impl From<&Branch> for Made {
    fn from(branch: &Branch) -> Self {
        Self { name: branch.name.clone(), checkpoint: branch.checkpoint, time: branch.time }
    }
}

impl Untold {
    pub(super) fn new(branch: Option<&Branch>, container: Option<Container>) -> Result<Self> {
        let boot = crate::boot_id().context("read", "the boot's id")?;
        Ok(Self { boot, made: branch.map(Made::from), container })
    }

    /// Reads the mark in the directory `place`; `None` if there is none of this boot.
    pub(super) fn read(place: &Path) -> Result<Option<Self>> {
        let path = place.join(UNTOLD);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("read", path),
        };
        let now = Self::new(None, None)?;
        Ok(serde_json::from_slice::<Self>(&bytes).ok().filter(|untold| untold.boot == now.boot))
    }
}

/// A run or a restore that nobody was told of, and that nobody starts any more. Nobody else begins one of its name as long as this is there.
#[derive(Debug)]
pub(crate) struct Abandoned {
    /// The branch that may have been made for it.
    pub(crate) branch: Option<Made>,
    container: Option<Container>,
    place: PathBuf,
    _lock: File,
}

impl Runs {
    /// The names of those that were not told of: they are being started, or were abandoned.
    ///
    /// However many have ended, they are not looked at.
    pub(crate) fn untold(&self) -> Vec<Name> {
        let Ok(notes) = fs::read_dir(self.starting()) else { return self.untold_of_all() };
        let names = notes.flatten().filter_map(|note| {
            let name = noted(note.file_name().to_str()?)?;
            let place = self.dir().join(name.as_str());
            // Without a mark it was told of, or the mark is about to be made.
            let is_untold = is_marked(&place) || self.alone().is_ok_and(|_alone| is_marked(&place));
            if !is_untold {
                let _ = fs::remove_file(note.path());
            }
            is_untold.then_some(name)
        });
        names.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The same, where no earlier command has begun to note it: an earlier release does not.
    fn untold_of_all(&self) -> Vec<Name> {
        // Without a directory there are no runs.
        let Ok(_alone) = self.alone() else { return Vec::new() };
        let untold = names_in(&self.dir(), is_marked);
        if untold.is_empty() {
            // Until there is one, all are looked at.
            let _ = fs::DirBuilder::new().mode(0o700).create(self.starting());
        }
        untold
    }

    fn starting(&self) -> PathBuf {
        self.state.join(STARTING)
    }

    /// Notes that a run of that name is going to have a mark; `None` if all are looked at. Nobody else makes one meanwhile.
    pub(super) fn note_start(&self, name: &Name) -> Result<Option<PathBuf>> {
        let number = crate::random_bytes::<8>().context("make", "a name")?;
        let note = self.starting().join(format!("{}.{name}", hex::encode(number)));
        match fs::write(&note, "") {
            Ok(()) => Ok(Some(note)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("write", note),
        }
    }

    /// Takes the run of that name, if it was abandoned, and ends what there still is of its processes.
    pub(crate) fn take_abandoned(&self, name: &Name) -> Result<Option<Abandoned>> {
        let place = self.dir().join(name.as_str());
        // One that has gone meanwhile, or that somebody starts, is none.
        let Some(lock) = lock_idle(&place) else { return Ok(None) };
        let Some(untold) = Untold::read(&place)? else { return Ok(None) };
        Abandoned::take(place, lock, untold)
    }
}

fn is_marked(place: &Path) -> bool {
    place.join(UNTOLD).symlink_metadata().is_ok()
}

/// The run that a note is of.
fn noted(note: &str) -> Option<Name> {
    note.split_once('.')?.1.parse().ok()
}

/// Those that have a directory in `dir` of which `is_wanted` holds.
pub(super) fn names_in(dir: &Path, is_wanted: impl Fn(&Path) -> bool) -> Vec<Name> {
    let names = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<Name>().ok().filter(|_| is_wanted(&entry.path())));
    let mut names: Vec<Name> = names.collect();
    names.sort();
    names
}

/// Locks the directory, unless it has gone or somebody has locked it.
pub(super) fn lock_idle(place: &Path) -> Option<File> {
    File::open(place).ok().filter(|place| place.try_lock().is_ok())
}

impl Abandoned {
    /// Ends what there is of the processes; `None` if they cannot be seen from here.
    pub(super) fn take(place: PathBuf, lock: File, untold: Untold) -> Result<Option<Self>> {
        if let Some(init) = Init::read(&place) {
            match init.find(&place) {
                Whereabouts::Here(found) => {
                    let ended = if init.is_first_in_its_space(found) { end(found) } else { end_below(found) };
                    ended.context("end the processes of", &place)?;
                }
                // Whoever sees it ends it.
                Whereabouts::Elsewhere => return Ok(None),
                Whereabouts::Nowhere => {}
            }
        }
        Ok(Some(Self { branch: untold.made, container: untold.container, place, _lock: lock }))
    }

    /// Ends the container that was restored onto the branch, and removes its bundle. To be called if the branch was made for it alone:
    /// before there was one, there was no container either, and one of the same name and bundle is another's.
    pub(crate) fn end_container(&self) -> Result<()> {
        let Some(container) = &self.container else { return Ok(()) };
        container.end()?;
        remove(container.bundle.as_path())
    }

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

/// Ends what the init restores onto the pids of this machine, and waits until the init, which nobody listens to any more, has ended by itself.
///
/// Were it killed, nobody would see what it leaves behind.
fn end_below(init: ProcessId) -> io::Result<()> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        // What is forked meanwhile is found by the next look.
        let tree = Tree::of_pid(init.pid).ok().filter(|tree| tree.contains(init));
        for member in tree.iter().flat_map(Tree::members).filter(|member| member.id != init) {
            // One that has ended needs no signal.
            let _ = member.id.open().and_then(|process| Ok(pidfd_send_signal(process, Signal::KILL)?));
        }
        if init.ends_within(Some(LOOK_AGAIN))? {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::PathText;
    use crate::engine::Confinement;
    use crate::run::RunRecord;

    /// All were looked at by every command that writes.
    #[test]
    fn runs_that_have_ended_are_not_looked_at() {
        let state = tempfile::tempdir().unwrap();
        let runs = Runs::of(state.path());
        let create = |name: &str| {
            let (writable, read_only, scratch) = Default::default();
            let confinement = Confinement { writable, read_only, scratch, output: PathText(runs.output()) };
            runs.create(&RunRecord::new(name.parse().unwrap(), Vec::new(), confinement, Vec::new())).unwrap()
        };
        let untold = || runs.untold().iter().map(Name::to_string).collect::<Vec<_>>();
        let notes = || fs::read_dir(runs.starting()).unwrap().count();
        assert_eq!(untold(), [""; 0]);
        // As of an earlier release, which notes nothing.
        let earlier = create("earlier");
        assert!(!runs.starting().exists());
        assert_eq!(untold(), ["earlier"]);
        earlier.told().unwrap();
        assert_eq!(untold(), [""; 0]);
        let (one, other) = (create("one"), create("other"));
        assert_eq!((untold(), notes()), (vec!["one".into(), "other".into()], 2));
        one.told().unwrap();
        other.discard().unwrap();
        assert_eq!((untold(), notes()), (Vec::new(), 0));
        // Somebody was killed right after he had noted it, or after it was told of.
        runs.note_start(&"one".parse().unwrap()).unwrap();
        runs.note_start(&"third".parse().unwrap()).unwrap();
        assert_eq!((untold(), notes()), (Vec::new(), 0));
        fs::write(runs.dir().join("one").join(UNTOLD), "").unwrap();
        assert_eq!(untold(), [""; 0]);
    }
}
