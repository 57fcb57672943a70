//! The one device-mapper call that the `devicemapper` crate cannot make as needed.
//!
//! The crate's resume waits until udev has dealt with the event that the kernel sends. The origin of a snapshot is
//! resumed while processes stand frozen, perhaps udev's own among them: nothing may be waited for.
#![allow(unsafe_code)]

use std::ffi::c_char;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

use devicemapper_sys as raw;

mod call {
    use devicemapper_sys as raw;

    nix::ioctl_readwrite!(dev_suspend, raw::DM_IOCTL, raw::DM_DEV_SUSPEND_CMD, raw::dm_ioctl);
}

/// Resumes the device that is called `name`, and tells nobody to wait.
///
/// Succeeds if the device was not suspended.
pub(crate) fn resume(control: impl AsFd, name: &str) -> io::Result<()> {
    let mut header = raw::dm_ioctl {
        // The first version that has this call as it is today.
        version: [4, 0, 0],
        data_size: size_of::<raw::dm_ioctl>() as u32,
        data_start: size_of::<raw::dm_ioctl>() as u32,
        ..Default::default()
    };
    // The last byte stays the zero that ends the name.
    let room = header.name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in header.name.iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    // SAFETY: the structure is the one that this call reads and writes, it says its own size, and it lives throughout.
    unsafe { call::dev_suspend(control.as_fd().as_raw_fd(), &mut header) }?;
    Ok(())
}
