//! The catalog's format, version 1.
//!
//! The file `catalog.db` in the state directory is an [SQLite 3 database](https://www.sqlite.org/fileformat2.html) in
//! write-ahead mode, with `application_id` 0x66736e70 ("fsnp") and `user_version` 1. Its tables:
//!
//! | table | one row is | columns |
//! |---|---|---|
//! | `store` | a place where snapshots are kept | `identity`, `body`, `digest` |
//! | `volume` | a registered volume | `name`, `body`, `digest` |
//! | `checkpoint` | a sealed checkpoint | `seq`, `id`, `parent`, `body`, `digest` |
//! | `branch` | a branch | `seq`, `name`, `checkpoint`, `body`, `digest` |
//! | `tag` | a name for a checkpoint | `name`, `checkpoint` |
//! | `tip` | the newest checkpoint of a volume on a line of work (`line` is a branch's name, or empty) | `line`, `volume`, `checkpoint` |
//! | `hold` | a reason why an image may not be deleted | `store`, `locator`, `holder` |
//! | `tree` | the processes of a checkpoint, if they were looked at | `checkpoint`, `body`, `digest` |
//! | `intent` | a change that was begun | `seq`, `body`, `digest` |
//!
//! A `body` is the JSON of the record of the same name in this crate, and `digest` the first 16 bytes of its BLAKE3
//! hash. `seq` grows and is never used again; all order goes by it, because clocks go backwards. A `holder` is
//! `checkpoint ID`, `branch NAME` or `intent SEQ`.
//!
//! What is kept of files without names lies in the directory `unlinked` beside it and in the stores, as `unlinked.rs` describes it; the record of
//! the checkpoint lists it.
//!
//! Beside it lie SQLite's files `catalog.db-wal`, the log, and `catalog.db-shm`. The last command to close the catalog empties the log; after a
//! kill, or after branches were made, it may hold changes. `catalog.db-left` is the mark of a log that holds branches only: its length in
//! bytes, a space, and its header in hexadecimal. The directory `intents` has the files of each pending intent, as `lock.rs` describes them. The file `lock` is
//! held while the catalog is made, and `freezing` is described in `turn.rs`.
//!
//! A catalog of a release that did not record processes has no table `tree` until it is needed, and one of a release that did not index them no index
//! of the branches of which something has to be mounted. One of a release before that keeps tags, tips and holds apart from their keys
//! (without `WITHOUT ROWID`), which no query notices.
//!
//! Readers ignore fields of a body that they do not know. A change that an older release would misread raises the
//! version, and a release refuses a version above its own.

use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rustix::fs::{Access, AtFlags, CWD, StatVfsMountFlags};

use super::sys::{self, HEADER};
use super::{Error, Result, translate, wal};

/// The version that this release writes.
pub const VERSION: i64 = 1;

/// The catalog's file in the state directory.
pub const FILE: &str = "catalog.db";

const APPLICATION_ID: i32 = 0x6673_6e70;

const SCHEMA: &str = "
CREATE TABLE store (identity TEXT PRIMARY KEY, body TEXT NOT NULL, digest BLOB NOT NULL) STRICT;
CREATE TABLE volume (name TEXT PRIMARY KEY, body TEXT NOT NULL, digest BLOB NOT NULL) STRICT;
CREATE TABLE checkpoint (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, parent TEXT, body TEXT NOT NULL, digest BLOB NOT NULL
) STRICT;
CREATE INDEX checkpoint_parent ON checkpoint (parent);
CREATE TABLE branch (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, checkpoint TEXT NOT NULL,
    body TEXT NOT NULL, digest BLOB NOT NULL
) STRICT;
CREATE INDEX branch_checkpoint ON branch (checkpoint);
CREATE TABLE tag (name TEXT PRIMARY KEY, checkpoint TEXT NOT NULL REFERENCES checkpoint (id)) STRICT, WITHOUT ROWID;
CREATE INDEX tag_checkpoint ON tag (checkpoint);
CREATE TABLE tip (
    line TEXT NOT NULL, volume TEXT NOT NULL, checkpoint TEXT NOT NULL, PRIMARY KEY (line, volume)
) STRICT, WITHOUT ROWID;
CREATE INDEX tip_checkpoint ON tip (checkpoint);
CREATE TABLE hold (
    store TEXT NOT NULL, locator TEXT NOT NULL, holder TEXT NOT NULL, PRIMARY KEY (store, locator, holder)
) STRICT, WITHOUT ROWID;
CREATE INDEX hold_holder ON hold (holder);
CREATE TABLE intent (seq INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL, digest BLOB NOT NULL) STRICT;
";

/// Goes with its checkpoint, also when an earlier release removes that.
pub(super) const TREE_TABLE: &str = "
CREATE TABLE IF NOT EXISTS tree (
    checkpoint TEXT PRIMARY KEY REFERENCES checkpoint (id) ON DELETE CASCADE, body TEXT NOT NULL, digest BLOB NOT NULL
) STRICT;
";

/// Every command asks for these branches, and most catalogs have none among thousands.
///
/// A catalog of an earlier release has it from its next branch with a directory of its own on; until then they are searched for among all.
pub(super) const TO_MOUNT_INDEX: &str = "
CREATE INDEX IF NOT EXISTS branch_to_mount ON branch (seq)
WHERE instr(body, '\"overlay\"') OR instr(body, '\"home\"');
";

/// Makes the state directory and an empty catalog in it, unless there is one.
///
/// The catalog appears under its name only when it is whole, so that a short file under that name is damage and is
/// never taken for a new catalog.
pub(super) fn create_if_missing(state: &Path) -> Result<()> {
    let path = state.join(FILE);
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    };
    std::fs::DirBuilder::new_private().create(state).map_err(io("make the state directory", state))?;
    // Two first commands at once: the second waits, and then finds the catalog.
    let lock_path = state.join("lock");
    let lock = File::create(&lock_path).map_err(io("open", &lock_path))?;
    lock.lock().map_err(io("lock", &lock_path))?;
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    // SQLite would add the changes of that log to whatever catalog is there. An empty one is left from a call that was cut short here.
    if log(&path).symlink_metadata().is_ok_and(|log| !log.is_file() || log.len() > 0) {
        let reason = "it is gone, and its log catalog.db-wal is not; remove that, too, to begin a new catalog";
        return Err(Error::Damaged { path, reason: reason.into() });
    }
    let fresh = state.join("catalog.new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(io("remove", &fresh)(error)),
        _ => {}
    }
    let database = |source| translate(&path, source);
    let db = Connection::open(&fresh).map_err(database)?;
    db.pragma_update(None, "application_id", APPLICATION_ID).map_err(database)?;
    db.pragma_update(None, "user_version", VERSION).map_err(database)?;
    db.execute_batch(SCHEMA).map_err(database)?;
    db.execute_batch(TREE_TABLE).map_err(database)?;
    db.execute_batch(TO_MOUNT_INDEX).map_err(database)?;
    db.pragma_update(None, "journal_mode", "WAL").map_err(database)?;
    db.close().map_err(|(_, source)| database(source))?;
    let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all()).map_err(io("sync", path));
    sync(&fresh)?;
    // With the catalog, the name of its log becomes durable, and stays (`design/catalog`).
    let log = log(&path);
    File::create(&log).map_err(io("make", &log))?;
    std::fs::rename(&fresh, &path).map_err(io("rename", &fresh))?;
    sync(state)
}

/// Makes the log again, which somebody has removed, and its name durable: SQLite is built to leave that to us, for it would sync the
/// directory once in each command.
///
/// Who may not make it is told so by SQLite.
pub(super) fn make_log(path: &Path) -> Result<()> {
    if File::create_new(log(path)).is_err() {
        return Ok(());
    }
    let state = path.parent().unwrap_or(path);
    let synced = File::open(state).and_then(|dir| dir.sync_all());
    synced.map_err(|source| Error::Io { action: "sync", path: state.to_owned(), source })
}

/// Makes directories that no other user may enter.
trait NewPrivate {
    fn new_private() -> std::fs::DirBuilder;
}

impl NewPrivate for std::fs::DirBuilder {
    fn new_private() -> std::fs::DirBuilder {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
    }
}

/// Refuses what cannot be a catalog before SQLite opens it: SQLite takes an empty file for a new database, and would block on a fifo.
///
/// It is only looked at: to close a descriptor of it would take away the locks of whoever has it open in this process (`design/catalog`).
pub(super) fn check_file(path: &Path) -> Result<()> {
    let io = |source: std::io::Error| Error::Io { action: "open", path: path.to_owned(), source };
    let meta = match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(Error::Missing { path: path.to_owned() }),
        looked => looked.map_err(io)?,
    };
    if meta.is_symlink() {
        return Err(damaged(path, "it is a symbolic link"));
    }
    if !meta.is_file() {
        return Err(damaged(path, "it is not a regular file"));
    }
    if meta.len() < HEADER as u64 {
        return Err(damaged(path, "it is too short"));
    }
    rustix::fs::accessat(CWD, path, Access::READ_OK, AtFlags::EACCESS).map_err(|error| io(error.into()))
}

/// Refuses what is no catalog, or a part of one, before SQLite reads it: it would read a truncated file up to the first missing page.
pub(super) fn check_header(path: &Path, db: &Connection) -> Result<()> {
    let read = || sys::header(db).map_err(|source| translate(path, source));
    let (header, length) = read()?;
    // Offsets 16 and 28 of the header: the page size, and the number of pages that the file has without its log.
    let page = match u16::from_be_bytes([header[16], header[17]]) {
        1 => 65_536,
        size => u64::from(size),
    };
    let pages = u32::from_be_bytes([header[28], header[29], header[30], header[31]]);
    let there = length.checked_div(page).ok_or_else(|| damaged(path, "it is not a database"))?;
    let there = u32::try_from(there).unwrap_or(u32::MAX);
    if there < pages {
        // Who was cut off while the log was written back may have written the header and not yet the last pages: the log still
        // has those.
        let io = |source| Error::Io { action: "read", path: log(path), source };
        let logged = wal::pages_in(&log(path), page).map_err(io)?;
        if !(there + 1..=pages).all(|page| logged.contains(&page)) {
            // Unless somebody wrote it back at this very moment, and began the log anew.
            return if read()?.1 == length { Err(damaged(path, "it was truncated")) } else { check_header(path, db) };
        }
    }
    // Offset 68: it was written before the file got its name, and never since, so that nobody need ask SQLite.
    if header[68..72] != APPLICATION_ID.to_be_bytes() {
        return Err(damaged(path, "it is not a catalog of fsnap"));
    }
    Ok(())
}

fn damaged(path: &Path, reason: &str) -> Error {
    Error::Damaged { path: path.to_owned(), reason: reason.to_owned() }
}

/// How SQLite is told to read a catalog whose file system is read-only; nothing if it can be read in the usual way.
///
/// Readers make the index that they share with writers, if there is none; where that is impossible, SQLite has to be told
/// that the file cannot change, or, if a log of changes lies beside it, to keep an index of its own: it does so in exclusive
/// mode, with a VFS that locks nothing. Where only this mount is read-only and somebody writes through another at this very
/// moment, a read may meet half a change: an error then, for every record has a digest.
pub(super) fn read_only(path: &Path) -> Option<OsString> {
    if !rustix::fs::statvfs(path).is_ok_and(|fs| fs.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        return None;
    }
    match log(path).metadata().map_or(0, |log| log.len()) {
        0 => Some(uri(path, "immutable=1")),
        _ if index(path).symlink_metadata().is_ok() => None,
        _ => Some(uri(path, "vfs=unix-none")),
    }
}

/// The catalog's log of changes.
pub(super) fn log(path: &Path) -> PathBuf {
    beside(path, "-wal")
}

/// The index of the log.
pub(super) fn index(path: &Path) -> PathBuf {
    beside(path, "-shm")
}

/// What was in the log when a branch left it there: its [mark](wal::Mark).
pub(super) fn left(path: &Path) -> PathBuf {
    beside(path, "-left")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn uri(path: &Path, option: &str) -> OsString {
    let mut uri = b"file:".to_vec();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'%' | b'?' | b'#' => uri.extend(format!("%{byte:02x}").bytes()),
            _ => uri.push(byte),
        }
    }
    uri.push(b'?');
    uri.extend(option.bytes());
    OsString::from_vec(uri)
}

/// Refuses a log that cannot be one: SQLite would block on a fifo. Tells whether there is a log.
pub(super) fn check_log(path: &Path) -> Result<bool> {
    let log = log(path);
    match log.symlink_metadata() {
        Ok(meta) if !meta.is_file() => Err(Error::Damaged {
            path: log,
            reason: "it is not a regular file; the catalog itself may be whole".into(),
        }),
        found => Ok(found.is_ok()),
    }
}

/// Refuses a catalog of a later release.
pub(super) fn check_version(db: &Connection, path: &Path) -> Result<()> {
    let read = db.pragma_query_value(None, "user_version", |row| row.get(0));
    match read.map_err(|source| translate(path, source))? {
        VERSION => Ok(()),
        found if found > VERSION => Err(Error::NewerVersion { path: path.to_owned(), found }),
        found => Err(Error::Damaged { path: path.to_owned(), reason: format!("its version is {found}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_programs_database_is_no_catalog() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let db = Connection::open(&path).unwrap();
        db.execute_batch("CREATE TABLE message (text)").unwrap();
        check_file(&path).unwrap();
        let error = check_header(&path, &db).unwrap_err().to_string();
        assert!(error.ends_with("is damaged: it is not a catalog of fsnap"), "{error}");
    }

    #[test]
    fn pages_that_only_the_log_has_are_no_truncation() {
        let dir = tempfile::tempdir().unwrap();
        let (state, copy) = (dir.path().join("state"), dir.path().join("copy"));
        create_if_missing(&state).unwrap();
        std::fs::create_dir(&copy).unwrap();
        let db = Connection::open(state.join(FILE)).unwrap();
        db.execute_batch("CREATE TABLE filler (content); INSERT INTO filler VALUES (zeroblob(200000))").unwrap();
        // What is there once the first page was written back, and no other.
        for name in [FILE.to_owned(), format!("{FILE}-wal")] {
            std::fs::copy(state.join(&name), copy.join(&name)).unwrap();
        }
        let pages: u32 = db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
        let path = copy.join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[28..32].copy_from_slice(&pages.to_be_bytes());
        std::fs::write(&path, bytes).unwrap();
        let check = || check_header(&path, &Connection::open(&path).unwrap());
        check().unwrap();
        let log = log(&path);
        let len = log.metadata().unwrap().len();
        File::options().write(true).open(&log).unwrap().set_len(len / 2).unwrap();
        assert!(matches!(check(), Err(Error::Damaged { .. })));
    }
}
