//! Serving a tree at a directory, until it is unmounted.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fsnap_backend::mounts::{self, Mount};
use fuser::{Config, Filesystem, INodeNo, Notifier, Session, SessionACL};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use super::adapter::Adapter;
use super::branches::Branches;
use super::browse::{Browse, Gone, Natives, Records, States};
use super::mount_adapter::MountAdapter;
use super::mounting;
use super::overlay::Overlay;
use super::watch::Watch;
use crate::mount;

/// The type of our mounts.
pub const TYPE: &str = crate::mount::SERVED;

/// Why a tree could not be served, or not be unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The branch could not be opened.
    #[error(transparent)]
    Overlay(#[from] super::overlay::Error),
    /// What lies below cannot be made visible.
    #[error(transparent)]
    Mount(#[from] crate::mount::Error),
    /// A chain of branches is too long for what the process may have open, or too much is in use at once.
    #[error(
        "no descriptor is left, though what nobody uses was closed: {source}; allow the server more (`ulimit -n`, `LimitNOFILE=` in a unit), and mount again"
    )]
    NoDescriptor {
        /// What the last call said.
        source: std::io::Error,
    },
    /// Nothing of ours is mounted there.
    #[error("{dir:?} is not mounted by fsnap")]
    NotMounted {
        /// The directory.
        dir: PathBuf,
    },
    /// One of ours is there already, and would be out of sight.
    #[error(
        "fsnap has something mounted at {dir:?} already: unmount it first, with `fsnap umount`, or name another directory"
    )]
    Mounted {
        /// The directory.
        dir: PathBuf,
    },
    /// What is served could not be found any more.
    #[error("{dir:?} cannot be mounted on: that would hide {hidden:?}, which fsnap needs; name another directory")]
    Hides {
        /// The directory.
        dir: PathBuf,
        /// What lies there or below.
        hidden: PathBuf,
    },
    /// What is written to one would change the other.
    #[error("{store:?} cannot keep the changes of {lower:?}: one lies in the other; name another directory")]
    NotApart {
        /// What is to stay as it is.
        lower: PathBuf,
        /// What would be written to.
        store: PathBuf,
    },
    /// A process still uses it.
    #[error("{dir:?} is in use: end the processes that have files or their working directory there")]
    Busy {
        /// Where it is mounted.
        dir: PathBuf,
    },
    /// Only root can attach snapshots.
    #[error("cannot attach snapshots to {dir:?}, which takes root: mount it without --native")]
    NotRoot {
        /// The directory.
        dir: PathBuf,
    },
    /// Where to attach them is not known.
    #[error(
        "the table of mounts does not have {dir:?}: snapshots are read through it, and none is attached; unmount it, and mount it again"
    )]
    NotInTable {
        /// The directory.
        dir: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} {object:?}: {source}")]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        object: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// How a tree is mounted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Other users see it too.
    pub allow_other: bool,
    /// Set-id bits have an effect.
    pub suid: bool,
    /// Device nodes can be opened.
    pub dev: bool,
    /// Snapshots that the kernel can mount are attached, and not read through FUSE.
    pub native: bool,
}

pub(super) fn failed<'a>(action: &'static str, object: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { action, object: object.to_owned(), source }
}

/// Mounts a copy-on-write tree at `dir`, calls `ready`, and serves it until it is unmounted.
pub fn serve(overlay: Overlay, source: &Path, dir: &Path, options: Options, ready: impl FnOnce()) -> Result<(), Error> {
    let notifier = Arc::new(OnceLock::new());
    let adapter = Adapter::new(overlay, source, notifier.clone());
    let merge = adapter.merger();
    let (ended, waits) = std::sync::mpsc::channel::<()>();
    let keeper = std::thread::Builder::new().name("merge".into()).spawn(move || {
        while waits.recv_timeout(MERGING) == Err(RecvTimeoutError::Timeout) {
            // What cannot be merged now is tried again.
            let _ = merge();
        }
    });
    let keeper = keeper.map_err(failed("start a thread for", dir))?;
    let served = serve_by(adapter, &notifier, source, dir, options, |_| ready());
    drop(ended);
    let _ = keeper.join();
    served
}

/// How often it is looked whether images were deleted, so that layers can be merged; they are before each snapshot, too.
///
/// Seldom: to move a file from layer to layer changes its `ctime`, and who compares that reads the file again.
const MERGING: Duration = Duration::from_secs(600);

/// Mounts past states and branches at `dir`, calls `ready`, and serves them until they are unmounted.
///
/// Snapshots are let go of when nobody has looked at them for `idle`, and all of them at the end. `report` is told of every failure
/// that is more than a wrong name.
pub fn serve_all(
    records: Records,
    report: fn(&crate::Error),
    source: &Path,
    dir: &Path,
    options: Options,
    idle: Duration,
    ready: impl FnOnce(),
) -> Result<(), Error> {
    if options.native && !rustix::process::geteuid().is_root() {
        return Err(Error::NotRoot { dir: dir.to_owned() });
    }
    let (notifier, state) = (Arc::new(OnceLock::<Notifier>::new()), records.state.clone());
    let branches = Arc::new(Branches::new(records.clone(), Box::new(report), notifier.clone()));
    let browse = Arc::new(Browse::new(records, branches.clone(), Box::new(report)));
    let natives = options.native.then(|| Natives::start(browse.clone(), notifier.clone())).transpose();
    let natives = natives.map_err(failed("start a thread for", dir))?;
    let (ended, waits) = std::sync::mpsc::channel::<()>();
    let looked_after = (browse.clone(), branches.clone(), natives.clone());
    let keeper = std::thread::Builder::new().name("idle".into()).spawn(move || {
        let (browse, branches, natives) = looked_after;
        let mut merged = Instant::now();
        while waits.recv_timeout(idle / 4) == Err(RecvTimeoutError::Timeout) {
            if let Some(natives) = &natives {
                natives.let_go_of_removed();
                natives.let_go(idle);
            }
            browse.let_go_of_removed();
            branches.let_go_of_removed();
            browse.let_go(idle);
            branches.let_go(idle);
            if merged.elapsed() >= MERGING {
                branches.merge();
                merged = Instant::now();
            }
        }
        if let Some(natives) = &natives {
            natives.end();
        }
        branches.close();
        browse.let_go_of_all();
    });
    let keeper = keeper.map_err(failed("start a thread for", dir))?;
    // Where it cannot be, what is gone is seen a second later.
    let watch = Watch::start(&state.clone(), {
        let (browse, branches, notifier) = (browse.clone(), branches.clone(), notifier.clone());
        let mut seen = States::default();
        move || {
            // To read the catalog touches its files, too.
            let now = States::of(&state);
            if std::mem::replace(&mut seen, now) == now {
                return;
            }
            branches.let_go_of_removed();
            let Some(notifier) = notifier.get() else { return };
            for Gone { parent, number, name, for_good } in browse.gone() {
                let parent = INodeNo(parent);
                // What is in use below it stays known, and is not found any more.
                let _ = match for_good {
                    true => notifier.delete(parent, INodeNo(number), &name),
                    // Who is on his way through it would find nothing in a directory that is deleted, and is to look for the one that was made since.
                    false => notifier.inval_entry(parent, &name),
                };
            }
        }
    });
    let adapter = MountAdapter::new(browse, branches, natives.clone(), notifier.clone());
    let ready = |shown: &Path| {
        if let Some(natives) = natives {
            match in_table(shown, mounted) {
                Ok(mount) => natives.mounted_at(mount),
                Err(error) => report(&error.into()),
            }
        }
        ready();
    };
    let served = serve_by(adapter, &notifier, source, dir, options, ready);
    drop(watch);
    drop(ended);
    // It has nothing to fail at, and what it could not let go of harms nothing.
    let _ = keeper.join();
    served
}

fn serve_by(
    adapter: impl Filesystem + 'static,
    notifier: &OnceLock<Notifier>,
    source: &Path,
    dir: &Path,
    options: Options,
    ready: impl FnOnce(&Path),
) -> Result<(), Error> {
    // The modes that are asked for are the modes that are made.
    rustix::process::umask(Mode::empty());
    clear_stale(dir)?;
    // Before it is mounted: afterwards, every look at it takes somebody who serves it.
    let shown = dir.canonicalize().map_err(failed("resolve", dir))?;
    if is_ours(&shown).map_err(failed("look for a mount at", dir))? {
        return Err(Error::Mounted { dir: dir.to_owned() });
    }
    let mut config = Config::default();
    config.n_threads = Some(4);
    // Who may use the mount is for the kernel to say; it also makes requests of its own in anybody's name.
    config.acl = SessionACL::All;
    // Threads that each have a device of their own share no queue: root can give it to all of them.
    config.clone_fd = rustix::process::geteuid().is_root();
    if !config.clone_fd && !options.allow_other {
        config.acl = SessionACL::Owner;
    }
    let device = mounting::mount(source, dir, options)?;
    if options.native {
        // Mount namespaces that are made later have copies of what is attached: these go when it is taken off here.
        let shared = rustix::mount::mount_change(dir, MountPropagationFlags::SHARED);
        shared.map_err(|error| failed("share the mount of", dir)(error.into()))?;
    }
    let session = Session::from_fd(adapter, device, config.acl, config);
    let session = session.inspect_err(|_| drop(mounting::detach(dir)));
    let session = session.map_err(failed("serve", dir))?;
    let _ = notifier.set(session.notifier());
    larger_readahead(&shown);
    let noted = note_server(source, &shown);
    let signals = end_on_signals(shown.clone(), noted.clone()).map_err(failed("wait for signals for", dir))?;
    ready(&shown);
    let served = session.run().or_else(ended_while_reading).map_err(failed("serve", dir));
    signals.close();
    noted.iter().for_each(|noted| drop(std::fs::remove_file(noted)));
    served
}

/// Takes for its end what the kernel says at the end of a session to a thread that it was just handing a request: that the
/// connection was aborted, where a thread that asks a moment later is told that there is no device (`fuse_dev_do_read` in the
/// kernel's `fs/fuse/dev.c`). The session knows only the second answer for an end.
fn ended_while_reading(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(Errno::CONNABORTED.raw_os_error()) { Ok(()) } else { Err(error) }
}

/// How long processes that use what is served keep a server that is to end.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Takes the mount off when this process is told to end. Whoever still uses it gets no answer any more a moment later.
fn end_on_signals(dir: PathBuf, noted: Option<PathBuf>) -> io::Result<signal_hook::iterator::Handle> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let handle = signals.handle();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.forever().next().is_none() {
            return;
        }
        let _ = mounting::detach(&dir);
        // The session ends with the last user of the mount, and this process with the session.
        std::thread::sleep(LAST_ANSWERS);
        noted.iter().for_each(|noted| drop(std::fs::remove_file(noted)));
        std::process::exit(0);
    })?;
    Ok(handle)
}

/// The directory of files that servers hold, beside what they serve from.
const SERVERS: &str = "servers";

/// Holds a file until this process ends, so that who unmounts can wait for that. Where there is no place for it, nobody waits.
fn note_server(source: &Path, dir: &Path) -> Option<PathBuf> {
    let mount = mounted(dir).ok()??;
    // The store of a copy-on-write tree has a lock of its own.
    if source.join("lock").exists() && source.join("upper").exists() {
        return None;
    }
    let servers = source.join(SERVERS);
    let _ = std::fs::create_dir(&servers);
    let note = servers.join(mount.root.device.to_string());
    let file = File::create(&note).ok()?;
    let _ = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    std::mem::forget(file);
    Some(note)
}

/// Reads of what is not passed through come in larger pieces; where that cannot be set, they come in smaller ones.
fn larger_readahead(dir: &Path) {
    if let Ok(Some(mount)) = mounted(dir) {
        let _ = std::fs::write(format!("/sys/class/bdi/{}/read_ahead_kb", mount.root.device), "1024");
    }
}

/// Takes off what a server that was killed has left.
fn clear_stale(dir: &Path) -> Result<(), Error> {
    if is_stale(dir) { mounting::detach(dir) } else { Ok(()) }
}

/// Whether nobody serves it any more. Attributes would not tell, for the kernel has them cached.
fn is_stale(dir: &Path) -> bool {
    loop {
        match rustix::fs::statfs(dir) {
            // It was being killed at this moment.
            Err(Errno::CONNABORTED) => {}
            answer => return answer.err() == Some(Errno::NOTCONN),
        }
    }
}

/// What has become of the server of a mount that was taken off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Server {
    /// It has ended: its store can be opened again at once.
    Ended,
    /// It goes on, because another mount namespace has the mount as well: that of a container, for one, which was made meanwhile.
    GoesOn,
}

/// Unmounts what fsnap serves at `dir`, and waits some seconds for the end of the server.
pub fn unmount(dir: &Path) -> Result<Server, Error> {
    let refused = || Error::NotMounted { dir: dir.to_owned() };
    let stale = is_stale(dir);
    let path = if stale { std::path::absolute(dir) } else { dir.canonicalize() };
    let path = path.map_err(failed("resolve", dir))?;
    let mount = mounted(&path)?.ok_or_else(refused)?;
    let store = &mount.source;
    let note = store.join(SERVERS).join(mount.root.device.to_string());
    if stale {
        let _ = std::fs::remove_file(note);
        return mounting::detach(&path).map(|()| Server::Ended);
    }
    // Opened before the server ends, which takes its note away then.
    let lock = if note.exists() { note } else { store.join("lock") };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let lock = rustix::fs::openat(CWD, lock, flags, Mode::empty());
    unmount_with_attached(&mount)?;
    // Without it, there is nobody to wait for.
    Ok(lock.map_or(Server::Ended, |lock| wait_for_server(&lock)))
}

/// Unmounts it, if nobody uses it nor what its server has attached to it.
fn unmount_with_attached(served: &Mount) -> Result<(), Error> {
    let mut again = ATTEMPTS;
    loop {
        mount::take_off_attached(served, Path::new(""), UnmountFlags::empty())?;
        match mounting::unmount(&served.point) {
            // Somebody may have looked at another snapshot meanwhile.
            Err(Error::Busy { .. }) if again > 0 && is_looked_at(served) => again -= 1,
            done => return done,
        }
    }
}

/// How often it is tried to unmount what others look at meanwhile.
const ATTEMPTS: usize = 50;

fn is_looked_at(served: &Mount) -> bool {
    mount::attached(served, Path::new("")).is_ok_and(|attached| !attached.is_empty())
}

/// Waits until nobody has the lock, for a while.
fn wait_for_server(lock: &OwnedFd) -> Server {
    let until = Instant::now() + Duration::from_secs(10);
    while rustix::fs::flock(lock, rustix::fs::FlockOperation::NonBlockingLockShared).is_err() {
        if Instant::now() > until {
            return Server::GoesOn;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Server::Ended
}

/// Whether `dir` is where one of ours is mounted, whoever else mounts just now.
fn is_ours(dir: &Path) -> io::Result<bool> {
    let opened = rustix::fs::openat(CWD, dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Ok(mounts::of_file(opened)?.is_some_and(|mount| mount.point == dir && mount.fstype == TYPE.as_bytes()))
}

/// Finds a mount in the table, whose first reading may have missed it.
fn in_table<T>(dir: &Path, look: impl Fn(&Path) -> Result<Option<T>, Error>) -> Result<T, Error> {
    let found = look(dir).transpose().or_else(|| look(dir).transpose());
    found.unwrap_or_else(|| Err(Error::NotInTable { dir: dir.to_owned() }))
}

/// Our mount that is uppermost at `dir`.
fn mounted(dir: &Path) -> Result<Option<Mount>, Error> {
    let uppermost = mounts::at(dir).map_err(failed("look for a mount at", dir))?;
    Ok(uppermost.filter(|mount| mount.fstype == TYPE.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_missed_in_the_table_is_told() {
        let dir = Path::new("/mnt");
        let told_at = |last: u32| {
            let looks = std::cell::Cell::new(0);
            in_table(dir, |_| Ok((looks.replace(looks.get() + 1) == last).then_some("found")))
        };
        assert!(matches!((told_at(0), told_at(1)), (Ok("found"), Ok("found"))));
        let Err(missed) = told_at(2) else { panic!("it looks too often") };
        assert!(missed.to_string().starts_with("the table of mounts does not have \"/mnt\": "), "{missed}");
        let failing = in_table(dir, |_| Err::<Option<()>, _>(failed("look at", dir)(io::ErrorKind::Other.into())));
        assert!(matches!(failing, Err(Error::Io { action: "look at", .. })));
    }
}
