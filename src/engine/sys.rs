//! The calls around a run that have no safe binding: the only `unsafe` of the engines.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;

/// Makes every mount of this mount namespace read-only; what is mounted later is not.
pub(super) fn make_everything_read_only() -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path ends with a NUL, and the structure is valid for the call and of the size that is told.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the next program have standard input, output and error, and no other open file.
pub(super) fn close_all_by_exec() -> io::Result<()> {
    // SAFETY: no descriptor is closed here: they are closed when another program takes the place of this one.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Starts a command so that it is killed when this thread ends, however that ends.
pub(crate) fn dies_with_this_thread(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    let tie = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        match rustix::process::getppid() {
            Some(pid) if pid.as_raw_pid().cast_unsigned() == parent => Ok(()),
            // It has ended already: no signal will come.
            _ => Err(rustix::io::Errno::SRCH.into()),
        }
    };
    // SAFETY: it makes two system calls between fork and exec, and touches no memory that others could have locked.
    unsafe { command.pre_exec(tie) }
}
