//! Finishes or undoes what was begun by somebody who is gone.

use std::collections::BTreeSet;
use std::fmt;

use fsnap_backend::Locator;

use super::checkpoint::{boot_id, is_lost};
use super::{Begun, Coordinator, adopt};
use crate::catalog::{Doomed, Intent, IntentId, IntentLock, Note, PendingCheckpoint, Taken};
use crate::checkpoint::{CheckpointId, OtherWriters};
use crate::name::Name;
use crate::processes::Tree;
use crate::run::{self, Abandoned, Restores, Runs};
use crate::volume::StoreRecord;
use crate::{Result, engine};

/// What recovery did with one intent.
#[derive(Debug)]
pub enum Recovered {
    /// A checkpoint whose snapshots were all taken is sealed now.
    Sealed(CheckpointId),
    /// A checkpoint that was not taken is undone.
    Undone(CheckpointId),
    /// A branch of which everything was made is recorded: a power cut had taken the record away, or came before it.
    BranchFinished(Name),
    /// A branch that was not finished is removed.
    BranchRemoved(Name),
    /// A removal is finished.
    Removed,
    /// A run that was being started is undone: its processes have ended, and its record and its branch are removed.
    RunUndone(Name),
    /// A restore onto a branch of that name is undone: the processes have ended, and the branch is removed.
    RestoreUndone(Name),
    /// A branch whose files were not visible any more, as after a start of the machine, is mounted again.
    Mounted(Name),
    /// It was done, and the catalog has lost the record of it with the end of its log; what it left is left alone.
    Forgotten {
        /// What was done.
        what: String,
    },
    /// It could not be done now; the next recovery tries again.
    Postponed {
        /// What was begun.
        what: String,
        /// Why it could not be done.
        error: crate::Error,
    },
}

/// An image that this catalog does not record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stray {
    /// The store.
    pub store: StoreRecord,
    /// Where in it.
    pub at: Locator,
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StoreRecord { backend, place, .. } = &self.store;
        write!(f, "{} in the {backend} store at {place}: not recorded in this catalog, and left alone", self.at)
    }
}

impl Coordinator {
    /// Finishes or undoes every intent that nobody works on.
    ///
    /// An engine that is still alive is left its checkpoint, unless everything was taken. Images that the catalog did
    /// not record are never touched.
    pub fn recover(&self) -> Result<Vec<Recovered>> {
        let mut done = self.recover_those(|_, _| true)?;
        self.catalog.sweep_intent_files()?;
        done.extend(self.undo_untold());
        if done.iter().any(|one| matches!(one, Recovered::Undone(_)))
            && let Err(error) = run::sweep_images(&self.catalog)
        {
            done.push(Recovered::Postponed { what: "the removal of a process image".into(), error });
        }
        done.extend(self.mount_branches()?);
        Ok(done)
    }

    /// Undoes the starts of runs, and the restores, whose author was killed before anybody was told.
    fn undo_untold(&self) -> Vec<Recovered> {
        let state = self.catalog.state();
        let (runs, restores) = (Runs::of(state), Restores::of(state));
        let mut done = Vec::new();
        let mut add = |undone: Result<bool>, recovered: Recovered, what: String| match undone {
            Ok(true) => done.push(recovered),
            Ok(false) => {}
            Err(error) => done.push(Recovered::Postponed { what, error }),
        };
        for name in runs.untold() {
            let undone = runs.take_abandoned(&name).and_then(|abandoned| self.undo_abandoned(abandoned));
            add(undone, Recovered::RunUndone(name.clone()), format!("the start of the run {name}"));
        }
        for name in restores.names() {
            let undone = restores.take_abandoned(&name).and_then(|abandoned| self.undo_abandoned(abandoned));
            add(undone, Recovered::RestoreUndone(name.clone()), format!("the restore onto branch {name}"));
        }
        done
    }

    /// Removes the branch that was made for it, and what is left of itself; tells whether there was anything.
    fn undo_abandoned(&self, abandoned: Option<Abandoned>) -> Result<bool> {
        let Some(abandoned) = abandoned else { return Ok(false) };
        if let Some(made) = &abandoned.branch {
            let found = self.catalog.branch(&made.name)?;
            // Another of that name was not made for it.
            if found.as_ref().is_none_or(|found| made.is(found)) {
                abandoned.end_container()?;
                if found.is_some() {
                    self.remove_branch(&made.name)?;
                }
                // Nobody was told of it. Who failed and was killed while it undid itself has removed the branch already.
                let _ = std::fs::remove_file(self.restore_log(&made.name));
            }
        }
        abandoned.remove()?;
        Ok(true)
    }

    /// Seals the checkpoints that were taken and that nobody works on, and leaves all else that is half done alone.
    pub fn seal_taken(&self) -> Result<Vec<Recovered>> {
        self.recover_those(|id, intent| matches!(intent, Intent::Checkpoint(_)) && self.catalog.may_be_taken(id))
    }

    /// Recovers the checkpoints that were left by somebody who is gone, and that froze one of these processes.
    ///
    /// To be asked when it is one's turn to freeze them: whoever recovered such a checkpoint later would set running what is frozen by then.
    pub fn recover_frozen(&self, tree: &Tree) -> Result<Vec<Recovered>> {
        self.recover_those(|_, intent| match intent {
            Intent::Checkpoint(pending) => pending.freeze.as_ref().is_some_and(|freeze| freeze.concerns(tree)),
            Intent::Branch { .. } | Intent::Remove { .. } => false,
        })
    }

    fn recover_those(&self, wanted: impl Fn(IntentId, &Intent) -> bool) -> Result<Vec<Recovered>> {
        let mut done = Vec::new();
        let boot = boot_id()?;
        let mut intents = self.catalog.intents()?;
        intents.retain(|(id, intent)| wanted(*id, intent));
        for (_, intent) in &intents {
            let Intent::Checkpoint(pending) = intent else { continue };
            for member in &pending.members {
                // To open a store sets its volumes going, should a killed call have stopped one. A store that cannot be
                // opened is complained of by whoever needs it.
                let _ = self.store(&member.store);
            }
        }
        for (id, intent) in intents {
            if !self.needs_recovery(id, &intent, &boot) {
                continue;
            }
            let finished = intent.boot() == boot && self.catalog.was_finished(id)?;
            let Some(lock) = self.catalog.lock_intent_in_a_moment(id)? else { continue };
            // Its author may have finished it before the lock was free.
            let Some(intent) = self.catalog.intent(id)? else {
                lock.finish();
                continue;
            };
            if !self.needs_recovery(id, &intent, &boot) {
                continue;
            }
            let what = describe(&intent);
            let recovered = match finished {
                true => self.remember(id, lock, intent),
                false => self.recover_one(id, lock, intent),
            };
            done.push(recovered.unwrap_or_else(|error| Recovered::Postponed { what, error }));
        }
        Ok(done)
    }

    /// The images that the catalog does not record, in the stores that can be opened: another catalog's, perhaps.
    ///
    /// They are shown, and never touched.
    pub fn strays(&self) -> Result<Vec<Stray>> {
        let mut strays = Vec::new();
        for record in self.catalog.stores()? {
            // Whether a store is there is another question: `fsnap volumes` tells.
            let Ok(store) = self.store(&record.identity) else { continue };
            let listed = |store: &dyn fsnap_backend::Backend| -> Result<BTreeSet<Locator>> {
                Ok(store.list()?.into_iter().map(|image| image.at).collect())
            };
            let before = listed(store.as_ref())?;
            let held = self.catalog.held(&record.identity)?;
            if before.is_subset(&held) {
                continue;
            }
            // A volume that fsnap did not make may be listed for as long as the store does not know it.
            for volume in self.catalog.volumes()?.iter().filter(|volume| volume.store == record.identity) {
                // One that is away is no image either way.
                let _ = adopt(store.as_ref(), &volume.name, &volume.path, &volume.identity);
            }
            // What is being removed by another fsnap has lost its hold, and is gone in a moment.
            let after = listed(store.as_ref())?;
            let unheld = before.intersection(&after).filter(|at| !held.contains(*at));
            strays.extend(unheld.map(|at| Stray { store: record.clone(), at: at.clone() }));
        }
        Ok(strays)
    }

    fn needs_recovery(&self, id: IntentId, intent: &Intent, boot: &str) -> bool {
        match intent {
            Intent::Checkpoint(pending) => {
                // In another boot, whoever has the engine's pid and start time is somebody else.
                let is_owned = pending.boot == boot && pending.owner.is_some_and(|owner| owner.is_alive());
                self.catalog.may_be_taken(id) || !is_owned
            }
            Intent::Branch { .. } | Intent::Remove { .. } => true,
        }
    }

    fn recover_one(&self, id: IntentId, lock: IntentLock, intent: Intent) -> Result<Recovered> {
        match intent {
            Intent::Remove { images, overlays, rooms, .. } => {
                self.delete(&Doomed { images, overlays, rooms })?;
                self.catalog.drop_intent(id)?;
                lock.finish();
                Ok(Recovered::Removed)
            }
            Intent::Branch { name, boot, images, checkpoint, .. } => {
                // In the boot in which it was begun, the record would be there.
                if boot != boot_id()?
                    && let Some(checkpoint) = checkpoint
                    && let Some(branch) = self.grown_before_the_power_cut(&name, &checkpoint, &images)?
                    && self.catalog.add_branch(id, &branch, true)?
                {
                    lock.finish();
                    return Ok(Recovered::BranchFinished(name));
                }
                self.undo(id, lock)?;
                Ok(Recovered::BranchRemoved(name))
            }
            Intent::Checkpoint(pending) => self.recover_checkpoint(id, lock, *pending),
        }
    }

    /// Deals with an intent that was finished, and that the catalog has again because the end of its log was lost.
    ///
    /// Nothing is deleted for it: its places may hold by now what came of it, or what others made there. A checkpoint of
    /// which every snapshot is whole is sealed once more.
    fn remember(&self, id: IntentId, lock: IntentLock, intent: Intent) -> Result<Recovered> {
        let what = describe(&intent);
        if let Intent::Checkpoint(pending) = intent
            && let Some(taken) = self.settle_all(&pending)?
        {
            let sealed = self.seal(Begun { id, lock, pending: *pending, taken: Some(taken) })?;
            return Ok(Recovered::Sealed(sealed.id));
        }
        self.catalog.drop_intent(id)?;
        lock.finish();
        Ok(Recovered::Forgotten { what })
    }

    fn recover_checkpoint(&self, id: IntentId, lock: IntentLock, pending: PendingCheckpoint) -> Result<Recovered> {
        // First of all, nobody stays frozen.
        if let Some(freeze) = &pending.freeze {
            freeze.thaw()?;
        }
        let checkpoint = pending.id;
        let taken = match lock.taken()? {
            Note::Whole(mut taken) => {
                if taken.searching {
                    taken.tell(lock.end_of_search(self.catalog.patience())?);
                }
                Some(taken)
            }
            Note::Absent if pending.boot == boot_id()? => None,
            Note::Absent | Note::Torn => self.taken_before_the_power_cut(&pending)?,
        };
        if taken.is_none() {
            self.undo(id, lock)?;
            return Ok(Recovered::Undone(checkpoint));
        }
        match self.seal(Begun { id, lock, pending, taken }) {
            Ok(sealed) => Ok(Recovered::Sealed(sealed.id)),
            // A store that is away, too, can be said to be not there. Whether it was undone, the catalog knows.
            Err(_) if self.catalog.intent(id)?.is_none() => Ok(Recovered::Undone(checkpoint)),
            Err(error) => Err(error),
        }
    }

    /// What the frozen window left, if all of it reached the disk: every member, and the engine's own last file.
    ///
    /// The note that everything was taken is not synced in the frozen window, so that a power cut right after it
    /// leaves an intent that looks unfinished.
    fn taken_before_the_power_cut(&self, pending: &PendingCheckpoint) -> Result<Option<Taken>> {
        let Some(images) = &pending.engine else { return Ok(None) };
        // What it left out of its images was kept by fsnap, and which files those were stood in the note.
        if pending.external {
            return Ok(None);
        }
        if !engine::is_complete(&images.name, images.images.as_path()) {
            return Ok(None);
        }
        self.settle_all(pending)
    }

    /// Every member's snapshot, if all of them are whole.
    fn settle_all(&self, pending: &PendingCheckpoint) -> Result<Option<Taken>> {
        let mut members = Vec::new();
        for plan in &pending.members {
            let store = self.store(&plan.store)?;
            let snapshot = match store.settle(&plan.at).map_err(crate::Error::from) {
                Ok(snapshot) => snapshot,
                Err(error) if is_lost(&error) => return Ok(None),
                Err(error) => return Err(error),
            };
            // Who was frozen and who else wrote was seen when it was taken, and is forgotten: claim no more than is sure.
            members.push(plan.taken(snapshot, store.store().capabilities.live, OtherWriters::default()));
        }
        Ok(Some(Taken { time: jiff::Timestamp::now(), members, searching: false, tree: None, kept: Vec::new() }))
    }
}

fn describe(intent: &Intent) -> String {
    match intent {
        Intent::Checkpoint(pending) => format!("checkpoint {}", pending.id.short()),
        Intent::Branch { name, .. } => format!("branch {name}"),
        Intent::Remove { images, overlays, .. } if images.is_empty() => {
            format!("the removal of {}", count(overlays.len(), "branch's directory", "branches' directories"))
        }
        Intent::Remove { images, .. } => format!("the removal of {}", count(images.len(), "image", "images")),
    }
}

fn count(number: usize, one: &str, several: &str) -> String {
    if number == 1 { format!("one {one}") } else { format!("{number} {several}") }
}
