//! Grows a writable branch from a checkpoint.

use std::path::PathBuf;
use std::sync::Arc;

use fsnap_backend::{Backend, Identity, Locator, MountSpec, Source};

use super::checkpoint::{boot_id, is_lost};
use super::{Coordinator, overlay, side_by_side};
use crate::branch::{Branch, BranchMember, Difference, Form};
use crate::catalog::{ImageRef, Intent, IntentId};
use crate::checkpoint::{Checkpoint, CheckpointId, Member, PathText};
use crate::failpoint;
use crate::name::Name;
use crate::progress::Work;
use crate::{Error, Result};

/// One clone or overlay that is to be made.
struct Planned<'a> {
    member: &'a Member,
    store: Arc<dyn Backend>,
    at: Locator,
    overlay: Option<Difference>,
}

impl Coordinator {
    /// Makes the branch `name` from `checkpoint`: one writable clone of every member, or an overlay over it where the
    /// store cannot clone.
    ///
    /// All of it or nothing: when one clone fails, the others are deleted.
    pub fn branch(&self, checkpoint: &Checkpoint, name: &Name) -> Result<Branch> {
        self.branch_and_tell(checkpoint, name, &|_| {})
    }

    /// The same, and calls `on_record` when nothing is left to do but to record it.
    pub fn branch_and_tell(&self, checkpoint: &Checkpoint, name: &Name, on_record: &dyn Fn(&Branch)) -> Result<Branch> {
        if self.catalog.branch(name)?.is_some() {
            return Err(Error::NameTaken { what: "the branch", name: name.clone(), by: None });
        }
        let mut planned = Vec::with_capacity(checkpoint.members.len());
        for member in &checkpoint.members {
            let store = self.store(&member.store)?;
            let can = store.store().capabilities;
            if !can.clones && !can.mountable {
                // The kernel can lay nothing over it.
                return self.branch_to_write_and_tell(checkpoint, name, on_record);
            }
            let (at, overlay) = match can.clones {
                true => (self.reserve(store.as_ref(), Source::Snapshot(&member.snapshot))?, None),
                false => (member.snapshot.at.clone(), Some(self.plan_overlay(name, &member.volume)?)),
            };
            planned.push(Planned { member, store, at, overlay });
        }
        let image = |plan: &Planned<'_>| ImageRef { store: plan.member.store.clone(), at: plan.at.clone() };
        let overlays = planned.iter().filter_map(|plan| Some(plan.overlay.as_ref()?.dir.clone())).collect();
        let images = planned.iter().map(image).collect();
        let mut intent =
            Intent::Branch { name: name.clone(), boot: boot_id()?, images, overlays, checkpoint: Some(checkpoint.id) };
        let (id, lock) = self.catalog.begin(&intent)?;
        failpoint::hit("branch:recorded");
        let grown = self.grow(checkpoint, name, &planned, (id, &mut intent)).and_then(|branch| {
            failpoint::hit("branch:grown");
            on_record(&branch);
            // A power cut that takes the record away leaves the intent and every clone, and with them the branch.
            let durable = !branch.members.iter().all(|member| member.form == Form::Clone);
            // Between the look above and this transaction, the name or the checkpoint may have gone.
            let added = self.catalog.add_branch(id, &branch, durable)?;
            if added { Ok(branch) } else { Err(self.why_no_branch(name, checkpoint)?) }
        });
        match grown {
            Ok(branch) => {
                lock.finish();
                Ok(branch)
            }
            Err(error) => Err(error.and_undo(self.undo(id, lock))),
        }
    }

    /// Why the catalog took no branch of that name, which was free a moment before: somebody else has made one, or has removed the checkpoint.
    pub(super) fn why_no_branch(&self, name: &Name, checkpoint: &Checkpoint) -> Result<Error> {
        Ok(match self.catalog.checkpoint(&checkpoint.id)? {
            Some(_) => Error::NameTaken { what: "the branch", name: name.clone(), by: None },
            None => Error::NoSuchCheckpoint { reference: checkpoint.id.to_string(), near: Vec::new() },
        })
    }

    fn grow(
        &self,
        checkpoint: &Checkpoint,
        name: &Name,
        planned: &[Planned<'_>],
        (id, intent): (IntentId, &mut Intent),
    ) -> Result<Branch> {
        let work = self.begin_work(Work::Cloning, planned.len());
        side_by_side(planned, |plan| {
            if plan.overlay.is_none() {
                plan.store.clone_snapshot(&plan.member.snapshot, &plan.at)?;
            }
            failpoint::hit("branch:cloned");
            work.step();
            Ok(())
        })?;
        drop(work);
        let mut members = Vec::with_capacity(planned.len());
        for plan in planned {
            let mut form = plan.overlay.clone().map_or(Form::Clone, Form::Overlay);
            let (path, identity) = match &plan.overlay {
                Some(overlay) => {
                    let path = self.make_overlay(plan.store.as_ref(), &plan.member.snapshot, overlay)?;
                    failpoint::hit("branch:mounted");
                    (path, self.overlay_identity(overlay)?)
                }
                None => {
                    let path = match plan.store.activate(&plan.at)? {
                        MountSpec::Bind { dir, .. } => dir,
                        spec => {
                            let dir = PathText(self.homes.join(name.as_str()).join(plan.member.volume.as_str()));
                            if let Intent::Branch { overlays, .. } = &mut *intent {
                                overlays.push(dir.clone());
                            }
                            self.catalog.update(id, intent)?;
                            let path = overlay::mount_clone(&spec, dir.as_path())?;
                            failpoint::hit("branch:mounted");
                            form = Form::MountedClone(dir);
                            path
                        }
                    };
                    let identity = plan.store.adopt(&path)?.identity().clone();
                    (path, identity)
                }
            };
            members.push(grown(plan.member, plan.at.clone(), path, identity, form));
        }
        Ok(Branch { name: name.clone(), checkpoint: checkpoint.id, time: jiff::Timestamp::now(), members })
    }

    /// The branch that grew before a power cut took the record of it away; `None` if a clone is missing, or has to be mounted.
    pub(super) fn grown_before_the_power_cut(
        &self,
        name: &Name,
        checkpoint: &CheckpointId,
        images: &[ImageRef],
    ) -> Result<Option<Branch>> {
        let Some(checkpoint) = self.catalog.checkpoint(checkpoint)? else { return Ok(None) };
        let mut members = Vec::with_capacity(images.len());
        for (member, image) in checkpoint.members.iter().zip(images) {
            let store = self.store(&image.store)?;
            let path = match store.activate(&image.at).map_err(Error::from) {
                Ok(MountSpec::Bind { dir, read_only: false }) => dir,
                Ok(_) => return Ok(None),
                Err(error) if is_lost(&error) => return Ok(None),
                Err(error) => return Err(error),
            };
            let identity = store.adopt(&path)?.identity().clone();
            members.push(grown(member, image.at.clone(), path, identity, Form::Clone));
        }
        let whole = members.len() == checkpoint.members.len();
        Ok(whole.then(|| Branch {
            name: name.clone(),
            checkpoint: checkpoint.id,
            time: jiff::Timestamp::now(),
            members,
        }))
    }
}

/// The member's part in a branch.
fn grown(member: &Member, at: Locator, path: PathBuf, identity: Identity, form: Form) -> BranchMember {
    BranchMember {
        volume: member.volume.clone(),
        backend: member.backend.clone(),
        store: member.store.clone(),
        at,
        path: PathText(path),
        identity,
        origin: member.path.clone(),
        form,
        needs: Vec::new(),
    }
}
