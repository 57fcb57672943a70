//! Contents of small files that the kernel is given before it asks.
//!
//! Who opens a small file reads it, and all of it. Given at the opening, its content takes no round trip of its own. Nor does
//! a look at the attributes afterwards take one: the kernel drops them when it reads from us, for the time of access, and not when it reads
//! what it has. It keeps the content until it wants the room, so that each is given once.
//!
//! Architecture Invariant: a content is given only while nobody else has the file open. Nobody can be writing to it then; and the
//! kernel, which locks the pages that it asks us for, cannot be waiting for us where we wait for it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock};

use fuser::{INodeNo, Notifier};

use super::open::locked;

/// The length up to which contents are given: what the kernel would read ahead at the first reading anyway.
const MOST: u64 = 64 << 10;

/// Gives contents, and knows which were given.
#[derive(Debug)]
pub(super) struct Given {
    notifier: Arc<OnceLock<Notifier>>,
    files: Mutex<HashSet<u64>>,
}

impl Given {
    /// None were given yet. The notifier is set once the session has one.
    pub(super) fn new(notifier: Arc<OnceLock<Notifier>>) -> Self {
        Self { notifier, files: Mutex::default() }
    }

    /// How many bytes the kernel should be given of a file of that length.
    pub(super) fn wanted(&self, number: INodeNo, length: u64) -> Option<u32> {
        let small = (1..=MOST).contains(&length) && !locked(&self.files).contains(&number.0);
        small.then(|| u32::try_from(length).ok()).flatten()
    }

    /// Gives the kernel the whole content of a file. It asks for what it did not take.
    pub(super) fn give(&self, number: INodeNo, content: &[u8]) {
        if let Some(notifier) = self.notifier.get()
            && notifier.store(number, 0, content).is_ok()
        {
            locked(&self.files).insert(number.0);
        }
    }

    /// The kernel has forgotten the file, and with it the content.
    pub(super) fn forgotten(&self, number: INodeNo) {
        locked(&self.files).remove(&number.0);
    }
}
