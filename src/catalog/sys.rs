//! What SQLite can only be told through its C interface: the only `unsafe` of the catalog.

#![allow(unsafe_code)]

use std::ffi::c_int;

use rusqlite::{Connection, Error, ffi};

/// Lets the log of changes stay, when the last connection to the catalog closes: [`SQLITE_FCNTL_PERSIST_WAL`].
///
/// [`SQLITE_FCNTL_PERSIST_WAL`]: https://www.sqlite.org/c3ref/c_fcntl_begin_atomic_write.html
pub(super) fn keep_log(db: &Connection) -> rusqlite::Result<()> {
    let mut keep: c_int = 1;
    let operation = ffi::SQLITE_FCNTL_PERSIST_WAL;
    // SAFETY: the handle is that of an open connection and not used elsewhere meanwhile, the name ends with a zero, and the operation takes the
    // address of an `int`, which it does not keep.
    let code = unsafe { ffi::sqlite3_file_control(db.handle(), c"main".as_ptr(), operation, (&raw mut keep).cast()) };
    if code == ffi::SQLITE_OK { Ok(()) } else { Err(Error::SqliteFailure(ffi::Error::new(code), None)) }
}
