//! The signals that end the process: the only `unsafe` of the command line.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::sync::OnceLock;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// What the process says on standard error when its time is over.
pub(super) static LAST_WORDS: OnceLock<String> = OnceLock::new();

/// A file that is removed then.
pub(super) static NOTE: OnceLock<CString> = OnceLock::new();

/// Says the last words, removes the note, sets going what stands, and ends the process with exit code 1.
pub(super) extern "C" fn end(_: libc::c_int) {
    let words = LAST_WORDS.get().map_or("", String::as_str);
    // SAFETY: these calls may be made in a signal handler (signal-safety(7)), and the texts live for ever.
    unsafe {
        if let Some(note) = NOTE.get() {
            libc::unlink(note.as_ptr());
        }
        fsnap::stores::release_at_once();
        libc::write(libc::STDERR_FILENO, words.as_ptr().cast(), words.len());
        libc::_exit(1);
    }
}

/// What is said when a page of the catalog's shared index cannot be had.
///
/// SQLite maps that file into memory, and a file system that is full can tell of it by this signal only.
const NO_PAGE: &str = "fsnap: error: a file of the catalog can be neither read nor made larger (SIGBUS)\n\
    fsnap: hint: free some space on its file system, or look for faults of its device; \
    the next command undoes what was half done\n";

/// Says [`NO_PAGE`], and ends the process with exit code 1.
pub(super) extern "C" fn end_without_page(_: libc::c_int) {
    // SAFETY: these calls may be made in a signal handler (signal-safety(7)).
    unsafe {
        fsnap::stores::release_at_once();
        libc::write(libc::STDERR_FILENO, NO_PAGE.as_ptr().cast(), NO_PAGE.len());
        libc::_exit(1);
    }
}

/// Sets what is done when `signal` comes.
pub(super) fn handle(signal: Signal, handler: SigHandler, flags: SaFlags) -> nix::Result<()> {
    let action = SigAction::new(handler, flags, SigSet::empty());
    // SAFETY: the handlers that are passed, those above, call nothing that may not be called in one.
    unsafe { sigaction(signal, &action) }.map(drop)
}
