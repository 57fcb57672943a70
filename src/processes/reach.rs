//! Which volumes a tree of processes can write to.
//!
//! A volume counts by *use*, when a process has a file of it open or mapped for writing or a directory of it in hand,
//! and by *reach*, when a process sees it on a writable mount and may enter it. Entering is what can be asked without
//! a walk over the whole volume: a file that the process may write lies somewhere below, or it does not. A
//! read-only descriptor opened again for writing, a thread with descriptors of its own (`unshare(CLONE_FILES)`) and writes
//! through an overlay whose upper layer lies in a volume are not seen.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use fsnap_backend::beneath;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};

use super::credentials::Credentials;
use super::files::{How, InUse, Lens, visit_all};
use super::mounts::{Device, Mount, Place, may_hang};
use super::proc_dir::{ProcDir, is_gone};
use super::view::{Located, View, Views};
use super::{Error, Member, ProcessId, Result, Tree};

/// A volume that processes may be able to write to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its root directory, by a path of fsnap's own mount namespace.
    pub dir: PathBuf,
    /// `st_dev` of the root directory.
    pub dev: u64,
    /// `st_ino` of the root directory.
    pub ino: u64,
    /// What makes it count.
    pub kind: CandidateKind,
}

/// What makes a candidate count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CandidateKind {
    /// A registered volume: counts by use and by reach.
    Registered,
    /// A branch: counts by use, or where it is mounted at another place than its own directory. Branches lie side by
    /// side in a store, and a process that can reach the store does not thereby work on all of them.
    Branch,
}

impl Candidate {
    /// Describes the directory that stands at `dir` now; the last component may not be a symbolic link.
    pub fn of(dir: &Path, kind: CandidateKind) -> io::Result<Self> {
        let root = beneath::open_root(dir)?;
        let found = rustix::fs::statx(&root, "", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
        let dev = rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor);
        Ok(Self { dir: dir.into(), dev, ino: found.stx_ino, kind })
    }
}

/// A volume that a tree can write to, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// Which of the candidates: its index.
    pub candidate: usize,
    /// A process that can.
    pub process: ProcessId,
    /// The name of the process, for messages.
    pub command: String,
    /// In what way.
    pub how: How,
}

/// Finds the candidates that the tree can write to, in their order, each once.
///
/// A candidate whose directory is missing, or is not the one it was, is left out: no process can reach it under that
/// path. Fails when a member's files may not be looked at.
pub fn reach(tree: &Tree, candidates: &[Candidate]) -> Result<Vec<Reach>> {
    let mut survey = Survey::new(candidates, Doubt::Counts)?;
    let mut found: Vec<Option<Reach>> = vec![None; candidates.len()];
    for member in tree.members() {
        let mut on_found = |candidate: usize, how: How| {
            let by_mount = |how: &How| matches!(how, How::Mount(_));
            // That a process uses it says more than that it could.
            let keep = found[candidate].as_ref().is_some_and(|old| !by_mount(&old.how) || by_mount(&how));
            if !keep {
                let (process, command) = (member.id, member.command.clone());
                found[candidate] = Some(Reach { candidate, process, command, how });
            }
        };
        match survey.examine(member.id, &mut on_found) {
            Err(error) if is_gone(&error) => {}
            // The files of a process that has ended and was not waited for cannot be read, whoever asks.
            Err(_) if !member.id.is_alive() => {}
            Err(source) => return Err(Error::Read { object: format!("/proc/{}", member.id).into(), source }),
            Ok(()) => {}
        }
    }
    Ok(found.into_iter().flatten().collect())
}

/// Finds the processes that surely use one of the candidates, or see it mounted.
///
/// What cannot be told does not count: a descriptor on a mount that no namespace shows may be of any file of its file
/// system, and a server that holds one would else be a user of everything there. Processes that may not be looked at are
/// left out.
pub fn users(candidates: &[Candidate]) -> Result<Vec<Member>> {
    Survey::new(candidates, Doubt::Ignored)?.users()
}

/// Finds the same of directories that are shown to other mount namespaces only, by file systems of that type and source: `dirs` are paths in these.
///
/// What fsnap's own mount namespace shows is left out.
pub fn users_elsewhere(fstype: &str, source: &Path, dirs: &[PathBuf]) -> Result<Vec<Member>> {
    let mut views = views()?;
    let mut devices: HashSet<Device> = HashSet::new();
    for process in super::all()? {
        let Ok(view) = open(process).and_then(|dir| views.of(&dir)) else { continue };
        let wanted = |mount: &&Mount| mount.fstype == fstype.as_bytes() && mount.source == source;
        devices.extend(view.table.iter().filter(wanted).map(|mount| mount.root.device));
    }
    for mount in views.own().table.iter() {
        devices.remove(&mount.root.device);
    }
    let places: Vec<_> =
        devices.iter().flat_map(|&device| dirs.iter().map(move |dir| Place { device, path: dir.clone() })).collect();
    // No directory of ours is one of them.
    let nowhere = Candidate { dir: PathBuf::new(), dev: 0, ino: 0, kind: CandidateKind::Branch };
    let candidates = vec![nowhere; places.len()];
    match places.is_empty() {
        true => Ok(Vec::new()),
        false => Survey::at(places, views, &candidates, Doubt::Ignored).users(),
    }
}

/// Whether a file counts of which cannot be told which candidate of its file system it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// It belongs to each of them: nothing may be missed.
    Counts,
    /// It belongs to none: only what is sure may be said.
    Ignored,
}

/// The candidates' places, and what has been learnt of the processes' surroundings.
#[derive(Debug)]
pub(super) struct Survey<'a> {
    candidates: &'a [Candidate],
    doubt: Doubt,
    places: Vec<Option<Place>>,
    devices: Vec<Device>,
    pub(super) views: Views,
    /// Processes that see and may do the same reach the same: most of a tree does.
    seen: HashSet<(PathBuf, PathBuf, Credentials)>,
}

impl<'a> Survey<'a> {
    pub(super) fn new(candidates: &'a [Candidate], doubt: Doubt) -> Result<Self> {
        Ok(Self::seen_from(views()?, candidates, doubt))
    }

    /// With fsnap's own view, read a moment ago.
    pub(super) fn seen_from(views: Views, candidates: &'a [Candidate], doubt: Doubt) -> Self {
        let places: Vec<_> = candidates.iter().map(|candidate| place_of(candidate, &views)).collect();
        let devices = places.iter().flatten().map(|place| place.device).collect();
        Self { candidates, doubt, places, devices, views, seen: HashSet::new() }
    }

    /// With one place for each candidate, which is not looked for.
    fn at(places: Vec<Place>, views: Views, candidates: &'a [Candidate], doubt: Doubt) -> Self {
        let devices = places.iter().map(|place| place.device).collect();
        let places = places.into_iter().map(Some).collect();
        Self { candidates, doubt, places, devices, views, seen: HashSet::new() }
    }

    /// All processes that use one of the candidates, or see it mounted.
    fn users(mut self) -> Result<Vec<Member>> {
        let mut found = Vec::new();
        for process in super::all()? {
            let mut uses = false;
            // Its files are seen one after the other: what was found before a failure is true.
            let _ = self.examine(process, &mut |_, _| uses = true);
            found.extend(uses.then(|| Member::look_up(process.pid)).flatten());
        }
        Ok(found)
    }

    /// For a look at the files of a process that has this view.
    pub(super) fn lens<'b>(&'b self, view: &'b View) -> Lens<'b> {
        Lens { view, views: &self.views, devices: &self.devices }
    }

    /// Calls `on_found` for each candidate that the process uses or reaches.
    fn examine(&mut self, process: ProcessId, on_found: &mut dyn FnMut(usize, How)) -> io::Result<()> {
        let dir = open(process)?;
        let view = self.views.of(&dir)?;
        visit_all(&dir, &self.lens(&view), &mut |file| {
            for candidate in self.owners(&file) {
                on_found(candidate, file.how.clone());
            }
            true
        })?;
        let credentials = Credentials::of(&dir, &self.views.user_namespace)?;
        if self.seen.insert((view.namespace.clone(), view.root.clone(), credentials.clone())) {
            for candidate in 0..self.candidates.len() {
                if let Some(point) = self.mount_reaching(candidate, &dir, &view, &credentials) {
                    on_found(candidate, How::Mount(point));
                }
            }
        }
        Ok(())
    }

    /// The candidates to which a file in use belongs: one, or all that it may belong to where that cannot be told.
    pub(super) fn owners(&self, file: &InUse) -> Vec<usize> {
        match &file.located {
            Located::At(place) => self.owner(place).into_iter().collect(),
            Located::In(_) | Located::Unknown if self.doubt == Doubt::Ignored => Vec::new(),
            Located::In(device) => {
                self.indices(|at| self.places[at].as_ref().is_some_and(|place| place.device == *device))
            }
            Located::Unknown => {
                self.indices(|at| self.places[at].is_some() && Some(self.candidates[at].dev) == file.device)
            }
        }
    }

    fn indices(&self, matches: impl Fn(usize) -> bool) -> Vec<usize> {
        (0..self.candidates.len()).filter(|&at| matches(at)).collect()
    }

    /// The innermost candidate at or above the place: a store of branches may lie within a volume's directory.
    pub(super) fn owner(&self, place: &Place) -> Option<usize> {
        let holds = |at: &usize| self.places[*at].as_ref().is_some_and(|root| place.is_beneath(root));
        let depth = |at: &usize| self.places[*at].as_ref().map(|root| root.path.components().count());
        (0..self.candidates.len()).filter(holds).max_by_key(depth)
    }

    /// The owner, and the way from its root to the place.
    pub(super) fn below(&self, place: &Place) -> Option<(usize, PathBuf)> {
        let owner = self.owner(place)?;
        let root = self.places[owner].as_ref()?;
        Some((owner, place.path.strip_prefix(&root.path).ok()?.to_owned()))
    }

    /// The mount point through which the process can enter the candidate, if any.
    fn mount_reaching(&self, at: usize, dir: &ProcDir, view: &View, who: &Credentials) -> Option<PathBuf> {
        let root = self.places[at].as_ref()?;
        let candidate = &self.candidates[at];
        let mounts = view.table.iter().filter(|mount| mount.writable && mount.root.device == root.device);
        for mount in mounts {
            let path = match candidate.kind {
                CandidateKind::Branch => {
                    if mount.root != *root || mount.point == candidate.dir {
                        continue;
                    }
                    mount.point.clone()
                }
                CandidateKind::Registered => match root.path.strip_prefix(&mount.root.path) {
                    Ok(below) => fsnap_backend::mounts::join(&mount.point, below),
                    // It shows a part of the volume.
                    Err(_) if self.owner(&mount.root) == Some(at) => mount.point.clone(),
                    Err(_) => continue,
                },
            };
            let visible = view.table.resolve(&path).is_some_and(|top| top.id == mount.id);
            if visible && path.starts_with(&view.root) && may_enter(&path, dir, view, who) {
                return Some(mount.point.clone());
            }
        }
        None
    }
}

/// fsnap's own view.
pub(super) fn views() -> Result<Views> {
    Views::new().map_err(|source| Error::Read { object: "/proc/thread-self".into(), source })
}

/// Opens the directory of a process, or of one of its threads that lives, if it is still the same one.
pub(super) fn open(process: ProcessId) -> io::Result<ProcDir> {
    let dir = ProcDir::of(process.pid)?;
    let stat = dir.stat()?;
    if stat.start_time != process.start_time {
        return Err(rustix::io::Errno::SRCH.into());
    }
    dir.living(stat.state)
}

/// Where the candidate's root lies, if what stands there is still the candidate.
fn place_of(candidate: &Candidate, views: &Views) -> Option<Place> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, &candidate.dir, flags, Mode::empty()).ok()?;
    let wanted = StatxFlags::INO | StatxFlags::MNT_ID;
    let found = rustix::fs::statx(&root, "", AtFlags::EMPTY_PATH, wanted).ok()?;
    let dev = rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor);
    if (dev, found.stx_ino) != (candidate.dev, candidate.ino) {
        return None;
    }
    use std::os::fd::AsRawFd;
    let text = std::fs::read_link(format!("/proc/thread-self/fd/{}", root.as_raw_fd())).ok()?;
    let mount = Some(found.stx_mnt_id);
    match views.locate(views.own(), &text, mount) {
        Located::At(place) => Some(place),
        Located::In(_) | Located::Unknown => None,
    }
}

/// Whether the process may search every directory from its root to `path`, that one included.
///
/// Who may search every directory need not be asked about any. For others, one name at a time and without following links: the directories
/// may belong to hostile processes. A mount that may never answer is not looked at, and is taken to permit.
pub(super) fn may_enter(path: &Path, process: &ProcDir, view: &View, who: &Credentials) -> bool {
    let may_hang_at = |path: &Path| view.table.resolve(path).is_none_or(may_hang);
    let Ok(below) = path.strip_prefix(&view.root) else { return false };
    if who.searches_all() || may_hang_at(&view.root) {
        return true;
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(mut at) = rustix::fs::openat(process, "root", flags, Mode::empty()) else { return true };
    let mut reached = view.root.clone();
    if !permits(&at, who) {
        return false;
    }
    for component in below.components() {
        let Component::Normal(name) = component else { return false };
        reached.push(name);
        if may_hang_at(&reached) {
            return true;
        }
        match beneath::open_handle(&at, name) {
            Ok(next) => at = next,
            Err(error) => return !is_gone(&error),
        }
        if !permits(&at, who) {
            return false;
        }
    }
    true
}

fn permits(dir: &OwnedFd, who: &Credentials) -> bool {
    let Ok(meta) = beneath::stat_fd(dir) else { return true };
    who.may_search(&meta, false) || has_acl(dir) && who.may_search(&meta, true)
}

fn has_acl(dir: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    // A handle has no fgetxattr; its link in /proc leads to the same file.
    let path = format!("/proc/thread-self/fd/{}", dir.as_raw_fd());
    let mut nothing: [u8; 0] = [];
    rustix::fs::getxattr(path, OsStr::from_bytes(b"system.posix_acl_access"), &mut nothing).is_ok_and(|size| size > 0)
}
