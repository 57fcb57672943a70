//! Making a clone: a tree of real files that equals a snapshot.
//!
//! It is built as `volumes/<locator>.part` and renamed when it is whole and durable. Contents are shared or copied, never
//! linked: the store's own files stay out of reach of who writes to the clone. All names of a file with several are
//! links to one in `volumes/<locator>.links`, a directory that goes away at the end, so that no directory has to be
//! found again.
//!
//! The order of attributes matters: a change of owner clears set-id bits and capabilities, so the mode and the extended
//! attributes follow it; writing to a directory moves its times, so they come last, when everything below it is done.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use fsnap_backend::{
    Content, Error, ErrorKind, FileKind, FileMeta, IoContext, Locator, Result, Snapshot, Xattrs, beneath,
};
use rustix::fs::{Gid, Mode, Uid, XattrFlags};
use rustix::io::Errno;

use crate::content::{self, BUFFER};
use crate::crew::{self, Root, Task, Work};
use crate::lock::Lock;
use crate::record::{Body, Item, RecordRef};
use crate::store::{Inner, is_root, is_volume, no_image, sync_dir};

/// Makes the volume `at` of `snapshot`.
pub(crate) fn clone_snapshot(store: &Inner, snapshot: &Snapshot, at: &Locator) -> Result<()> {
    if !is_volume(at) {
        return Err(no_image(at));
    }
    // Held while its contents are read: `delete` answers Busy.
    let path = store.manifest_path(&snapshot.at);
    let _held = match Lock::try_shared(&path, || format!("the snapshot {}", snapshot.at), "it is being removed") {
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(no_image(&snapshot.at)),
        held => held?,
    };
    let manifest = store.whole(snapshot)?;
    let volumes = store.dir.join("volumes");
    if fs::symlink_metadata(volumes.join(at.as_str())).is_ok() {
        return Err(Error::Exists { what: format!("the volume {at}") });
    }
    let dir = File::open(&volumes).context("open", &volumes)?;
    let part = remove(store, &dir, at)?;
    beneath::make_dir(&dir, &part).context("make the directory", volumes.join(&part))?;
    let links = links_name(at);
    let linked = beneath::make_dir(&dir, &links).context("make the directory", volumes.join(&links))?;
    let root = beneath::open_dir(&dir, &part).context("open the directory", volumes.join(&part))?;
    let restore = Restore {
        store,
        root: Root::new(root.as_fd()),
        shown: &volumes.join(&part),
        privileged: is_root(),
        reflinks: AtomicBool::new(true),
        links: linked,
        linked: Mutex::default(),
    };
    crew::run(&restore, Node::new(manifest.root), crew::hands(|_| vec![0; BUFFER]))?;
    drop(restore);
    beneath::remove_tree(&dir, &links).context("remove", volumes.join(&links))?;
    store.sync()?;
    let name = volumes.join(at.as_str());
    fs::rename(volumes.join(&part), &name).context("put in place", &name)?;
    sync_dir(&volumes)
}

/// Removes a clone, whole or partial; returns the name under which it was partial.
pub(crate) fn remove(store: &Inner, volumes: impl AsFd, at: &Locator) -> Result<OsString> {
    let part = OsString::from(format!("{at}.part"));
    let shown = |name: &OsStr| store.dir.join("volumes").join(name);
    for name in [&part, &links_name(at)] {
        beneath::remove_tree(&volumes, name).context("remove", shown(name))?;
    }
    Ok(part)
}

fn links_name(at: &Locator) -> OsString {
    format!("{at}.links").into()
}

struct Restore<'a> {
    store: &'a Inner,
    root: Root<'a>,
    /// The volume's path while it is made, for messages.
    shown: &'a Path,
    privileged: bool,
    reflinks: AtomicBool,
    /// Holds one name of each file that has several.
    links: OwnedFd,
    linked: Mutex<HashSet<u64>>,
}

struct Node {
    record: RecordRef,
    own: Mutex<Option<(FileMeta, Xattrs)>>,
}

impl Node {
    fn new(record: RecordRef) -> Self {
        Self { record, own: Mutex::default() }
    }
}

impl Work for Restore<'_> {
    type Node = Node;
    type Hand = Vec<u8>;

    fn visit(&self, buffer: &mut Vec<u8>, task: &Task<Node>) -> Result<Vec<(OsString, Node)>> {
        let record = self.store.record(&task.node.record)?;
        let dir = task.open(&self.root).context("open the directory", task.shown(self.shown, None))?;
        let mut children = Vec::new();
        for item in record.items {
            let from = match &item.body {
                Body::File(Some(content)) => Some(content::open(self.store, content, item.meta.size)?),
                _ => None,
            };
            let made = match item.body {
                Body::Dir(below) => {
                    let made = beneath::make_dir(&dir, &item.name).map(drop);
                    children.push((item.name.clone(), Node::new(below)));
                    made
                }
                _ if item.meta.nlink > 1 => self.make_linked(buffer, &dir, &item, from.as_deref()),
                _ => self.make(buffer, &dir, &item.name, &item, from.as_deref()),
            };
            made.context("restore", task.shown(self.shown, Some(&item.name)))?;
        }
        *task.node.own.lock().unwrap_or_else(PoisonError::into_inner) = Some((record.meta, record.xattrs));
        Ok(children)
    }

    fn leave(&self, _: &mut Vec<u8>, task: &Task<Node>) -> Result<()> {
        let own = task.node.own.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((meta, xattrs)) = own else { return Ok(()) };
        let dir = task.open(&self.root).context("open the directory", task.shown(self.shown, None))?;
        self.dress(&dir, &meta, &xattrs).context("restore the attributes of", task.shown(self.shown, None))
    }
}

impl Restore<'_> {
    /// One name of a file that has several.
    fn make_linked(
        &self,
        buffer: &mut [u8],
        dir: impl AsFd,
        item: &Item,
        from: Option<&dyn Content>,
    ) -> io::Result<()> {
        let first = OsString::from(format!("{:x}", item.meta.ino));
        {
            // Held while the file is made: the other thread may come with another name of it.
            let mut linked = self.linked.lock().unwrap_or_else(PoisonError::into_inner);
            if linked.insert(item.meta.ino) {
                self.make(buffer, &self.links, &first, item, from)?;
            }
        }
        match beneath::link(&self.links, &first, &dir, &item.name) {
            // The file has as many names as its file system allows, the one in `links` included.
            Err(error) if error.raw_os_error() == Some(Errno::MLINK.raw_os_error()) => {
                Ok(rustix::fs::renameat(&self.links, &first, dir, &item.name)?)
            }
            linked => linked,
        }
    }

    fn make(
        &self,
        buffer: &mut [u8],
        dir: impl AsFd,
        name: &OsStr,
        item: &Item,
        from: Option<&dyn Content>,
    ) -> io::Result<()> {
        match &item.body {
            Body::File(_) => {
                let file = beneath::create_file(dir, name, 0o600)?;
                from.map_or(Ok(()), |from| self.fill(buffer, &file, from))?;
                return self.dress(&file, &item.meta, &item.xattrs);
            }
            Body::Symlink(target) => beneath::make_symlink(&dir, name, target)?,
            Body::Node => beneath::make_node(&dir, name, item.meta.kind, item.meta.rdev)?,
            Body::Dir(_) => return Err(Errno::INVAL.into()),
        }
        let FileMeta { uid, gid, mode, atime, mtime, .. } = item.meta;
        self.tolerate(beneath::chown(&dir, name, uid, gid))?;
        if item.meta.kind != FileKind::Symlink {
            beneath::chmod(&dir, name, mode)?;
        }
        for (key, value) in &item.xattrs {
            self.tolerate_xattr(key, beneath::set_xattr(&dir, name, key, value))?;
        }
        beneath::set_times(dir, name, atime, mtime)
    }

    fn fill(&self, buffer: &mut [u8], file: &File, from: &dyn Content) -> io::Result<()> {
        if let Some(whole) = from.as_file()
            && self.reflinks.load(Ordering::Relaxed)
        {
            if rustix::fs::ioctl_ficlone(file, whole).is_ok() {
                return Ok(());
            }
            self.reflinks.store(false, Ordering::Relaxed);
        }
        content::copy(from, Some(file), None, buffer)
    }

    /// Gives an open file its attributes.
    fn dress(&self, file: impl AsFd, meta: &FileMeta, xattrs: &Xattrs) -> io::Result<()> {
        let file = file.as_fd();
        let owned = rustix::fs::fchown(file, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
        let kept = owned.is_ok();
        self.tolerate(owned.map_err(io::Error::from))?;
        // Set-id bits of a file that could not be given to its owner would speak for somebody else.
        let mode = if kept { meta.mode } else { meta.mode & 0o1777 };
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
        for (key, value) in xattrs {
            let set = rustix::fs::fsetxattr(file, key, value, XattrFlags::empty());
            self.tolerate_xattr(key, set.map_err(io::Error::from))?;
        }
        beneath::set_times_fd(file, meta.atime, meta.mtime)
    }

    /// Without privileges files keep our owner: the store's capabilities say so.
    fn tolerate(&self, done: io::Result<()>) -> io::Result<()> {
        match done {
            Err(error) if !self.privileged && error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            done => done,
        }
    }

    fn tolerate_xattr(&self, key: &OsStr, set: io::Result<()>) -> io::Result<()> {
        match set {
            // What only one file system understands, such as whether btrfs compresses a file, is no part of the file.
            Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
                if key.as_encoded_bytes().starts_with(b"btrfs.") { Ok(()) } else { Err(error) }
            }
            Err(_) if !self.privileged && key.as_encoded_bytes().starts_with(b"security.") => Ok(()),
            set => set,
        }
    }
}
