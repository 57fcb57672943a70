//! The calls around a run that have no safe binding: the only `unsafe` of the engines.

#![allow(unsafe_code)]

use std::io;

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
