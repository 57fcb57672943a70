//! Saves a run, processes and files, by the engine.
//!
//! The image directory is fsnap's own: in `images` of the state directory, locked while it is written. One that nobody holds and
//! no checkpoint names is what a killed fsnap left, and goes when its checkpoint is undone, with the next one of a run, or by `fsnap recover`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{COPY_RECORD, Run, RunRecord};
use crate::catalog::{Access, Catalog, Intent};
use crate::checkpoint::{CheckpointId, EngineImages, PathText};
use crate::coordinator::Coordinator;
use crate::engine::criu::{self, Criu};
use crate::engine::{Action, Dump, Images, Rest, StageCommand, sys};
use crate::error::IoContext;
use crate::processes::{self, AuditRules, Policy, ProcessId, Tree};
use crate::{Error, Result, stores};

/// How to call fsnap as the engine's action script: a program, and the name that it is called by.
#[derive(Debug, Clone)]
pub struct HookCommand {
    /// The program.
    pub program: PathBuf,
    /// Its name.
    pub name: OsString,
}

/// A checkpoint of a run that is to be taken.
#[derive(Debug)]
pub struct RunCheckpoint<'a> {
    /// The run.
    pub run: &'a Run,
    /// The state directory.
    pub state: &'a Path,
    /// The engine.
    pub criu: &'a Criu,
    /// Further arguments for `criu dump`.
    pub args: &'a [OsString],
    /// Files without names that CRIU leaves to fsnap, as it calls them.
    pub external: &'a [String],
    /// What is done about what it can write to besides; what is its own is known.
    pub audit: &'a AuditRules,
    /// How long it may stand, if that is not what the settings say of hooks.
    pub deadline: Option<Duration>,
    /// How to start the stage of the dump.
    pub stage: &'a StageCommand,
    /// How to call the hook.
    pub hook: &'a HookCommand,
    /// What to say of it.
    pub message: &'a str,
    /// How to send away the process that a hook left to stand by for these images.
    pub dismiss: fn(&Path, &EngineImages),
    /// How stores are opened.
    pub stores: &'a stores::Options,
}

/// What files without names need of CRIU: those that have other names get one of these for the time being, and those that fsnap does not keep for it are copied
/// whatever their length.
pub const UNLINKED: [&str; 3] = ["--link-remap", "--ghost-limit", "1024G"];
/// A variable that tells the hook that CRIU leaves files to fsnap.
pub const EXTERNAL: &str = "FSNAP_EXTERNAL";
/// A variable that tells the hook, in JSON, how the audit of a run is made.
pub const AUDIT: &str = "FSNAP_AUDIT";
/// A variable that tells the hook, in seconds, how long the run may stand, if that is not what the settings say.
pub const DEADLINE: &str = "FSNAP_DEADLINE";
/// A variable that tells the hook to wait, before it says that everything was taken, for [`IN_ORDER`] at its standard input: something else is
/// done beside it.
pub const REST: &str = "FSNAP_REST";
/// What it hears when that was done. If it was not, there is nothing.
pub const IN_ORDER: &[u8] = b"in order\n";
/// What a user who is not root has to tell CRIU, else it insists on rights over the whole machine.
const UNPRIVILEGED: &str = "--unprivileged";

/// What CRIU is told of every run, to save it and to restore it.
pub fn engine_args() -> Vec<OsString> {
    let unprivileged = (!rustix::process::geteuid().is_root()).then_some(UNPRIVILEGED);
    // Locks that it holds come back in its copies.
    ["--file-locks"].into_iter().chain(unprivileged).map(OsString::from).collect()
}

/// What came of a call of the hook.
struct Called {
    /// The checkpoint that it named.
    said: Option<CheckpointId>,
    /// Whether all else was in order.
    rest: bool,
}

/// How long another fsnap may be at work on what is to be taken back, or keep the processes frozen.
const PATIENCE: Duration = Duration::from_secs(30);

impl RunCheckpoint<'_> {
    /// Takes it, after those that others are taking, of the run or of its processes; the next command seals it. On failure nothing of it is left, and the run goes on.
    pub fn take(&self) -> Result<CheckpointId> {
        let _turn = self.run.begin_saving()?;
        let (init, root) = self.run.running()?;
        refuse_out_of_reach(root)?;
        // One that is stopped by a signal meanwhile cannot be saved, and one that is traced cannot be stopped.
        let catalog = Catalog::open(self.state, Access::Read, PATIENCE)?;
        let _alone = catalog.turn_to_freeze(&Tree::of_pid(root.pid)?, PATIENCE)?;
        drop(catalog);
        let (dir, _lock) = self.make_directory()?;
        let mut id = None;
        match self.dump(init, root, &dir, &mut id) {
            Ok(id) => Ok(id),
            Err(error) => {
                // What cannot be taken back still needs its images.
                let undone = self.take_back(&dir, id).and_then(|()| fs::remove_dir_all(&dir).context("remove", &dir));
                Err(error.and_undo(undone))
            }
        }
    }

    /// Takes back what the hook began, or took for an engine that failed afterwards.
    fn take_back(&self, dir: &Path, id: Option<CheckpointId>) -> Result<()> {
        let images =
            EngineImages { name: criu::NAME.into(), images: PathText(dir.canonicalize().context("find", dir)?) };
        // It ends with the engine, which this program is, and has the lock until then.
        (self.dismiss)(self.state, &images);
        let mut coordinator = Coordinator::open(self.state, Access::Write, PATIENCE)?;
        coordinator.open_stores_with(*self.stores);
        coordinator.take_back(&images, id)
    }

    /// Has everything saved; `id` becomes what the hook called the checkpoint, also if it fails.
    fn dump(
        &self,
        init: ProcessId,
        root: ProcessId,
        dir: &Path,
        id: &mut Option<CheckpointId>,
    ) -> Result<CheckpointId> {
        let record = dir.join(COPY_RECORD);
        let bytes = serde_json::to_vec_pretty(&self.run.record).map_err(std::io::Error::other);
        bytes.and_then(|bytes| fs::write(&record, bytes)).context("write", &record)?;
        let images = Images::open(dir)?;
        let scratch: Vec<PathBuf> = self.run.record.confinement.scratch.iter().map(|dir| dir.0.clone()).collect();
        let mut args = engine_args();
        args.extend(UNLINKED.map(OsString::from));
        args.extend(self.external.iter().flat_map(|key| ["--external".into(), key.into()]));
        if let Some(terminal) = self.run.record.terminal {
            args.extend(["--external".into(), terminal.key().into()]);
        }
        args.extend_from_slice(self.args);
        let mut failed = None;
        let dump =
            Dump { criu: self.criu, init, root, images: &images, scratch: &scratch, args: &args, stage: self.stage };
        let audit = AuditRules { own: self.run.own_mounts()?, ..self.audit.clone() };
        let audit =
            serde_json::to_string(&audit).map_err(std::io::Error::other).context("write", "the rules of the audit")?;
        let dumped = dump.run(|action, rest| match self.call_hook(action, rest, &images, root, &audit) {
            // The reason is the dump's.
            Ok(Called { rest: false, .. }) => false,
            Ok(Called { said, .. }) => {
                *id = id.or(said);
                // Before the freeze it says which checkpoint it has begun; if it has not, there is nothing to save.
                if action.name() == "pre-dump" && id.is_none() {
                    failed = Some(Error::NothingToTake { why: self.no_volume() });
                }
                failed.is_none()
            }
            Err(error) => {
                failed = Some(error);
                false
            }
        });
        match (dumped, failed, *id) {
            (_, Some(error), _) => Err(error),
            (Err(error), None, _) => Err(error.into()),
            (Ok(()), None, Some(id)) => Ok(id),
            (Ok(()), None, None) => Err(Error::NothingToTake { why: self.no_volume() }),
        }
    }

    fn no_volume(&self) -> String {
        let RunRecord { name, volumes, .. } = &self.run.record;
        let what = match &volumes[..] {
            [] => "start it with `--volume`".to_owned(),
            // It had one when it was started.
            seen => {
                let again = seen.iter().map(|seen| format!("`fsnap init {}`", seen.at));
                format!("{} tells fsnap again what it writes to", again.collect::<Vec<_>>().join(", "))
            }
        };
        format!("the run {name} can write to no registered volume: {what}")
    }

    fn call_hook(
        &self,
        action: Action<'_>,
        rest: Rest<'_>,
        images: &Images,
        root: ProcessId,
        audit: &str,
    ) -> Result<Called> {
        let frozen = matches!(action, Action::Frozen(_));
        let mut command = Command::new(&self.hook.program);
        // When this program dies, the relay fails and the processes run: nothing may be taken any more.
        let mut hook = sys::dies_with_this_thread(&mut command)
            .arg0(&self.hook.name)
            .env("CRTOOLS_SCRIPT_ACTION", action.name())
            .env("CRTOOLS_IMAGE_DIR", format!("/proc/{}/fd/{}", std::process::id(), images.as_fd().as_raw_fd()))
            .env("CRTOOLS_INIT_PID", root.to_string())
            .envs((!self.external.is_empty()).then_some((EXTERNAL, "1")))
            .env(AUDIT, audit)
            .envs(self.deadline.map(|deadline| (DEADLINE, deadline.as_secs_f64().to_string())))
            .env("FSNAP_MESSAGE", self.message)
            .envs(frozen.then_some((REST, "1")))
            .stdin(if frozen { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run", &self.hook.program)?;
        let rest = rest();
        if let Some(mut input) = hook.stdin.take().filter(|_| rest) {
            // One that has ended meanwhile says itself why.
            let _ = input.write_all(IN_ORDER);
        }
        let output = hook.wait_with_output().context("run", &self.hook.program)?;
        if !rest {
            return Ok(Called { said: None, rest });
        }
        if !output.status.success() {
            return Err(Error::HookFailed { said: without_labels(&String::from_utf8_lossy(&output.stderr)) });
        }
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Called { said: said.lines().next().and_then(|line| crate::reference::parse_id(line).ok()), rest })
    }

    /// Makes an empty directory for images, and locks it.
    fn make_directory(&self) -> Result<(PathBuf, File)> {
        let all = directory(self.state);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&all).context("make the directory", &all)?;
        loop {
            let name = hex::encode(crate::random_bytes::<8>().context("make", "a name")?);
            let dir = all.join(name);
            fs::DirBuilder::new().mode(0o700).create(&dir).context("make the directory", &dir)?;
            let lock = File::open(&dir).and_then(|file| file.lock().map(|()| file));
            // A sweep that came between took it for one that nobody works on.
            if dir.exists() {
                return Ok((dir.clone(), lock.context("lock", &dir)?));
            }
        }
    }
}

/// What a command of fsnap said, to be said by this one.
fn without_labels(said: &str) -> String {
    let lines = said.trim_end().lines().map(|line| {
        let unlabelled = line.strip_prefix("fsnap: ").unwrap_or(line);
        unlabelled.strip_prefix("error: ").unwrap_or(unlabelled)
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The engine would find out only while the processes stand.
fn refuse_out_of_reach(root: ProcessId) -> Result<()> {
    let rules = AuditRules { policy: Policy::Ignore, ..AuditRules::default() };
    match processes::observe(&Tree::of_pid(root.pid)?, Vec::new(), &rules)?.out_of_reach() {
        Some((pid, path)) => Err(Error::OutOfReach { pid, path: path.clone() }),
        None => Ok(()),
    }
}

/// As the kernel names it, for that is what hooks record.
fn directory(state: &Path) -> PathBuf {
    state.canonicalize().unwrap_or_else(|_| state.into()).join("images")
}

/// Removes the image directory of a checkpoint that is gone, if fsnap made it.
pub(crate) fn remove_images(state: &Path, images: &PathText) -> Result<()> {
    if images.as_path().parent() != Some(&directory(state)) {
        return Ok(());
    }
    match fs::remove_dir_all(images.as_path()) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context("remove", images.as_path()),
        _ => Ok(()),
    }
}

/// Removes the image directories that a killed fsnap left, and tells how many: nobody works on them, and no checkpoint names them.
pub fn sweep_images(catalog: &Catalog) -> Result<usize> {
    let Ok(entries) = fs::read_dir(directory(catalog.state())) else { return Ok(0) };
    // Locked before it is asked who needs it: whoever made it may have ended, and sealed its checkpoint, meanwhile.
    let free = entries.flatten().filter_map(|entry| {
        let lock = File::open(entry.path()).ok()?;
        lock.try_lock().ok().map(|()| (entry.path(), lock))
    });
    let free: Vec<_> = free.collect();
    if free.is_empty() {
        return Ok(0);
    }
    let mut needed: BTreeSet<PathText> = BTreeSet::new();
    let engines = catalog.checkpoints()?.into_iter().map(|checkpoint| checkpoint.engine);
    needed.extend(engines.flatten().map(|engine| engine.images));
    for (_, intent) in catalog.intents()? {
        if let Intent::Checkpoint(pending) = intent {
            needed.extend(pending.engine.map(|engine| engine.images));
        }
    }
    let mut removed = 0;
    for (dir, _lock) in free.into_iter().filter(|(dir, _)| !needed.contains(&PathText(dir.clone()))) {
        match fs::remove_dir_all(&dir) {
            // An engine whose caller was killed makes files until it hears of that: the next time is early enough.
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
            done => {
                done.context("remove", &dir)?;
                removed += 1;
            }
        }
    }
    Ok(removed)
}
