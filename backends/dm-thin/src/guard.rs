//! The guard: a second process that resumes a device when the first one cannot.
//!
//! It is a child that shares nothing with its parent but a pipe and device-mapper's control device. It is told which device is
//! about to be suspended before it is, and that it runs again after it does. At the end of the pipe, which is the end of
//! the parent, it resumes what it was told of last. It is in a session of its own, so that what ends its parent's job
//! does not end it as well; and it has no other file open.
//!
//! [`Guards`] keeps some at hand, since a process is not to be made while others stand: `prime` sees to one for the snapshot that
//! it is called for.

use std::collections::BTreeMap;
use std::io::{self, PipeWriter, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fsnap_backend::Locator;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::dm::Mapper;
use crate::sys::{self, Order};

/// A running guard; told to end, and waited for, when dropped.
#[derive(Debug)]
pub(crate) struct Guard {
    orders: PipeWriter,
    pid: Pid,
}

impl Guard {
    fn start(mapper: &Mapper) -> io::Result<Self> {
        let (listen, orders) = io::pipe()?;
        let pid = sys::fork_guard(mapper.control(), &listen)?;
        Ok(Self { orders, pid })
    }

    fn tell(&self, order: &Order) -> io::Result<()> {
        // In one piece, for it is shorter than what a pipe takes so.
        (&self.orders).write_all(order)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Of one that is gone there is nobody to wait for.
        let _ = self.tell(&sys::END);
        let _ = waitpid(self.pid, None);
    }
}

/// The guards of a store.
#[derive(Debug, Default)]
pub(crate) struct Guards(Mutex<AtHand>);

#[derive(Debug, Default)]
struct AtHand {
    /// For the images that are going to be made.
    ready: BTreeMap<Locator, Guard>,
    /// Their work is done.
    idle: Vec<Guard>,
}

impl Guards {
    fn at_hand(&self) -> MutexGuard<'_, AtHand> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that there is a guard for the snapshot that is to be made at `at`.
    pub(crate) fn prepare(&self, mapper: &Mapper, at: &Locator) -> io::Result<()> {
        let mut at_hand = self.at_hand();
        if !at_hand.ready.contains_key(at) {
            let guard = at_hand.idle.pop().map_or_else(|| Guard::start(mapper), Ok)?;
            at_hand.ready.insert(at.clone(), guard);
        }
        Ok(())
    }

    /// Has the device watched that is about to be suspended for the snapshot at `at`.
    ///
    /// To be [ended](Self::end) when it runs again; a guard that is dropped without that goes with the process.
    pub(crate) fn watch(&self, mapper: &Mapper, at: &Locator, device: &str) -> io::Result<Guard> {
        let order = sys::order(device)?;
        let ready = self.at_hand().ready.remove(at);
        // Somebody may have killed it.
        if let Some(guard) = ready.filter(|guard| guard.tell(&order).is_ok()) {
            return Ok(guard);
        }
        let guard = Guard::start(mapper)?;
        guard.tell(&order)?;
        Ok(guard)
    }

    /// Tells the guard that the device runs again, and keeps it for later.
    pub(crate) fn end(&self, guard: Guard) {
        // One that is gone is of no more use.
        if guard.tell(&sys::NOTHING).is_ok() {
            self.at_hand().idle.push(guard);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_device_mapper_takes_fit_into_an_order() {
        assert_eq!(sys::order("thin").unwrap()[..6], *b"\x04thin\0");
        assert!(sys::order(&"x".repeat(127)).is_ok());
        for bad in ["", &"x".repeat(128)] {
            assert!(sys::order(bad).is_err(), "{bad:?}");
        }
    }
}
