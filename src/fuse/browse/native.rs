//! Snapshots that the kernel can mount, attached where `ids/<id>/<volume>` is: FUSE is out of the way of whoever looks into them.
//!
//! A snapshot is attached when a volume is first looked up. An answer cannot wait for that: who looks up a name holds a lock of the directory
//! above it, without which nothing can be attached there. So the first look-up is answered `ESTALE`. The kernel then walks the same
//! path once more by itself, for whichever system call it was, and asks for the attributes of the directory above when it enters it again.
//! It holds no lock then: this answer waits until the snapshot is attached, and the walk goes on into it. So does the answer to who
//! looks the volume up when the thread that attaches has found it, and needs no lock of the directory above any more.
//!
//! What cannot be attached is read through FUSE.
//!
//! Architecture Invariant: the threads that serve never wait for the one that attaches, for it walks through what they serve. Answers wait
//! here, and only those to threads that hold nothing which attaching takes.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use fsnap_backend::mounts::{self, Mount};
use fuser::{INodeNo, Notifier};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::layout::Place;
use super::node::What;
use super::tree::{Tree, Used};
use super::{Attr, Browse, Keep, Result};
use crate::checkpoint::CheckpointId;
use crate::failpoint;
use crate::mount::Error;

/// So many snapshots are attached at the most, besides those that are in use: each is a line in everybody's table of mounts.
const MOST_ATTACHED: usize = 32;

/// How often it is looked whether a snapshot is still attached that somebody sees through FUSE.
const LOOKED_FOR: Duration = Duration::from_secs(1);

/// Takes the attributes that were asked for.
pub(in crate::fuse) type Answer = Box<dyn FnOnce(Result<Attr>) + Send>;

/// Which snapshots are attached.
pub struct Natives {
    browse: Arc<Browse>,
    notifier: Arc<OnceLock<Notifier>>,
    mounted: OnceLock<Mount>,
    queue: Sender<Arc<Tree>>,
    /// The thread that attaches.
    attacher: OnceLock<u32>,
    /// Held while something is attached or taken off. Taken before `known`.
    at_work: Mutex<()>,
    /// By the tree's number.
    known: Mutex<HashMap<u64, Known>>,
}

/// What is known of a tree that somebody has looked at.
struct Known {
    tree: Arc<Tree>,
    /// The number of the directory that it is in.
    above: u64,
    state: State,
    /// Since when it is so; of an attached one, when it was last seen to be in use.
    since: Instant,
}

enum State {
    /// It is to be attached.
    Awaited {
        /// The threads that were told to walk again, and have not come by yet.
        walkers: HashSet<u32>,
        /// The thread that attaches has looked it up.
        found: bool,
        /// The answers that wait.
        waiting: Vec<(Asked, Answer)>,
    },
    /// It is attached, as the mount of this id.
    Attached { mount: u64, looked_for: Instant, _used: Used },
    /// It cannot be attached: never, or this time.
    Through { for_good: bool },
}

/// What an answer is to.
enum Asked {
    /// To the look-up of a volume, where this was found.
    Name(Attr),
    /// To the attributes of a directory above volumes.
    Attributes(u64),
}

impl std::fmt::Debug for Natives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Natives").field("mounted", &self.mounted).finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Natives {
    /// Starts the thread that attaches. Nothing is attached before it is [told where](Self::mounted_at).
    pub(in crate::fuse) fn start(browse: Arc<Browse>, notifier: Arc<OnceLock<Notifier>>) -> std::io::Result<Arc<Self>> {
        let (queue, jobs) = channel();
        let natives = Arc::new(Self {
            browse,
            notifier,
            mounted: OnceLock::new(),
            queue,
            attacher: OnceLock::new(),
            at_work: Mutex::default(),
            known: Mutex::default(),
        });
        let weak = Arc::downgrade(&natives);
        std::thread::Builder::new().name("attach".into()).spawn(move || attach_all(&weak, &jobs))?;
        Ok(natives)
    }

    /// Tells which mount it is that shows the volumes.
    pub(in crate::fuse) fn mounted_at(&self, mount: Mount) {
        let _ = self.mounted.set(mount);
    }

    /// Finds a name for this thread of somebody's, and counts that the kernel knows it. Answers at once, or when what was found is
    /// attached, or has the kernel walk again.
    pub(in crate::fuse) fn look_up(&self, parent: u64, name: &OsStr, thread: u32, answer: Answer) {
        let found = self.browse.look_up(parent, name);
        let volume = found.as_ref().ok().and_then(|attr| Some((*attr, self.browse.volume(attr.meta.ino)?)));
        match volume {
            Some((attr, tree)) => self.enter(parent, attr, tree, thread, answer),
            None => answer(found),
        }
    }

    /// Answers who has looked up a volume.
    fn enter(&self, above: u64, attr: Attr, tree: Arc<Tree>, thread: u32, answer: Answer) {
        let in_passing = Attr { name: Keep::Not, ..attr };
        let mut known = locked(&self.known);
        let is_attached = known.get(&tree.number).is_some_and(|known| matches!(known.state, State::Attached { .. }));
        if is_attached && self.is_dropped(&tree) {
            known.remove(&tree.number);
        }
        let found = match known.get_mut(&tree.number).map(|known| &mut known.state) {
            Some(State::Awaited { found, .. }) if self.attacher.get() == Some(&thread) => {
                *found = true;
                Some(in_passing)
            }
            // The kernel knows the name by now and has only asked whether it still holds: nothing that attaching takes is held for that.
            Some(State::Awaited { found: true, waiting, .. }) => return waiting.push((Asked::Name(attr), answer)),
            Some(State::Attached { .. } | State::Through { for_good: true }) => Some(attr),
            Some(State::Through { for_good: false }) => Some(in_passing),
            // A thread without a number is in a namespace that is none of ours, and would not be known again.
            _ if thread == 0 || self.mounted.get().is_none() => Some(in_passing),
            Some(State::Awaited { walkers, .. }) => {
                walkers.insert(thread);
                None
            }
            None => {
                let state = State::Awaited { walkers: HashSet::from([thread]), found: false, waiting: Vec::new() };
                known.insert(tree.number, Known { tree: tree.clone(), above, state, since: Instant::now() });
                let _ = self.queue.send(tree);
                None
            }
        };
        drop(known);
        if let Some(found) = found {
            return answer(Ok(found));
        }
        self.browse.forget(attr.meta.ino, 1);
        // Or the kernel would not ask for what it knows.
        if let Some(notifier) = self.notifier.get() {
            let _ = notifier.inval_inode(INodeNo(above), -1, 0);
        }
        failpoint::hit("native:again");
        answer(Err(Errno::STALE));
    }

    /// Answers with the attributes of a file, at once or when what this thread waits for is attached.
    pub(in crate::fuse) fn answer(&self, number: u64, thread: u32, answer: Answer) {
        if let Some(checkpoint) = self.browse.checkpoint(number) {
            let mut known = locked(&self.known);
            let mut awaited = known.values_mut().filter(|known| known.tree.checkpoint == checkpoint);
            let waits = awaited.find_map(|known| match &mut known.state {
                State::Awaited { walkers, waiting, .. } => walkers.remove(&thread).then_some(waiting),
                _ => None,
            });
            if let Some(waiting) = waits {
                return waiting.push((Asked::Attributes(number), answer));
            }
        }
        answer(self.attr(number));
    }

    /// The attributes of a file. They are not kept where the kernel has to ask for them when it walks again, nor of a volume that
    /// might be attached.
    fn attr(&self, number: u64) -> Result<Attr> {
        let mut attr = self.browse.attr(number)?;
        let mut known = locked(&self.known);
        if let Some(checkpoint) = self.browse.checkpoint(number) {
            if known.values().any(|known| known.tree.checkpoint == checkpoint && known.is_awaited()) {
                attr.attributes = Keep::Not;
            }
            return Ok(attr);
        }
        let Some(tree) = self.browse.volume(number) else { return Ok(attr) };
        let mut known = known.get_mut(&tree.number);
        if !known.as_deref().is_some_and(|known| matches!(known.state, State::Through { .. })) {
            attr.attributes = Keep::Not;
        }
        // Whoever asks is below the mount, if it is still there: the kernel takes it off when it cannot look up the directories above.
        if let Some(Known { state: State::Attached { looked_for, .. }, .. }) = &mut known
            && looked_for.elapsed() >= LOOKED_FOR
        {
            *looked_for = Instant::now();
            let _ = self.queue.send(tree);
        }
        Ok(attr)
    }

    /// Attaches a snapshot that is not attached, and gives the answers that wait for it.
    fn settle(&self, tree: &Arc<Tree>) {
        let work = locked(&self.at_work);
        let found = |known: &Known| match known.state {
            State::Attached { mount, .. } => Some(mount),
            _ => None,
        };
        let Some((above, mount)) = locked(&self.known).get(&tree.number).map(|known| (known.above, found(known)))
        else {
            return;
        };
        if mount.is_some_and(|mount| self.find(tree, mount) != Found::Gone) {
            return;
        }
        let used = Used::new(tree);
        let state = match self.attach(tree) {
            Ok(Some(mount)) => State::Attached { mount, looked_for: Instant::now(), _used: used },
            Ok(None) => State::Through { for_good: true },
            Err(error) => {
                (self.browse.report)(&error);
                State::Through { for_good: false }
            }
        };
        let known = Known { tree: tree.clone(), above, state, since: Instant::now() };
        let before = locked(&self.known).insert(tree.number, known);
        drop(work);
        if let Some(Known { state: State::Awaited { waiting, .. }, .. }) = before {
            waiting.into_iter().for_each(|(asked, answer)| match asked {
                Asked::Name(attr) => answer(Ok(attr)),
                Asked::Attributes(number) => answer(self.attr(number)),
            });
        }
        self.bound();
    }

    /// Attaches a snapshot, and tells its mount's id; `None` if the kernel cannot mount it.
    fn attach(&self, tree: &Tree) -> crate::Result<Option<u64>> {
        let Some(prepared) = tree.to_mount()? else { return Ok(None) };
        let point = self.point(tree);
        let above = self.directory_above(tree)?;
        // Refused where something is mounted that is not known here.
        let dir = open_beneath(&above, Path::new(tree.volume().as_str())).map_err(failed("open", &point))?;
        Ok(Some(prepared.attach_to(&dir, &point)?))
    }

    fn root(&self) -> &Path {
        self.mounted.get().map_or(Path::new(""), |mount| &mount.point)
    }

    /// Where a snapshot is attached.
    fn point(&self, tree: &Tree) -> PathBuf {
        below(&tree.checkpoint, self.root()).join(tree.volume().as_str())
    }

    /// Opens the directory of the tree's checkpoint in our mount; nobody can put another in its place.
    fn directory_above(&self, tree: &Tree) -> crate::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, self.root(), flags, Mode::empty());
        let root = root.map_err(failed("open", self.root()))?;
        let device = rustix::fs::fstat(&root).map_err(failed("examine", self.root()))?.st_dev;
        if self.mounted.get().is_none_or(|mount| mount.root.device.number() != device) {
            return Err(Error::Covered { dir: self.root().into() }.into());
        }
        let dir = below(&tree.checkpoint, Path::new(""));
        Ok(open_beneath(root, &dir).map_err(failed("open", &self.root().join(&dir)))?)
    }

    fn find(&self, tree: &Tree, mount: u64) -> Found {
        match mounts::at(&self.point(tree)) {
            Ok(Some(found)) if found.id == mount => Found::There,
            // The table may have missed it. A look tells, but counts as a use.
            Ok(None) if self.is_seen(tree, mount) => Found::There,
            Ok(None) => Found::Gone,
            _ => Found::Covered,
        }
    }

    /// Whether the kernel has dropped what was attached. It does so when it drops the name: whoever was told to walk again, and comes to that only after
    /// the attaching, has it dropped. He looks the name up next, which nobody needs to who finds it attached.
    fn is_dropped(&self, tree: &Tree) -> bool {
        let point = self.point(tree);
        // As in `find`, but a look at it would wait for an answer from here.
        let is_gone = || matches!(mounts::at(&point), Ok(None));
        is_gone() && is_gone()
    }

    fn is_seen(&self, tree: &Tree, mount: u64) -> bool {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let look = |above| rustix::fs::statx(above, tree.volume().as_str(), flags, StatxFlags::MNT_ID);
        self.directory_above(tree).is_ok_and(|above| look(above).is_ok_and(|found| found.stx_mnt_id == mount))
    }

    /// Takes a snapshot off that nobody uses. One that is in use counts as used now.
    fn take_off(&self, tree: &Tree, mount: u64, flags: UnmountFlags) {
        let taken_off = match self.find(tree, mount) {
            Found::Gone => true,
            Found::Covered => false,
            // A descriptor of the mount itself would keep it busy.
            Found::There => self.directory_above(tree).is_ok_and(|above| {
                let path = format!("/proc/thread-self/fd/{}/{}", above.as_raw_fd(), tree.volume());
                rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW).is_ok()
            }),
        };
        let mut known = locked(&self.known);
        if !taken_off {
            known.entry(tree.number).and_modify(|known| known.since = Instant::now());
            return;
        }
        let gone = known.remove(&tree.number);
        drop(known);
        // Whoever comes next is to look it up again.
        if let Some((notifier, gone)) = self.notifier.get().zip(gone) {
            let _ = notifier.inval_entry(INodeNo(gone.above), OsStr::new(tree.volume().as_str()));
        }
    }

    /// What is attached, those first that were used longest ago.
    fn attached(&self) -> Vec<(Instant, Arc<Tree>, u64)> {
        let known = locked(&self.known);
        let attached = known.values().filter_map(|known| match known.state {
            State::Attached { mount, .. } => Some((known.since, known.tree.clone(), mount)),
            _ => None,
        });
        let mut attached: Vec<_> = attached.collect();
        attached.sort_by_key(|(since, ..)| *since);
        attached
    }

    /// Keeps the number of attached snapshots bounded.
    fn bound(&self) {
        let _work = locked(&self.at_work);
        let attached = self.attached();
        for (_, tree, mount) in attached.iter().take(attached.len().saturating_sub(MOST_ATTACHED)) {
            self.take_off(tree, *mount, UnmountFlags::empty());
        }
    }

    /// Takes off what nobody has used for so long. What could not be attached is tried again when it is looked up the next time.
    pub(in crate::fuse) fn let_go(&self, idle: Duration) {
        let _work = locked(&self.at_work);
        for (_, tree, mount) in self.attached().iter().filter(|(since, ..)| since.elapsed() >= idle) {
            // The kernel takes off only what nobody has used since it was asked the last time.
            self.take_off(tree, *mount, UnmountFlags::EXPIRE);
        }
        let stays = |known: &Known| !matches!(known.state, State::Through { .. }) || known.since.elapsed() < idle;
        locked(&self.known).retain(|_, known| stays(known));
    }

    /// Takes off what is in the catalog no more.
    pub(in crate::fuse) fn let_go_of_removed(&self) {
        let _work = locked(&self.at_work);
        let is_removed = |tree: &Tree| matches!(self.browse.layout.is_recorded(&tree.checkpoint), Ok(false));
        for (_, tree, mount) in self.attached().iter().filter(|(_, tree, _)| is_removed(tree)) {
            self.take_off(tree, *mount, UnmountFlags::empty());
        }
    }

    /// Forgets everything: what was attached went with the mount.
    pub(in crate::fuse) fn end(&self) {
        locked(&self.known).clear();
    }
}

impl Known {
    fn is_awaited(&self) -> bool {
        matches!(self.state, State::Awaited { .. })
    }
}

/// What stands where a snapshot was attached.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    There,
    Gone,
    Covered,
}

impl Browse {
    /// The tree whose root has this number.
    fn volume(&self, number: u64) -> Option<Arc<Tree>> {
        match &self.nodes.get(number)?.what {
            What::Volume(tree) => Some(tree.clone()),
            _ => None,
        }
    }

    /// The checkpoint whose directory has this number.
    fn checkpoint(&self, number: u64) -> Option<CheckpointId> {
        match self.nodes.get(number)?.what {
            What::Place(Place::Checkpoint(id)) => Some(id),
            _ => None,
        }
    }
}

/// Attaches what is asked for, until nobody can ask any more.
fn attach_all(natives: &Weak<Natives>, jobs: &Receiver<Arc<Tree>>) {
    let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    while let Ok(tree) = jobs.recv() {
        let Some(natives) = natives.upgrade() else { return };
        natives.attacher.get_or_init(|| thread);
        natives.settle(&tree);
    }
}

/// The directory of a checkpoint in the tree at `root`.
fn below(checkpoint: &CheckpointId, root: &Path) -> PathBuf {
    root.join("ids").join(checkpoint.to_string())
}

/// Opens a directory of the same mount as a handle, without following a link.
fn open_beneath(dir: impl std::os::fd::AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve)
}

fn failed(action: &'static str, object: &Path) -> impl Fn(Errno) -> Error {
    move |error| Error::Io { action, object: object.into(), source: error.into(), detail: String::new() }
}
