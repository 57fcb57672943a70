//! The frozen window: what is done while processes are frozen, and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Backend, Consistency};

use super::{Begun, adopt, side_by_side};
use crate::catalog::{self, HiddenNote, Note, PendingCheckpoint, SearchAnswer, SearchFile, Taken};
use crate::checkpoint::{EngineImages, OtherWriters};
use crate::volume::StoreRecord;
use crate::{Error, Result, failpoint, stores};

/// Stands in the place of the writers' names for ever if the search for them does not end.
const NOT_SEARCHED: &str = "perhaps others: the search for them was cut off";

/// A checkpoint that was begun, with all that is needed while its processes are frozen: the database is not.
#[derive(Debug)]
pub struct Window {
    pub(super) begun: Begun,
    /// One for each planned member.
    pub(super) stores: Vec<Arc<dyn Backend>>,
}

impl Window {
    pub(super) fn new(begun: Begun, stores: Vec<Arc<dyn Backend>>) -> Self {
        Self { begun, stores }
    }

    /// Finds the checkpoint that another process began for the engine's images in that directory; `None` if none was.
    ///
    /// `state` is the directory of the catalog, which is not opened.
    pub fn reopen(state: &Path, images: &EngineImages, options: &stores::Options) -> Result<Option<Self>> {
        let wanted = |pending: &PendingCheckpoint| pending.engine.as_ref() == Some(images);
        let Some((id, lock, plan)) = catalog::find_plan(state, wanted)? else { return Ok(None) };
        let taken = match lock.taken()? {
            Note::Whole(taken) => Some(taken),
            Note::Absent | Note::Torn => None,
        };
        Ok(Some(Self::open(Begun { id, lock, pending: plan.pending, taken }, &plan.stores, options)?))
    }

    /// Opens the stores of a checkpoint that was begun, and looks at no database.
    pub fn open(begun: Begun, stores: &[StoreRecord], options: &stores::Options) -> Result<Self> {
        let mut opened = BTreeMap::new();
        for record in stores {
            opened.insert(&record.identity, stores::open(record, options)?);
        }
        let found = |store| opened.get(store).map(Arc::clone);
        let stores = begun.pending.members.iter().map(|member| {
            found(&member.store).ok_or_else(|| {
                let what = format!("the store {}, in the plan of the checkpoint,", member.store);
                Error::Backend(fsnap_backend::Error::NotFound { what })
            })
        });
        let stores = stores.collect::<Result<_>>()?;
        Ok(Self { begun, stores })
    }

    /// Makes ahead what takes a while in the window: the file for the note.
    pub fn prepare(&self) -> Result<()> {
        Ok(self.begun.lock.prepare_taken()?)
    }

    /// What was planned.
    pub fn pending(&self) -> &PendingCheckpoint {
        &self.begun.pending
    }

    /// The file that says that everything was taken; without it, the next command undoes what was.
    pub fn note(&self) -> PathBuf {
        self.begun.lock.note()
    }

    /// What was taken, once everything was.
    pub fn taken(&self) -> Option<&Taken> {
        self.begun.taken.as_ref()
    }

    /// Takes every member's snapshot, side by side; the processes are frozen, or nobody claims that they are (`stopped`).
    ///
    /// `search` is asked afterwards who else has files of the volumes open for writing: one list per planned member, or
    /// `None` when the answer comes later, [here](Self::tell) or in the [search file](Self::begin_search). When this fails, the caller gives the checkpoint up.
    pub fn take(&mut self, stopped: bool, search: impl FnOnce() -> Result<Option<SearchAnswer>>) -> Result<()> {
        failpoint::hit("take:opened");
        let pending = &self.begun.pending;
        let members: Vec<_> = self.stores.iter().zip(&pending.members).collect();
        let snapshots = side_by_side(&members, |(store, member)| {
            let snapshot = adopt(store.as_ref(), &member.volume, &member.path, &member.identity)
                .and_then(|volume| Ok(store.snapshot(&volume, &member.at)?))
                .map_err(|error| error.at_member(&member.volume))?;
            failpoint::hit("take:snapshot");
            Ok(snapshot)
        });
        // Asked in any case: nothing is undone while a search goes on.
        let answer = search();
        let (snapshots, answer) = (snapshots?, answer?);
        let searching = answer.is_none();
        let not_searched = || vec![OtherWriters::in_words(NOT_SEARCHED.to_owned()); members.len()];
        let SearchAnswer { writers, tree } =
            answer.unwrap_or_else(|| SearchAnswer { writers: not_searched(), tree: None });
        let taken = members.iter().zip(snapshots).zip(writers).map(|(((store, plan), snapshot), writers)| {
            let all_stood = stopped && writers.texts.is_empty();
            let consistency = if all_stood { Consistency::PointInTime } else { store.store().capabilities.live };
            plan.taken(snapshot, consistency, writers)
        });
        let (time, members) = (jiff::Timestamp::now(), taken.collect());
        self.begun.taken = Some(Taken { time, members, searching, tree, kept: Vec::new() });
        failpoint::hit("take:all");
        Ok(())
    }

    /// Brings in who else was writing, where that was not waited for while processes were frozen.
    pub fn tell(&mut self, answer: SearchAnswer) {
        if let Some(taken) = &mut self.begun.taken {
            taken.tell(Some(answer));
        }
    }

    /// The file for the answer to who else was writing, where that is not waited for while processes are frozen.
    pub fn begin_search(&self) -> Result<SearchFile> {
        self.begun.begin_search()
    }

    /// Writes down, without syncing, that everything was taken.
    ///
    /// The note does not count before it [appears](HiddenNote::appear). An engine's hook does nothing after that but end, for what
    /// the engine calls a failure must not be noted.
    pub fn write_note(&self) -> Result<HiddenNote> {
        let nothing = || Error::NothingToTake { why: "no snapshot was taken".into() };
        Ok(self.begun.lock.write_taken(self.begun.taken.as_ref().ok_or_else(nothing)?)?)
    }

    /// The processes run again, and the catalog may be used: the checkpoint can be sealed or given up.
    pub fn close(self) -> Begun {
        self.begun
    }

    /// Leaves a noted checkpoint to be sealed by the next command: while the processes are frozen there is no time for it.
    ///
    /// This process must end now. It holds the lock until then, so that nobody seals what it may still take back.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    /// Deletes what was taken, and returns `error` with what went wrong in that.
    ///
    /// The intent stays, and is dropped by the next command.
    pub fn give_up(self, error: Error) -> Error {
        let undone = self.begun.lock.remove_taken().map_err(Error::from).and_then(|()| {
            let members: Vec<_> = self.stores.iter().zip(&self.begun.pending.members).collect();
            self.remove_rooms()?;
            side_by_side(&members, |(store, member)| {
                store.deactivate(&member.at)?;
                Ok(store.delete(&member.at)?)
            })
        });
        error.and_undo(undone.map(drop))
    }
}
