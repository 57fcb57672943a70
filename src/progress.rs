//! What is told of long work while it goes on.
//!
//! The library prints nothing: whoever calls it gives it a [`Progress`] to report to, or none. Nothing is reported while
//! processes are frozen: the [`Window`](crate::coordinator::Window) has nobody to report to, and every piece of work that
//! was begun before it has ended.

use std::fmt;

/// Hears of long work.
///
/// Pieces of work come one after the other, never one in another; steps may come from several threads.
pub trait Progress: fmt::Debug + Send + Sync {
    /// A piece of work begins; `steps` is the number of its steps, if that is known.
    fn begin(&self, work: Work, steps: Option<usize>);

    /// A step is done.
    fn step(&self);

    /// The work has ended, well or not.
    fn end(&self);
}

/// What can take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Work {
    /// Volumes are flushed and copied ahead, while their writers run.
    Priming,
    /// Snapshots are made durable.
    Settling,
    /// Clones of snapshots are made.
    Cloning,
    /// Images are deleted.
    Deleting,
    /// Files are compared.
    Comparing,
    /// Snapshots are read again.
    Verifying,
    /// An engine restores processes.
    Restoring,
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Priming => "copying ahead",
            Self::Settling => "making durable",
            Self::Cloning => "cloning",
            Self::Deleting => "deleting",
            Self::Comparing => "comparing",
            Self::Verifying => "verifying",
            Self::Restoring => "restoring",
        })
    }
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: Work, _: Option<usize>) {}
    fn step(&self) {}
    fn end(&self) {}
}

/// A piece of work that goes on; it ends when this is dropped.
#[derive(Debug)]
pub struct Underway<'a>(&'a dyn Progress);

impl<'a> Underway<'a> {
    /// Tells that the work begins.
    pub fn new(progress: &'a dyn Progress, work: Work, steps: impl Into<Option<usize>>) -> Self {
        progress.begin(work, steps.into());
        Self(progress)
    }

    /// Tells that a step is done.
    pub fn step(&self) {
        self.0.step();
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
