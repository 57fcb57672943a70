//! Going down a chain of branches, however long it is.
//!
//! Each level asks the one below, and is opened over it, and lets go of it when it is gone. So a question to a chain nests as deep as the chain is long, and
//! a hundred levels take more than the 2 MiB of stack that a thread has. Every so many levels the way goes on in another thread, which has
//! a stack of its own; whoever asked waits for it, so that nothing happens at the same time.

use std::cell::Cell;
use std::io;
use std::panic::resume_unwind;
use std::thread::{Builder, scope};

thread_local! {
    /// How many levels this thread has gone down.
    static LEVELS: Cell<usize> = const { Cell::new(0) };
}

/// A level takes up to 20 KiB, without optimizations.
const MOST: usize = 32;

/// Does something that may come back here for the next level.
pub(super) fn deeper<T: Send>(act: impl FnOnce() -> T + Send) -> io::Result<T> {
    struct Level(usize);
    impl Drop for Level {
        fn drop(&mut self) {
            LEVELS.set(self.0);
        }
    }
    let level = Level(LEVELS.get());
    if level.0 < MOST {
        LEVELS.set(level.0 + 1);
        return Ok(act());
    }
    scope(|scope| {
        let below = Builder::new().name("deeper".into()).spawn_scoped(scope, act)?;
        Ok(below.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}
