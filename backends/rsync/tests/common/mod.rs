//! What the tests share: file systems to run on, trees, and their comparison.

#![allow(dead_code)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fsnap_backend::{Backend, Content, Dir, DirTree, FileKind, FileMeta, Locator, MountSpec, Snapshot, Source, Volume};
use fsnap_rsync::Store;

/// A volume and a store beside it, in a directory that goes away.
pub(crate) struct Place {
    pub(crate) store: Store,
    pub(crate) dir: PathBuf,
    _temp: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    pub(crate) fn below(parent: &Path) -> Self {
        Self::with(parent, |place| Store::create(place).unwrap())
    }

    pub(crate) fn with(parent: &Path, store: impl FnOnce(&Path) -> Store) -> Self {
        let temp = tempfile::tempdir_in(parent).unwrap();
        let dir = temp.path().join("volume");
        fs::create_dir(&dir).unwrap();
        let store = store(&temp.path().join("store"));
        Self { store, dir, _temp: temp }
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn write(&self, name: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub(crate) fn volume(&self) -> Volume {
        self.store.adopt(&self.dir).unwrap()
    }

    pub(crate) fn reserve(&self) -> Locator {
        self.store.reserve(Source::Volume(&self.volume()), &BTreeSet::new()).unwrap()
    }

    /// All three steps.
    pub(crate) fn take(&self) -> Snapshot {
        let (volume, at) = (self.volume(), self.reserve());
        self.store.prime(&volume, &at).unwrap();
        let taken = self.store.snapshot(&volume, &at).unwrap();
        let settled = self.store.settle(&at).unwrap();
        assert_eq!(taken, settled);
        settled
    }

    pub(crate) fn tree(&self, snapshot: &Snapshot) -> Arc<dyn Dir> {
        match self.store.activate(&snapshot.at).unwrap() {
            MountSpec::Tree(tree) => tree,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn clone_of(&self, snapshot: &Snapshot) -> PathBuf {
        let at = self.store.reserve(Source::Snapshot(snapshot), &BTreeSet::new()).unwrap();
        self.store.clone_snapshot(snapshot, &at).unwrap();
        self.activated(&at)
    }

    pub(crate) fn activated(&self, at: &Locator) -> PathBuf {
        match self.store.activate(at).unwrap() {
            MountSpec::Bind { dir, read_only: false } => dir,
            other => panic!("{other:?}"),
        }
    }

    /// Where the store lies.
    pub(crate) fn store_dir(&self) -> PathBuf {
        self.dir.parent().unwrap().join("store")
    }

    /// Everything below a directory of the store that is no directory.
    pub(crate) fn files_in(&self, place: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut waiting = vec![self.store_dir().join(place)];
        while let Some(dir) = waiting.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_dir() { &mut waiting } else { &mut found }.push(entry.path());
            }
        }
        found.sort();
        found
    }

    /// The files that hold contents.
    pub(crate) fn contents(&self) -> Vec<PathBuf> {
        let names = ["records", "table", "sums"];
        let mut files = self.files_in("batches");
        files.retain(|path| !names.iter().any(|name| path.file_name().unwrap() == *name));
        files.retain(|path| path.extension().is_none_or(|found| found != "sums"));
        files
    }
}

/// What is compared of a file's attributes.
fn comparable(meta: &FileMeta) -> FileMeta {
    let none = fsnap_backend::Timestamp::default();
    let size = if meta.kind == FileKind::Dir { 0 } else { meta.size };
    // A directory's link count and size are its file system's own affair; what was born or read when, too.
    let nlink = if meta.kind == FileKind::Dir { 0 } else { meta.nlink };
    FileMeta { ino: 0, size, nlink, atime: none, ctime: none, btime: None, ..*meta }
}

/// Asserts that two trees are equal: names, attributes, extended attributes, contents, holes and hard links.
pub(crate) fn assert_same(left: &dyn Dir, right: &dyn Dir) {
    let mut links = std::collections::HashMap::new();
    assert_same_at(left, right, &mut PathBuf::new(), &mut links);
}

pub(crate) fn assert_same_as_dir(tree: &dyn Dir, dir: &Path) {
    assert_same(tree, &DirTree::open(dir).unwrap());
}

fn assert_same_at(
    left: &dyn Dir,
    right: &dyn Dir,
    path: &mut PathBuf,
    links: &mut std::collections::HashMap<u64, u64>,
) {
    assert_eq!(comparable(&left.meta().unwrap()), comparable(&right.meta().unwrap()), "{}", path.display());
    assert_eq!(left.own_xattrs().unwrap(), right.own_xattrs().unwrap(), "{}", path.display());
    let (ours, theirs) = (left.entries().unwrap(), right.entries().unwrap());
    let names = |entries: &[fsnap_backend::Entry]| entries.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs), "names in {}", path.display());
    for (one, other) in ours.iter().zip(&theirs) {
        path.push(&one.name);
        assert_eq!(comparable(&one.meta), comparable(&other.meta), "{}", path.display());
        assert_eq!(left.xattrs(&one.name).unwrap(), right.xattrs(&one.name).unwrap(), "{}", path.display());
        match one.meta.kind {
            FileKind::Dir => {
                let (left, right) = (left.open_dir(&one.name).unwrap(), right.open_dir(&one.name).unwrap());
                assert_same_at(&*left, &*right, path, links);
            }
            FileKind::File => {
                let linked = *links.entry(one.meta.ino).or_insert(other.meta.ino);
                assert_eq!(linked, other.meta.ino, "{} is linked otherwise", path.display());
                let (left, right) = (left.open_file(&one.name).unwrap(), right.open_file(&one.name).unwrap());
                assert_same_content(&*left, &*right, path);
            }
            FileKind::Symlink => {
                assert_eq!(left.read_link(&one.name).unwrap(), right.read_link(&one.name).unwrap());
            }
            _ => {}
        }
        path.pop();
    }
}

pub(crate) fn ranges(content: &dyn Content) -> Vec<std::ops::Range<u64>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(range) = content.data_after(at).unwrap() {
        at = range.end;
        found.push(range);
    }
    found
}

fn assert_same_content(left: &dyn Content, right: &dyn Content, path: &Path) {
    assert_eq!(left.len(), right.len(), "{}", path.display());
    assert_eq!(ranges(left), ranges(right), "holes of {}", path.display());
    for range in ranges(left) {
        let mut at = range.start;
        while at < range.end {
            let wanted = (range.end - at).min(1 << 20) as usize;
            let read = |content: &dyn Content| {
                let mut bytes = vec![0; wanted];
                let mut got = 0;
                while got < wanted {
                    match content.read_at(&mut bytes[got..], at + got as u64).unwrap() {
                        0 => panic!("{} ends early", path.display()),
                        more => got += more,
                    }
                }
                bytes
            };
            assert!(read(left) == read(right), "{} differs at {at}", path.display());
            at += wanted as u64;
        }
    }
}

/// The content of a file in a tree.
pub(crate) fn read(tree: &dyn Dir, path: &str) -> Vec<u8> {
    let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
    let mut below: Option<Box<dyn Dir>> = None;
    for name in above.split('/').filter(|name| !name.is_empty()) {
        below = Some(below.as_deref().unwrap_or(tree).open_dir(OsStr::new(name)).unwrap());
    }
    let content = below.as_deref().unwrap_or(tree).open_file(OsStr::new(name)).unwrap();
    let mut bytes = vec![0; content.len() as usize];
    let mut at = 0;
    while at < bytes.len() {
        at += content.read_at(&mut bytes[at..], at as u64).unwrap();
    }
    bytes
}

pub(crate) fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

pub(crate) fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A file system in a file, mounted until it is dropped.
pub(crate) struct Mounted {
    pub(crate) dir: PathBuf,
    _temp: Option<tempfile::TempDir>,
}

impl Mounted {
    /// Makes and mounts a file system of `size` bytes; `make` is mkfs and its arguments.
    pub(crate) fn image(make: &[&str], size: u64) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let image = temp.path().join("image");
        File::create(&image).unwrap().set_len(size).unwrap();
        let image_text = image.to_str().unwrap();
        run(make[0], &[&make[1..], &[image_text]].concat());
        Self::mount(temp, &["-o", "loop", image_text])
    }

    pub(crate) fn tmpfs(size: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        Self::mount(temp, &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
    }

    pub(crate) fn btrfs() -> Self {
        Self::image(&["mkfs.btrfs", "-q"], 512 << 20)
    }

    pub(crate) fn xfs() -> Self {
        Self::image(&["mkfs.xfs", "-q", "-m", "reflink=1"], 512 << 20)
    }

    pub(crate) fn ext4(size: u64) -> Self {
        Self::image(&["mkfs.ext4", "-q", "-F"], size)
    }

    fn mount(temp: tempfile::TempDir, args: &[&str]) -> Self {
        let dir = temp.path().join("mounted");
        fs::create_dir(&dir).unwrap();
        run("mount", &[args, &[dir.to_str().unwrap()]].concat());
        Self { dir, _temp: Some(temp) }
    }

    pub(crate) fn remount(&self, options: &str) {
        run("mount", &["-o", &format!("remount,{options}"), self.dir.to_str().unwrap()]);
    }
}

impl AsRef<Path> for Mounted {
    fn as_ref(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.dir).status().is_ok_and(|status| status.success());
        if !unmounted {
            // A failed test may have left files open: the mount goes away with them.
            let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        }
    }
}
