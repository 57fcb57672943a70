//! Reads a tree of processes into its record.
//!
//! Most of it has to be read while the tree stands, and every process of it waits meanwhile: so each descriptor costs a
//! handful of system calls, a file is never opened, and nothing is asked of a server. What may keep the reader waiting,
//! or need not be of that instant, is left for [`Observation::finish`].

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags};

use super::audit::told;
use super::credentials::Credentials;
use super::files::{Mapping, Target, target_of};
use super::mounts::Mount;
use super::proc_dir::{ProcDir, link_in, numbers_in, unless_gone};
use super::reach::{self, Candidate, Doubt, Survey};
use super::sockets::Sockets;
use super::view::{Located, View, Views};
use super::{
    AuditRules, Error, FilePlace, FrozenTree, InVolume, MappedFile, Medium, Member, OpenFile, OpenKind, Outside,
    Policy, ProcessRecord, Result, Tree, TreeRecord, Unlinked, Via,
};
use crate::checkpoint::PathText;
use crate::name::Name;

/// More descriptors and mapped files than any tree has that is not out to make fsnap slow.
const FILES: usize = 100_000;

/// More than anybody reads of one audit.
const OUTSIDE: usize = 10_000;

/// How much of a command line is kept.
const ARGUMENTS: usize = 16 << 10;

/// How long command lines are waited for: they lie in the processes' own memory, behind which may be a server.
const PATIENCE: Duration = Duration::from_secs(1);

/// A tree that was read as far as it had to stand for it.
#[derive(Debug)]
pub struct Observation {
    volumes: Vec<(Name, Candidate)>,
    rules: AuditRules,
    pub(super) record: TreeRecord,
    mounts: Vec<Outside>,
    /// One for each process of the record, unless it could not be opened.
    pub(super) dirs: Vec<Option<ProcDir>>,
    /// The files that have no name any more, each once.
    pub(super) unlinked: Vec<Unlinked>,
    sockets: Sockets,
}

/// What a look at a tree needs and does not depend on the tree: made ahead, while nobody stands.
#[derive(Debug)]
pub struct Outlook {
    volumes: Vec<(Name, Candidate)>,
    rules: AuditRules,
    views: Views,
    /// The device of memory that has no name.
    memory: Option<u64>,
}

impl Outlook {
    /// For looks at what trees have in use, and at what of that these volumes do not hold.
    pub fn new(volumes: Vec<(Name, Candidate)>, rules: AuditRules) -> Result<Self> {
        Ok(Self { volumes, rules, views: reach::views()?, memory: memory_device() })
    }

    /// The volumes.
    pub fn volumes(&self) -> &[(Name, Candidate)] {
        &self.volumes
    }

    /// How the audit is made.
    pub fn rules(&self) -> &AuditRules {
        &self.rules
    }

    /// Reads the tree as it stands now, and audits what it can write to outside the volumes.
    pub fn observe(mut self, frozen: FrozenTree) -> Result<Observation> {
        let own = |source| Error::Read { object: "/proc/thread-self/mountinfo".into(), source };
        self.views.renew().map_err(own)?;
        self.look(frozen)
    }

    fn look(self, frozen: FrozenTree) -> Result<Observation> {
        let Self { volumes, rules, views, memory } = self;
        let (names, candidates) = split(&volumes);
        let observation = Observation {
            volumes,
            rules,
            record: TreeRecord::new(),
            mounts: Vec::new(),
            dirs: Vec::new(),
            unlinked: Vec::new(),
            sockets: Sockets::default(),
        };
        let mut observer = Observer {
            names: &names,
            survey: Survey::seen_from(views, &candidates, Doubt::Ignored),
            seen: HashSet::new(),
            named: HashSet::new(),
            gone: HashSet::new(),
            memory,
            left: FILES,
            observation,
        };
        frozen.for_each(|member, dir| observer.member(member, dir));
        let mut observation = observer.observation;
        if observation.rules.policy == Policy::Refuse {
            // What decides has to be known at once.
            observation.look_at_sockets()?;
        }
        Ok(observation)
    }
}

/// Reads the tree, and audits what it can write to outside the volumes.
pub fn observe(tree: &Tree, volumes: Vec<(Name, Candidate)>, rules: &AuditRules) -> Result<Observation> {
    Outlook::new(volumes, rules.clone())?.look(FrozenTree::open(tree))
}

fn split(volumes: &[(Name, Candidate)]) -> (Vec<Name>, Vec<Candidate>) {
    volumes.iter().cloned().unzip()
}

impl Observation {
    /// Why there may be no checkpoint, if the rules say so.
    pub fn objection(&self) -> Option<String> {
        if self.rules.policy != Policy::Refuse {
            return None;
        }
        let mut reasons: Vec<String> = self.record.outside.iter().chain(&self.mounts).map(Outside::to_string).collect();
        let unread = self.record.processes.iter().filter_map(|process| {
            let reason = process.unread.as_ref()?;
            Some(format!("{} ({}) cannot be looked at: {reason}", process.pid, process.command))
        });
        reasons.extend(unread);
        if self.record.cut_off {
            reasons.push(format!("they have more than {FILES} files in use"));
        }
        summary(&reasons)
    }

    /// The record, with what need not be read while the tree stands.
    pub fn finish(mut self) -> TreeRecord {
        // What cannot be told any more is left out: nothing depends on it.
        let _ = self.look_at_sockets();
        let Self { mut record, mut mounts, dirs, .. } = self;
        record.outside.append(&mut mounts);
        record.outside.truncate(OUTSIDE);
        let (tell, told) = mpsc::channel();
        // A reader that has to wait for a server waits alone.
        let shared = Arc::new((ManuallyDrop::new(dirs), Mutex::new(Reading::GoesOn)));
        let own = shared.clone();
        let reader = std::thread::Builder::new().spawn(move || {
            for (index, dir) in own.0.iter().enumerate() {
                let arguments = dir.as_ref().and_then(|dir| arguments(dir, &own.1).ok()).unwrap_or_default();
                if tell.send((index, arguments)).is_err() {
                    return;
                }
            }
        });
        let Ok(reader) = reader else { return record };
        let until = Instant::now() + PATIENCE;
        for _ in 0..record.processes.len() {
            let left = until.saturating_duration_since(Instant::now());
            let Ok((index, arguments)) = told.recv_timeout(left) else {
                *shared.1.lock().unwrap_or_else(PoisonError::into_inner) = Reading::Abandoned;
                return record;
            };
            record.processes[index].arguments = arguments;
        }
        if reader.join().is_ok() {
            drop(Arc::into_inner(shared).map(|(dirs, _)| ManuallyDrop::into_inner(dirs)));
        }
        record
    }

    fn add(&mut self, outside: Outside) {
        if self.rules.policy == Policy::Ignore {
            return;
        }
        if self.rules.ignores(&outside) {
            self.record.ignored += 1;
        } else if outside.via == Via::Mount {
            self.mounts.push(outside);
        } else {
            self.record.outside.push(outside);
        }
    }

    /// Names the files of sockets, which lie where some process bound them.
    fn look_at_sockets(&mut self) -> Result<()> {
        if self.sockets.is_empty() || self.rules.policy == Policy::Ignore {
            return Ok(());
        }
        let (names, candidates) = split(&self.volumes);
        let mut survey = Survey::new(&candidates, Doubt::Ignored)?;
        let mut known = HashSet::new();
        for socket in std::mem::take(&mut self.sockets).bound() {
            let Some(dir) = &self.dirs[socket.process] else { continue };
            let Ok((place, mount)) = socket.locate(dir, &mut survey, &names, &self.rules) else { continue };
            let Some((file_system, medium)) = mount.filter(|_| place.volume.is_none()) else { continue };
            let process = &self.record.processes[socket.process];
            let (pid, command, path) = (process.pid, process.command.clone(), place.path);
            // A server has one for each of its clients, all bound to one file.
            if known.insert((pid, path.clone())) {
                let via = Via::Socket { fd: socket.fd };
                self.add(Outside { pid, command, via, path, file_system, medium, unlinked: false });
            }
        }
        Ok(())
    }
}

/// The first few of them, and how many more there are.
fn summary(reasons: &[String]) -> Option<String> {
    const SHOWN: usize = 8;
    let mut text = reasons.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("; ");
    if reasons.len() > SHOWN {
        text.push_str(&format!("; and {} more", reasons.len() - SHOWN));
    }
    (!reasons.is_empty()).then_some(text)
}

struct Observer<'a> {
    names: &'a [Name],
    survey: Survey<'a>,
    /// Processes that see and may do the same can write to the same mounts.
    seen: HashSet<(PathBuf, PathBuf, Credentials)>,
    /// The mounts that were named.
    named: HashSet<(PathBuf, u64)>,
    /// The device and inode of files that have no name any more.
    gone: HashSet<(u64, u64)>,
    /// The device of memory that has no name.
    memory: Option<u64>,
    /// How many more files may be recorded.
    left: usize,
    observation: Observation,
}

impl Observer<'_> {
    fn member(&mut self, member: &Member, dir: io::Result<ProcDir>) {
        let mut record = ProcessRecord {
            pid: member.id.pid,
            start_time: member.id.start_time,
            parent: member.parent,
            command: member.command.clone(),
            arguments: Vec::new(),
            cwd: None,
            root: None,
            program: None,
            files: Vec::new(),
            mapped: Vec::new(),
            unread: None,
        };
        let read = dir.and_then(|dir| self.process(&dir, &mut record).map(|()| dir));
        let dir = match read {
            Ok(dir) => Some(dir),
            // It has ended and was not waited for: it has no files.
            Err(_) if !member.id.is_alive() => None,
            Err(error) => {
                record.unread = Some(error.to_string());
                None
            }
        };
        self.observation.record.processes.push(record);
        self.observation.dirs.push(dir);
    }

    fn process(&mut self, dir: &ProcDir, record: &mut ProcessRecord) -> io::Result<()> {
        let view = self.survey.views.of(dir)?;
        record.cwd = self.directory(dir, &view, "cwd")?;
        record.root = self.directory(dir, &view, "root")?;
        // The kernel's own helpers have none.
        record.program = self.directory(dir, &view, "exe").unwrap_or_default();
        self.descriptors(dir, &view, record)?;
        self.mappings(dir, &view, record)?;
        self.mounts(dir, &view, record)
    }

    fn directory(&self, dir: &ProcDir, view: &View, name: &str) -> io::Result<Option<FilePlace>> {
        let Some(target) = unless_gone(target_of(dir, name))? else { return Ok(None) };
        Ok(Some(self.place(view, dir.link(name)?, target.mount, target.unlinked)))
    }

    fn place(&self, view: &View, text: PathBuf, mount: Option<u64>, unlinked: bool) -> FilePlace {
        let path = if unlinked { without_mark(text) } else { text };
        let located = match path.is_absolute() {
            true => self.survey.views.locate(view, &path, mount),
            false => Located::Unknown,
        };
        let volume = in_volume(&self.survey, self.names, &located);
        FilePlace { path: PathText(path), volume, unlinked }
    }

    fn take_one(&mut self) -> bool {
        let more = self.left > 0;
        self.left = self.left.saturating_sub(1);
        self.observation.record.cut_off |= !more;
        more
    }

    fn descriptors(&mut self, dir: &ProcDir, view: &View, record: &mut ProcessRecord) -> io::Result<()> {
        let fds = dir.open_dir("fd")?;
        let infos = dir.open_dir("fdinfo")?;
        let mut sockets: Vec<(u64, i32)> = Vec::new();
        for fd in numbers_in(&fds)? {
            if !self.take_one() {
                break;
            }
            let name = fd.to_string();
            // `None`: it was closed meanwhile.
            let Some(target) = unless_gone(target_of(&fds, &name))? else { continue };
            let Some(text) = unless_gone(link_in(&fds, &name))? else { continue };
            let kind = kind_of(&target, &text);
            // Of the kernel's own objects it may be long, and tells nothing that is needed here.
            let Info { flags, offset, locked } = match kind {
                OpenKind::Other | OpenKind::Socket => Info::default(),
                _ => info_of(&infos, &name).unwrap_or_default(),
            };
            let is_mounted = || target.mount.is_none_or(|id| view.table.by_id(id).is_some());
            let is_memory = Some(target.device) == self.memory || names_memory(&text) && !is_mounted();
            let place = self.place(view, text, target.mount, target.unlinked);
            if kind == OpenKind::File && !is_memory {
                self.unlinked(&target, &place, view, || format!("fd/{name}"));
            }
            let Target { device, inode, .. } = target;
            if kind == OpenKind::Socket {
                sockets.push((inode, fd));
            }
            let file = OpenFile { fd, place, kind, flags, offset, device, inode, locked };
            if kind == OpenKind::File && file.is_writable() && !is_memory {
                let mount = self.mount_of(view, &file.place, target.mount, |mount| self.concerned(mount));
                self.audit(Via::Descriptor { fd }, &file.place, mount, record);
            }
            record.files.push(file);
        }
        record.files.sort_by_key(|file| file.fd);
        if !sockets.is_empty() && self.observation.rules.policy != Policy::Ignore {
            let process = self.observation.record.processes.len();
            self.observation.sockets.add(dir, process, sockets)?;
        }
        Ok(())
    }

    fn mappings(&mut self, dir: &ProcDir, view: &View, record: &mut ProcessRecord) -> io::Result<()> {
        let content = dir.read("maps")?;
        let mut known: HashMap<(u64, u64), usize> = HashMap::new();
        for mapping in content.split(|&byte| byte == b'\n').filter_map(Mapping::parse) {
            let device = mapping.device.number();
            if let Some(&index) = known.get(&(device, mapping.inode)) {
                let file: &mut MappedFile = &mut record.mapped[index];
                file.shared |= mapping.shared;
                file.writable |= mapping.writable && mapping.shared;
                continue;
            }
            let text = mapping.path();
            let is_mounted = || view.table.iter().any(|mount| mount.root.device == mapping.device);
            if Some(device) == self.memory || names_memory(&text) && !is_mounted() {
                continue;
            }
            if !self.take_one() {
                break;
            }
            // A file may be *named* so; whether it is gone is asked of the file.
            let marked = has_mark(&text);
            let link = || format!("map_files/{}", mapping.range);
            let target = if marked { target_of(dir, &link()).ok().filter(|target| target.unlinked) } else { None };
            let unlinked = target.is_some();
            let path = if unlinked { without_mark(text) } else { text };
            let located = self.survey.views.locate_mapped(view, &path, mapping.device);
            let volume = in_volume(&self.survey, self.names, &located);
            known.insert((device, mapping.inode), record.mapped.len());
            let place = FilePlace { path: PathText(path), volume, unlinked };
            if let Some(target) = target {
                self.unlinked(&target, &place, view, link);
            }
            record.mapped.push(MappedFile {
                place,
                shared: mapping.shared,
                writable: mapping.writable && mapping.shared,
                device,
                inode: mapping.inode,
            });
        }
        for index in 0..record.mapped.len() {
            let file = &record.mapped[index];
            if file.writable {
                let place = file.place.clone();
                let mount = self.mount_of(view, &place, None, |mount| self.concerned(mount));
                self.audit(Via::Mapping, &place, mount, record);
            }
        }
        Ok(())
    }

    /// Remembers a file that has no name any more, so that it can be opened while the process stands.
    fn unlinked(&mut self, target: &Target, place: &FilePlace, view: &View, link: impl Fn() -> String) {
        let &Target { device, inode, mount, unlinked, .. } = target;
        if !unlinked || !self.gone.insert((device, inode)) {
            return;
        }
        let Some((_, medium)) = self.mount_of(view, place, mount, told) else { return };
        let (process, link) = (self.observation.dirs.len(), link());
        let found = Unlinked { place: place.clone(), device, inode, mount, medium, process, link };
        self.observation.unlinked.push(found);
    }

    fn concerned(&self, mount: &Mount) -> Option<(String, Medium)> {
        self.observation.rules.concerned(mount)
    }

    /// What `told` tells of the mount that the file lies on.
    fn mount_of(
        &self,
        view: &View,
        place: &FilePlace,
        mount: Option<u64>,
        told: impl Fn(&Mount) -> Option<(String, Medium)>,
    ) -> Option<(String, Medium)> {
        let by_path = || view.resolve(place.path.as_path());
        let found: Option<&Mount> = mount.map_or_else(by_path, |id| view.table.by_id(id));
        match found {
            None => Some(("unknown".into(), Medium::Unknown)),
            Some(mount) => told(mount),
        }
    }

    /// Names the file if it is outside the checkpoint.
    fn audit(&mut self, via: Via, place: &FilePlace, on: Option<(String, Medium)>, record: &ProcessRecord) {
        let Some((file_system, medium)) = on else { return };
        // Of a volume's file that has no name, the content is kept.
        if place.volume.is_some() {
            return;
        }
        let FilePlace { path, unlinked, .. } = place.clone();
        let (pid, command) = (record.pid, record.command.clone());
        let outside = Outside { pid, command, via, path, file_system, medium, unlinked };
        self.observation.add(outside);
    }

    /// Names the mounts that the process can write to and that no volume covers.
    fn mounts(&mut self, dir: &ProcDir, view: &View, record: &ProcessRecord) -> io::Result<()> {
        if self.observation.rules.policy == Policy::Ignore {
            return Ok(());
        }
        let who = Credentials::of(dir, &self.survey.views.user_namespace)?;
        if !self.seen.insert((view.namespace.clone(), view.root.clone(), who.clone())) {
            return Ok(());
        }
        for mount in view.table.iter().filter(|mount| mount.writable) {
            let Some((file_system, medium)) = self.concerned(mount) else { continue };
            let visible = view.table.resolve(&mount.point).is_some_and(|top| top.id == mount.id);
            let inside = mount.point.starts_with(&view.root) || view.root.starts_with(&mount.point);
            if !visible || !inside || self.survey.owner(&mount.root).is_some() {
                continue;
            }
            if mount.point.starts_with(&view.root) && !reach::may_enter(&mount.point, dir, view, &who) {
                continue;
            }
            // What lies above the root is not seen, unless the root itself lies on it.
            let below = !mount.point.starts_with(&view.root);
            if below && view.table.resolve(&view.root).is_none_or(|top| top.id != mount.id) {
                continue;
            }
            if self.named.insert((view.namespace.clone(), mount.id)) {
                let path = PathText(mount.point.clone());
                let (pid, command) = (record.pid, record.command.clone());
                let outside = Outside { pid, command, via: Via::Mount, path, file_system, medium, unlinked: false };
                self.observation.add(outside);
            }
        }
        Ok(())
    }
}

/// Where in the volumes it is.
pub(super) fn in_volume(survey: &Survey<'_>, names: &[Name], located: &Located) -> Option<InVolume> {
    let Located::At(place) = located else { return None };
    let (owner, below) = survey.below(place)?;
    Some(InVolume { name: names.get(owner)?.clone(), path: PathText(below) })
}

/// Takes a file's name and the mark behind it apart.
fn without_mark(text: PathBuf) -> PathBuf {
    match text.as_os_str().as_bytes().strip_suffix(MARK) {
        Some(path) => OsStr::from_bytes(path).into(),
        None => text,
    }
}

pub(super) fn has_mark(text: &Path) -> bool {
    text.as_os_str().as_bytes().ends_with(MARK)
}

/// What the kernel writes behind the name of a file that is not found under it any more.
const MARK: &[u8] = b" (deleted)";

fn kind_of(target: &Target, text: &Path) -> OpenKind {
    match target.kind {
        FileType::RegularFile => OpenKind::File,
        FileType::Directory => OpenKind::Directory,
        FileType::Fifo => OpenKind::Fifo,
        FileType::Socket => OpenKind::Socket,
        FileType::CharacterDevice => OpenKind::CharDevice,
        FileType::BlockDevice => OpenKind::BlockDevice,
        // Of a file on another user's FUSE mount not even this is told.
        _ if text.is_absolute() => OpenKind::File,
        _ => OpenKind::Other,
    }
}

/// What `fdinfo` says of a descriptor.
#[derive(Debug, Default, PartialEq, Eq)]
struct Info {
    flags: u32,
    offset: u64,
    locked: bool,
}

/// The flags and the offset of a descriptor, and whether its file is locked, of its file in `fdinfo`.
fn info_of(infos: &OwnedFd, name: &str) -> Option<Info> {
    let file = rustix::fs::openat(infos, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    // The first lines tell it, whatever follows; of the locks, there is room for the first dozen.
    let mut start = [0; 1024];
    let length = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut start)).ok()?;
    Info::parse(&start[..length])
}

impl Info {
    fn parse(text: &[u8]) -> Option<Self> {
        let lines = || text.split(|&byte| byte == b'\n');
        let field = |name: &[u8]| {
            let line = lines().find_map(|line| line.strip_prefix(name))?;
            std::str::from_utf8(line.trim_ascii()).ok()
        };
        // "lock: 1: POSIX  ADVISORY  WRITE 7 fe:00:12 0 EOF": the other kinds belong to the descriptor.
        let is_posix = |line: &[u8]| {
            let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
            words.next() == Some(b"lock:") && words.nth(1) == Some(b"POSIX")
        };
        Some(Self {
            flags: u32::from_str_radix(field(b"flags:")?, 8).ok()?,
            offset: field(b"pos:")?.parse().ok()?,
            locked: lines().any(is_posix),
        })
    }
}

/// The device of files that are memory and have no name: what `memfd_create(2)` makes, and shared memory of System V.
fn memory_device() -> Option<u64> {
    let file = rustix::fs::memfd_create("fsnap", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    Some(rustix::fs::fstat(file).ok()?.st_dev)
}

/// Whether the kernel gives such names to memory that it keeps in file systems of its own, which are mounted nowhere: huge pages, secrets, the
/// rings of asynchronous input and output. The engine saves it with the processes, or cannot.
fn names_memory(text: &Path) -> bool {
    const NAMES: [&[u8]; 4] = [b"/memfd:", b"/anon_hugepage", b"/secretmem", b"/[aio]"];
    let text = text.as_os_str().as_bytes();
    NAMES.iter().any(|name| text.starts_with(name))
}

/// Whether anybody still waits for command lines.
///
/// When nobody does, the process may have closed all of its files, and have others under their numbers: from then on
/// the reader opens nothing and closes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    GoesOn,
    Abandoned,
}

/// The command line, or its beginning.
fn arguments(dir: &ProcDir, reading: &Mutex<Reading>) -> io::Result<Vec<PathText>> {
    let goes_on =
        || Some(reading.lock().unwrap_or_else(PoisonError::into_inner)).filter(|state| **state == Reading::GoesOn);
    let abandoned = || io::Error::from(io::ErrorKind::TimedOut);
    let file = {
        let _held = goes_on().ok_or_else(abandoned)?;
        ManuallyDrop::new(dir.open("cmdline")?)
    };
    let mut content = vec![0; ARGUMENTS];
    let read = read_up_to(&file, &mut content);
    {
        let _held = goes_on().ok_or_else(abandoned)?;
        drop(ManuallyDrop::into_inner(file));
    }
    let length = read?;
    content.truncate(length);
    if content.is_empty() {
        return Ok(Vec::new());
    }
    let text = content.strip_suffix(b"\0").unwrap_or(&content);
    let of = |argument: &[u8]| PathText(OsStr::from_bytes(argument).into());
    Ok(text.split(|&byte| byte == 0).map(of).collect())
}

fn read_up_to(file: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match rustix::io::retry_on_intr(|| rustix::io::read(file, &mut buffer[length..]))? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_ends() {
        let reasons: Vec<String> = (0..10).map(|number| number.to_string()).collect();
        assert_eq!(summary(&reasons).unwrap(), "0; 1; 2; 3; 4; 5; 6; 7; and 2 more");
        assert_eq!(summary(&reasons[..1]).unwrap(), "0");
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn only_locks_of_the_process_count() {
        let start = "pos:\t12\nflags:\t0100002\nmnt_id:\t29\nino:\t5\n";
        let of = |lock: &str| Info::parse(format!("{start}{lock}").as_bytes()).unwrap();
        for (lock, locked) in [
            ("", false),
            ("lock:\t1: FLOCK  ADVISORY  WRITE 7 fe:00:5 0 EOF\n", false),
            ("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:5 0 EOF\n", false),
            (
                "lock:\t1: FLOCK  ADVISORY  WRITE 7 fe:00:5 0 EOF\nlock:\t2: POSIX  ADVISORY  READ 7 fe:00:5 128 128\n",
                true,
            ),
        ] {
            assert_eq!(of(lock), Info { flags: 0o100002, offset: 12, locked }, "{lock}");
        }
        assert_eq!(Info::parse(b"pos:\t12\n"), None);
    }

    #[test]
    fn only_the_mark_itself_is_taken_away() {
        let shown = |text: &str| without_mark(text.into()).into_os_string().into_string().unwrap();
        assert_eq!(shown("/a (deleted) (deleted)"), "/a (deleted)");
        assert_eq!(shown("/a (deleted)x"), "/a (deleted)x");
    }
}
