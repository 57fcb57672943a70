//! Random histories with seals, released images and merges that are cut short at every step: what can be read stays the same.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;

use fsnap_backend::{Dir, FileKind, beneath};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRng, TestRunner};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::node::{Ino, ROOT};
use super::sealed::SealedDir;
use super::{Attr, Below, Caller, Change, Overlay, Result, seal, steps};

const PATHS: &[&str] =
    &["a", "b", "big", "d", "d/a", "d/b", "d/e", "d/e/a", "d/e/b", "e", "e/a", "e/d", "e/d/a", "l", "new"];
const BY: Caller = Caller { uid: 0, gid: 0 };

#[derive(Debug, Clone)]
enum Operation {
    Create(usize),
    Write(usize, u32, u16, u8),
    Rewrite(usize, u8),
    Truncate(usize, u32),
    MakeDir(usize),
    RemoveDir(usize),
    Unlink(usize),
    Rename(usize, usize),
    Exchange(usize, usize),
    Link(usize, usize),
    Symlink(usize),
    Chmod(usize, u16),
    SetXattr(usize, u8),
    Reopen,
    /// With that file written past the tree before and afterwards.
    Seal(usize),
    /// The image of one of the sealed states is deleted, and what can be merged is, but for a stop after so many steps.
    Release(usize, u32),
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let path = || 0..PATHS.len();
    let offset = || 0..300_000_u32;
    prop_oneof![
        3 => path().prop_map(Create),
        3 => (path(), offset(), 1..9000_u16, any::<u8>()).prop_map(|(p, o, l, b)| Write(p, o, l, b)),
        2 => (offset(), 1..9000_u16, any::<u8>()).prop_map(|(o, l, b)| Write(2, o, l, b)),
        1 => (path(), any::<u8>()).prop_map(|(p, b)| Rewrite(p, b)),
        1 => (path(), offset()).prop_map(|(p, s)| Truncate(p, s)),
        1 => offset().prop_map(|s| Truncate(2, s)),
        2 => path().prop_map(MakeDir),
        2 => path().prop_map(RemoveDir),
        3 => path().prop_map(Unlink),
        6 => (path(), path()).prop_map(|(p, q)| Rename(p, q)),
        3 => (path(), path()).prop_map(|(p, q)| Exchange(p, q)),
        3 => (path(), path()).prop_map(|(p, q)| Link(p, q)),
        1 => path().prop_map(Symlink),
        1 => (path(), 0..0o7777_u16).prop_map(|(p, m)| Chmod(p, m)),
        1 => (path(), any::<u8>()).prop_map(|(p, v)| SetXattr(p, v)),
        1 => Just(Reopen),
        5 => path().prop_map(Seal),
        4 => (any::<usize>(), 0..60_u32).prop_map(|(n, s)| Release(n, s)),
    ]
}

/// What can be seen of a tree.
type Seen = BTreeMap<String, String>;

fn seen(root: &dyn Dir) -> Seen {
    fn below(dir: &dyn Dir, at: &str, found: &mut Seen) {
        for entry in dir.entries().unwrap() {
            let (path, meta) = (format!("{at}/{}", entry.name.display()), entry.meta);
            let time = if meta.kind == FileKind::Dir { None } else { Some(meta.mtime) };
            let mut said = format!("{:?} {:o} {} {:?}", meta.kind, meta.mode, meta.ino, time);
            said += &format!(" {:?}", dir.xattrs(&entry.name).unwrap());
            match meta.kind {
                FileKind::Dir => below(dir.open_dir(&entry.name).unwrap().as_ref(), &path, found),
                FileKind::File => {
                    let content = dir.open_file(&entry.name).unwrap();
                    let mut bytes = vec![0; content.len() as usize];
                    let mut read = 0;
                    while read < bytes.len() {
                        match content.read_at(&mut bytes[read..], read as u64).unwrap() {
                            0 => panic!("{path} is not as long as it says"),
                            more => read += more,
                        }
                    }
                    said += &format!(" nlink {} {} {}", meta.nlink, bytes.len(), blake3::hash(&bytes));
                }
                FileKind::Symlink => said += &format!(" {:?}", dir.read_link(&entry.name).unwrap()),
                _ => {}
            }
            found.insert(path, said);
        }
    }
    let mut found = Seen::new();
    below(root, "", &mut found);
    found
}

fn assert_same(expected: &Seen, found: &Seen, what: &str) {
    let paths = expected.keys().chain(found.keys()).filter(|path| expected.get(*path) != found.get(*path));
    let lines: Vec<String> =
        paths.map(|path| format!("{path}: {:?} / {:?}", expected.get(path), found.get(path))).collect();
    assert!(lines.is_empty(), "{what}:\n{}", lines.join("\n"));
}

/// In memory, for merging syncs again and again.
struct Site {
    base: tempfile::TempDir,
    overlay: Option<Arc<Overlay>>,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.overlay = None;
        let _ = rustix::mount::unmount(self.base.path(), UnmountFlags::DETACH);
    }
}

impl Site {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        rustix::mount::mount("merge", base.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        let lower = base.path().join("lower");
        for dir in ["d/e", "e"] {
            fs::create_dir_all(lower.join(dir)).unwrap();
        }
        for (name, content) in [("a", "first"), ("d/a", "second"), ("d/b", "third"), ("d/e/a", "fourth"), ("e/a", "")] {
            fs::write(lower.join(name), content).unwrap();
        }
        let big: Vec<u8> = (0..200_000_u32).map(|at| (at / 7) as u8).collect();
        fs::write(lower.join("big"), big).unwrap();
        fs::hard_link(lower.join("a"), lower.join("b")).unwrap();
        fs::hard_link(lower.join("a"), lower.join("d/e/b")).unwrap();
        let mut site = Self { base, overlay: None };
        site.open();
        fs::create_dir(site.store().join("holds")).unwrap();
        site
    }

    fn store(&self) -> std::path::PathBuf {
        self.base.path().join("store")
    }

    fn lower(&self) -> Below {
        Below::Dir(beneath::open_root(&self.base.path().join("lower")).unwrap())
    }

    fn open(&mut self) {
        self.overlay = None;
        self.overlay = Some(Arc::new(Overlay::open_at_once(self.lower(), &self.store()).unwrap()));
    }

    fn overlay(&self) -> &Arc<Overlay> {
        self.overlay.as_ref().unwrap()
    }

    fn live(&self) -> Seen {
        seen(&SealedDir::root(self.overlay().clone()))
    }

    fn state(&self, number: u64) -> Seen {
        seen(Overlay::sealed(self.lower(), &self.store(), number).unwrap().as_ref())
    }

    fn layers(&self) -> Vec<u64> {
        seal::numbers(&beneath::open_root(&self.store()).unwrap()).unwrap()
    }

    /// Looks up a path; the names on the way stay known, as the kernel would have it.
    fn find(&self, path: &str) -> Result<Attr> {
        path.split('/')
            .try_fold(self.overlay().attr(ROOT)?, |at, name| self.overlay().look_up(at.ino, OsStr::new(name)))
    }

    fn parent(&self, path: &'static str) -> Result<(Ino, &'static OsStr)> {
        let (dir, name) = path.rsplit_once('/').map_or((None, path), |(dir, name)| (Some(dir), name));
        let parent = dir.map_or(Ok(ROOT), |dir| self.find(dir).map(|attr| attr.ino))?;
        Ok((parent, OsStr::new(name)))
    }

    fn write(&self, path: &str, offset: u64, data: &[u8], truncate: bool) -> Result<()> {
        let ino = self.find(path)?.ino;
        let file = self.overlay().open_file(ino, true, truncate)?;
        let written = self.overlay().write(ino, &file, data, offset);
        self.overlay().close_file(ino);
        written.map(drop)
    }

    fn seal(&self, image: &str, passed: &str) -> Result<()> {
        fs::write(self.store().join("holds").join(image), "").unwrap();
        let open =
            self.find(passed).and_then(|attr| Ok((attr.ino, self.overlay().open_file(attr.ino, true, false)?))).ok();
        let whole = open.as_ref().and_then(|(ino, file)| Some((*ino, file.whole()?)));
        let sealed = self.overlay().seal(image, || ((), whole.iter().map(|(ino, _)| *ino).collect()));
        if let Some((_, file)) = &whole {
            file.write_all_at(image.as_bytes(), 3).unwrap();
        }
        open.iter().for_each(|(ino, _)| self.overlay().close_file(*ino));
        sealed
    }

    fn apply(&mut self, operation: &Operation) -> Result<()> {
        use Operation::*;
        let at = |path: usize| PATHS[path];
        let rename = |from: usize, to: usize, exchange| {
            // The kernel refuses what would lead into itself.
            if at(to).starts_with(&format!("{}/", at(from)))
                || exchange && at(from).starts_with(&format!("{}/", at(to)))
            {
                return Err(Errno::INVAL);
            }
            self.overlay().rename(self.parent(at(from))?, self.parent(at(to))?, false, exchange).map(drop)
        };
        let overlay = self.overlay();
        match *operation {
            Create(p) => {
                let (parent, name) = self.parent(at(p))?;
                let (attr, _) = overlay.create(parent, name, 0o644, 0, BY)?;
                overlay.close_file(attr.ino);
            }
            Write(p, offset, length, byte) => self.write(at(p), offset.into(), &vec![byte; length.into()], false)?,
            Rewrite(p, byte) => self.write(at(p), 0, &[byte; 100], true)?,
            Truncate(p, size) => {
                let change = Change { size: Some(size.into()), ..Change::default() };
                overlay.change(self.find(at(p))?.ino, &change)?;
            }
            MakeDir(p) => {
                let (parent, name) = self.parent(at(p))?;
                overlay.make_dir(parent, name, 0o755, 0, BY)?;
            }
            RemoveDir(p) => {
                let (parent, name) = self.parent(at(p))?;
                overlay.rmdir(parent, name)?;
            }
            Unlink(p) => {
                let (parent, name) = self.parent(at(p))?;
                overlay.unlink(parent, name)?;
            }
            Rename(p, q) => rename(p, q, false)?,
            Exchange(p, q) => rename(p, q, true)?,
            Link(p, q) => {
                let (parent, name) = self.parent(at(q))?;
                overlay.link(self.find(at(p))?.ino, parent, name)?;
            }
            Symlink(p) => {
                let (parent, name) = self.parent(at(p))?;
                overlay.make_symlink(parent, name, OsStr::new("to nowhere"), BY)?;
            }
            Chmod(p, mode) => {
                let attr = self.find(at(p))?;
                if attr.kind != rustix::fs::FileType::Symlink {
                    let change = Change { mode: Some(mode.into()), ..Change::default() };
                    overlay.change(attr.ino, &change)?;
                }
            }
            SetXattr(p, value) => overlay.set_xattr(self.find(at(p))?.ino, OsStr::new("trusted.own"), &[value], 0)?,
            Reopen => self.open(),
            Seal(_) | Release(..) => {}
        }
        Ok(())
    }
}

/// Names the directory of a site to a process of this program that is to merge there, and to be killed.
const KILLED_IN: &str = "FSNAP_TEST_KILLED_IN";
/// After how many steps.
const KILLED_AFTER: &str = "FSNAP_TEST_KILLED_AFTER";

/// Merges in a process of its own that is killed after so many steps, and sees to what it has left.
fn merge_and_be_killed(site: &mut Site, stop: u32) {
    site.overlay = None;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "merge_tests::whatever_is_merged_reads_the_same"]);
    command.env(KILLED_IN, site.base.path()).env(KILLED_AFTER, stop.to_string());
    let output = command.output().unwrap();
    let killed = output.status.signal() == Some(rustix::process::Signal::KILL.as_raw());
    assert!(killed || output.status.success(), "{output:?}");
    if stop % 8 < 4 {
        let live = seal::live(&beneath::open_root(&site.store()).unwrap()).unwrap();
        drop(Overlay::sealed(site.lower(), &site.store(), live - 1).unwrap());
    }
    site.open();
}

fn be_killed(base: &std::path::Path) {
    let stop = std::env::var(KILLED_AFTER).unwrap().parse().unwrap();
    let lower = Below::Dir(beneath::open_root(&base.join("lower")).unwrap());
    let overlay = Overlay::open_at_once(lower, &base.join("store")).unwrap();
    steps::KILL.set(true);
    steps::STOP.set(Some(stop));
    overlay.merge(|| ((), Vec::new())).unwrap();
}

/// Stops the merging after so many steps, and leaves to others what it has begun.
fn merge(site: &mut Site, stop: u32) {
    if stop % 4 == 3 {
        return merge_and_be_killed(site, stop);
    }
    steps::STOP.set(Some(stop));
    let merged = site.overlay().merge(|| ((), Vec::new()));
    steps::STOP.set(None);
    match (merged, stop % 3) {
        (Ok(()), _) => {}
        // It is dead, and somebody reads a sealed state before there is another one.
        (Err(Errno::INTR), 0) => {
            site.overlay = None;
            let live = seal::live(&beneath::open_root(&site.store()).unwrap()).unwrap();
            drop(Overlay::sealed(site.lower(), &site.store(), live - 1).unwrap());
            site.open();
        }
        (Err(Errno::INTR), 1) => site.open(),
        // The server itself goes on.
        (Err(Errno::INTR), _) => site.overlay().merge(|| ((), Vec::new())).unwrap(),
        (Err(error), _) => panic!("{error}"),
    }
}

fn history(operations: &[Operation]) {
    let mut site = Site::new();
    let mut states = BTreeMap::new();
    for (at, operation) in operations.iter().enumerate() {
        let before = site.live();
        match operation {
            Operation::Seal(passed) => {
                let image = format!("image.{at}");
                let sealed = seal::live(&beneath::open_root(&site.store()).unwrap()).unwrap();
                site.seal(&image, PATHS[*passed]).unwrap();
                // What was written past the tree afterwards is in nothing that was sealed.
                states.insert(sealed, (image, before));
            }
            Operation::Release(which, stop) => {
                if let Some(&number) = states.keys().nth(which % states.len().max(1)) {
                    let (image, _) = states.remove(&number).unwrap();
                    fs::remove_file(site.store().join("holds").join(image)).unwrap();
                    merge(&mut site, *stop);
                    assert_same(&before, &site.live(), "merged");
                }
            }
            _ => drop(site.apply(operation)),
        }
        for (number, (_, then)) in &states {
            assert_same(then, &site.state(*number), &format!("state {number} after {operation:?}"));
        }
    }
    let before = site.live();
    for (image, _) in std::mem::take(&mut states).into_values() {
        fs::remove_file(site.store().join("holds").join(image)).unwrap();
    }
    site.open();
    site.overlay().merge(|| ((), Vec::new())).unwrap();
    assert!(site.layers().len() <= 2, "{:?} are left", site.layers());
    site.open();
    assert_same(&before, &site.live(), "with nothing sealed any more");
    no_room_is_lost(&site);
}

/// Nothing is in the index that no name leads to.
fn no_room_is_lost(site: &Site) {
    let live = site.live();
    let numbers: Vec<String> = live.values().filter_map(|said| said.split(' ').nth(2)).map(str::to_owned).collect();
    for number in site.layers() {
        let dir = beneath::open_root(&site.store()).unwrap();
        let (_, index) = seal::parts(&dir, number).unwrap();
        use std::os::fd::AsFd;
        for (name, _) in super::object::names(index.as_fd()).unwrap() {
            let number = name.to_str().unwrap().trim_end_matches(".taken");
            let number = u64::from_str_radix(number, 16).unwrap().to_string();
            assert!(numbers.contains(&number), "{name:?} is left in the index");
        }
    }
}

/// Deeper than a stack of the usual size would take, at a kilobyte for each level.
#[test]
fn a_deep_tree_is_merged() {
    const DEPTH: usize = 4096;
    let mut site = Site::new();
    let content = |site: &Site, name: &str, top: &str| -> Result<Vec<u8>> {
        let mut at = site.find(top)?.ino;
        for _ in 1..DEPTH {
            at = site.overlay().look_up(at, OsStr::new("d"))?.ino;
        }
        let file = site.overlay().look_up(at, OsStr::new(name))?.ino;
        let open = site.overlay().open_file(file, false, false)?;
        let mut bytes = vec![0; 100];
        let length = open.read(&mut bytes, 0)?;
        site.overlay().close_file(file);
        bytes.truncate(length);
        Ok(bytes)
    };
    let create = |site: &Site, parent: Ino, name: &str, text: &[u8]| -> Result<()> {
        let (attr, file) = site.overlay().create(parent, OsStr::new(name), 0o644, 0, BY)?;
        site.overlay().write(attr.ino, &file, text, 0)?;
        site.overlay().close_file(attr.ino);
        Ok(())
    };
    let mut at = ROOT;
    for level in 0..DEPTH {
        let name = if level == 0 { "deep" } else { "d" };
        at = site.overlay().make_dir(at, OsStr::new(name), 0o755, 0, BY).unwrap().ino;
    }
    create(&site, at, "old", b"old").unwrap();
    site.seal("first", "none").unwrap();
    create(&site, at, "new", b"new").unwrap();
    // All of it again, and a directory of the lower at another place.
    site.overlay().rename((ROOT, OsStr::new("deep")), (ROOT, OsStr::new("moved")), false, false).unwrap();
    site.seal("second", "none").unwrap();
    for image in ["first", "second"] {
        fs::remove_file(site.store().join("holds").join(image)).unwrap();
    }
    site.overlay().merge(|| ((), Vec::new())).unwrap();
    assert!(site.layers().len() <= 2, "{:?} are left", site.layers());
    site.open();
    for name in ["old", "new"] {
        assert_eq!(content(&site, name, "moved").unwrap(), name.as_bytes());
    }
}

#[test]
fn whatever_is_merged_reads_the_same() {
    if let Some(base) = std::env::var_os(KILLED_IN) {
        return be_killed(base.as_ref());
    }
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(60);
    let config = Config { cases, max_shrink_iters: 2000, failure_persistence: None, ..Config::default() };
    let seed = std::env::var("FSNAP_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let rng = TestRng::from_seed(proptest::test_runner::RngAlgorithm::ChaCha, &[seed; 32]);
    let run = TestRunner::new_with_rng(config, rng).run(&proptest::collection::vec(operation(), 1..40), |operations| {
        let done = std::panic::catch_unwind(|| history(&operations));
        done.map_err(|panic| TestCaseError::fail(panic.downcast_ref::<String>().cloned().unwrap_or_default()))
    });
    if let Err(error) = run {
        panic!("{error}");
    }
}
