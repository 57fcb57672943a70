//! What the kernel has open, and in which of its ways.
//!
//! The kernel reads and writes a file either through its page cache, asking us for pages, or by passing requests through to
//! a file of ours without asking; one file cannot be open in both ways at once, and all that is passed through must go to
//! the same registered file. Passing through is faster and is chosen where the whole content is one file of the upper that
//! will stay so; not for a file of the lower, because whoever has it open must see what is written after its copy-up.
//!
//! A mapping of a file that is passed through is one of the registered file, and outlives the handle that it was made by; nobody tells us of
//! its end. So a file stays registered when its last handle is closed, for as long as the kernel says that somebody has it.
//!
//! The names of a directory the kernel keeps as one list for all who read it, and where somebody goes on he is given what has the same position in
//! the list that is there by then. So all who share it must be told the same list. When a name has come or gone, those who open the directory
//! from then on read for themselves, until the others are done.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use fuser::{BackingId, FopenFlags};

use super::open::{List, Names, Table, locked};
use super::overlay::{Had, Ino, OpenFile};
use super::sys;

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
    ino: Ino,
    names: Names<OsString>,
    /// What those read that the kernel has one list for, if this is one of them.
    shared: Option<Arc<Mutex<Weak<Vec<OsString>>>>>,
    opened: Instant,
}

/// Who begins to read within this time after the opening may be told what was there at the opening.
const AT_ONCE: Duration = Duration::from_secs(1);

impl DirHandle {
    /// The names for a reading that goes on at `offset`; `read` reads them anew.
    pub(super) fn names<E>(
        &self,
        offset: u64,
        read: impl FnOnce() -> Result<Vec<OsString>, E>,
    ) -> Result<List<OsString>, E> {
        self.names.at(offset, |is_first| {
            let Some(shared) = &self.shared else { return read().map(Arc::new) };
            let mut last = locked(shared);
            // What the kernel told before may come from the others' list.
            let joins = is_first && (offset != 0 || self.opened.elapsed() < AT_ONCE);
            let names = match last.upgrade().filter(|_| joins) {
                Some(names) => names,
                None => Arc::new(read()?),
            };
            *last = Arc::downgrade(&names);
            Ok(names)
        })
    }

    /// Whether the kernel may tell others what this one is told.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.is_some()
    }
}

/// So many names that have gone from a directory are remembered. Some programs have one open for as long as they run, and make and remove files in it.
const MOST_GONE: usize = 10_000;

/// A directory that is open by handles for which the kernel has one list.
#[derive(Debug, Default)]
struct SharedDir {
    handles: u64,
    names: Arc<Mutex<Weak<Vec<OsString>>>>,
    /// A name has come or gone since.
    changed: bool,
    /// What had the names that have gone since, of these the last.
    gone: HashMap<OsString, Had>,
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
    registered: Option<Registered>,
    /// Cached pages are older than what was passed through.
    stale: bool,
    /// The kernel may have attributes from before the file was written past us.
    told: bool,
    /// Pages may have been changed in memory, and not been written to us yet.
    dirty: bool,
    /// It is among those that are [lingering](Modes::lingering).
    lingers: bool,
}

/// What is known of files that are open, or were.
#[derive(Debug, Default)]
struct Modes {
    files: HashMap<Ino, Mode>,
    /// Files that nobody has open, and that stay registered: they are mapped, or the kernel was not done with closing them yet.
    lingering: VecDeque<Ino>,
}

/// The file that is passed through to.
#[derive(Debug)]
struct Registered {
    backing: Arc<BackingId>,
    file: Arc<std::fs::File>,
}

impl Mode {
    /// Lets go of the registered file, if nobody has it open or mapped any more. It is closed when what is returned is dropped.
    fn let_go(&mut self) -> Option<Registered> {
        let unused = self.passed == 0 && self.registered.as_ref().is_some_and(|one| !sys::is_shared(&one.file));
        if unused {
            self.told = false;
        }
        self.registered.take_if(|_| unused)
    }

    fn is_needed(&self) -> bool {
        self.cached > 0 || self.passed > 0 || self.stale || self.registered.is_some()
    }
}

impl Modes {
    /// Lets go of what is known of a file, as far as nobody needs it any more.
    fn let_go(&mut self, ino: Ino) -> Option<Registered> {
        let mode = self.files.get_mut(&ino)?;
        let unused = mode.let_go();
        if !mode.is_needed() {
            self.files.remove(&ino);
        } else if mode.passed == 0 && mode.registered.is_some() && !mode.lingers {
            mode.lingers = true;
            self.lingering.push_back(ino);
        }
        unused
    }

    /// The same, for the file that has lingered longest.
    fn let_go_of_oldest(&mut self) -> Option<Registered> {
        let ino = self.lingering.pop_front()?;
        self.files.get_mut(&ino)?.lingers = false;
        self.let_go(ino)
    }
}

/// All handles of one mount.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: Table<Handle>,
    modes: Mutex<Modes>,
    dirs: Mutex<HashMap<Ino, SharedDir>>,
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

    /// Opens a directory; the kernel is told whether the list that it has is for this one, too.
    pub(super) fn open_dir(&self, ino: Ino) -> (u64, FopenFlags) {
        let opened = Instant::now();
        let mut dirs = locked(&self.dirs);
        let dir = dirs.entry(ino).or_default();
        let shared = (!dir.changed).then(|| dir.names.clone());
        dir.handles += u64::from(shared.is_some());
        let flags = match shared {
            Some(_) => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
            None => FopenFlags::FOPEN_KEEP_CACHE,
        };
        (self.open.add(Handle::Dir(DirHandle { ino, names: Names::default(), shared, opened })), flags)
    }

    /// A name in these directories has come or gone. Called before whoever did that is answered.
    pub(super) fn names_changed(&self, changed: &[Ino]) {
        let mut dirs = locked(&self.dirs);
        for ino in changed {
            if let Some(dir) = dirs.get_mut(ino) {
                dir.changed = true;
            }
        }
    }

    /// A file had this name in a directory until now.
    pub(super) fn name_gone(&self, dir: Ino, name: &OsStr, had: Had) {
        if let Some(dir) = locked(&self.dirs).get_mut(&dir) {
            if dir.gone.len() >= MOST_GONE {
                dir.gone.clear();
            }
            dir.gone.insert(name.to_owned(), had);
        }
    }

    /// What had a name in a directory, if that has gone since it was opened.
    pub(super) fn gone(&self, dir: Ino, name: &OsStr) -> Option<Had> {
        locked(&self.dirs).get(&dir)?.gone.get(name).copied()
    }

    /// Closes a directory. `forget` is called first if the kernel may have a list from before a name came or went.
    pub(super) fn close_dir(&self, number: u64, forget: impl FnOnce()) {
        let Some(handle) = self.open.remove(number) else { return };
        let Handle::Dir(DirHandle { ino, shared: Some(_), .. }) = &*handle else { return };
        if locked(&self.dirs).get(ino).is_some_and(|dir| dir.changed) {
            forget();
        }
        let mut dirs = locked(&self.dirs);
        let Some(dir) = dirs.get_mut(ino) else { return };
        dir.handles -= 1;
        if dir.handles == 0 {
            dirs.remove(ino);
        }
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
        let mode = modes.files.entry(ino).or_default();
        if mode.cached == 0
            // The kernel refuses to open otherwise what it passes through already.
            && (may_pass || mode.registered.is_some())
            && self.passthrough.load(Ordering::Relaxed)
            && let Some(whole) = file.whole()
        {
            if mode.registered.is_none() {
                match register(&whole) {
                    Ok(backing) => mode.registered = Some(Registered { backing: Arc::new(backing), file: whole }),
                    // Without the privilege, or on a stack of file systems that is too high, it never works.
                    Err(_) => self.passthrough.store(false, Ordering::Relaxed),
                }
            }
            if let Some(backing) = mode.registered.as_ref().map(|one| one.backing.clone()) {
                mode.passed += 1;
                mode.stale |= write;
                mode.told |= access == Access::Write;
                let handle = self.open.add(Handle::File(FileHandle { ino, file, passed: true }));
                // Who is not to pass has the file for mappings alone: the kernel asks us for what he reads and writes.
                let flags = if may_pass { FopenFlags::empty() } else { FopenFlags::FOPEN_DIRECT_IO };
                return Opened { handle, flags, backing: Some(backing) };
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

    /// Closes a handle; tells whether something may have been written past us. [`let_go`](Self::let_go) follows, when the file itself is closed.
    pub(super) fn close(&self, number: u64) -> bool {
        let Some(handle) = self.open.remove(number) else { return false };
        let Handle::File(file) = &*handle else { return false };
        let mut modes = locked(&self.modes);
        let Some(mode) = modes.files.get_mut(&file.ino) else { return false };
        if file.passed {
            mode.passed -= 1;
        } else {
            mode.cached -= 1;
        }
        mode.dirty &= mode.cached > 0 || mode.passed > 0;
        file.passed && mode.stale && mode.told
    }

    /// Lets go of what is known of a file, as far as nobody needs it any more.
    pub(super) fn let_go(&self, ino: Ino) {
        // Closed when nobody waits for the modes any more.
        let _unused;
        let mut modes = locked(&self.modes);
        // Two of those that linger for each that comes to it: only those that are mapped are left.
        _unused = [modes.let_go(ino), modes.let_go_of_oldest(), modes.let_go_of_oldest()];
    }

    /// Whether the file may be written past us, so that its size and times may change at any moment.
    pub(super) fn is_passed(&self, ino: Ino) -> bool {
        let mut modes = locked(&self.modes);
        drop(modes.let_go(ino));
        modes.files.get(&ino).is_some_and(|mode| mode.registered.is_some() && mode.stale)
    }

    /// Whether anybody has it open.
    pub(super) fn is_open(&self, ino: Ino) -> bool {
        locked(&self.modes).files.get(&ino).is_some_and(|mode| mode.cached > 0 || mode.passed > 0)
    }

    /// Files of which pages may have been changed that the kernel has not written to us yet.
    pub(super) fn dirty(&self) -> Vec<Ino> {
        locked(&self.modes).files.iter().filter(|(_, mode)| mode.dirty).map(|(ino, _)| *ino).collect()
    }

    /// Files that are passed through now, or mapped so; no others begin to be before the guard is dropped.
    pub(super) fn passed(&self) -> (impl Drop + '_, Vec<Ino>) {
        let mut modes = locked(&self.modes);
        for _ in 0..modes.lingering.len() {
            drop(modes.let_go_of_oldest());
        }
        let passed = modes.files.iter().filter(|(_, mode)| mode.registered.is_some()).map(|(ino, _)| *ino).collect();
        (modes, passed)
    }

    pub(super) fn forgotten(&self, ino: Ino) {
        let mut modes = locked(&self.modes);
        if modes.files.get(&ino).is_some_and(|mode| mode.cached == 0 && mode.passed == 0) {
            modes.files.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::FileType;

    use super::*;

    #[test]
    fn a_directory_that_stays_open_takes_no_more_and_more_room() {
        let handles = Handles::default();
        let (dir, name) = (7, |number: usize| OsString::from(number.to_string()));
        let (open, _) = handles.open_dir(dir);
        for number in 0..=MOST_GONE {
            handles.name_gone(dir, &name(number), (number as u64, FileType::RegularFile));
        }
        assert_eq!(handles.gone(dir, &name(MOST_GONE)), Some((MOST_GONE as u64, FileType::RegularFile)));
        assert_eq!(locked(&handles.dirs)[&dir].gone.len(), 1);
        handles.close_dir(open, || {});
        assert_eq!(handles.gone(dir, &name(MOST_GONE)), None);
    }
}
