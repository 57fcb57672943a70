//! Past states of a volume that no engine asked for: listing them, and making one a checkpoint.

use fsnap_backend::{Moment, Source, Volume};

use super::checkpoint::{boot_id, new_id};
use super::{Begun, Coordinator, Target, adopt};
use crate::catalog::{Intent, PendingCheckpoint, PlannedMember, Taken};
use crate::checkpoint::{Checkpoint, Member, OtherWriters};
use crate::processes::AuditRules;
use crate::reference::Past;
use crate::{Error, Result, failpoint};

/// A checkpoint of a past state.
#[derive(Debug)]
pub struct Pinned {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// It was not there before.
    pub fresh: bool,
}

impl Coordinator {
    /// The past states of a volume, by its name or path, that its file system keeps by itself; the oldest first.
    pub fn history(&self, volume: &str) -> Result<Vec<Moment>> {
        let target = self.target_named(volume)?;
        let store = self.store(&target.store)?;
        let opened = adopt(store.as_ref(), &target.volume, &target.path, &target.identity)?;
        Ok(store.history(&opened)?)
    }

    /// Makes a past state of a volume a checkpoint of its own, or finds the one that is of just that.
    ///
    /// The checkpoint has no parent, and what is taken later does not come after it.
    pub fn pin(&self, volume: &str, past: &Past) -> Result<Pinned> {
        let target = self.target_named(volume)?;
        let store = self.store(&target.store)?;
        let opened = adopt(store.as_ref(), &target.volume, &target.path, &target.identity)?;
        let moment = choose(store.history(&opened)?, &target, past)?;
        let snapshots = moment.kept.snapshots();
        if !snapshots.is_empty() {
            for checkpoint in self.catalog.checkpoints()? {
                if let [member] = checkpoint.members.as_slice()
                    && member.store == target.store
                    && snapshots.contains(&member.snapshot.at)
                {
                    return Ok(Pinned { checkpoint, fresh: false });
                }
            }
        }
        let at = self.reserve(store.as_ref(), Source::Volume(&opened))?;
        let time = time_of(&moment)?;
        let planned = target.clone().planned(at);
        let pending = PendingCheckpoint {
            id: new_id()?,
            branch: None,
            message: format!("{}@cp:{}", target.volume, moment.number),
            tags: Vec::new(),
            engine: None,
            owner: None,
            tree: None,
            boot: boot_id()?,
            freeze: None,
            members: vec![planned],
            pinned: true,
            audit: AuditRules::default(),
            external: false,
        };
        let (id, lock) = self.catalog.begin(&Intent::Checkpoint(Box::new(pending.clone())))?;
        failpoint::hit("pin:recorded");
        let mut begun = Begun { id, lock, pending, taken: None };
        match self.pin_member(&begun.pending.members[0], &opened, &moment) {
            Ok(member) => {
                let members = vec![member];
                begun.taken = Some(Taken { time, members, searching: false, tree: None, kept: Vec::new() });
            }
            Err(error) => return Err(self.give_up(begun, error)),
        }
        Ok(Pinned { checkpoint: self.seal(begun)?, fresh: true })
    }

    fn pin_member(&self, planned: &PlannedMember, volume: &Volume, moment: &Moment) -> Result<Member> {
        let store = self.store(&planned.store)?;
        let snapshot = store.pin(volume, moment.number, &planned.at)?;
        failpoint::hit("pin:pinned");
        // Whoever wrote at that moment was not stopped for it.
        Ok(planned.taken(snapshot, store.store().capabilities.live, OtherWriters::default()))
    }

    fn target_named(&self, volume: &str) -> Result<Target> {
        let found = self.targets_named(&[volume.to_owned()])?.pop();
        found.ok_or_else(|| self.no_such_volume(volume))
    }
}

/// The state that is meant: of that number, or the newest that is not younger than the time.
fn choose(history: Vec<Moment>, target: &Target, past: &Past) -> Result<Moment> {
    let span = match (history.first(), history.last()) {
        (Some(first), Some(last)) => {
            let told = |moment: &Moment| Ok::<_, Error>(format!("cp:{} of {}", moment.number, time_of(moment)?));
            format!("the states that are left are {} to {}", told(first)?, told(last)?)
        }
        _ => "no state is left".to_owned(),
    };
    let fits = |moment: &Moment| match past {
        Past::Number(number) => moment.number == *number,
        Past::Time(time) => i64::try_from(moment.seconds).is_ok_and(|seconds| seconds <= time.as_second()),
    };
    // By the number, and not by the time: the clock may have gone back.
    let found = history.into_iter().rev().find(fits);
    found.ok_or_else(|| Error::NoSuchState { volume: target.volume.clone(), past: past.to_string(), span })
}

/// When a state was made.
pub fn time_of(moment: &Moment) -> Result<jiff::Timestamp> {
    let seconds = i64::try_from(moment.seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_err(|error| Error::Io {
        action: "understand",
        object: format!("the time of checkpoint {}", moment.number),
        source: std::io::Error::other(error),
    })
}
