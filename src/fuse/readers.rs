//! What the kernel has open of trees that never change, and in which way.
//!
//! The kernel reads a file either through its page cache, asking us for pages, or from a file of ours without asking. One file cannot
//! be open in both ways at once: the first who opens it chooses, and the choice stands until the last has closed it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use fuser::BackingId;

use super::browse::{Listed, Opened};
use super::open::{Names, Table, locked};

/// The length from which passing through pays: registering a file costs as much as a read, and what is read into the page cache of
/// the mount is still there when the file is opened again.
const PASSED_FROM: u64 = 128 << 10;

/// An open file or directory.
#[derive(Debug)]
pub(super) enum Reader {
    File { number: u64, opened: Opened },
    Dir(Names<Listed>),
}

#[derive(Debug)]
struct Way {
    open: u64,
    backing: Option<Arc<BackingId>>,
}

/// All that is open in one mount.
#[derive(Debug, Default)]
pub(super) struct Readers {
    open: Table<Reader>,
    ways: Mutex<HashMap<u64, Way>>,
    /// The kernel may be asked to pass requests through.
    pub(super) passthrough: AtomicBool,
}

impl Readers {
    pub(super) fn get(&self, handle: u64) -> Option<Arc<Reader>> {
        self.open.get(handle)
    }

    pub(super) fn open_dir(&self) -> u64 {
        self.open.add(Reader::Dir(Names::default()))
    }

    /// Opens a file; returns its handle, and the registered file to which its reads are passed through, if they are. Calls `alone` if they
    /// are not, and nobody else has it open nor gets it before that returns.
    pub(super) fn open_file(
        &self,
        number: u64,
        opened: Opened,
        register: impl FnOnce(&File) -> io::Result<BackingId>,
        alone: impl FnOnce(),
    ) -> (u64, Option<Arc<BackingId>>) {
        let mut ways = locked(&self.ways);
        let backing = match ways.entry(number) {
            Entry::Occupied(mut way) => {
                way.get_mut().open += 1;
                way.get().backing.clone()
            }
            Entry::Vacant(way) => {
                let pays = self.passthrough.load(Ordering::Relaxed) && opened.length() >= PASSED_FROM;
                let backing = opened.whole().filter(|_| pays).and_then(|whole| {
                    // Without the privilege it never works; but another file may lie on a lower stack of file systems.
                    let registered = register(whole).map(Arc::new);
                    if registered.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
                        self.passthrough.store(false, Ordering::Relaxed);
                    }
                    registered.ok()
                });
                if backing.is_none() {
                    alone();
                }
                way.insert(Way { open: 1, backing: backing.clone() });
                backing
            }
        };
        drop(ways);
        (self.open.add(Reader::File { number, opened }), backing)
    }

    pub(super) fn close(&self, handle: u64) {
        let Some(reader) = self.open.remove(handle) else { return };
        let Reader::File { number, .. } = &*reader else { return };
        let mut ways = locked(&self.ways);
        if let Entry::Occupied(mut way) = ways.entry(*number) {
            way.get_mut().open -= 1;
            if way.get().open == 0 {
                way.remove();
            }
        }
    }
}
