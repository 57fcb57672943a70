//! What SQLite can only be told through its C interface: the only `unsafe` of the catalog.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::ptr;

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

/// The length of a database's header, in bytes ([the database header]).
///
/// [the database header]: https://www.sqlite.org/fileformat2.html#the_database_header
pub(super) const HEADER: usize = 100;

/// The header of a database's file, and the file's length in bytes, read through the descriptor that the connection has:
/// [`SQLITE_FCNTL_FILE_POINTER`]. The file must be as long as a header.
///
/// [`SQLITE_FCNTL_FILE_POINTER`]: https://www.sqlite.org/c3ref/c_fcntl_begin_atomic_write.html
pub(super) fn header(db: &Connection) -> rusqlite::Result<([u8; HEADER], u64)> {
    let mut file: *mut ffi::sqlite3_file = ptr::null_mut();
    let (mut header, mut length) = ([0; HEADER], 0);
    let operation = ffi::SQLITE_FCNTL_FILE_POINTER;
    // SAFETY: the handle is that of an open connection and not used elsewhere meanwhile, the name ends with a zero, and the operation takes the
    // address of a pointer to a file, which it sets to that of the connection. Its methods belong to SQLite and are there as long as it is open.
    // They take the file, a buffer with its length and an offset, or the address of an integer.
    let code = unsafe {
        match ffi::sqlite3_file_control(db.handle(), c"main".as_ptr(), operation, (&raw mut file).cast()) {
            ffi::SQLITE_OK => match file.as_ref().and_then(|file| file.pMethods.as_ref()) {
                Some(&ffi::sqlite3_io_methods { xRead: Some(read), xFileSize: Some(size), .. }) => {
                    match size(file, &raw mut length) {
                        ffi::SQLITE_OK => read(file, header.as_mut_ptr().cast(), HEADER as c_int, 0),
                        failed => failed,
                    }
                }
                _ => ffi::SQLITE_CANTOPEN,
            },
            failed => failed,
        }
    };
    if code == ffi::SQLITE_OK {
        Ok((header, length.cast_unsigned()))
    } else {
        Err(Error::SqliteFailure(ffi::Error::new(code), None))
    }
}
