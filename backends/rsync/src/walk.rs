//! The walk over a live volume that compares it with an earlier record and takes what changed.
//!
//! # When a file counts as unchanged
//!
//! An entry is taken over from the earlier record when everything that `statx(2)` says is equal, the inode change time
//! (ctime) above all, which no process can set. The time of the last access is left out: a file that was only read did
//! not change, and its record keeps the access time that it had when it last changed.
//!
//! Equal times do not always mean equal contents:
//!
//! * Times come from a clock that ticks every few milliseconds. A change in the same tick as the one before leaves the
//!   ctime as it is: a write, an extended attribute that is set, or a symbolic link that takes the place and the inode of
//!   another.
//! * A store into a shared mapping moves the ctime only when it makes a clean page dirty. Until that page is written
//!   back, further stores go unseen.
//! * A `write(2)` moves the ctime when it begins, not when it ends.
//!
//! Therefore a walk begins with `syncfs(2)`, and notes the time just before. Writing back makes every dirty page clean and
//! write-protects it, so a store after the flush moves the ctime to the time of the flush or later. A file whose
//! ctime lies well before the flush cannot have been changed since without its ctime telling. Every other entry, of
//! whatever kind, is marked *racy* in the record: the next walk reads it, and compares it with what is stored. That is also
//! what happens to every entry of a file system that never writes back (tmpfs), or whose times another machine sets (NFS),
//! and to the root, which is no entry of a directory.
//!
//! *Well before* means a tick of the clock. `prime` takes a second, because a direct write that it met half way through
//! may not have reached the file when it was read; `snapshot` reads it again, when its writer stands still.
//! Where times are kept in whole seconds, a time stands for the whole second.
//!
//! A file is opened once and its attributes are taken from the descriptor, before and after it is read. Reading
//! begins with `SEEK_DATA`, for which ext4, unlike for reading, waits for a write that is under way. If the attributes
//! moved, it is read again; if they keep moving, the file is left to `snapshot` by `prime`, and refused by `snapshot`
//! ([`Error::Changed`]). Sharing blocks needs none of this: it takes the file as of one instant.
//!
//! # Hostile volumes
//!
//! Every file is reached from its directory's descriptor by one name ([`beneath`]). A directory that is exchanged for a
//! symbolic link in the middle of the walk fails to open and counts as gone.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fsnap_backend::beneath::{self, Found};
use fsnap_backend::{Error, FileKind, FileMeta, IoContext, Omission, Result, Timestamp, Xattrs};
use rustix::io::Errno;

use crate::KIND;
use crate::crew::{self, Root, Task, Work};
use crate::maker::{Before, Maker, Subject, Taken};
use crate::pack::Pack;
use crate::record::{self, Body, ContentRef, Item, RecordRef};
use crate::store::{Inner, is_root};

/// One tick of the clock that files are stamped with, and some: kernels tick 100 to 1,000 times a second.
const TICK: u32 = 20_000_000;

/// How often a file that changes while it is read is read again.
const ATTEMPTS: usize = 5;

/// What one pass over a volume needs.
pub(crate) struct Walk<'a> {
    pub(crate) store: &'a Inner,
    pub(crate) root: Root<'a>,
    /// The volume's path, for messages.
    pub(crate) shown: &'a Path,
    pub(crate) pack: &'a Pack,
    /// Writers stand still: whatever changes nevertheless is an error.
    pub(crate) frozen: bool,
    /// An unchanged ctime means an unchanged content.
    pub(crate) ctime_tells: bool,
    /// What changed at this time or later is racy.
    pub(crate) racy_since: Timestamp,
    privileged: bool,
    device: u64,
    /// What was taken of files with several names, by device and inode.
    links: Mutex<HashMap<(u64, u64), Linked>>,
    omissions: Mutex<Vec<Omission>>,
    result: Mutex<Option<RecordRef>>,
}

/// A file with several names: its attributes and its content when it was taken.
type Linked = (FileMeta, Option<ContentRef>);

/// What is known of a directory while the crew is in it.
pub(crate) struct Node {
    /// Its record of the time before.
    before: Option<RecordRef>,
    /// Its attributes may have changed since without its times telling.
    racy: bool,
    /// Its place among the items of the directory above.
    index: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// `None` if it turned out to be gone.
    own: Option<(FileMeta, Xattrs)>,
    items: Vec<Item>,
    /// Items that turned out to be gone.
    gone: Vec<usize>,
    /// Whether it differs from `before`.
    changed: bool,
}

/// Just before the flush that precedes a walk, less what makes files racy.
pub(crate) fn racy_since(flushed: Timestamp, frozen: bool) -> Timestamp {
    if !frozen {
        return Timestamp { seconds: flushed.seconds.saturating_sub(1), ..flushed };
    }
    match flushed.nanoseconds.checked_sub(TICK) {
        Some(nanoseconds) => Timestamp { nanoseconds, ..flushed },
        None => Timestamp {
            seconds: flushed.seconds.saturating_sub(1),
            nanoseconds: flushed.nanoseconds + 1_000_000_000 - TICK,
        },
    }
}

impl<'a> Walk<'a> {
    pub(crate) fn new(
        store: &'a Inner,
        volume: &'a fsnap_backend::Volume,
        pack: &'a Pack,
        frozen: bool,
        flushed: Timestamp,
    ) -> Result<Self> {
        let found = beneath::look_fd(volume).context("read the attributes of", volume.dir())?;
        Ok(Self {
            store,
            root: Root::new(volume.as_fd()),
            shown: volume.dir(),
            pack,
            frozen,
            ctime_tells: crate::volume::ctime_tells(volume).context("identify", volume.dir())?,
            racy_since: racy_since(flushed, frozen),
            privileged: is_root(),
            device: found.device,
            links: Mutex::default(),
            omissions: Mutex::default(),
            result: Mutex::default(),
        })
    }

    /// Walks; the makers come back with what they made.
    pub(crate) fn run(self, before: Option<RecordRef>, makers: Vec<Maker<'a>>) -> Result<(Walked, Vec<Maker<'a>>)> {
        let root = Node { before, racy: true, index: 0, state: Mutex::default() };
        let makers = crew::run(&self, root, makers)?;
        let root = into_inner(self.result);
        let Some(root) = root else {
            return Err(Error::NotFound { what: format!("the volume {}", self.shown.display()) });
        };
        let mut omissions = into_inner(self.omissions);
        omissions.sort_by(|one, other| (&one.path, &one.reason).cmp(&(&other.path, &other.reason)));
        Ok((Walked { root, omissions }, makers))
    }

    fn omit(&self, path: &Path, reason: impl Into<String>) {
        lock(&self.omissions).push(Omission { path: printable(path.as_os_str()), reason: reason.into() });
    }

    fn racy(&self, meta: &FileMeta) -> bool {
        // A file system that keeps whole seconds stamps all of the second alike.
        let whole = meta.ctime.nanoseconds == 0;
        let latest = Timestamp { seconds: meta.ctime.seconds.saturating_add(whole.into()), ..meta.ctime };
        self.ctime_tells && latest >= self.racy_since
    }

    fn ino(&self, found: &Found) -> u64 {
        // Inode numbers of a btrfs subvolume within the volume begin anew: two files must not become one.
        if found.device == self.device { found.meta.ino } else { found.meta.ino ^ blake3_64(found.device) }
    }

    /// The attributes as they are recorded.
    fn meta(&self, found: &Found) -> FileMeta {
        FileMeta { ino: self.ino(found), ..found.meta }
    }

    fn note_what_is_not_kept(&self, task: &Task<Node>, name: &OsStr, found: &Found, xattrs: &Xattrs) {
        if found.immutable {
            self.omit(&task.path_of(name), IMMUTABLE);
        }
        if !self.privileged && xattrs.iter().any(|(key, _)| key == "security.capability") {
            self.omit(&task.path_of(name), "its capabilities (security.capability) can only be restored by root");
        }
    }

    /// One entry that is no directory; `None` if it is gone, or was omitted.
    fn take(
        &self,
        maker: &mut Maker<'_>,
        dir: impl AsFd,
        task: &Task<Node>,
        name: &OsStr,
        found: &Found,
        before: Option<&Item>,
    ) -> Result<Option<Item>> {
        let taken = if found.meta.kind == FileKind::File {
            self.take_file(maker, dir, task, name, before)
        } else {
            self.take_node(dir, task, name)
        };
        match taken {
            Err(Error::Io { source, .. }) if is_gone(&source) => Ok(None),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                self.omit(&task.path_of(name), "we may not read it");
                Ok(None)
            }
            Err(Error::Io { source, .. }) if is_mount(&source) => {
                self.omit(&task.path_of(name), MOUNTED);
                Ok(None)
            }
            taken => taken,
        }
    }

    /// A symbolic link, a fifo, a socket's or a device's node.
    fn take_node(&self, dir: impl AsFd, task: &Task<Node>, name: &OsStr) -> Result<Option<Item>> {
        let path = task.shown(self.shown, Some(name));
        for _ in 0..ATTEMPTS {
            let found = beneath::look(&dir, name).context("read the attributes of", &path)?;
            let body = match found.meta.kind {
                FileKind::Symlink => Body::Symlink(beneath::read_link(&dir, name).context("read the link", &path)?),
                FileKind::Fifo | FileKind::Socket => Body::Node,
                FileKind::CharDevice | FileKind::BlockDevice if self.privileged => Body::Node,
                FileKind::CharDevice | FileKind::BlockDevice => {
                    self.omit(&task.path_of(name), "only root can make a device's node again");
                    return Ok(None);
                }
                // It became something else since it was listed.
                FileKind::File | FileKind::Dir => return Ok(None),
            };
            let xattrs = beneath::xattrs(&dir, name).context("read the extended attributes of", &path)?;
            let after = beneath::look(&dir, name).context("read the attributes of", &path)?;
            if unchanged(&found.meta, &after.meta) {
                self.note_what_is_not_kept(task, name, &found, &xattrs);
                let meta = self.meta(&found);
                let racy = self.racy(&meta);
                return Ok(Some(Item { name: name.to_owned(), meta, racy, xattrs, body }));
            }
        }
        self.kept_changing(task, name)
    }

    fn take_file(
        &self,
        maker: &mut Maker<'_>,
        dir: impl AsFd,
        task: &Task<Node>,
        name: &OsStr,
        before: Option<&Item>,
    ) -> Result<Option<Item>> {
        let path = task.shown(self.shown, Some(name));
        let file = match beneath::open_file(&dir, name) {
            // It became something else since it was listed.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => return Ok(None),
            opened => opened.context("open", &path)?,
        };
        for _ in 0..ATTEMPTS {
            let found = beneath::look_fd(&file).context("read the attributes of", &path)?;
            let mut meta = self.meta(&found);
            let xattrs = beneath::xattrs_fd(&file).context("read the extended attributes of", &path)?;
            let link = (meta.nlink > 1).then_some((found.device, found.meta.ino));
            let known = link.and_then(|link| lock(&self.links).get(&link).copied());
            let content = match known {
                Some((meta_then, content)) if unchanged(&meta_then, &meta) => content,
                _ => {
                    let taken = self.take_content(maker, &file, &meta, before).context("copy", &path)?;
                    let content = match taken {
                        Taken::Torn => continue,
                        Taken::Kept => before.and_then(content_of),
                        Taken::Shared(content, length) => {
                            meta.size = length;
                            Some(content)
                        }
                        Taken::Copied(content) => Some(content),
                    };
                    let content = content.filter(|_| meta.size > 0);
                    let after = beneath::look_fd(&file).context("read the attributes of", &path)?;
                    let changed = !unchanged(&found.meta, &after.meta);
                    match taken {
                        Taken::Shared(content, _) if changed => maker.forget(&content),
                        Taken::Copied(content) if changed => {
                            maker.discard(&content).context("discard a copy of", &path)?;
                            continue;
                        }
                        _ if changed => continue,
                        _ => {}
                    }
                    match link {
                        None => content,
                        Some(link) => self.agree(maker, link, &meta, content, &taken).context("copy", &path)?,
                    }
                }
            };
            self.note_what_is_not_kept(task, name, &found, &xattrs);
            let racy = self.racy(&meta);
            return Ok(Some(Item { name: name.to_owned(), meta, racy, xattrs, body: Body::File(content) }));
        }
        self.kept_changing(task, name)
    }

    fn take_content(
        &self,
        maker: &mut Maker<'_>,
        file: &File,
        meta: &FileMeta,
        before: Option<&Item>,
    ) -> io::Result<Taken> {
        if meta.size == 0 {
            return Ok(Taken::Kept);
        }
        let before = before.and_then(|item| {
            let likely_equal = item.meta.mtime == meta.mtime && item.meta.ino == meta.ino;
            content_of(item).map(|content| Before { content, length: item.meta.size, likely_equal })
        });
        // A write(2) that began before the flush and is not over yet is thought of as in `racy_since`.
        let steady = self.ctime_tells && !self.racy(meta);
        maker.take(Subject { file, length: meta.size, steady }, before)
    }

    /// Two names of one file have one content, also when two threads took it at the same time: the first one's.
    fn agree(
        &self,
        maker: &mut Maker<'_>,
        link: (u64, u64),
        meta: &FileMeta,
        content: Option<ContentRef>,
        taken: &Taken,
    ) -> io::Result<Option<ContentRef>> {
        let agreed = {
            let mut links = lock(&self.links);
            match links.get(&link) {
                Some((meta_then, agreed)) if unchanged(meta_then, meta) => *agreed,
                _ => {
                    links.insert(link, (*meta, content));
                    content
                }
            }
        };
        if agreed != content
            && let Taken::Copied(superfluous) | Taken::Shared(superfluous, _) = taken
        {
            maker.discard(superfluous)?;
        }
        Ok(agreed)
    }

    fn kept_changing(&self, task: &Task<Node>, name: &OsStr) -> Result<Option<Item>> {
        if self.frozen {
            return Err(Error::Changed { path: task.path_of(name) });
        }
        // Left to `snapshot`.
        Ok(None)
    }

    /// The entry of a directory that another file system hides: it is there, and empty.
    fn mount_point(&self, task: &Task<Node>, name: &OsStr, found: &Found, before: Option<&Item>) -> Result<Item> {
        self.omit(&task.path_of(name), MOUNTED);
        if let Some(item) = before.filter(|item| unchanged(&item.meta, &self.meta(found))) {
            return Ok(item.clone());
        }
        let meta = self.meta(found);
        let record = self.pack.append(&record::encode(&meta, &Xattrs::new(), &[]))?;
        Ok(Item { name: name.to_owned(), meta, racy: false, xattrs: Xattrs::new(), body: Body::Dir(record) })
    }
}

const MOUNTED: &str = "another file system is mounted here";
const IMMUTABLE: &str = "its attribute immutable or append-only (chattr) is not kept";

/// What a walk found.
pub(crate) struct Walked {
    pub(crate) root: RecordRef,
    /// What could not be kept, sorted.
    pub(crate) omissions: Vec<Omission>,
}

impl<'a> Work for Walk<'a> {
    type Node = Node;
    type Hand = Maker<'a>;

    fn visit(&self, maker: &mut Maker<'a>, task: &Task<Node>) -> Result<Vec<(OsString, Node)>> {
        let path = task.shown(self.shown, None);
        let dir = match task.open(&self.root) {
            Ok(dir) => dir,
            Err(error) if task.parent().is_some() && is_gone(&error) => return Ok(Vec::new()),
            Err(error) if task.parent().is_some() && error.kind() == io::ErrorKind::PermissionDenied => {
                self.omit(&task.path(), "we may not read it");
                return Ok(Vec::new());
            }
            Err(error) => return Err(error).context("open the directory", &path),
        };
        let found = beneath::look_fd(&dir).context("read the attributes of", &path)?;
        if (found.device, found.meta.ino) == self.store.place {
            let reason =
                format!("the store {} lies in it: every snapshot would hold all others", self.store.dir.display());
            return Err(Error::NotAVolume { dir: self.shown.to_owned(), kind: KIND, reason });
        }
        let before = match task.node.before.as_ref().map(|before| self.store.record(before)) {
            None => None,
            Some(Ok(record)) => Some(record),
            // A damaged record costs time: its directory is taken anew.
            Some(Err(Error::Damaged { .. })) => None,
            Some(Err(error)) => return Err(error),
        };
        let meta = self.meta(&found);
        let same = before.as_ref().filter(|before| unchanged(&before.meta, &meta));
        let xattrs = match same {
            Some(before) if self.ctime_tells && !task.node.racy => before.xattrs.clone(),
            _ => match beneath::xattrs_fd(&dir) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    self.omit(&task.path(), "we may not read its extended attributes");
                    Xattrs::new()
                }
                read => read.context("read the extended attributes of", &path)?,
            },
        };
        let same = same.filter(|before| before.xattrs == xattrs);
        let mut changed = same.is_none();
        let own = (same.map_or(meta, |before| before.meta), xattrs);
        let items = before.map_or_else(Vec::new, |before| before.items);
        if found.immutable {
            self.omit(&task.path(), IMMUTABLE);
        }
        let mut names = beneath::names(&dir).context("list", &path)?;
        names.sort_unstable();
        let mut before = items.into_iter().peekable();
        let mut items = Vec::with_capacity(names.len());
        let mut children = Vec::new();
        for name in names {
            while before.next_if(|item| item.name.as_bytes() < name.as_bytes()).is_some() {
                changed = true;
            }
            let then = before.next_if(|item| item.name == name);
            let had = then.is_some();
            let found = match beneath::look(&dir, &name) {
                Err(error) if is_gone(&error) => {
                    changed |= had;
                    continue;
                }
                found => found.context("read the attributes of", task.shown(self.shown, Some(&name)))?,
            };
            let meta = self.meta(&found);
            if found.meta.kind == FileKind::Dir && !found.mount_root {
                let record = then.as_ref().and_then(|item| match item.body {
                    Body::Dir(record) => Some(record),
                    _ => None,
                });
                let index = items.len();
                changed |= record.is_none();
                // The record is put in when the directory is left.
                let body = Body::Dir(record.unwrap_or(NO_RECORD));
                let (meta, racy) = then.map_or((meta, true), |item| (item.meta, item.racy));
                items.push(Item { name: name.clone(), meta, racy, xattrs: Xattrs::new(), body });
                children.push((name, Node { before: record, racy, index, state: Mutex::default() }));
                continue;
            }
            let same = then.as_ref().is_some_and(|item| unchanged(&item.meta, &meta));
            let item = match then {
                _ if found.mount_root && found.meta.kind == FileKind::File => {
                    self.omit(&task.path_of(&name), MOUNTED);
                    None
                }
                then if found.mount_root => Some(self.mount_point(task, &name, &found, then.as_ref())?),
                Some(item) if same && self.ctime_tells && !item.racy => {
                    self.note_what_is_not_kept(task, &name, &found, &item.xattrs);
                    items.push(item);
                    continue;
                }
                then => {
                    let taken = self.take(maker, &dir, task, &name, &found, then.as_ref())?;
                    if let (Some(taken), Some(then)) = (&taken, then)
                        && unchanged(&then.meta, &taken.meta)
                        && (then.racy, &then.xattrs, &then.body) == (taken.racy, &taken.xattrs, &taken.body)
                    {
                        items.push(then);
                        continue;
                    }
                    taken
                }
            };
            changed |= item.is_some() || had;
            items.extend(item);
        }
        changed |= before.next().is_some();
        *lock(&task.node.state) = State { own: Some(own), items, gone: Vec::new(), changed };
        Ok(children)
    }

    fn leave(&self, _: &mut Maker<'a>, task: &Task<Node>) -> Result<()> {
        let mut state = std::mem::take(&mut *lock(&task.node.state));
        let left = match state.own {
            None => None,
            Some((meta, xattrs)) => {
                if !state.gone.is_empty() {
                    let mut index = 0;
                    state.items.retain(|_| {
                        index += 1;
                        !state.gone.contains(&(index - 1))
                    });
                }
                let record = match task.node.before {
                    Some(before) if !state.changed => before,
                    _ => self.pack.append(&record::encode(&meta, &xattrs, &state.items))?,
                };
                Some((meta, record))
            }
        };
        match (task.parent(), left) {
            (None, left) => *lock(&self.result) = left.map(|(_, record)| record),
            (Some(parent), None) => {
                let mut above = lock(&parent.node.state);
                above.gone.push(task.node.index);
                above.changed = true;
            }
            (Some(parent), Some((meta, record))) => {
                let mut above = lock(&parent.node.state);
                above.changed |= task.node.before != Some(record);
                let item = &mut above.items[task.node.index];
                item.racy = self.racy(&meta);
                item.meta = meta;
                item.body = Body::Dir(record);
            }
        }
        Ok(())
    }
}

/// Stands where the record of a directory will be put.
const NO_RECORD: RecordRef = RecordRef { batch: record::BatchId([0; 16]), offset: 0, length: 0, hash: [0; 32] };

fn content_of(item: &Item) -> Option<ContentRef> {
    match item.body {
        Body::File(content) => content,
        _ => None,
    }
}

/// Whether two attributes are of the same file that nobody changed in between.
fn unchanged(then: &FileMeta, now: &FileMeta) -> bool {
    *then == FileMeta { atime: then.atime, ..*now }
}

fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP, Errno::STALE];
    gone.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn is_mount(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::XDEV.raw_os_error())
}

fn blake3_64(number: u64) -> u64 {
    let hash = blake3::hash(&number.to_le_bytes());
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

/// Text of a path, with what is not UTF-8 escaped.
fn printable(path: &OsStr) -> String {
    let mut text = String::new();
    for chunk in path.as_bytes().utf8_chunks() {
        text.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}

fn into_inner<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that a thread panicked; the crew passes the panic on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
