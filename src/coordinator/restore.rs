//! Brings processes back onto files of the same instant.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use fsnap_backend::MountSpec;
use fsnap_backend::mounts::{self, Mount};
use rustix::fs::{Mode, OFlags};

use super::Coordinator;
use crate::branch::{Branch, Form};
use crate::checkpoint::{Checkpoint, CheckpointId, Member, PathText};
use crate::engine::criu::{self, Criu};
use crate::engine::{self, GivenBack, Images, MountPlan, PidSpace, Restore, Restored, StageCommand, TerminalId};
use crate::error::IoContext;
use crate::mount::Restrictions;
use crate::name::Name;
use crate::progress::Work;
use crate::run::{Place, RunRecord};
use crate::{Error, Result, failpoint};

/// What is to be restored, and how.
#[derive(Debug)]
pub struct RestoreRequest<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// The name of the branch that the processes will work on; it must not exist.
    pub branch: &'a Name,
    /// The engine.
    pub criu: &'a Criu,
    /// Further arguments for it.
    pub args: &'a [OsString],
    /// How fsnap starts itself as a stage of the restore.
    pub stage: &'a StageCommand,
    /// Where the restored pids are valid.
    pub pids: PidSpace,
    /// The directory of the run that the processes shall be, or of the restore.
    pub place: &'a Place,
    /// The run that the processes shall be.
    pub run: Option<RunRequest<'a>>,
}

/// The run that restored processes shall be.
#[derive(Debug, Clone, Copy)]
pub struct RunRequest<'a> {
    /// What it is.
    pub record: &'a RunRecord,
    /// The terminal that was saved, and the one that stands in its place.
    pub terminal: Option<(TerminalId, &'a Path)>,
}

impl Coordinator {
    /// Makes a fresh branch and restores the checkpoint's processes onto it.
    ///
    /// Always a fresh one: the engine changes files in it while it restores. If the restore fails, the branch is
    /// removed. Calls `on_record` when the branch is about to be recorded: whoever ends this process before leaves nothing that stays.
    /// Whoever kills it later leaves what the next recovery undoes, until the caller has [told](Place::told) of it.
    pub fn restore(&self, request: &RestoreRequest<'_>, on_record: &dyn Fn()) -> Result<(Branch, Restored)> {
        let checkpoint = request.checkpoint;
        let images = self.images_of(checkpoint)?;
        let branch = self.branch_and_tell(checkpoint, request.branch, &|branch| {
            // Without it, `fsnap branches` shows what a kill leaves.
            let _ = request.place.branch_is_recorded(branch);
            on_record();
        })?;
        match self.restore_onto(request, &branch, &images) {
            Ok(restored) => Ok((branch, restored)),
            Err(error) => Err(error.and_undo(self.remove_branch(&branch.name))),
        }
    }

    /// The images of a checkpoint, if they are still its own, and of an engine that fsnap can restore with.
    pub fn images_of(&self, checkpoint: &Checkpoint) -> Result<Images> {
        let Some(engine) = &checkpoint.engine else { return Err(Error::NoProcessImage { id: checkpoint.id }) };
        if engine.name != criu::NAME {
            return Err(engine::Error::Unknown { name: engine.name.clone() }.into());
        }
        open_images(checkpoint.id, &engine.images)
    }

    fn restore_onto(&self, request: &RestoreRequest<'_>, branch: &Branch, images: &Images) -> Result<Restored> {
        let (mut mounts, shown) = (Vec::with_capacity(branch.members.len()), self.shown());
        for member in &branch.members {
            // A run tells where its processes see a volume: on a branch, that is not where its files are.
            let seen = request.run.and_then(|run| run.record.volumes.iter().find(|seen| seen.volume == member.volume));
            let at = seen.map_or_else(|| member.origin.0.clone(), |seen| seen.at.0.clone());
            let spec = match member.form {
                // One overlay cannot be mounted twice, nor can what fsnap itself serves: what is mounted is shown there as well.
                Form::Overlay(_) | Form::Layers(_) => {
                    let dir = shown.files_of(branch, member);
                    let dir = dir.ok_or_else(|| Error::NotShown { name: branch.name.clone() })?;
                    MountSpec::Bind { dir, read_only: false }
                }
                Form::Clone | Form::MountedClone(_) => self.store(&member.store)?.activate(&member.at)?,
            };
            let restrictions = Restrictions::of(&at)?;
            mounts.push(MountPlan { spec, at, restrictions });
        }
        let log = self.restore_log(&branch.name);
        if let Some(logs) = log.parent() {
            std::fs::create_dir_all(logs).context("make the directory", logs)?;
        }
        let returned = self.returned(request.checkpoint, branch, &mounts)?;
        let restore = Restore {
            criu: request.criu,
            images,
            mounts: &mounts,
            returned: &returned,
            args: request.args,
            pids: request.pids,
            log: &log,
            stage: request.stage,
            place: request.place.path(),
            confinement: request.run.map(|run| &run.record.confinement),
            terminal: request.run.and_then(|run| run.terminal),
        };
        let _work = self.begin_work(Work::Restoring, None);
        let restored = restore.run()?;
        failpoint::hit("restore:reported");
        // Nobody reads what went well, and a branch would leave it behind.
        let _ = std::fs::remove_file(&log);
        Ok(restored)
    }

    /// Where the engine's log of a restore onto that branch goes.
    pub(super) fn restore_log(&self, branch: &Name) -> PathBuf {
        self.catalog.state().join("log").join(format!("restore-{branch}.log"))
    }

    /// The files that the engine left to fsnap: each comes back in the directory on the branch that it was in, if that is still there.
    fn returned(&self, checkpoint: &Checkpoint, branch: &Branch, mounts: &[MountPlan]) -> Result<Vec<GivenBack>> {
        let mut returned = Vec::new();
        engine::allow_descriptors(checkpoint.kept.len());
        for kept in &checkpoint.kept {
            let Some(external) = &kept.external else { continue };
            let lost = |reason: &str| Error::NotKept { path: kept.place.path.clone(), reason: reason.into() };
            let content = self.open_kept(checkpoint, kept)?.ok_or_else(|| lost("its content is not there"))?;
            let volume = kept.place.volume.as_ref().filter(|volume| volume.is_sound());
            let volume = volume.ok_or_else(|| lost("it was in no volume"))?;
            let member = branch.members.iter().position(|member| member.volume == volume.name);
            let mount = member.and_then(|index| mounts.get(index)).ok_or_else(|| lost("its volume is not there"))?;
            returned.push(GivenBack {
                external: external.clone(),
                content,
                root: mount.at.clone(),
                below: volume.path.0.clone(),
                attributes: kept.attributes.clone(),
            });
        }
        Ok(returned)
    }

    /// Makes sure that an engine which restores from `images` will find the files of that checkpoint: every member's
    /// path shows a branch that grew from it, or the volume itself.
    ///
    /// Images that are no checkpoint of fsnap are `None`, and not checked; images of a checkpoint that this catalog does
    /// not know are refused.
    pub fn check_restore(&self, images: &Images) -> Result<Option<CheckpointId>> {
        let Some(record) = images.record()? else { return Ok(None) };
        let id = crate::reference::parse_id(&record.checkpoint)?;
        let checkpoint = self
            .catalog
            .checkpoint(&id)?
            .ok_or_else(|| Error::NoSuchCheckpoint { reference: id.to_string(), near: Vec::new() })?;
        for member in &checkpoint.members {
            self.check_member(id, member)?;
        }
        Ok(Some(id))
    }

    fn check_member(&self, checkpoint: CheckpointId, member: &Member) -> Result<()> {
        if self.shows_overlay(checkpoint, member)? {
            return Ok(());
        }
        let path = member.path.as_path();
        let found = match self.store(&member.store).and_then(|store| Ok(store.adopt(path)?)) {
            Ok(volume) => volume.identity().clone(),
            // On another file system, the store is not there either.
            Err(error) => {
                let (expected, found) = (self.expected(member), format!("{}: {error}", file_system(path)));
                return Err(Error::WrongFiles { path: member.path.clone(), checkpoint, expected, found });
            }
        };
        if found == member.identity {
            return Ok(());
        }
        let branches = self.catalog.branches()?;
        let mut grown = branches.iter().filter(|branch| branch.checkpoint == checkpoint);
        if grown.any(|branch| branch.members.iter().any(|m| m.volume == member.volume && m.identity == found)) {
            return Ok(());
        }
        let name = branches.iter().find(|branch| branch.members.iter().any(|m| m.identity == found));
        let found = match name {
            Some(branch) => format!("the branch {} of checkpoint {}", branch.name, branch.checkpoint.short()),
            None => found.to_string(),
        };
        let expected = self.expected(member);
        Err(Error::WrongFiles { path: member.path.clone(), checkpoint, expected, found })
    }

    /// Whether the member's path shows an overlay that grew from the checkpoint: not the member's own backend tells.
    fn shows_overlay(&self, checkpoint: CheckpointId, member: &Member) -> Result<bool> {
        for branch in self.catalog.branches_to_mount()? {
            let overlays =
                branch.members.iter().filter(|m| branch.checkpoint == checkpoint && m.volume == member.volume);
            for (found, overlay) in overlays.filter_map(|m| Some((m, m.form.overlay()?))) {
                let Some(keeper) = &overlay.keeper else { continue };
                let shown = self.store(&keeper.store)?.adopt(member.path.as_path());
                if shown.is_ok_and(|shown| *shown.identity() == found.identity) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn expected(&self, member: &Member) -> String {
        format!("volume {} ({}) or a branch of it", member.volume, member.identity)
    }
}

/// What is mounted at a path, for people.
fn file_system(path: &Path) -> String {
    // To open what it is, and no more, waits for nobody: it may be a fifo.
    let place = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let mount = place.ok().and_then(|place| mounts::of_file(place).ok().flatten());
    match mount {
        Some(Mount { fstype, source, .. }) => {
            format!("{} of {}", crate::printable(OsStr::from_bytes(&fstype)), PathText(source))
        }
        None => "something else".into(),
    }
}

/// Opens the image directory, if it still holds the process image of that checkpoint: a later dump may have
/// overwritten it.
fn open_images(id: CheckpointId, dir: &PathText) -> Result<Images> {
    let images = Images::open(dir.as_path())?;
    let found = match images.record()? {
        Some(record) if record.checkpoint == id.to_string() => {
            images.check_owner()?;
            return Ok(images);
        }
        Some(record) => format!("checkpoint {}", crate::printable(record.checkpoint.as_ref())),
        None => "no checkpoint of fsnap".into(),
    };
    Err(Error::ImagesReplaced { id, images: dir.clone(), found })
}
