//! What a process means by a path, in terms that hold for every process.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::sched::CloneFlags;

use super::mounts::{Device, Mount, MountTable, Place};
use super::proc_dir::ProcDir;

/// A process's mounts, and how the kernel's link texts are to be read with them.
///
/// The text of a link such as `/proc/PID/fd/3` is a path from the root of the *file's* mount namespace (fsnap's root does not lie on
/// the way there, unless the namespace is its own), while `/proc/PID/mountinfo` counts from the root of *the process*.
/// The two differ when the process has changed its root.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// The mounts, by paths from `base`.
    pub(crate) table: Rc<MountTable>,
    /// Taken away from a link's text, it leaves a path of the table.
    base: PathBuf,
    /// The root of the process, as a path of the table.
    pub(crate) root: PathBuf,
    /// The mount namespace's name: the text of the link `ns/mnt`.
    pub(crate) namespace: PathBuf,
}

/// Where an open file lies, as far as it can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Located {
    /// Here.
    At(Place),
    /// Somewhere in this file system: its mount is known, the way from there is not.
    In(Device),
    /// On a mount that no namespace at hand shows, such as a detached one, or none at all.
    Unknown,
}

/// The views of the processes met so far, one table for each namespace and root.
#[derive(Debug)]
pub(crate) struct Views {
    own: View,
    /// The name of fsnap's own user namespace: the text of the link `ns/user`.
    pub(crate) user_namespace: PathBuf,
    known: HashMap<(PathBuf, PathBuf), View>,
}

impl Views {
    /// Starts with fsnap's own view.
    pub(crate) fn new() -> io::Result<Self> {
        let table = Rc::new(MountTable::of_self()?);
        let namespace = std::fs::read_link("/proc/thread-self/ns/mnt")?;
        let own = View { table, base: "/".into(), root: "/".into(), namespace };
        let user_namespace = std::fs::read_link("/proc/thread-self/ns/user")?;
        let known = HashMap::from([(own.key(), own.clone())]);
        Ok(Self { own, user_namespace, known })
    }

    /// Starts once more, with what is mounted by now.
    pub(crate) fn renew(&mut self) -> io::Result<()> {
        self.own.table = Rc::new(MountTable::of_self()?);
        self.known = HashMap::from([(self.own.key(), self.own.clone())]);
        Ok(())
    }

    /// fsnap's own view.
    pub(crate) fn own(&self) -> &View {
        &self.own
    }

    /// The view of a process.
    pub(crate) fn of(&mut self, process: &ProcDir) -> io::Result<View> {
        let namespace = process.link("ns/mnt")?;
        let root = process.link("root")?;
        let key = (namespace, root);
        if let Some(view) = self.known.get(&key) {
            return Ok(view.clone());
        }
        // The whole table of the namespace is needed: the part below a changed root lacks the very mount that the root
        // lies on.
        let top = (key.0.clone(), PathBuf::from("/"));
        if !self.known.contains_key(&top)
            && let Some(table) = whole_table(process, &key.1)
        {
            let (base, root, namespace) = ("/".into(), "/".into(), key.0.clone());
            self.known.insert(top.clone(), View { table: Rc::new(table), base, root, namespace });
        }
        let view = match self.known.get(&top) {
            Some(whole) => View { root: key.1.clone(), ..whole.clone() },
            None => View {
                table: Rc::new(MountTable::of(process)?),
                base: key.1.clone(),
                root: "/".into(),
                namespace: key.0.clone(),
            },
        };
        self.known.insert(key, view.clone());
        Ok(view)
    }

    /// Locates a file by its link's text and its mount's id, if that is known.
    pub(crate) fn locate(&self, view: &View, text: &Path, mount: Option<u64>) -> Located {
        let Some(id) = mount else {
            return view.resolve(text).map_or(Located::Unknown, |mount| place_on(mount, view, text));
        };
        // A descriptor may have come from another namespace, so other tables are asked too.
        let views = std::iter::once(view).chain(self.known.values());
        let found = views.filter_map(|view| Some((view, view.table.by_id(id)?))).next();
        found.map_or(Located::Unknown, |(view, mount)| place_on(mount, view, text))
    }

    /// Locates a mapped file, of which the kernel tells the device and not the mount.
    pub(crate) fn locate_mapped(&self, view: &View, text: &Path, device: Device) -> Located {
        let path = view.path(text);
        let on_device = |mount: &&Mount| mount.root.device == device;
        let visible = path.as_deref().and_then(|path| view.table.resolve(path)).filter(on_device);
        // Something else may be mounted over it by now.
        let hidden = || {
            let below = |mount: &&Mount| path.as_deref().is_some_and(|path| path.starts_with(&mount.point));
            view.table.iter().filter(on_device).filter(below).max_by_key(|mount| mount.point.components().count())
        };
        visible.or_else(hidden).map_or(Located::In(device), |mount| place_on(mount, view, text))
    }
}

impl View {
    fn key(&self) -> (PathBuf, PathBuf) {
        (self.namespace.clone(), self.root.clone())
    }

    /// A link's text as a path of the table.
    pub(crate) fn path(&self, text: &Path) -> Option<PathBuf> {
        Some(Path::new("/").join(text.strip_prefix(&self.base).ok()?))
    }

    /// The mount on which a walk to the link's text ends.
    pub(crate) fn resolve(&self, text: &Path) -> Option<&Mount> {
        self.table.resolve(&self.path(text)?)
    }
}

/// All mounts of the process's namespace, read from the root of it; `None` if that is not permitted.
fn whole_table(process: &ProcDir, root: &Path) -> Option<MountTable> {
    if root == Path::new("/") {
        return MountTable::of(process).ok();
    }
    let namespace = process.open("ns/mnt").ok()?;
    // A thread of its own that nobody else's paths depend on.
    let read = std::thread::scope(|scope| {
        let enter = || -> io::Result<MountTable> {
            nix::sched::unshare(CloneFlags::CLONE_FS)?;
            nix::sched::setns(&namespace, CloneFlags::CLONE_NEWNS)?;
            MountTable::of_self()
        };
        scope.spawn(enter).join()
    });
    read.ok()?.ok()
}

fn place_on(mount: &Mount, view: &View, text: &Path) -> Located {
    let place = view.path(text).and_then(|path| mount.place(&path));
    place.map_or(Located::In(mount.root.device), Located::At)
}
