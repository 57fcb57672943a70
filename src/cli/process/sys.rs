//! The beginning of the process, the signals that end it, and a child that goes on without it: the only `unsafe` of the command line.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::AssertUnwindSafe;
use std::sync::OnceLock;
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::ForkResult;

/// Where the C library begins the program.
#[cfg(not(test))]
// SAFETY: the C library calls nothing else by that name, and no other function has it.
#[unsafe(no_mangle)]
extern "C" fn main(_: libc::c_int, _: *const *const libc::c_char) -> libc::c_int {
    let run = || crate::cli::main(std::env::args_os().collect());
    // 101 is what a program in Rust exits with after a panic; where it was stands on standard error by now.
    let code = std::panic::catch_unwind(run).unwrap_or(101);
    // This writes out what is buffered for standard output.
    std::process::exit(code.into())
}

/// Opens those of the standard input and output that are closed on nothing: the next file would become one of them, and what is
/// printed would go into it.
pub(crate) fn open_standard() {
    for fd in libc::STDIN_FILENO..=libc::STDERR_FILENO {
        // SAFETY: these calls take numbers and a text that lives for ever; a number that is open stays as it is.
        unsafe {
            if libc::fcntl(fd, libc::F_GETFD) < 0 {
                // The lowest number that is free is this one.
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
        }
    }
}

/// Whether the signal is ignored: whoever started this process wants it so, as nohup(1) and a shell for what it runs in the background.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the call fills the place with what is valid, and changes nothing; all zeroes are valid as well.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// What the process says on standard error when its time is over.
pub(crate) static LAST_WORDS: OnceLock<String> = OnceLock::new();

/// A file that is removed then.
pub(crate) static NOTE: OnceLock<CString> = OnceLock::new();

/// Says the last words, removes the note, sets going what stands, and ends the process with exit code 1.
pub(crate) extern "C" fn end(_: libc::c_int) {
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
pub(crate) extern "C" fn end_without_page(_: libc::c_int) {
    // SAFETY: these calls may be made in a signal handler (signal-safety(7)).
    unsafe {
        fsnap::stores::release_at_once();
        libc::write(libc::STDERR_FILENO, NO_PAGE.as_ptr().cast(), NO_PAGE.len());
        libc::_exit(1);
    }
}

/// Runs `work` in a child that is a copy of this process, and ends it: nothing of the parent's is finished or cleaned up there.
///
/// The process must have one thread.
pub(crate) fn in_child(work: impl FnOnce()) -> io::Result<()> {
    // SAFETY: no other thread can hold a lock that the child would wait for.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { .. } => Ok(()),
        ForkResult::Child => {
            let _ = std::panic::catch_unwind(AssertUnwindSafe(work));
            // SAFETY: it has no preconditions.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Makes a child that goes on alone: in a session of its own, in no directory that somebody may want to unmount, and with no files but
/// those `kept`.
pub(crate) fn detach(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    nix::unistd::setsid()?;
    nix::unistd::chdir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    drop(null);
    keep_only(kept)
}

/// Closes all files of a child but those `kept`, and the standard ones.
pub(crate) fn keep_only(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().map(|file| file.as_raw_fd().cast_unsigned()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for next in kept.into_iter().chain([u32::MAX]) {
        if first < next {
            // SAFETY: what owns the files that are closed here is never used or dropped in the child.
            if unsafe { libc::syscall(libc::SYS_close_range, first, next - 1, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = next.saturating_add(1);
    }
    Ok(())
}

/// Ends a child after `limit`, in silence: the parent's handler would say that the hook failed, and take its note away.
pub(crate) fn end_after(limit: Duration) -> io::Result<()> {
    handle(Signal::SIGALRM, SigHandler::SigDfl, SaFlags::empty())?;
    nix::unistd::alarm::set(u32::try_from(limit.as_secs()).unwrap_or(u32::MAX).max(1));
    Ok(())
}

/// Lets others run first: this process preempts nobody when it wakes up (`SCHED_BATCH`, sched(7)), and takes a smaller share.
pub(crate) fn give_way() {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter is valid for the call. If it is refused, the process merely does not give way.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameter) };
    let _ = rustix::process::nice(10);
}

/// How long the end of a hook may take, once its files are closed, until the engine has been woken by it.
const HANDOVER: Duration = Duration::from_millis(5);

/// Waits for the end of the process that holds the other end of `its`; and then for whoever waits for that process, who is to run first.
///
/// A process that ends closes its files before it wakes its parent. So who was woken by the former runs by then, perhaps where the parent
/// ran last, and need not be preempted for it: the engine, and all that stands, would wait for a time slice, some milliseconds.
pub(crate) fn wait_for_end(its: &mut impl Read) -> io::Result<usize> {
    let ended = its.read(&mut [0]);
    std::thread::sleep(HANDOVER);
    ended
}

/// Sets what is done when `signal` comes.
pub(crate) fn handle(signal: Signal, handler: SigHandler, flags: SaFlags) -> nix::Result<()> {
    let action = SigAction::new(handler, flags, SigSet::empty());
    // SAFETY: the handlers that are passed, those above, call nothing that may not be called in one.
    unsafe { sigaction(signal, &action) }.map(drop)
}
