//! The sealed states that this process has open: each of them once, however many trees lie over it.
//!
//! A branch of a branch's checkpoint lies over a chain of states. If each tree opened its whole chain for itself, a chain of `n`
//! branches would have `n²/2` states open, with the descriptors of each. A state never changes, so that all can read the same one; it is
//! closed when the last of them lets go.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use fsnap_backend::{Dir, Result};

/// Which state is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct State {
    /// The store of its tree.
    pub(super) tree: PathBuf,
    /// Of that store: another one may lie there later.
    pub(super) identity: String,
    pub(super) layer: u64,
}

static OPEN: Mutex<Option<HashMap<State, Weak<dyn Dir>>>> = Mutex::new(None);

/// The root of that state; `open` opens it where nobody has it open.
pub(super) fn state(state: State, open: impl FnOnce() -> Result<Arc<dyn Dir>>) -> Result<Arc<dyn Dir>> {
    if let Some(found) = known(|known| known.get(&state).and_then(Weak::upgrade)) {
        return Ok(found);
    }
    // With no lock, for what lies below is opened by this way, too.
    let opened = open()?;
    Ok(known(|known| match known.get(&state).and_then(Weak::upgrade) {
        // Somebody else was faster.
        Some(found) => found,
        None => {
            known.retain(|_, open| open.strong_count() > 0);
            known.insert(state, Arc::downgrade(&opened));
            opened.clone()
        }
    }))
}

fn known<T>(act: impl FnOnce(&mut HashMap<State, Weak<dyn Dir>>) -> T) -> T {
    act(OPEN.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}
