//! Runs: commands that fsnap started, or restored, in namespaces of their own.
//!
//! A run is a directory in `runs` of the state directory, named like it, and nothing else keeps it: no daemon, no row in the catalog.
//! What it consists of says which state it is in, so that it is right after every crash:
//!
//! | in the directory | written by | when |
//! |---|---|---|
//! | a lock on it | who starts the run | until it runs, or has failed |
//! | `run.json`, the [`RunRecord`] | the same | first of all |
//! | `init`, an [`Init`] | the first stage | before there is any process |
//! | `untold`, an `Untold` | who starts the run | until it runs: whoever finds it without the lock undoes the start |
//! | `start.log` | the stages | what they complain of |
//! | `root` | who starts the run | when it runs |
//! | `output/log` | the processes | all they say |
//! | `ended` | the init | when the root has ended |
//!
//! A run lives while its init does, which is told by pid, start time and boot: a reused pid is no run. A directory without a
//! living init and without a lock is what is left of a run, kept for its log until the name is used again or it is removed.
//!
//! Which runs may have an `untold` stands in the directory `starting` beside `runs`, in the names of empty files: `NUMBER.RUN`. So nobody looks at
//! all that have ended. Where that directory is missing, as after an earlier release, all are looked at; it is made once none has one.
//!
//! The processes see `output` only, at a path that is the same for all copies; what the other files say is not theirs to change.

mod checkpoint;
mod restores;
mod untold;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use fsnap_backend::beneath;
use serde::{Deserialize, Serialize};

pub(crate) use checkpoint::remove_images;
pub use checkpoint::{
    AUDIT, DEADLINE, EXTERNAL, HookCommand, IN_ORDER, REST, RunCheckpoint, UNLINKED, engine_args, sweep_images,
};
pub use restores::Restores;
pub(crate) use untold::Abandoned;
use untold::{UNTOLD, Untold};

use crate::branch::Branch;
use crate::checkpoint::{CheckpointId, PathText};
use crate::engine::{
    Confinement, Container, Ended, Images, Init, LOG, OUTPUT, SCRATCH_TYPE, TerminalId, Whereabouts, is_locked, os_text,
};
use crate::error::IoContext;
use crate::name::Name;
use crate::processes::{self, ProcessId, Tree};
use crate::{Error, Result};

/// The newest version of [`RunRecord`].
const VERSION: u32 = 1;
/// The record in the directory of a run.
const RUN_RECORD: &str = "run.json";
/// The root of the tree, in the same place.
const ROOT: &str = "root";
/// A record beside an engine's images: how to make copies of the run.
pub(crate) const COPY_RECORD: &str = "fsnap-run.json";
/// More than a record of a thousand directories needs.
const RECORD_LIMIT: u64 = 1 << 20;

/// What a run is, and how another like it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    version: u32,
    /// Its name.
    pub name: Name,
    /// The command that was started.
    #[serde(with = "os_text::list")]
    pub command: Vec<OsString>,
    /// When it was started, or restored.
    pub since: jiff::Timestamp,
    /// The checkpoint that it was restored from.
    pub checkpoint: Option<CheckpointId>,
    /// The branch that it works on.
    pub branch: Option<Name>,
    /// Whether it has a terminal.
    pub terminal: Option<TerminalId>,
    /// What it can write to, apart from its volumes.
    pub confinement: Confinement,
    /// Where it finds each of its volumes.
    pub volumes: Vec<SeenVolume>,
}

/// A volume, and where processes find its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenVolume {
    /// The volume's name.
    pub volume: Name,
    /// The path.
    pub at: PathText,
}

impl RunRecord {
    /// A run of `command` that starts now.
    pub fn new(name: Name, command: Vec<OsString>, confinement: Confinement, volumes: Vec<SeenVolume>) -> Self {
        let since = jiff::Timestamp::now();
        Self {
            version: VERSION,
            name,
            command,
            since,
            checkpoint: None,
            branch: None,
            terminal: None,
            confinement,
            volumes,
        }
    }

    /// A copy of it, from that checkpoint, on a branch of the copy's name.
    pub fn copied(&self, name: Name, checkpoint: CheckpointId) -> Self {
        let (command, confinement) = (self.command.clone(), self.confinement.clone());
        let mut copy = Self::new(name.clone(), command, confinement, self.volumes.clone());
        (copy.checkpoint, copy.branch) = (Some(checkpoint), Some(name));
        copy
    }

    /// The run that was saved in an image directory; `None` if it is of something else.
    pub fn of_images(images: &Images) -> Result<Option<Self>> {
        let Some(bytes) = images.read(COPY_RECORD, RECORD_LIMIT)? else { return Ok(None) };
        Self::parse(&bytes, &images.path().join(COPY_RECORD)).map(Some)
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let refuse = |reason: String| Error::BadRun { path: PathText(path.into()), reason };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let not_ours = |error: serde_json::Error| refuse(format!("it is not a record of fsnap: {error}"));
        let Versioned { version } = serde_json::from_slice(bytes).map_err(not_ours)?;
        if version > VERSION {
            return Err(refuse(format!("it has version {version}; this fsnap reads up to {VERSION}")));
        }
        serde_json::from_slice(bytes).map_err(not_ours)
    }
}

/// All runs of a state directory.
#[derive(Debug, Clone)]
pub struct Runs {
    state: PathBuf,
}

/// How it stands with a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Somebody is about to start it.
    Starting,
    /// It runs.
    Running {
        /// What waits for its processes.
        init: ProcessId,
        /// The root of its tree, if that has not ended.
        root: Option<ProcessId>,
    },
    /// It runs in a pid namespace that does not show from here.
    Elsewhere,
    /// It is the run that this process is one of.
    Within,
    /// All its processes have ended.
    Ended(Ended),
}

/// A run, and how it stood when it was looked at.
#[derive(Debug, Clone)]
pub struct Run {
    /// What it is.
    pub record: RunRecord,
    /// How it stood.
    pub state: RunState,
    place: PathBuf,
}

/// The directory of a run that is being started, or of a restore that is under way, locked.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    lock: File,
    container: Option<Container>,
    note: Option<PathBuf>,
}

impl Runs {
    /// Those of the state directory `state`.
    pub fn of(state: &Path) -> Self {
        Self { state: state.into() }
    }

    fn dir(&self) -> PathBuf {
        self.state.join("runs")
    }

    /// Where every run finds its own log: a path that is there for all of them.
    pub fn output(&self) -> PathBuf {
        self.state.join(OUTPUT)
    }

    /// All of them, by name; each may be unreadable by itself.
    pub fn list(&self) -> Result<Vec<Result<Run>>> {
        let dir = self.dir();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context("read the directory", &dir),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse::<Name>().ok());
        let mut names: Vec<Name> = names.collect();
        names.sort();
        Ok(names.into_iter().filter_map(|name| self.find(&name).transpose()).collect())
    }

    /// The run of that name.
    pub fn find(&self, name: &Name) -> Result<Option<Run>> {
        let place = self.dir().join(name.as_str());
        let path = place.join(RUN_RECORD);
        let record = match fs::read(&path) {
            Ok(bytes) => RunRecord::parse(&bytes, &path)?,
            // It is not begun, or it is being removed.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("read", &path),
        };
        let state = match state_of(&place) {
            RunState::Elsewhere if self.is_within(&place) => RunState::Within,
            state => state,
        };
        Ok(Some(Run { state, record, place }))
    }

    /// Whether this process is one of the run with the directory `place`: where all runs see their own output, it sees that one's.
    fn is_within(&self, place: &Path) -> bool {
        let identity = |path: PathBuf| fs::metadata(path).map(|found| (found.dev(), found.ino()));
        let outputs = (identity(self.output()), identity(place.join(OUTPUT)));
        matches!(outputs, (Ok(seen), Ok(its)) if seen == its)
    }

    /// The run of that name, which must be there.
    pub fn get(&self, name: &Name) -> Result<Run> {
        let found = self.find(name)?;
        let near =
            || self.list().unwrap_or_default().into_iter().flatten().map(|run| run.record.name.to_string()).collect();
        found.ok_or_else(|| Error::NoSuchRun { name: name.to_string(), near: near() })
    }

    /// Makes the directory of a new run; what is left of an ended one of that name goes.
    pub fn create(&self, record: &RunRecord) -> Result<Place> {
        let (dir, output) = (self.dir(), self.output());
        for dir in [&dir, &output] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).context("make the directory", dir)?;
        }
        let _alone = self.alone()?;
        let path = dir.join(record.name.as_str());
        self.refuse_taken(&record.name)?;
        remove(&path)?;
        let note = self.note_start(&record.name)?;
        fs::DirBuilder::new().mode(0o700).create(&path).context("make the directory", &path)?;
        let lock = File::open(&path).context("open", &path)?;
        lock.lock().context("lock", &path)?;
        let place = Place { path, lock, container: None, note };
        let output = place.path.join(OUTPUT);
        fs::create_dir(&output).context("make the directory", &output)?;
        let log = output.join(LOG);
        beneath::open_root(&output)
            .and_then(|dir| beneath::create_file(dir, LOG.as_ref(), 0o600))
            .context("make", &log)?;
        // First, so that there is no run that looks like one of which somebody was told.
        place.write_untold(None)?;
        place.write(RUN_RECORD, record)?;
        Ok(place)
    }

    /// Makes sure that no run of that name has not ended.
    pub fn refuse_taken(&self, name: &Name) -> Result<()> {
        let path = self.dir().join(name.as_str());
        refuse_half_done(&path, name)?;
        if path.exists() && !matches!(state_of(&path), RunState::Ended(_)) {
            let by = Some("`fsnap ps` lists the runs".to_owned());
            return Err(Error::NameTaken { what: "the run", name: name.clone(), by });
        }
        Ok(())
    }

    /// Waits for others that make or remove runs: two do not take away what the other has begun under the same name.
    fn alone(&self) -> Result<File> {
        let dir = self.dir();
        let all = File::open(&dir).context("open", &dir)?;
        all.lock().context("lock", &dir)?;
        Ok(all)
    }

    /// Removes what is left of a run that has ended; one whose start was cut short is for recovery to undo.
    pub fn remove(&self, name: &Name) -> Result<()> {
        // One whose record cannot be read is removed like any other.
        let is_there = || match self.get(name) {
            Err(Error::BadRun { .. }) => Ok(()),
            found => found.map(drop),
        };
        is_there()?;
        let _alone = self.alone()?;
        is_there()?;
        let place = self.dir().join(name.as_str());
        match state_of(&place) {
            RunState::Ended(_) => refuse_half_done(&place, name).and_then(|()| remove(&place)),
            _ => Err(Error::RunLives { name: name.clone() }),
        }
    }
}

/// Makes sure that what is left in `place` is not of a start that was cut short: the mark knows the branch that was made for it.
fn refuse_half_done(place: &Path, name: &Name) -> Result<()> {
    match Untold::read(place)? {
        Some(_) if !is_locked(place) => Err(Error::RunHalfDone { name: name.clone() }),
        _ => Ok(()),
    }
}

fn remove(place: &Path) -> Result<()> {
    match fs::remove_dir_all(place) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context("remove", place),
        _ => Ok(()),
    }
}

fn state_of(place: &Path) -> RunState {
    let noted = Init::read(place);
    match noted.as_ref().map(|init| init.find(place)) {
        Some(Whereabouts::Here(init)) => {
            let same_pids = noted.as_ref().is_some_and(|noted| noted.id() == init);
            return RunState::Running { init, root: root_of(place, init, same_pids) };
        }
        Some(Whereabouts::Elsewhere) => return RunState::Elsewhere,
        Some(Whereabouts::Nowhere) | None if is_locked(place) => return RunState::Starting,
        Some(Whereabouts::Nowhere) | None => {}
    }
    // Nothing ran before its root was recorded, or nobody knows.
    let ran = noted.filter(|_| place.join(ROOT).exists());
    RunState::Ended(ran.map_or(Ended::Unknown, |init| init.told_end(place)))
}

/// The recorded root; if whoever would have recorded it was killed, the one child that the init has.
fn root_of(place: &Path, init: ProcessId, same_pids: bool) -> Option<ProcessId> {
    let recorded = fs::read(place.join(ROOT)).ok().and_then(|b| serde_json::from_slice::<Option<ProcessId>>(&b).ok());
    if let Some(None) = recorded {
        return None;
    }
    if let Some(root) = recorded.flatten().filter(|root| root.is_alive()) {
        return Some(root);
    }
    if same_pids && recorded.flatten().is_some() {
        // It has ended. What it started at once, and left behind, has the same start time.
        return None;
    }
    let tree = Tree::of_pid(init.pid).ok()?;
    let mut children = tree.members().filter(|member| member.parent == init.pid).map(|member| member.id);
    match recorded.flatten() {
        // It was recorded in another pid namespace, and has another pid here.
        Some(root) => children.find(|child| child.start_time == root.start_time),
        None => children.next().filter(|_| children.next().is_none()),
    }
}

impl Place {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its stages complain.
    pub fn start_log(&self) -> PathBuf {
        self.path.join("start.log")
    }

    /// That branch is about to be recorded, for it alone.
    pub fn branch_is_recorded(&self, branch: &Branch) -> Result<()> {
        self.write_untold(Some(branch))
    }

    fn write_untold(&self, branch: Option<&Branch>) -> Result<()> {
        self.write(UNTOLD, &Untold::new(branch, self.container.clone())?)
    }

    /// A descriptor for a program that works on it: if this one is killed, nobody takes it for abandoned before that program has ended, too.
    ///
    /// Every program that is started inherits it, until it is dropped.
    pub fn keep_locked(&self) -> Result<OwnedFd> {
        rustix::io::dup(&self.lock).map_err(std::io::Error::from).context("keep locked", &self.path)
    }

    /// It runs: records the root of its tree, which may have ended already. From now on it is not undone when this program is killed.
    pub fn started(&self, root: Option<ProcessId>) -> Result<()> {
        self.write(ROOT, &root)?;
        self.told()
    }

    /// Somebody was told of it: from now on it is not undone when this program is killed.
    pub fn told(&self) -> Result<()> {
        let untold = self.path.join(UNTOLD);
        fs::remove_file(&untold).context("remove", &untold)?;
        self.forget_note();
        Ok(())
    }

    /// It does not run, or is no run and was told of: removes everything.
    pub fn discard(&self) -> Result<()> {
        remove(&self.path)?;
        self.forget_note();
        Ok(())
    }

    /// One that stays goes with the next command.
    fn forget_note(&self) {
        if let Some(note) = &self.note {
            let _ = fs::remove_file(note);
        }
    }

    fn write(&self, name: &str, content: &impl Serialize) -> Result<()> {
        let (unfinished, path) = (self.path.join(format!("{name}.new")), self.path.join(name));
        let bytes = serde_json::to_vec_pretty(content).map_err(std::io::Error::other).context("write", &path)?;
        fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, &path)).context("write", &path)
    }
}

impl Run {
    /// Waits until nobody else saves it, and keeps others from it as long as what is returned is there.
    ///
    /// The engine traces the processes, and one process cannot be traced by two. The record carries the lock, since one on the directory says
    /// that the run is being started.
    fn begin_saving(&self) -> Result<File> {
        let record = self.place.join(RUN_RECORD);
        let file = File::open(&record).context("open", &record)?;
        file.lock().context("lock", &record)?;
        Ok(file)
    }

    /// Opens its log. The processes could have put anything in its place: it is a regular file, or an error.
    pub fn log(&self) -> Result<File> {
        let output = self.place.join(OUTPUT);
        beneath::open_root(&output)
            .and_then(|dir| beneath::open_file(dir, LOG.as_ref()))
            .context("read", output.join(LOG))
    }

    /// The init and the root of its tree; an error if it does not run.
    pub fn running(&self) -> Result<(ProcessId, ProcessId)> {
        match self.state {
            RunState::Running { init, root: Some(root) } => Ok((init, root)),
            RunState::Running { root: None, .. } => Err(Error::RunHasNoRoot { name: self.record.name.clone() }),
            RunState::Starting => Err(Error::RunStarting { name: self.record.name.clone() }),
            RunState::Elsewhere => Err(Error::RunElsewhere { name: self.record.name.clone() }),
            RunState::Within => Err(Error::RunAround { name: self.record.name.clone() }),
            RunState::Ended(_) => Err(Error::RunEnded { name: self.record.name.clone() }),
        }
    }

    /// The mounts that are its own, by the kernel's numbers: its scratch places, which a checkpoint saves with its processes, and
    /// the one with its log.
    pub fn own_mounts(&self) -> Result<BTreeSet<u64>> {
        let (init, _) = self.running()?;
        let mounts = processes::uncovered(init).context("read the mounts of the run", self.record.name.as_str())?;
        let RunRecord { confinement, volumes, .. } = &self.record;
        // Instead of a scratch place there may be what was asked for.
        let others = || confinement.writable.iter().chain(volumes.iter().map(|volume| &volume.at));
        let is_own = |at: &PathText, fstype: &[u8]| match &confinement.output == at {
            true => true,
            false => {
                fstype == SCRATCH_TYPE.as_bytes()
                    && confinement.scratch.contains(at)
                    && others().all(|other| other != at)
            }
        };
        let own = mounts.into_iter().filter(|mount| is_own(&PathText(mount.point.clone()), &mount.fstype));
        Ok(own.map(|mount| mount.id).collect())
    }
}

/// Reads to the end of what there is.
pub fn read_on(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).context("read", "the log of the run")?;
    Ok(bytes)
}
