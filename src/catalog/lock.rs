//! The files of an intent: who works on it, and what the frozen window reads and writes.
//!
//! Up to six files in the directory `intents`, for the intent `N`:
//!
//! * `N` is locked by whoever works on the intent, and holds the [`Plan`] of a checkpoint whose snapshots another process
//!   takes: the hook of an engine;
//! * `N.taken` holds what was [`Taken`], from the instant at which all was;
//! * `N.search` holds who else was writing, once the search for them has ended;
//! * `N.new` is one that is being written;
//! * `N.attendant.X` is the socket of a process that stands by to take the snapshots;
//! * `N.finished` stands for the others, when they were found missing though the catalog has the intent.
//!
//! A record is a line with the digest of what follows in hexadecimal digits, and JSON. Nothing of it is synced, since processes are frozen
//! meanwhile: it survives the death of fsnap. After a power cut it may be missing or torn; the intent in the catalog was durable before.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::query::encode;
use super::search::PAUSE;
use super::{Catalog, Error, IntentId, PendingCheckpoint, Plan, Result, Taken};

/// Held by the process that works on an intent; the kernel releases it when the process dies, however it dies.
///
/// Lock order: an intent's lock is taken before a transaction begins, never inside one.
#[derive(Debug)]
pub struct IntentLock {
    file: File,
    files: IntentFiles,
    finished: bool,
}

/// What the frozen window left behind, as far as can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Nothing: not everything was taken.
    Absent,
    /// Everything was taken.
    Whole(Taken),
    /// Something that cannot be read.
    Torn,
}

#[derive(Debug, Clone)]
struct IntentFiles {
    dir: PathBuf,
    id: IntentId,
}

impl IntentFiles {
    fn of(state: &Path, id: IntentId) -> Self {
        Self { dir: state.join("intents"), id }
    }

    fn lock(&self) -> PathBuf {
        self.dir.join(self.id.to_string())
    }

    fn taken(&self) -> PathBuf {
        self.dir.join(format!("{}.taken", self.id))
    }

    /// Whether everything was taken, or may have been.
    fn is_taken(&self) -> bool {
        self.taken().symlink_metadata().is_ok()
    }

    fn search(&self) -> PathBuf {
        self.dir.join(format!("{}.search", self.id))
    }

    /// Whether writers are searched for, or will be, or were.
    fn is_searched(&self) -> bool {
        self.search().symlink_metadata().is_ok()
    }

    fn finished(&self) -> PathBuf {
        self.dir.join(format!("{}.finished", self.id))
    }

    fn unfinished(&self) -> PathBuf {
        self.dir.join(format!("{}.new", self.id))
    }

    /// The socket of a process that stands by; `mark` is made of small letters.
    fn attendant(&self, mark: &str) -> PathBuf {
        self.dir.join(format!("{}.attendant.{mark}", self.id))
    }

    /// Opens one of them to be written, and makes it, and the directory, if there is none.
    fn make(&self, options: &mut OpenOptions, path: &Path) -> io::Result<File> {
        let options = options.create(true).write(true).mode(0o600);
        match options.open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                match std::fs::create_dir(&self.dir) {
                    Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                    _ => {}
                }
                options.open(path)
            }
            opened => opened,
        }
    }

    /// All files there are, in the order in which they are removed.
    fn all(&self) -> Vec<PathBuf> {
        let paths = std::fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let socket = self.attendant("");
        let (sockets, others): (Vec<_>, Vec<_>) =
            paths.partition(|path| path.as_os_str().as_bytes().starts_with(socket.as_os_str().as_bytes()));
        let last = [self.unfinished(), self.search(), self.taken(), self.lock(), self.finished()];
        sockets.into_iter().chain(last.into_iter().filter(|path| others.contains(path))).collect()
    }
}

impl IntentLock {
    /// Removes the intent's files, and the lock with them: the intent is gone.
    pub fn finish(mut self) {
        self.finished = true;
    }

    /// Writes down what the frozen window needs to know.
    pub fn write_plan(&self, plan: &Plan) -> Result<()> {
        let write = || {
            let mut file = &self.file;
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(&to_bytes(plan))
        };
        write().map_err(io_error("write", &self.files.lock()))
    }

    /// Writes the note that everything was taken. It counts once it [appears](HiddenNote::appear).
    pub fn write_taken(&self, taken: &Taken) -> Result<HiddenNote> {
        let path = self.files.unfinished();
        let written = self.open_unfinished().and_then(|mut file| file.write_all(&to_bytes(taken)));
        written.map_err(io_error("write", &path))?;
        Ok(HiddenNote(self.files.clone()))
    }

    /// Makes the file for that note, which takes longer than to write it.
    pub fn prepare_taken(&self) -> Result<()> {
        self.open_unfinished().map(drop).map_err(io_error("make", &self.files.unfinished()))
    }

    fn open_unfinished(&self) -> io::Result<File> {
        self.files.make(options().truncate(true), &self.files.unfinished())
    }

    /// Where a process listens that stands by for this intent.
    pub(super) fn attendant(&self, mark: &str) -> PathBuf {
        self.files.attendant(mark)
    }

    pub(super) fn search(&self) -> PathBuf {
        self.files.search()
    }

    /// The directory of the catalog.
    pub fn state(&self) -> &Path {
        self.files.dir.parent().unwrap_or(&self.files.dir)
    }

    /// Where the note of what was taken will lie.
    pub fn note(&self) -> PathBuf {
        self.files.taken()
    }

    /// Takes the note back: the snapshots are about to be deleted.
    pub fn remove_taken(&self) -> Result<()> {
        let path = self.files.taken();
        unless_missing(std::fs::remove_file(&path)).map_err(io_error("remove", &path))
    }

    /// What was taken.
    pub fn taken(&self) -> Result<Note> {
        let path = self.files.taken();
        match options().read(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Note::Absent),
            opened => {
                let content = opened.and_then(read).map_err(io_error("read", &path))?;
                Ok(from_bytes(&content).map_or(Note::Torn, Note::Whole))
            }
        }
    }
}

impl Drop for IntentLock {
    fn drop(&mut self) {
        if self.finished {
            // A file left behind is a little dirt, which the next recovery removes; nothing depends on it.
            for path in self.files.all() {
                let _ = std::fs::remove_file(path);
            }
        }
        // A child that another thread is about to start has the descriptor too for a moment: closing is not enough.
        let _ = self.file.unlock();
    }
}

impl AsFd for IntentLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The note that everything was taken, which was written by somebody and does not count yet.
#[derive(Debug)]
pub struct HiddenNote(IntentFiles);

impl HiddenNote {
    /// The one with that number, in the state directory: for another process than the one that wrote it.
    pub fn of(state: &Path, number: i64) -> Self {
        Self(IntentFiles::of(state, IntentId(number)))
    }

    /// Its number.
    pub fn number(&self) -> i64 {
        self.0.id.0
    }

    /// Where it will be seen.
    pub fn path(&self) -> PathBuf {
        self.0.taken()
    }

    /// Lets it be seen, the whole of it at once: from here on, the next command seals the checkpoint.
    pub fn appear(&self) -> Result<()> {
        let path = self.0.taken();
        std::fs::rename(self.0.unfinished(), &path).map_err(io_error("write", &path))
    }
}

impl Catalog {
    /// Locks the intent; `None` if somebody works on it.
    ///
    /// The caller looks the intent up again afterwards: its former owner may have finished it.
    pub(crate) fn lock_intent(&self, id: IntentId) -> Result<Option<IntentLock>> {
        let files = IntentFiles::of(&self.state, id);
        let path = files.lock();
        let file = files.make(options().read(true), &path).map_err(io_error("open", &path))?;
        Ok(try_lock(&file, &files)?.then(|| IntentLock { file, files, finished: false }))
    }

    /// Locks the intent as [`lock_intent`](Self::lock_intent) does, and waits a moment for a process of a hook that is about to let go
    /// of it: one that searches for writers, or has stood by for a hook that was never called.
    ///
    /// As long as the catalog's patience, once it was taken: it is on its way to be sealed, and who asks for this checkpoint next is to find it
    /// so, however slow the machine is.
    pub(crate) fn lock_intent_in_a_moment(&self, id: IntentId) -> Result<Option<IntentLock>> {
        let files = IntentFiles::of(&self.state, id);
        let limit = if self.may_be_taken(id) { self.patience() } else { MOMENT };
        within(limit, || self.lock_intent(id), || files.is_searched() || self.may_be_taken(id))
    }

    /// Locks the intent as [`lock_intent`](Self::lock_intent) does, whoever works on it: [`Error::InHand`] after the catalog's patience.
    pub(crate) fn lock_intent_in_turn(&self, id: IntentId) -> Result<IntentLock> {
        let lock = within(self.patience(), || self.lock_intent(id), || true)?;
        lock.ok_or_else(|| Error::InHand { path: IntentFiles::of(&self.state, id).lock() })
    }

    /// Whether somebody finished the intent, though the catalog still has it: the end of the catalog's log was lost.
    ///
    /// The files of an intent are made before it can be seen, and removed after its record was. So in the boot in which it
    /// was begun, files that are missing tell. In a later one they do not: they were never synced.
    pub(crate) fn was_finished(&self, id: IntentId) -> Result<bool> {
        let files = IntentFiles::of(&self.state, id);
        if files.finished().symlink_metadata().is_ok() {
            return Ok(true);
        }
        if files.lock().symlink_metadata().is_ok() {
            return Ok(false);
        }
        // The next to lock it makes the file again: what was seen is kept beside it.
        let path = files.finished();
        files.make(options().truncate(true), &path).map_err(io_error("make", &path))?;
        Ok(true)
    }

    /// Removes the files of intents that are gone: whoever finished them died before they were removed.
    pub(crate) fn sweep_intent_files(&self) -> Result<()> {
        let dir = self.state.join("intents");
        let strays = || -> Result<BTreeSet<IntentId>> {
            let mut found = ids_in(&dir)?;
            for (id, _) in self.intents()? {
                found.remove(&id);
            }
            Ok(found)
        };
        if strays()?.is_empty() {
            return Ok(());
        }
        // An intent's lock is made in the transaction that records it: in another one, nobody's is half made.
        self.transact(|_| {
            for id in strays()? {
                if let Some(lock) = self.lock_intent(id)? {
                    lock.finish();
                }
            }
            Ok(())
        })
    }

    /// Whether everything was taken, or may have been, of the checkpoint that the intent is for.
    pub fn may_be_taken(&self, id: IntentId) -> bool {
        IntentFiles::of(&self.state, id).is_taken()
    }
}

/// Finds a planned checkpoint that is `wanted`, and locks it; looks at no database.
///
/// [`Error::InHand`] if somebody else works on it.
pub fn find_plan(
    state: &Path,
    wanted: impl Fn(&PendingCheckpoint) -> bool,
) -> Result<Option<(IntentId, IntentLock, Plan)>> {
    for id in ids_in(&state.join("intents"))? {
        let Some((file, files, plan)) = plan_of(state, id, &wanted)? else { continue };
        let path = files.lock();
        let free = in_a_moment(|| Ok(try_lock(&file, &files)?.then_some(())), || files.is_searched());
        let Some(()) = free? else { return Err(Error::InHand { path }) };
        let lock = IntentLock { file, files, finished: false };
        // Whoever finished it before the lock was free has unlinked the file.
        if lock.file.metadata().map_err(io_error("examine", &path))?.nlink() > 0 {
            return Ok(Some((id, lock, plan)));
        }
    }
    Ok(None)
}

/// The plan in the file of that intent, if there is one and it is `wanted`.
fn plan_of(
    state: &Path,
    id: IntentId,
    wanted: impl Fn(&PendingCheckpoint) -> bool,
) -> Result<Option<(File, IntentFiles, Plan)>> {
    let files = IntentFiles::of(state, id);
    let path = files.lock();
    let mut file = match options().read(true).write(true).open(&path) {
        // Finished meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io_error("open", &path))?,
    };
    let content = read(&mut file).map_err(io_error("read", &path))?;
    // Intents of other kinds have no plan, and one that is being written is none of an engine that waits.
    let plan = from_bytes::<Plan>(&content).filter(|plan| wanted(&plan.pending));
    Ok(plan.map(|plan| (file, files, plan)))
}

/// How long a process of a hook may take to notice that the hook or the engine has ended.
const MOMENT: Duration = Duration::from_secs(1);

/// Tries to get something from a process of a hook that is about to let go of it, for a moment.
///
/// Such a process ends, or goes on to search for writers, by itself when the hook or the engine has ended, but takes notice of that
/// a little later than others do.
pub(super) fn in_a_moment<T>(get: impl Fn() -> Result<Option<T>>, hopeful: impl Fn() -> bool) -> Result<Option<T>> {
    within(MOMENT, get, hopeful)
}

pub(super) fn within<T>(
    limit: Duration,
    get: impl Fn() -> Result<Option<T>>,
    hopeful: impl Fn() -> bool,
) -> Result<Option<T>> {
    let start = Instant::now();
    loop {
        let got = get()?;
        if got.is_some() || start.elapsed() > limit || !hopeful() {
            return Ok(got);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether there is a note that a checkpoint was taken, which is there until it is sealed; looks at no database.
pub fn is_any_taken(state: &Path) -> Result<bool> {
    Ok(ids_in(&state.join("intents"))?.into_iter().any(|id| IntentFiles::of(state, id).is_taken()))
}

/// The intents that have files in the directory.
fn ids_in(dir: &Path) -> Result<BTreeSet<IntentId>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries.map_err(io_error("read", dir))?,
    };
    let mut ids = BTreeSet::new();
    for entry in entries {
        let name = entry.map_err(io_error("read", dir))?.file_name();
        let number = name.to_str().map(|name| name.trim_end_matches(|c: char| c == '.' || c.is_ascii_lowercase()));
        ids.extend(number.and_then(|number| number.parse().ok()).map(IntentId));
    }
    Ok(ids)
}

pub(super) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

fn try_lock(file: &File, files: &IntentFiles) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(io_error("lock", &files.lock())(error)),
    }
}

pub(super) fn read(mut file: impl Read) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    Ok(content)
}

pub(super) fn to_bytes<T: Serialize>(record: &T) -> Vec<u8> {
    let (body, digest) = encode(record);
    format!("{}\n{body}", hex::encode(digest)).into_bytes()
}

pub(super) fn from_bytes<T: DeserializeOwned>(content: &[u8]) -> Option<T> {
    let (digest, body) = std::str::from_utf8(content).ok()?.split_once('\n')?;
    (digest == hex::encode(super::query::digest(body))).then(|| serde_json::from_str(body).ok())?
}

pub(super) fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path: path.clone(), source }
}
