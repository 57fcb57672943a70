//! A small btrfs file system of its own for each test.
#![allow(dead_code, reason = "every test file uses another part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use btrfsutil::subvolume::{DeleteFlags, Subvolume};
use fsnap_backend::{Backend, Locator, MountSpec, Snapshot, Source, Volume};
use fsnap_btrfs::Store;
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

const IMAGE: &str = "image";
const TOP: &str = "top";

/// A mounted btrfs file system on a loop device; unmounted and gone when dropped.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) top: PathBuf,
    pub(crate) image: PathBuf,
    _dir: TempDir,
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self::sized(512 << 20, "")
    }

    /// One of `bytes`, mounted with more `options`.
    pub(crate) fn sized(bytes: u64, options: &str) -> Self {
        Self::made(bytes, &[], options)
    }

    /// One in which names and contents share all room, so that it is filled soon.
    pub(crate) fn mixed(bytes: u64) -> Self {
        Self::made(bytes, &["--mixed"], "")
    }

    fn made(bytes: u64, how: &[&str], options: &str) -> Self {
        let dir = tempfile::tempdir().expect("make a directory");
        let image = dir.path().join(IMAGE);
        fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("make a sparse file");
        run(Command::new("mkfs.btrfs").arg("-q").args(how).arg(&image).stdout(Stdio::null()).stderr(Stdio::null()));
        let top = dir.path().join(TOP);
        fs::create_dir(&top).expect("make a mount point");
        let disk = Self { top, image, _dir: dir };
        disk.mount(options);
        disk
    }

    pub(crate) fn mount(&self, options: &str) {
        let options = format!("loop,{options}");
        run(Command::new("mount")
            .args(["-t", "btrfs", "-o", options.trim_end_matches(',')])
            .args([&self.image, &self.top]));
    }

    pub(crate) fn unmount(&self) {
        umount2(&self.top, MntFlags::empty()).expect("unmount");
    }

    pub(crate) fn remount(&self, options: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.top));
    }

    /// Makes a subvolume and returns its path.
    pub(crate) fn subvolume(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = self.top.join(path);
        make_subvolume(&path).expect("make a subvolume");
        path
    }

    /// The number of subvolumes of the file system.
    pub(crate) fn subvolumes(&self) -> usize {
        let out = Command::new("btrfs").args(["subvolume", "list"]).arg(&self.top).output().expect("run btrfs");
        assert!(out.status.success(), "{out:?}");
        // A name may hold a newline, but a line of it does not begin like this.
        out.stdout.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"ID ")).count()
    }

    pub(crate) fn store(&self) -> Store {
        Store::create(&self.top.join(".fsnap")).expect("make a store")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Also when a test fails: nothing of it stays mounted, and the loop device goes with its last user.
        if umount2(&self.top, MntFlags::empty()).is_err() {
            umount2(&self.top, MntFlags::MNT_DETACH).ok();
        }
    }
}

impl AsRef<Path> for Disk {
    fn as_ref(&self) -> &Path {
        &self.top
    }
}

/// The file that the loop device below `place` stands on.
pub(crate) fn image_below(place: &Path) -> PathBuf {
    let top = place.ancestors().find(|dir| dir.ends_with(TOP)).expect("the place lies on a disk of this module");
    top.with_file_name(IMAGE)
}

pub(crate) fn make_subvolume(path: &Path) -> io::Result<()> {
    // By the library that the crate uses too; the kernel's answer is in errno alone.
    Subvolume::create(path, None).map(drop).map_err(|_| io::Error::last_os_error())
}

pub(crate) fn delete_subvolume(path: &Path) -> io::Result<()> {
    let deleted = Subvolume::get(path).and_then(|found| found.delete(DeleteFlags::RECURSIVE));
    deleted.map_err(|_| io::Error::last_os_error())
}

pub(crate) fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// Captures `volume` in one go.
pub(crate) fn snapshot(store: &Store, volume: &Volume) -> Snapshot {
    let at = store.reserve(Source::Volume(volume), &Default::default()).expect("reserve");
    store.prime(volume, &at).expect("prime");
    let taken = store.snapshot(volume, &at).expect("snapshot");
    assert_eq!(store.settle(&at).expect("settle"), taken);
    taken
}

/// Makes a clone of `snapshot` and returns where it lives.
pub(crate) fn clone(store: &Store, snapshot: &Snapshot) -> Locator {
    let at = store.reserve(Source::Snapshot(snapshot), &Default::default()).expect("reserve");
    store.clone_snapshot(snapshot, &at).expect("clone");
    at
}

/// Where the files of an image are.
pub(crate) fn dir_of(store: &Store, at: &Locator) -> PathBuf {
    match store.activate(at).expect("activate") {
        MountSpec::Bind { dir, .. } => dir,
        other => panic!("no directory: {other:?}"),
    }
}

/// Every path below `dir`, with the content of files and `None` for the rest.
pub(crate) fn contents(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(at) = pending.pop() {
        for entry in fs::read_dir(&at).expect("list") {
            let path = entry.expect("list").path();
            let kind = path.symlink_metadata().expect("look at a file").file_type();
            let content = kind.is_file().then(|| fs::read(&path).expect("read"));
            found.insert(path.strip_prefix(dir).expect("it is below").to_owned(), content);
            if kind.is_dir() {
                pending.push(path);
            }
        }
    }
    found
}

/// The directories below `dir` that stand where btrfs left a nested subvolume out.
pub(crate) fn placeholders(dir: &Path) -> Vec<PathBuf> {
    let inode = |path: &PathBuf| dir.join(path).symlink_metadata().expect("look at a file").ino();
    contents(dir).into_keys().filter(|path| inode(path) == 2).collect()
}
