//! The catalog: the durable record of stores, volumes, checkpoints, branches, holds and intents.
//!
//! One SQLite database in write-ahead mode, because a hook, a command and a file server open it at the same time, and
//! because it survives being killed at any instruction. [`format`](mod@format) is its specification.
//!
//! * A change of the world outside is preceded by an [`Intent`], committed durably, and followed by a transaction that
//!   replaces the intent by its result. No backend is called inside a transaction.
//! * An image may be deleted only if nothing holds it and a removal intent names it.
//! * While processes are frozen, the database is not touched: what is needed is read from the file that is the intent's
//!   lock ([`find_plan`]), and what was taken is written to one beside it, without an fsync. It survives fsnap's death, and
//!   a power cut falls back to the intent, which was durable before the processes froze.
//! * Each record carries a digest, so that a flipped byte is an error and never another record.
//!
//! In reading order: [`format`](mod@format), what is in the database; `query`, its changes and questions, with `tree` for what was seen of
//! processes; `intent`, changes before they are made; `lock`, who works on one; `attendant` and `search`, what passes between the processes that
//! do; `wal`, [`index`] and `sys`, what SQLite must be asked or told besides.

mod attendant;
pub mod format;
pub mod index;
mod intent;
mod lock;
mod query;
mod search;
mod sys;
mod tree;
mod turn;
mod wal;

use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use rustix::fs::{Access as MayAccess, access};

pub use attendant::{Attending, attendants, end_if_stopped};
pub use intent::{Doomed, ImageRef, Intent, IntentId, PendingCheckpoint, Plan, PlannedMember, RoomRef, Taken};
pub use lock::{HiddenNote, IntentLock, Note, find_plan, is_any_taken};
pub use query::Removal;
pub use search::{SearchAnswer, SearchFile, WriterLists};
pub use turn::FreezeTurn;

/// Why the catalog could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database refused.
    #[error("the catalog {} cannot be used: {source}{}", path.display(), which(source))]
    Database {
        /// The catalog's file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// Another fsnap kept the catalog locked for longer than the deadline.
    #[error("the catalog {} is locked by another fsnap", path.display())]
    Locked {
        /// The catalog's file.
        path: PathBuf,
    },
    /// A file of the catalog cannot grow: its file system is full, or the process may not write files of that size.
    #[error("the catalog {} cannot grow: its file system is full, or the size of files is limited", path.display())]
    Full {
        /// The catalog's file.
        path: PathBuf,
    },
    /// It may not be written, and would have to be: also who only reads may have to make the index that all share.
    #[error("the catalog {} may not be written by this user, or not where it is mounted", path.display())]
    ReadOnly {
        /// The catalog's file.
        path: PathBuf,
    },
    /// The file is not what a catalog was when fsnap last wrote it.
    #[error("the catalog {} is damaged: {reason}", path.display())]
    Damaged {
        /// The catalog's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A later fsnap wrote it.
    #[error(
        "the catalog {} has format version {found}, and this fsnap reads version {}: use the newer fsnap",
        path.display(), format::VERSION
    )]
    NewerVersion {
        /// The catalog's file.
        path: PathBuf,
        /// The version found.
        found: i64,
    },
    /// There is none, and it may not be made.
    #[error("there is no catalog at {}", path.display())]
    Missing {
        /// Where it was expected.
        path: PathBuf,
    },
    /// A search for writers, which somebody else waits to end, goes on.
    #[error("a process of fsnap still searches for writers, with {} locked", path.display())]
    Searching {
        /// The file for its answer.
        path: PathBuf,
    },
    /// Somebody else works on what was begun, for longer than was waited for.
    #[error("another fsnap works on what was begun, with {} locked", path.display())]
    InHand {
        /// The intent's lock.
        path: PathBuf,
    },
    /// Somebody else froze some of the processes for longer than was waited for.
    #[error("another fsnap freezes these processes, with {} locked", path.display())]
    Freezing {
        /// The file in which they are locked.
        path: PathBuf,
    },
    /// A system call on one of the catalog's files failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// The result of a call of the catalog.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a catalog is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To read only; writes nothing, not even recovery.
    Read,
    /// To read and change; each commit is durable.
    Write,
    /// The same; makes the catalog if there is none.
    Create,
}

/// The open catalog.
#[derive(Debug)]
pub struct Catalog {
    db: Connection,
    state: PathBuf,
    access: Access,
    patience: Duration,
    /// As it was set last, if it was.
    waits_for: Cell<Option<Synchronous>>,
    /// The number of others' changes that it has seen, if the log held nothing but branches when it was opened.
    began_with: Option<i64>,
}

/// How far SQLite waits for the disk: a level of [`PRAGMA synchronous`](https://www.sqlite.org/pragma.html#pragma_synchronous).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Synchronous {
    /// Nowhere.
    Off = 0,
    /// Where the log is put into the catalog, and where it is begun anew.
    Normal = 1,
    /// Also at each commit.
    Full = 2,
}

/// What the log may grow to before a branch puts it into the catalog, in bytes: five branches or so. All of it is read by who opens the
/// catalog next, at a gigabyte per second or so.
const LEFT_AT_MOST: u64 = 256 << 10;

/// Records of fewer bytes, with their holds, fill less of the log than SQLite takes for a reason to put it into the catalog.
const SMALL: usize = 256 << 10;

impl Catalog {
    /// Opens the catalog in the directory `state`.
    ///
    /// `patience` bounds the wait for another writer: [`Error::Locked`] after it.
    pub fn open(state: &Path, access: Access, patience: Duration) -> Result<Self> {
        let path = state.join(format::FILE);
        if access == Access::Create {
            format::create_if_missing(state)?;
        }
        let has_log = format::check_log(&path)?;
        format::check_file(&path)?;
        let how = match access {
            Access::Read => OpenFlags::SQLITE_OPEN_READ_ONLY,
            Access::Write | Access::Create => OpenFlags::SQLITE_OPEN_READ_WRITE,
        };
        let how = how | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let read_only = if access == Access::Read { format::read_only(&path) } else { None };
        let alone = read_only.is_some();
        if !alone && !has_log {
            format::make_log(&path)?;
        }
        let opened = match read_only {
            Some(uri) => Connection::open_with_flags(uri, how | OpenFlags::SQLITE_OPEN_URI),
            None => Connection::open_with_flags(&path, how),
        };
        let db = opened.map_err(|source| translate(&path, source))?;
        format::check_header(&path, &db)?;
        let mut catalog =
            Self { db, state: state.to_owned(), access, patience, waits_for: Cell::new(None), began_with: None };
        catalog.configure(alone).map_err(|source| catalog.failed(source))?;
        format::check_version(&catalog.db, &path)?;
        if access != Access::Read {
            let seen = catalog.changes_of_others()?;
            catalog.began_with = catalog.log_has_branches_only().then_some(seen);
        }
        Ok(catalog)
    }

    fn configure(&self, alone: bool) -> rusqlite::Result<()> {
        if alone {
            self.db.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        }
        self.db.busy_timeout(self.patience)?;
        self.db.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        self.db.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        match self.access {
            Access::Read => {}
            Access::Write | Access::Create => {
                self.db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, true)?;
                // An empty log that stays is cheaper than one that each command makes and removes: its name need not be made durable.
                self.db.pragma_update(None, "journal_size_limit", 0)?;
                sys::keep_log(&self.db)?;
            }
        }
        Ok(())
    }

    /// The directory that holds the catalog and what belongs to it.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// What it was opened for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// How long it waits for another fsnap.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    fn path(&self) -> PathBuf {
        self.state.join(format::FILE)
    }

    fn failed(&self, source: rusqlite::Error) -> Error {
        translate(&self.path(), source)
    }

    fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Damaged { path: self.path(), reason: reason.into() }
    }

    /// Runs `change` as one transaction: all of it, or none.
    ///
    /// Nothing but the catalog may be touched in it.
    fn transact<T>(&self, change: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        self.transact_at(Synchronous::Full, change)
    }

    fn transact_at<T>(&self, level: Synchronous, change: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        self.wait_for(level)?;
        self.leave_log(false)?;
        let begun = Transaction::new_unchecked(&self.db, TransactionBehavior::Immediate);
        let transaction = begun.map_err(|source| self.failed(source))?;
        let value = change(&transaction)?;
        transaction.commit().map_err(|source| self.failed(source))?;
        Ok(value)
    }

    /// The same, without waiting until the change is on the disk: a power cut soon after may take it away, and nothing that was done before it.
    ///
    /// The next durable change makes it durable, too.
    fn transact_unsynced<T>(&self, change: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        self.transact_at(Synchronous::Normal, change)
    }

    /// The same as [`transact`](Self::transact), with one sync instead of two where the log is empty.
    ///
    /// SQLite syncs the header of a log that it begins anew before it writes what follows: behind a header that came late, old frames
    /// could be taken for new ones. A file that was empty has no old ones.
    ///
    /// A change that could not be made durable was made, and is an error all the same: for an intent, which recovery undoes then. It must
    /// be smaller than what SQLite would put into the catalog by itself, which it would not sync either.
    fn transact_in_one_sync<T>(&self, change: impl Fn(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let log = format::log(&self.path());
        let is_empty = || log.metadata().is_ok_and(|log| log.len() == 0);
        if is_empty() {
            // Nobody else can write to it from the beginning of the transaction on; somebody may have before that.
            let change = |tx: &Transaction<'_>| if is_empty() { change(tx).map(Some) } else { Ok(None) };
            let changed = self.transact_at(Synchronous::Off, change);
            // Also what closing the catalog does is not to go without.
            self.wait_for(Synchronous::Full)?;
            if let Some(value) = changed? {
                let synced = File::open(&log).and_then(|log| log.sync_data());
                return synced.map(|()| value).map_err(|source| self.not_synced(log, source));
            }
        }
        self.transact(change)
    }

    /// A network's file system tells only then that there is no room.
    fn not_synced(&self, log: PathBuf, source: std::io::Error) -> Error {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match source.kind() {
            StorageFull | QuotaExceeded => Error::Full { path: self.path() },
            _ => Error::Io { action: "sync", path: log, source },
        }
    }

    /// Sets what SQLite waits for, unless it does already.
    fn wait_for(&self, level: Synchronous) -> Result<()> {
        if self.waits_for.get() != Some(level) {
            let set = self.db.pragma_update(None, "synchronous", level as u8);
            set.map_err(|source| self.failed(source))?;
            self.waits_for.set(Some(level));
        }
        Ok(())
    }

    /// Whether closing the catalog leaves what is in the log where it is, or puts it into the catalog.
    ///
    /// Whoever closes it next without saying so puts it there.
    fn leave_log(&self, leave: bool) -> Result<()> {
        let set = self.db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, leave);
        set.map(drop).map_err(|source| self.failed(source))
    }

    /// Whether the log is empty, or was left by a branch and has not changed since.
    fn log_has_branches_only(&self) -> bool {
        let (log, left) = (format::log(&self.path()), format::left(&self.path()));
        match wal::Mark::of(&log) {
            Ok(Some(mark)) => mark.length < LEFT_AT_MOST && mark.is_noted(&left).unwrap_or(false),
            Ok(None) => true,
            Err(_) => false,
        }
    }

    /// Leaves the log where it is, if nothing else changes before closing: somebody waits for it, and nothing in it that cannot be made good
    /// was left unsynced.
    ///
    /// Only changes for branches may be in it, so that a log which is cut short takes nothing else away.
    fn leave_own_log(&self) -> Result<()> {
        let leave = self.began_with.is_some() && self.began_with == Some(self.changes_of_others()?);
        if leave && let Ok(Some(mark)) = wal::Mark::of(&format::log(&self.path())) {
            // Without the note the next command puts the log into the catalog.
            let _ = mark.write(&format::left(&self.path()));
        }
        self.leave_log(leave)
    }

    /// Changes its value whenever another connection has changed the catalog.
    fn changes_of_others(&self) -> Result<i64> {
        let read = || self.db.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0));
        read().map_err(|source| self.failed(source))
    }

    /// Reads every page and record; returns what is damaged.
    pub fn verify(&self) -> Result<Vec<String>> {
        let mut statement = self.db.prepare("PRAGMA integrity_check").map_err(|source| self.failed(source))?;
        let rows = statement.query_map([], |row| row.get::<_, String>(0)).map_err(|source| self.failed(source))?;
        let mut damage: Vec<String> = Vec::new();
        for row in rows {
            let line = row.map_err(|source| self.failed(source))?;
            if line != "ok" {
                damage.push(line);
            }
        }
        damage.extend(self.damaged_records()?);
        Ok(damage)
    }
}

/// Which of the failures that SQLite has one sentence for it is: an I/O error has dozens of causes.
fn which(source: &rusqlite::Error) -> String {
    match source.sqlite_error() {
        Some(error) if error.extended_code > 0xff => format!(" ({error})"),
        _ => String::new(),
    }
}

/// Whether this user may write the catalog, and make files beside it.
fn may_be_written(path: &Path) -> bool {
    [Some(path), path.parent()].into_iter().flatten().all(|path| access(path, MayAccess::WRITE_OK).is_ok())
}

fn translate(path: &Path, source: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode;
    let path = path.to_owned();
    let extended = source.sqlite_error().map(|error| error.extended_code);
    match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Error::Locked { path },
        Some(ErrorCode::DiskFull) => Error::Full { path },
        // The index that readers and writers share is made by the first of them, also by one who only reads.
        _ if extended == Some(rusqlite::ffi::SQLITE_IOERR_SHMSIZE) => Error::Full { path },
        Some(ErrorCode::ReadOnly) => Error::ReadOnly { path },
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied) if !may_be_written(&path) => Error::ReadOnly { path },
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            Error::Damaged { path, reason: source.to_string() }
        }
        _ => Error::Database { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_that_finds_no_room_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("state"), Access::Create, Duration::ZERO).unwrap();
        let said = |errno: rustix::io::Errno| catalog.not_synced("/log".into(), errno.into()).to_string();
        for full in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
            assert!(said(full).contains("catalog.db cannot grow"), "{}", said(full));
        }
        assert!(said(rustix::io::Errno::IO).starts_with("cannot sync /log: "));
    }

    /// The locks that this process has on a file, as fcntl(2) sets them.
    fn locks_on(file: &Path) -> usize {
        use std::os::unix::fs::MetadataExt as _;
        let number = format!(":{}", file.metadata().unwrap().ino());
        let own = std::process::id().to_string();
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        let is_own = |line: &&str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            matches!(fields[..], [_, "POSIX", _, _, pid, file, ..] if pid == own && file.ends_with(&number))
        };
        locks.lines().filter(is_own).count()
    }

    #[test]
    fn who_looks_at_the_catalog_leaves_it_locked_for_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path(), Access::Create, Duration::ZERO).unwrap();
        assert!(catalog.branches().unwrap().is_empty());
        let path = catalog.path();
        let locks = || (locks_on(&path), locks_on(&format::index(&path)));
        let before = locks();
        assert!(before.0 > 0 && before.1 > 0, "{before:?}");
        let other = Catalog::open(dir.path(), Access::Read, Duration::ZERO).unwrap();
        assert!(other.branches().unwrap().is_empty());
        assert_eq!(locks(), before);
        drop(other);
        assert_eq!(locks(), before);
        index::head(dir.path()).unwrap();
        assert_eq!(locks(), before);
        let again = index::head(dir.path()).unwrap();
        std::thread::scope(|scope| scope.spawn(|| assert_eq!(index::head(dir.path()).unwrap(), again)).join()).unwrap();
        assert_eq!(locks(), before);
    }

    #[test]
    fn an_io_error_says_which() {
        use rusqlite::ffi;
        let said = |code| {
            let source = rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some("disk I/O error".to_owned()));
            translate(Path::new("/catalog"), source).to_string()
        };
        let start = "the catalog /catalog cannot be used: disk I/O error";
        let short = said(ffi::SQLITE_IOERR_SHORT_READ);
        assert!(short.starts_with(start) && short.contains("522"), "{short}");
        assert_eq!(said(ffi::SQLITE_IOERR), start, "it is none of them");
    }
}
