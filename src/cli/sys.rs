//! The signal that ends the process: the only `unsafe` of the command line.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::sync::OnceLock;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// What the process says on standard error when its time is over.
pub(super) static LAST_WORDS: OnceLock<String> = OnceLock::new();

/// A file that is removed then.
pub(super) static NOTE: OnceLock<CString> = OnceLock::new();

/// Says the last words, removes the note, and ends the process with exit code 1.
pub(super) extern "C" fn end(_: libc::c_int) {
    let words = LAST_WORDS.get().map_or("", String::as_str);
    // SAFETY: these calls may be made in a signal handler (signal-safety(7)), and the texts live for ever.
    unsafe {
        if let Some(note) = NOTE.get() {
            libc::unlink(note.as_ptr());
        }
        libc::write(libc::STDERR_FILENO, words.as_ptr().cast(), words.len());
        libc::_exit(1);
    }
}

/// Sets what is done when `signal` comes.
pub(super) fn handle(signal: Signal, handler: SigHandler, flags: SaFlags) -> nix::Result<()> {
    let action = SigAction::new(handler, flags, SigSet::empty());
    // SAFETY: the one handler that is passed, `end`, calls nothing that may not be called in one.
    unsafe { sigaction(signal, &action) }.map(drop)
}
