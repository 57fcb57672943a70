//! Signals that end this process while it makes something that is to be told, or not to be there.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use fsnap::engine::Init;
use rustix::process::{Signal, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::emulate_default_handler;

use super::super::{Failure, say};
use super::sys;

/// From its making on, a signal that ends the process waits while something is [held](Self::hold); at any other time it acts as ever.
///
/// There is one for the life of the process, for what handles the signals stays.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupts(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    /// What is being made; a second signal says its name.
    what: Option<String>,
    /// The directory of the run that it is.
    run: Option<PathBuf>,
    /// The signal that came meanwhile.
    signal: Option<i32>,
}

impl Interrupts {
    /// Begins to listen; what was ignored stays so.
    pub(crate) fn new() -> Result<Self, Failure> {
        let listen = |source| fsnap::Error::Io { action: "listen to", object: "signals".into(), source };
        let ends = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !sys::is_ignored(*signal));
        let mut signals = signal_hook::iterator::Signals::new(ends).map_err(listen)?;
        let all = Self::default();
        let its = all.clone();
        std::thread::spawn(move || signals.forever().for_each(|signal| its.came(signal)));
        Ok(all)
    }

    /// Lets signals wait: `what` is about to be recorded, or is there. The first one ends what runs in the directory `run`.
    pub(crate) fn hold(&self, what: &str, run: Option<PathBuf>) {
        let mut held = self.lock();
        (held.what, held.run) = (Some(what.into()), run);
    }

    /// Lets what runs go on, whatever comes; or tells that a signal waits.
    pub(crate) fn settle(&self) -> bool {
        let mut held = self.lock();
        held.run = None;
        held.signal.is_some()
    }

    /// Whether a signal waits: then what is not told yet is to be undone.
    pub(crate) fn waits(&self) -> bool {
        self.lock().signal.is_some()
    }

    /// Lets signals act again, and the one that waits: everything is told, or undone.
    pub(crate) fn release(&self) {
        let signal = std::mem::take(&mut *self.lock()).signal;
        signal.map(emulate_default_handler);
    }

    fn came(&self, signal: i32) {
        let mut held = self.lock();
        match &held.what {
            Some(what) if held.signal.is_some() => say("error", &format!("interrupted; {what} may be there")),
            Some(_) => {
                held.signal = Some(signal);
                if let Some(init) = held.run.as_deref().and_then(Init::read) {
                    // One that has ended needs no signal.
                    let _ = init.id.open().map(|init| pidfd_send_signal(init, Signal::KILL));
                }
                return;
            }
            None => {}
        }
        // Under the lock: nothing is recorded any more.
        let _ = emulate_default_handler(signal);
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Says that it was undone, since a signal waits.
pub(crate) fn undone(what: &str) -> Failure {
    say("error", &format!("interrupted; {what} was undone"));
    Failure::Reported
}
