//! What the kernel has open, and in which of its ways.
//!
//! The kernel reads and writes a file either through its page cache, asking us for pages, or by passing requests through to
//! a file of ours without asking; one file cannot be open in both ways at once, and all that is passed through must go to
//! the same registered file. Passing through is faster and is chosen where the whole content is one file of the upper that
//! will stay so; not for a file of the lower, because whoever has it open must see what is written after its copy-up.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use fuser::{BackingId, FopenFlags};

use super::open::{Names, Table, locked};
use super::overlay::{Ino, OpenFile};

/// An open file or directory.
#[derive(Debug)]
pub(super) enum Handle {
    File(FileHandle),
    Dir(DirHandle),
}

#[derive(Debug)]
pub(super) struct FileHandle {
    pub(super) ino: Ino,
    pub(super) file: Arc<OpenFile>,
    passed: bool,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct DirHandle {
    pub(super) names: Names<OsString>,
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    /// It was made at this very moment.
    Create,
}

/// How the kernel has a file open.
#[derive(Debug, Default)]
struct Mode {
    cached: u64,
    passed: u64,
    backing: Option<Arc<BackingId>>,
    /// Cached pages are older than what was passed through.
    stale: bool,
    /// The kernel may have attributes from before the file was written past us.
    told: bool,
    /// Pages may have been changed in memory, and not been written to us yet.
    dirty: bool,
}

/// All handles of one mount.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: Table<Handle>,
    modes: Mutex<HashMap<Ino, Mode>>,
    /// Held while the length of a file changes that nobody needs to have open for that.
    pub(super) resizing: Mutex<()>,
    /// The kernel may be asked to pass requests through.
    pub(super) passthrough: AtomicBool,
}

/// How a file was opened.
pub(super) struct Opened {
    pub(super) handle: u64,
    pub(super) flags: FopenFlags,
    pub(super) backing: Option<Arc<BackingId>>,
}

impl Handles {
    pub(super) fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.open.get(number)
    }

    /// Whether nothing is open.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(super) fn open_dir(&self) -> u64 {
        self.open.add(Handle::Dir(DirHandle { names: Names::default() }))
    }

    /// Chooses the way in which the file is opened; `may_pass` says whether it may be passed through. Calls `alone` if it is opened for
    /// reading through the page cache, which has nothing that is older, and nobody else has it open nor gets it before that returns.
    pub(super) fn open_file(
        &self,
        ino: Ino,
        file: Arc<OpenFile>,
        access: Access,
        may_pass: bool,
        register: impl FnOnce(&std::fs::File) -> std::io::Result<BackingId>,
        alone: impl FnOnce(&OpenFile),
    ) -> Opened {
        let write = access != Access::Read;
        let mut modes = locked(&self.modes);
        let mode = modes.entry(ino).or_default();
        if mode.cached == 0
            // The kernel refuses to open otherwise what it passes through already.
            && (may_pass || mode.backing.is_some())
            && self.passthrough.load(Ordering::Relaxed)
            && let Some(whole) = file.whole()
        {
            let backing = match &mode.backing {
                Some(backing) => Some(backing.clone()),
                None => match register(&whole) {
                    Ok(backing) => Some(Arc::new(backing)),
                    Err(_) => {
                        // Without the privilege, or on a stack of file systems that is too high, it never works.
                        self.passthrough.store(false, Ordering::Relaxed);
                        None
                    }
                },
            };
            if let Some(backing) = backing {
                mode.backing = Some(backing.clone());
                mode.passed += 1;
                mode.stale |= write;
                mode.told |= access == Access::Write;
                let handle = self.open.add(Handle::File(FileHandle { ino, file, passed: true }));
                return Opened { handle, flags: FopenFlags::empty(), backing: Some(backing) };
            }
        }
        if access == Access::Read && mode.cached == 0 && mode.passed == 0 && !mode.stale {
            alone(&file);
        }
        // What is passed through elsewhere cannot be cached here at the same time.
        let flags = if mode.passed > 0 {
            FopenFlags::FOPEN_DIRECT_IO
        } else {
            mode.cached += 1;
            if std::mem::take(&mut mode.stale) { FopenFlags::empty() } else { FopenFlags::FOPEN_KEEP_CACHE }
        };
        mode.dirty |= write;
        let passed = flags.contains(FopenFlags::FOPEN_DIRECT_IO);
        if passed {
            mode.passed += 1;
        }
        let handle = self.open.add(Handle::File(FileHandle { ino, file, passed }));
        Opened { handle, flags, backing: None }
    }

    /// Closes a handle; tells which file it was on, and whether something may have been written past us.
    pub(super) fn close(&self, number: u64) -> Option<(Ino, bool)> {
        let handle = self.open.remove(number)?;
        let Handle::File(file) = &*handle else { return None };
        // Let go of when nobody waits for the modes any more.
        let _unused;
        let mut modes = locked(&self.modes);
        let mode = modes.get_mut(&file.ino)?;
        if file.passed {
            mode.passed -= 1;
        } else {
            mode.cached -= 1;
        }
        mode.dirty &= mode.cached > 0 || mode.passed > 0;
        let behind = file.passed && mode.stale && mode.told;
        if mode.passed == 0 {
            _unused = mode.backing.take();
            mode.told = false;
        }
        if mode.cached == 0 && mode.passed == 0 && !mode.stale {
            modes.remove(&file.ino);
        }
        Some((file.ino, behind))
    }

    /// Whether the file is open for being passed through, so that its size and times may change at any moment.
    pub(super) fn is_passed(&self, ino: Ino) -> bool {
        locked(&self.modes).get(&ino).is_some_and(|mode| mode.passed > 0 && mode.stale)
    }

    /// Files of which pages may have been changed that the kernel has not written to us yet.
    pub(super) fn dirty(&self) -> Vec<Ino> {
        locked(&self.modes).iter().filter(|(_, mode)| mode.dirty).map(|(ino, _)| *ino).collect()
    }

    /// Files that are passed through now; no others begin to be before the guard is dropped.
    pub(super) fn passed(&self) -> (impl Drop + '_, Vec<Ino>) {
        let modes = locked(&self.modes);
        let passed = modes.iter().filter(|(_, mode)| mode.backing.is_some()).map(|(ino, _)| *ino).collect();
        (modes, passed)
    }

    pub(super) fn forgotten(&self, ino: Ino) {
        let mut modes = locked(&self.modes);
        if modes.get(&ino).is_some_and(|mode| mode.cached == 0 && mode.passed == 0) {
            modes.remove(&ino);
        }
    }
}
