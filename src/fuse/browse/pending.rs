//! Checkpoints that were taken and are not sealed yet: a hook leaves that to the next command, and somebody looks before there is one.
//!
//! They are sealed in the background, so that no look waits for a sync: whoever looks again finds them. What cannot be sealed is told.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Records, Report};
use crate::Result;
use crate::catalog::is_any_taken;
use crate::coordinator::Recovered;

/// Between two looks for notes.
const PAUSE: Duration = Duration::from_secs(1);

/// Looks for them, not too often, and never twice at the same time.
#[derive(Debug, Default)]
pub(super) struct Pending {
    tried: Mutex<Option<Instant>>,
    at_work: Arc<AtomicBool>,
}

impl Pending {
    /// Has what was taken sealed. Returns at once.
    pub(super) fn seal(&self, records: &Records, report: &Arc<Report>) {
        let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
        if tried.is_some_and(|tried| tried.elapsed() < PAUSE) {
            return;
        }
        *tried = Some(Instant::now());
        drop(tried);
        if !is_any_taken(&records.state).unwrap_or(false) || self.at_work.swap(true, Ordering::AcqRel) {
            return;
        }
        let (records, report, at_work) = (records.clone(), report.clone(), self.at_work.clone());
        let sealing = std::thread::Builder::new().name("seal".into()).spawn(move || {
            match seal_taken(&records) {
                Ok(done) => done.iter().for_each(|recovered| {
                    if let Recovered::Postponed { error, .. } = recovered {
                        (report)(error);
                    }
                }),
                Err(error) => (report)(&error),
            }
            at_work.store(false, Ordering::Release);
        });
        if sealing.is_err() {
            self.at_work.store(false, Ordering::Release);
        }
    }
}

fn seal_taken(records: &Records) -> Result<Vec<Recovered>> {
    records.open_to_write()?.seal_taken()
}
