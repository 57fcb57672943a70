//! Takes a checkpoint: begin while the processes run, take in the [`Window`] in which they are frozen, seal when they run again.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use fsnap_backend::{Backend, Source};

use super::{Coordinator, Target, Window, adopt, side_by_side};
use crate::catalog::{
    Attending, Intent, IntentId, IntentLock, PendingCheckpoint, Plan, PlannedMember, SearchFile, Taken,
};
use crate::checkpoint::{Checkpoint, CheckpointId, EngineImages};
use crate::failpoint;
use crate::name::Name;
use crate::processes::{AuditRules, ProcessId, Tree};
use crate::progress::Work;
use crate::quiesce::FreezeRecord;
use crate::volume::StoreRecord;
use crate::{Error, Result};

/// What a checkpoint is to be.
#[derive(Debug, Default)]
pub struct Request {
    /// The volumes, by [`Coordinator::targets`] or its relatives.
    pub targets: Vec<Target>,
    /// What the user says of it.
    pub message: String,
    /// Tags to be set when it is sealed.
    pub tags: Vec<Name>,
    /// The engine's image directory.
    pub engine: Option<EngineImages>,
    /// The engine's process; `None` if fsnap itself keeps the processes frozen.
    pub owner: Option<ProcessId>,
    /// The root of the process tree.
    pub tree: Option<ProcessId>,
    /// The processes whose files without names are kept ahead, while they run.
    pub processes: Option<Tree>,
    /// The engine was told to leave files without names out of its images.
    pub external: bool,
    /// What is done about what the processes can write to besides.
    pub audit: AuditRules,
}

/// A checkpoint that was begun and belongs to this process.
#[derive(Debug)]
pub struct Begun {
    pub(super) id: IntentId,
    pub(super) lock: IntentLock,
    pub(super) pending: PendingCheckpoint,
    pub(super) taken: Option<Taken>,
}

impl Begun {
    /// What was planned.
    pub fn pending(&self) -> &PendingCheckpoint {
        &self.pending
    }

    /// Whether everything was taken: it only has to be sealed.
    pub fn may_be_taken(&self) -> bool {
        self.lock.note().symlink_metadata().is_ok()
    }

    /// The file for the answer to who else was writing, where that is not waited for while processes are frozen.
    pub fn begin_search(&self) -> Result<SearchFile> {
        Ok(self.lock.begin_search()?)
    }

    /// Opens the socket at which this process, or a child of it, stands by to take the snapshots.
    ///
    /// `None` if no engine's hook can be called for it.
    pub fn attend(&self) -> Result<Option<Attending>> {
        Ok(self.pending.engine.as_ref().map(|images| self.lock.attend(images)).transpose()?)
    }
}

/// The lock by which it belongs to this process.
impl AsFd for Begun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

impl Coordinator {
    /// Plans a checkpoint, records the plan durably, and does all that can be done while the processes run.
    ///
    /// All syncing of fsnap's own happens here.
    pub fn begin(&self, request: Request) -> Result<Begun> {
        let Request { targets, message, tags, engine, owner, tree, processes, external, audit } = request;
        if targets.is_empty() {
            let why = "there is no volume to take a snapshot of: register one with `fsnap init DIR`";
            return Err(Error::NothingToTake { why: why.into() });
        }
        self.refuse_taken(&tags)?;
        let branch = one_line_of_work(&targets)?;
        let mut members = Vec::with_capacity(targets.len());
        for target in targets {
            let store = self.store(&target.store)?;
            let at = adopt(store.as_ref(), &target.volume, &target.path, &target.identity)
                .and_then(|volume| self.reserve(store.as_ref(), Source::Volume(&volume)))
                .map_err(|error| error.at_member(&target.volume))?;
            members.push(target.planned(at));
        }
        members.sort_by(|a, b| a.volume.cmp(&b.volume));
        let pending = PendingCheckpoint {
            id: new_id()?,
            branch,
            message,
            tags,
            engine,
            owner,
            tree,
            boot: boot_id()?,
            freeze: None,
            members,
            pinned: false,
            audit,
            external,
        };
        failpoint::hit("begin:reserved");
        let (id, lock) = self.catalog.begin(&Intent::Checkpoint(Box::new(pending.clone())))?;
        failpoint::hit("begin:recorded");
        let begun = Begun { id, lock, pending, taken: None };
        match self.write_plan(&begun).and_then(|()| self.prime(&begun, processes.as_ref())) {
            Ok(()) => Ok(begun),
            Err(error) => Err(self.give_up(begun, error)),
        }
    }

    /// Leaves the plan to another process, which takes the snapshots: the engine's next hook.
    fn write_plan(&self, begun: &Begun) -> Result<()> {
        if begun.pending.engine.is_none() {
            return Ok(());
        }
        let plan = Plan { pending: begun.pending.clone(), stores: self.stores_of(begun)? };
        Ok(begun.lock.write_plan(&plan)?)
    }

    /// The stores of the planned members, each once.
    pub fn stores_of(&self, begun: &Begun) -> Result<Vec<StoreRecord>> {
        let mut stores = BTreeMap::new();
        for member in &begun.pending.members {
            stores.extend(self.catalog.store(&member.store)?.map(|store| (store.identity.clone(), store)));
        }
        Ok(stores.into_values().collect())
    }

    /// Flushes and copies ahead once more; the processes still run.
    pub fn prime(&self, begun: &Begun, processes: Option<&Tree>) -> Result<()> {
        let members = self.open_members(&begun.pending)?;
        let work = self.begin_work(Work::Priming, members.len());
        side_by_side(&members, |(store, member)| {
            adopt(store.as_ref(), &member.volume, &member.path, &member.identity)
                .and_then(|volume| Ok(store.prime(&volume, &member.at)?))
                .map_err(|error| error.at_member(&member.volume))?;
            failpoint::hit("begin:primed");
            work.step();
            Ok(())
        })?;
        if let Some(tree) = processes {
            self.prime_unlinked(&begun.pending, tree)?;
        }
        Ok(())
    }

    /// Finds the checkpoint that was begun for the engine's images in that directory, and locks it, when whoever works on it has let go.
    pub fn begun_in(&self, images: &EngineImages) -> Result<Option<Begun>> {
        let is_wanted =
            |intent: &Intent| matches!(intent, Intent::Checkpoint(pending) if pending.engine.as_ref() == Some(images));
        for (id, _) in self.catalog.intents()?.into_iter().filter(|(_, intent)| is_wanted(intent)) {
            let lock = self.catalog.lock_intent_in_turn(id)?;
            // Whoever had the lock may have sealed it, or undone it.
            match self.catalog.intent(id)? {
                Some(Intent::Checkpoint(pending)) => {
                    return Ok(Some(Begun { id, lock, pending: *pending, taken: None }));
                }
                _ => lock.finish(),
            }
        }
        Ok(None)
    }

    /// Takes back what was begun or taken for an engine that has failed, whether it is sealed by now or not; `id` is how the engine's
    /// hook called it.
    ///
    /// Requires that this coordinator has recovered nothing since: that would have sealed it.
    pub fn take_back(&self, images: &EngineImages, id: Option<CheckpointId>) -> Result<()> {
        if let Some(begun) = self.begun_in(images)? {
            return self.cancel(begun);
        }
        let found = id.map(|id| self.catalog.checkpoint(&id)).transpose()?.flatten();
        match found.filter(|checkpoint| checkpoint.engine.as_ref() == Some(images)) {
            Some(checkpoint) => self.remove_checkpoint(&checkpoint.id).map(drop),
            None => Ok(()),
        }
    }

    /// Records what fsnap is about to stop, durably, before it is stopped.
    pub fn record_freeze(&self, window: &mut Window, freeze: FreezeRecord) -> Result<()> {
        let begun = &mut window.begun;
        begun.pending.freeze = Some(freeze);
        self.catalog.update(begun.id, &Intent::Checkpoint(Box::new(begun.pending.clone())))?;
        Ok(())
    }

    /// Opens all that will be needed while the processes are frozen, before they are.
    pub fn window(&self, begun: Begun) -> Result<Window> {
        let stores = begun.pending.members.iter().map(|member| self.store(&member.store)).collect();
        match stores {
            Ok(stores) => Ok(Window::new(begun, stores)),
            Err(error) => Err(self.give_up(begun, error)),
        }
    }

    /// Makes what was taken durable, and puts the checkpoint in the place of its intent.
    ///
    /// The processes run again. When a member turns out not to be whole, everything is undone. A store may be away for the moment:
    /// then the intent stays, and the next recovery tries again.
    pub fn seal(&self, begun: Begun) -> Result<Checkpoint> {
        let members = self.open_members(&begun.pending)?;
        match self.put_in_place(&begun, &members) {
            Ok(checkpoint) => {
                begun.lock.finish();
                Ok(checkpoint)
            }
            Err(error) if is_lost(&error) => Err(self.give_up(begun, error)),
            Err(error) => Err(error),
        }
    }

    /// Seals, or undoes everything: nothing comes later of what a user was told has failed.
    ///
    /// For processes that run on in any case. What an engine may have ended is left to [`Self::seal`].
    pub fn seal_or_undo(&self, begun: Begun) -> Result<Checkpoint> {
        match self.open_members(&begun.pending).and_then(|members| self.put_in_place(&begun, &members)) {
            Ok(checkpoint) => {
                begun.lock.finish();
                Ok(checkpoint)
            }
            // Without the note the next recovery undoes it, should that not succeed now.
            Err(error) => Err(error.and_undo(self.cancel(begun))),
        }
    }

    fn put_in_place(&self, begun: &Begun, members: &[OpenMember<'_>]) -> Result<Checkpoint> {
        let Some(taken) = &begun.taken else {
            return Err(Error::NothingToTake { why: "no snapshot was taken".into() });
        };
        let work = self.begin_work(Work::Settling, members.len());
        let settled = side_by_side(members, |(store, member)| {
            let settled = store.settle(&member.at).map_err(|error| Error::from(error).at_member(&member.volume))?;
            failpoint::hit("seal:settled");
            work.step();
            Ok(settled)
        });
        drop(work);
        let settled = settled?;
        self.settle_kept(&begun.pending, &taken.kept)?;
        let mut members = taken.members.clone();
        for (member, snapshot) in members.iter_mut().zip(settled) {
            member.snapshot = snapshot;
        }
        let checkpoint = Checkpoint {
            id: begun.pending.id,
            parent: self.parent(&begun.pending)?,
            branch: begun.pending.branch.clone(),
            time: taken.time,
            message: begun.pending.message.clone(),
            engine: begun.pending.engine.clone(),
            members,
            pinned: begun.pending.pinned,
            kept: taken.kept.clone(),
        };
        failpoint::hit("seal:before");
        self.catalog.seal(begun.id, &checkpoint, &begun.pending.tags, taken.tree.as_ref())?;
        failpoint::hit("seal:after");
        Ok(checkpoint)
    }

    /// Undoes a checkpoint that was begun, and returns `error` with what went wrong in the undoing.
    pub fn give_up(&self, begun: Begun, error: Error) -> Error {
        error.and_undo(self.undo(begun.id, begun.lock))
    }

    fn cancel(&self, begun: Begun) -> Result<()> {
        begun.lock.remove_taken()?;
        self.undo(begun.id, begun.lock)
    }

    /// Deletes what an intent may have made, and then the intent.
    pub(super) fn undo(&self, id: IntentId, lock: IntentLock) -> Result<()> {
        failpoint::hit("undo:before");
        if let Some(doomed) = self.catalog.abandon(id)? {
            failpoint::hit("undo:abandoned");
            self.delete(&doomed)?;
            failpoint::hit("undo:deleted");
            self.catalog.drop_intent(id)?;
        }
        lock.finish();
        Ok(())
    }

    fn open_members<'a>(&self, pending: &'a PendingCheckpoint) -> Result<Vec<OpenMember<'a>>> {
        pending.members.iter().map(|member| Ok((self.store(&member.store)?, member))).collect()
    }

    /// The newest checkpoint on the same line of work with a volume in common; for the first of a branch, the
    /// checkpoint that the branch grew from.
    fn parent(&self, pending: &PendingCheckpoint) -> Result<Option<CheckpointId>> {
        let volumes: Vec<&Name> = pending.members.iter().map(|member| &member.volume).collect();
        if pending.pinned {
            return Ok(None);
        }
        if let Some(tip) = self.catalog.tip(pending.branch.as_ref(), &volumes)? {
            return Ok(Some(tip));
        }
        let Some(name) = &pending.branch else { return Ok(None) };
        Ok(self.catalog.branch(name)?.map(|branch| branch.checkpoint))
    }
}

/// A planned member, with its store.
type OpenMember<'a> = (Arc<dyn Backend>, &'a PlannedMember);

/// An id that no other checkpoint has.
pub(super) fn new_id() -> Result<CheckpointId> {
    CheckpointId::random().map_err(|source| Error::Io { action: "make", object: "an id".into(), source })
}

/// The one branch that the targets are on, if any: a checkpoint belongs to one line of work.
fn one_line_of_work(targets: &[Target]) -> Result<Option<Name>> {
    let mut branch: Option<&Name> = None;
    for target in targets {
        match (branch, &target.branch) {
            (Some(one), Some(other)) if one != other => {
                let why = format!("the volumes are on two branches, {one} and {other}: name the volumes of one");
                return Err(Error::NothingToTake { why });
            }
            (None, found) => branch = found.as_ref(),
            _ => {}
        }
    }
    Ok(branch.cloned())
}

/// Whether a member is not there, as opposed to out of reach.
pub(super) fn is_lost(error: &Error) -> bool {
    use fsnap_backend::ErrorKind;
    match error {
        Error::Backend(error) | Error::NoSnapshot { source: error, .. } => {
            matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Damaged)
        }
        Error::Several(errors) => errors.iter().any(is_lost),
        _ => false,
    }
}

/// The running kernel's boot.
pub(super) fn boot_id() -> Result<String> {
    crate::boot_id().map_err(|source| Error::Io { action: "read", object: "the boot's id".into(), source })
}
