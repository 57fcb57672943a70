//! The bare ioctl that fsnap is compared with.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use linux_raw_sys::btrfs as raw;
use nix::sys::ioctl::ioctl_num_type as Number;

mod call {
    use super::{Number, raw};
    nix::ioctl_write_ptr_bad!(
        snap_create,
        linux_raw_sys::ioctl::BTRFS_IOC_SNAP_CREATE_V2 as Number,
        raw::btrfs_ioctl_vol_args_v2
    );
}

/// `BTRFS_IOC_SNAP_CREATE_V2` of a snapshot that can be written, and nothing else.
pub fn snapshot(source: &File, dir: &File, name: &str) -> io::Result<()> {
    // SAFETY: the structure is plain integers, for which all zeroes is a value.
    let mut args: raw::btrfs_ioctl_vol_args_v2 = unsafe { std::mem::zeroed() };
    args.fd = i64::from(source.as_raw_fd());
    // SAFETY: the union's member `name` is an array of characters, of which zero is one; the name is shorter than it.
    for (to, from) in unsafe { &mut args.__bindgen_anon_2.name }.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: both descriptors are open for the call, and the kernel only reads the structure.
    unsafe { call::snap_create(dir.as_raw_fd(), &args) }?;
    Ok(())
}
