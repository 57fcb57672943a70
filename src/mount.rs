//! Carries out the recipes of backends: makes an image's files visible at a directory.
//!
//! A mount is made complete and detached first ([`Prepared`]), and then attached in one step: nobody sees a snapshot that can still be
//! written, or a volume without its flags. What was attached is taken off again when its [`Mounted`] is dropped, unless it is
//! [kept](Mounted::keep).
//!
//! A detached copy of a mount takes its flags from the original, and the call that would change them
//! (`mount_setattr`) has no safe binding. So the copy is put into a mount namespace that only one short-lived thread has,
//! gets its flags there, and is copied out again.
//!
//! The calls are those of [open_tree(2)], [fsopen(2)] and [move_mount(2)], and need `CAP_SYS_ADMIN`.
//!
//! [open_tree(2)]: https://man7.org/linux/man-pages/man2/open_tree.2.html
//! [fsopen(2)]: https://man7.org/linux/man-pages/man2/fsopen.2.html
//! [move_mount(2)]: https://man7.org/linux/man-pages/man2/move_mount.2.html

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use fsnap_backend::mounts::{self, Mount};
use fsnap_backend::{FileKind, MountSpec, beneath};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};
use serde::{Deserialize, Serialize};

/// The result of mounting or unmounting.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be mounted, or not be unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel cannot mount such an image; it is read through [`fsnap_backend::Dir`].
    #[error("this image cannot be mounted by the kernel: browse it through fsnap's file system")]
    NotMountable,
    /// The mount point is not a directory, or a symbolic link.
    #[error("{dir:?} cannot be a mount point: {reason}")]
    NotAMountPoint {
        /// The directory that was named.
        dir: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// A process still uses it.
    #[error("{dir:?} is in use: end the processes that have files or their working directory there")]
    Busy {
        /// Where it is mounted.
        dir: PathBuf,
    },
    /// Something else stands at the mount point by now.
    #[error("{dir:?} no longer shows what fsnap mounted there: unmount by hand what covers it")]
    Covered {
        /// Where it was mounted.
        dir: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} {object:?}: {source}{}", Detail(detail))]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        object: PathBuf,
        /// The system's answer.
        source: io::Error,
        /// What the file system itself had to say.
        detail: String,
    },
}

struct Detail<'a>(&'a str);

impl std::fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " ({})", self.0.escape_debug()) }
    }
}

fn failed<E: Into<io::Error>>(action: &'static str, object: &Path) -> impl Fn(E) -> Error {
    move |error| Error::Io { action, object: object.into(), source: error.into(), detail: String::new() }
}

/// What a mount refuses to processes, whatever the files on it say.
///
/// The default is for files that others made: neither set-id bits nor device nodes have an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restrictions {
    /// Set-user-ID and set-group-ID bits and file capabilities have no effect.
    pub nosuid: bool,
    /// Device nodes cannot be opened.
    pub nodev: bool,
    /// Programs cannot be run.
    pub noexec: bool,
}

impl Default for Restrictions {
    fn default() -> Self {
        Self { nosuid: true, nodev: true, noexec: false }
    }
}

impl Restrictions {
    /// Those of the mount that `dir` lies on: for a mount that is to take its place.
    pub fn of(dir: &Path) -> Result<Self> {
        let found = rustix::fs::statvfs(dir).map_err(failed("examine", dir))?.f_flag;
        Ok(Self {
            nosuid: found.contains(StatVfsMountFlags::NOSUID),
            nodev: found.contains(StatVfsMountFlags::NODEV),
            noexec: found.contains(StatVfsMountFlags::NOEXEC),
        })
    }
}

/// A mount that is complete and not attached anywhere; dropped, it is gone.
#[derive(Debug)]
pub struct Prepared {
    mount: OwnedFd,
}

impl Prepared {
    /// Carries out a recipe. A recipe for a snapshot yields a mount that refuses writes.
    pub fn new(spec: &MountSpec, restrictions: Restrictions) -> Result<Self> {
        let mount = match spec {
            MountSpec::Bind { dir, read_only } => bind(dir, *read_only, restrictions),
            MountSpec::Mount { fstype, source, options, read_only } => {
                new_file_system(fstype, source, options, *read_only, restrictions)
            }
            MountSpec::Tree(_) => Err(Error::NotMountable),
        };
        Ok(Self { mount: mount? })
    }

    /// Lays what `upper` in the directory `home` holds over a snapshot; `work` in it belongs to the kernel.
    ///
    /// The result is writable: what is written goes to `upper` ([overlayfs]). The snapshot stays mounted as long as this
    /// is, but nowhere where it could be seen.
    ///
    /// [overlayfs]: https://docs.kernel.org/filesystems/overlayfs.html
    pub fn overlay(lower: &MountSpec, home: &Path, restrictions: Restrictions) -> Result<Self> {
        let lower = Self::new(lower, restrictions)?;
        // overlayfs takes paths alone, and only of mounts that this namespace has.
        let lay = || {
            let failed = |error| failed("prepare an overlay in", home)(error);
            private_namespace().map_err(failed)?;
            // By the path again: a descriptor from before would be of a mount of the other namespace.
            rustix::process::chdir(home).map_err(failed)?;
            move_mount(&lower.mount, "", CWD, STAGE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed)?;
            // A rename of a directory that the snapshot has would else be refused.
            let options = format!("lowerdir={STAGE},upperdir=upper,workdir=work,redirect_dir=on");
            new_file_system("overlay", Path::new("fsnap"), &options, false, restrictions)
        };
        let laid = std::thread::scope(|scope| scope.spawn(lay).join());
        Ok(Self { mount: laid.unwrap_or_else(|panic| std::panic::resume_unwind(panic))? })
    }

    /// Opens the root of the mount for reading, attached nowhere; the mount goes with the last descriptor of it.
    pub fn open(self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&self.mount, ".", flags, Mode::empty());
        root.map_err(failed("open the root of", Path::new("a detached mount")))
    }

    /// Attaches it at the directory, over what may be mounted there.
    ///
    /// The last component of `at` may not be a symbolic link.
    pub fn attach(self, at: &Path) -> Result<Mounted> {
        let refuse = |reason| Error::NotAMountPoint { dir: at.into(), reason };
        let name = at.file_name().ok_or_else(|| refuse("it has no name of its own"))?;
        let parent = at.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.attach_beneath(open_dir(parent)?, name, at)
    }

    /// Attaches it at the directory `name` in `parent`; `shown` is what messages call it.
    pub fn attach_beneath(self, parent: OwnedFd, name: &OsStr, shown: &Path) -> Result<Mounted> {
        let open = beneath::open_handle(&parent, name).and_then(|dir| Ok((beneath::stat_fd(&dir)?.kind, dir)));
        let (kind, dir) = open.map_err(failed("open", shown))?;
        match kind {
            FileKind::Dir => {}
            FileKind::Symlink => {
                return Err(Error::NotAMountPoint { dir: shown.into(), reason: "it is a symbolic link" });
            }
            _ => return Err(Error::NotAMountPoint { dir: shown.into(), reason: "it is not a directory" }),
        }
        let id = self.attach_to(&dir, shown)?;
        Ok(Mounted { at: Some(At { parent, name: name.into(), id }), shown: shown.into() })
    }

    /// Attaches it to an open directory, and tells its [id](Mount::id). It stays there when all of this is forgotten.
    pub(crate) fn attach_to(self, dir: &OwnedFd, shown: &Path) -> Result<u64> {
        let both = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.mount, "", dir, "", both).map_err(failed("mount on", shown))?;
        mount_id(&self.mount, OsStr::new(""), AtFlags::EMPTY_PATH).map_err(failed("examine", shown))
    }
}

/// The file system's type of what fsnap itself serves.
pub const SERVED: &str = "fuse.fsnap";

/// What fsnap serves from `source`, as this mount namespace has it; the uppermost last.
pub(crate) fn mounts_of(source: &Path) -> io::Result<Vec<Mount>> {
    let ours = |mount: &Mount| mount.fstype == SERVED.as_bytes() && mount.source == source;
    Ok(mounts::own()?.into_iter().filter(ours).collect())
}

/// Where this mount namespace shows what fsnap serves from `source`; the uppermost last.
pub fn served(source: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(mounts_of(source)?.into_iter().map(|mount| mount.point).collect())
}

/// The snapshots that a server has attached to what it serves at `mount`: those at or below `below` there.
pub(crate) fn attached(mount: &Mount, below: &Path) -> io::Result<Vec<Mount>> {
    let below = mount.point.join(below);
    let ours = |other: &Mount| other.parent == mount.id && !other.writable && other.point.starts_with(&below);
    Ok(mounts::own()?.into_iter().filter(ours).collect())
}

/// Takes off what a server has [`attached`]. On failure the rest stays.
pub(crate) fn take_off_attached(mount: &Mount, below: &Path, flags: UnmountFlags) -> Result<()> {
    // The first reading of the table may have missed some.
    for _ in 0..2 {
        let attached = attached(mount, below).map_err(failed("look for what is mounted below", &mount.point))?;
        for Mount { point, .. } in attached {
            match unmount(&point, flags | UnmountFlags::NOFOLLOW) {
                // The server, or the kernel with its directory, was faster.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(Errno::BUSY) => return Err(Error::Busy { dir: point }),
                Err(error) => return Err(failed("unmount", &point)(error)),
            }
        }
    }
    Ok(())
}

/// Carries out a recipe at a directory: [`Prepared::new`] and [`Prepared::attach`].
pub fn mount(spec: &MountSpec, at: &Path, restrictions: Restrictions) -> Result<Mounted> {
    Prepared::new(spec, restrictions)?.attach(at)
}

/// Opens the root of what a snapshot's recipe shows, for reading. What is mounted for that is attached nowhere.
///
/// A directory is bound read-only, so that not even its access times change, and shows nothing that is mounted in it. Who
/// may not mount gets it as it is.
pub fn open(spec: &MountSpec) -> Result<OwnedFd> {
    match spec {
        MountSpec::Bind { dir, .. } if !rustix::process::geteuid().is_root() => open_dir(dir),
        spec => Prepared::new(spec, Restrictions::default())?.open(),
    }
}

/// Something that is mounted; dropped, it is taken off, at the latest when its last user is gone.
#[derive(Debug)]
#[must_use = "it is unmounted when this is dropped"]
pub struct Mounted {
    /// `None` once it is kept or taken off.
    at: Option<At>,
    shown: PathBuf,
}

#[derive(Debug)]
struct At {
    parent: OwnedFd,
    name: OsString,
    id: u64,
}

impl Mounted {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.shown
    }

    /// Leaves it mounted.
    pub fn keep(mut self) {
        self.at = None;
    }

    /// Unmounts it, if no process uses it. On failure it stays mounted.
    pub fn unmount(mut self) -> Result<()> {
        match self.at.take() {
            Some(at) => self.take_off(&at, UnmountFlags::empty()),
            None => Ok(()),
        }
    }

    fn take_off(&self, at: &At, flags: UnmountFlags) -> Result<()> {
        let no_follow = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        if mount_id(&at.parent, &at.name, no_follow).map_err(failed("examine", &self.shown))? != at.id {
            return Err(Error::Covered { dir: self.shown.clone() });
        }
        // A descriptor of the mount itself would keep it busy; its parent's leads to it all the same.
        let path = fd_path(&at.parent).join(&at.name);
        match unmount(&path, flags | UnmountFlags::NOFOLLOW) {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(Error::Busy { dir: self.shown.clone() }),
            Err(error) => Err(failed("unmount", &self.shown)(error)),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(at) = self.at.take() {
            // There is nobody to tell; what covers it, or was unmounted by others, is not ours.
            let _ = self.take_off(&at, UnmountFlags::DETACH);
        }
    }
}

fn mount_id(at: impl AsFd, name: &OsStr, flags: AtFlags) -> rustix::io::Result<u64> {
    Ok(rustix::fs::statx(at, name, flags, StatxFlags::MNT_ID)?.stx_mnt_id)
}

fn fd_path(descriptor: &OwnedFd) -> PathBuf {
    format!("/proc/thread-self/fd/{}", descriptor.as_raw_fd()).into()
}

fn open_dir(dir: &Path) -> Result<OwnedFd> {
    beneath::open_root(dir).map_err(failed("open", dir))
}

/// Makes a detached copy of the mount that `dir` lies on, with `dir` as its root.
fn bind(dir: &Path, read_only: bool, restrictions: Restrictions) -> Result<OwnedFd> {
    let copy = clone_tree(open_dir(dir)?, "").map_err(failed("copy the mount of", dir))?;
    let flagged = std::thread::scope(|scope| scope.spawn(|| with_flags(&copy, read_only, restrictions)).join());
    match flagged {
        Ok(flagged) => flagged.map_err(failed("restrict the mount of", dir)),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn clone_tree(at: impl AsFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = if path.is_empty() { clone | OpenTreeFlags::AT_EMPTY_PATH } else { clone };
    open_tree(at, path, clone)
}

/// Where this thread mounts what it needs by a path: any directory that is surely there will do, for nobody else looks up
/// paths in its namespace.
const STAGE: &str = "/proc";

/// Gives this thread a mount namespace of its own.
fn private_namespace() -> rustix::io::Result<()> {
    let to_errno = |error: nix::errno::Errno| Errno::from_raw_os_error(error as i32);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(to_errno)?;
    // Else what is mounted here would show up in the namespace it was copied from.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
}

/// Copies a detached mount with other flags. Requires a thread of its own, whose mount namespace it replaces.
fn with_flags(mount: &OwnedFd, read_only: bool, restrictions: Restrictions) -> rustix::io::Result<OwnedFd> {
    private_namespace()?;
    move_mount(mount, "", CWD, STAGE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let mut flags = MountFlags::BIND;
    flags.set(MountFlags::RDONLY, read_only);
    flags.set(MountFlags::NOSUID, restrictions.nosuid);
    flags.set(MountFlags::NODEV, restrictions.nodev);
    flags.set(MountFlags::NOEXEC, restrictions.noexec);
    mount_remount(STAGE, flags, "")?;
    clone_tree(CWD, STAGE)
}

/// Opens a file system as a detached mount.
fn new_file_system(
    fstype: &str,
    source: &Path,
    options: &str,
    read_only: bool,
    restrictions: Restrictions,
) -> Result<OwnedFd> {
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("open a file system for", source))?;
    let configure = || {
        fsconfig_set_string(&context, "source", source)?;
        if read_only {
            fsconfig_set_flag(&context, "ro")?;
        }
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(&context, key, value)?,
                None => fsconfig_set_flag(&context, option)?,
            }
        }
        fsconfig_create(&context)
    };
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, restrictions.nosuid);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, restrictions.nodev);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, restrictions.noexec);
    let mounted = configure().and_then(|()| fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes));
    mounted.map_err(|error| {
        let detail = messages(context);
        Error::Io { action: "mount", object: source.into(), source: error.into(), detail }
    })
}

/// What the file system said while it was configured: each read returns one message.
fn messages(context: OwnedFd) -> String {
    let mut context = File::from(context);
    let mut buffer = [0; 1024];
    let mut said = Vec::new();
    while said.len() < 8 {
        match context.read(&mut buffer) {
            Ok(length) if length > 0 => said.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned()),
            _ => break,
        }
    }
    said.join("; ")
}
