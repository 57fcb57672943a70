//! The system calls that have no safe wrapper.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::ptr;
use std::time::Duration;

use nix::unistd::Pid;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::time::Timespec;

/// Writes `data` at `offset` of `file` through a shared mapping, and flushes nothing.
///
/// The range must lie within the file.
pub(crate) fn store_through_mapping(file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
    let page = rustix::param::page_size() as u64;
    let start = offset - offset % page;
    let within = (offset - start) as usize;
    let len = within + data.len();
    if data.is_empty() || offset + data.len() as u64 > file.metadata()?.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel chooses the address, so nothing of this process is replaced; no Rust reference to the mapping
    // is ever made, and it is gone when this function returns. The suite alone writes to the file, so it keeps the
    // length that was checked above, and every byte of the range can be stored to.
    unsafe {
        let base = rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::WRITE, MapFlags::SHARED, file, start)?;
        ptr::copy_nonoverlapping(data.as_ptr(), base.cast::<u8>().add(within), data.len());
        rustix::mm::munmap(base, len)?;
    }
    Ok(())
}

/// Starts `command` in a child that first lives for `delay` as a copy of this process, with all its descriptors.
pub(crate) fn spawn_slowly(command: &mut Command, delay: Duration) -> io::Result<Child> {
    let delay = Timespec { tv_sec: delay.as_secs() as i64, tv_nsec: delay.subsec_nanos().into() };
    // SAFETY: between fork and exec, the closure makes one system call; it takes no lock and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            let _ = rustix::thread::nanosleep(&delay);
            Ok(())
        });
    }
    command.spawn()
}

/// A system call that a traced thread is about to make.
pub(crate) struct Entry {
    /// Its number.
    pub(crate) number: i64,
    /// Its arguments.
    pub(crate) arguments: [u64; 6],
}

/// The system call that the stopped thread `tid` is about to make; `None` if it has just made one.
pub(crate) fn entry(tid: Pid) -> nix::Result<Option<Entry>> {
    let info = match nix::sys::ptrace::syscall_info(tid) {
        // User-mode Linux does not tell (it lacks PTRACE_GET_SYSCALL_INFO), but has the registers.
        #[cfg(target_arch = "x86_64")]
        Err(nix::errno::Errno::EIO) => return Ok(entry_in(&nix::sys::ptrace::getregs(tid)?)),
        info => info?,
    };
    if info.op != nix::libc::PTRACE_SYSCALL_INFO_ENTRY {
        return Ok(None);
    }
    // SAFETY: for this `op` the kernel has filled the union's `entry`, whose fields are plain integers.
    let entry = unsafe { info.u.entry };
    Ok(Some(Entry { number: entry.nr as i64, arguments: entry.args }))
}

/// The same, read from the registers: a call that is about to be made has no result yet, which is shown as `ENOSYS`.
#[cfg(target_arch = "x86_64")]
fn entry_in(registers: &nix::libc::user_regs_struct) -> Option<Entry> {
    let none_yet = registers.rax as i64 == -i64::from(nix::libc::ENOSYS);
    none_yet.then_some(Entry {
        number: registers.orig_rax as i64,
        arguments: [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9],
    })
}
