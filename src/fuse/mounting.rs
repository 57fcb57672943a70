//! Putting a file system of ours where it is seen, and taking it off again.
//!
//! Root mounts by itself; everybody else through `fusermount3`. In both cases the mount is nobody's but its place's: it is not taken
//! off when its server ends. By then another server may have mounted at the same place, and a path does not tell the two
//! apart.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};

use super::session::{Error, Options, TYPE, failed};

/// The program that mounts for users.
const HELPER: &str = "fusermount3";

/// Mounts what `source` names at `dir`; returns the device that its requests come from.
pub(super) fn mount(source: &Path, dir: &Path, options: Options) -> Result<OwnedFd, Error> {
    if rustix::process::geteuid().is_root() { mount_as_root(source, dir, options) } else { ask(source, dir, options) }
}

/// Mounts by ourselves, because a helper would drop the type's second half.
fn mount_as_root(source: &Path, dir: &Path, options: Options) -> Result<OwnedFd, Error> {
    let device = Path::new("/dev/fuse");
    let opened = File::options().read(true).write(true).open(device).map_err(failed("open", device))?;
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        opened.as_raw_fd(),
        uid.as_raw(),
        gid.as_raw()
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::NOSUID, !options.suid);
    flags.set(MountFlags::NODEV, !options.dev);
    let data = CString::new(data).map_err(|error| failed("mount on", dir)(error.into()))?;
    let done = rustix::mount::mount(source, dir, TYPE, flags, &*data);
    done.map_err(|error| failed("mount on", dir)(error.into()))?;
    Ok(opened.into())
}

/// Has the helper mount, which then sends the device.
fn ask(source: &Path, dir: &Path, options: Options) -> Result<OwnedFd, Error> {
    let mut text = OsString::from("default_permissions,nosuid,nodev,subtype=fsnap,fsname=");
    text.push(escape(source));
    if options.allow_other {
        text.push(",allow_other");
    }
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = pair.map_err(|error| failed("mount on", dir)(error.into()))?;
    let mut helper = Command::new(HELPER);
    // Its standard input is the one file that a program is sure to be started with.
    helper.arg("-o").arg(text).arg("--").arg(dir).env("_FUSE_COMMFD", "0").stdin(theirs);
    run(&mut helper, "mount on", dir)?;
    drop(helper);
    received(&ours).map_err(failed("get the device of", dir))
}

/// A path among mount options.
fn escape(path: &Path) -> OsString {
    let mut escaped = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    OsString::from_vec(escaped)
}

/// The file that the other end has sent.
fn received(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [io::IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    files.next().ok_or_else(|| io::Error::other(format!("{HELPER} has sent none")))
}

/// Takes off what is uppermost at `dir`, if nobody uses it.
pub(super) fn unmount(dir: &Path) -> Result<(), Error> {
    take_off(dir, false)
}

/// Takes it off its place at once; whoever uses it keeps it.
pub(super) fn detach(dir: &Path) -> Result<(), Error> {
    take_off(dir, true)
}

fn take_off(dir: &Path, at_once: bool) -> Result<(), Error> {
    if rustix::process::geteuid().is_root() {
        let mut flags = UnmountFlags::NOFOLLOW;
        flags.set(UnmountFlags::DETACH, at_once);
        return match rustix::mount::unmount(dir, flags) {
            Err(Errno::BUSY) => Err(Error::Busy { dir: dir.to_owned() }),
            done => done.map_err(|error| failed("unmount", dir)(error.into())),
        };
    }
    let mut helper = Command::new(HELPER);
    helper.arg("-u").args(at_once.then_some("-z")).arg("--").arg(dir).stdin(Stdio::null());
    run(&mut helper, "unmount", dir)
}

fn run(helper: &mut Command, action: &'static str, dir: &Path) -> Result<(), Error> {
    let output = helper.output().map_err(failed("run fusermount3 for", dir))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if said.contains("busy") {
        return Err(Error::Busy { dir: dir.to_owned() });
    }
    Err(failed(action, dir)(io::Error::other(said)))
}
