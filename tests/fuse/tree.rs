//! What users can see of a directory tree, in a form that can be compared.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use fsnap_backend::{Dir, FileKind, FileMeta, Xattrs};

/// The files by their paths; each in words.
pub(crate) type Tree = BTreeMap<PathBuf, String>;

/// Everything but numbers and times: these two differ between trees that are equal.
pub(crate) fn of(root: &Path) -> Tree {
    let mut found = Tree::new();
    let mut first_names = HashMap::new();
    walk(root, root, &mut |path, relative| {
        let meta = fs::symlink_metadata(path).unwrap();
        let kind = meta.file_type();
        let mut said = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
        if !kind.is_dir() {
            let first = first_names.entry((meta.dev(), meta.ino())).or_insert_with(|| relative.to_owned());
            said += &format!(" nlink {} with {first:?} size {}", meta.nlink(), meta.size());
        }
        if kind.is_symlink() {
            said += &format!(" to {:?}", fs::read_link(path).unwrap());
        } else if kind.is_file() {
            let content = fs::read(path).unwrap();
            assert_eq!(content.len() as u64, meta.size(), "{path:?} is not as long as it says");
            said += &format!(" content {}", blake3::hash(&content));
        } else if kind.is_char_device() || kind.is_block_device() {
            said += &format!(" device {:x}", meta.rdev());
        }
        if !kind.is_symlink() {
            said += &format!(" xattrs {:?}", xattrs(path));
        }
        found.insert(relative.to_owned(), said);
    });
    found
}

/// As [`of`], of a tree that is read through the contract.
pub(crate) fn of_dir(root: &dyn Dir) -> Tree {
    let mut found = Tree::new();
    let mut first_names = HashMap::new();
    let said = words(&root.meta().unwrap(), Path::new(""), &mut first_names);
    found.insert(PathBuf::new(), said + &format!(" xattrs {:?}", plain(root.own_xattrs().unwrap())));
    of_below(root, Path::new(""), &mut found, &mut first_names);
    found
}

fn of_below(dir: &dyn Dir, at: &Path, found: &mut Tree, first_names: &mut HashMap<u64, PathBuf>) {
    for entry in dir.entries().unwrap() {
        let path = at.join(&entry.name);
        let mut said = words(&entry.meta, &path, first_names);
        match entry.meta.kind {
            FileKind::Symlink => said += &format!(" to {:?}", PathBuf::from(dir.read_link(&entry.name).unwrap())),
            FileKind::File => {
                let content = dir.open_file(&entry.name).unwrap();
                let mut bytes = vec![0; content.len() as usize];
                let mut read = 0;
                while read < bytes.len() {
                    let more = content.read_at(&mut bytes[read..], read as u64).unwrap();
                    assert_ne!(more, 0, "{path:?} is not as long as it says");
                    read += more;
                }
                said += &format!(" content {}", blake3::hash(&bytes));
            }
            FileKind::CharDevice | FileKind::BlockDevice => said += &format!(" device {:x}", entry.meta.rdev),
            _ => {}
        }
        if entry.meta.kind != FileKind::Symlink {
            said += &format!(" xattrs {:?}", plain(dir.xattrs(&entry.name).unwrap()));
        }
        found.insert(path.clone(), said);
        if entry.meta.kind == FileKind::Dir {
            of_below(dir.open_dir(&entry.name).unwrap().as_ref(), &path, found, first_names);
        }
    }
}

fn words(meta: &FileMeta, path: &Path, first_names: &mut HashMap<u64, PathBuf>) -> String {
    let mut said = format!("{:o} {}:{}", meta.kind.type_bits() | meta.mode, meta.uid, meta.gid);
    if meta.kind != FileKind::Dir {
        let first = first_names.entry(meta.ino).or_insert_with(|| path.to_owned());
        said += &format!(" nlink {} with {first:?} size {}", meta.nlink, meta.size);
    }
    said
}

fn plain(xattrs: Xattrs) -> BTreeMap<Vec<u8>, Vec<u8>> {
    xattrs.into_iter().map(|(name, value)| (name.into_encoded_bytes(), value)).collect()
}

/// As [`of`], and the times of last change: for one tree at two moments.
pub(crate) fn with_times(root: &Path) -> Tree {
    let mut found = of(root);
    walk(root, root, &mut |path, relative| {
        let meta = fs::symlink_metadata(path).unwrap();
        let times = (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
        *found.get_mut(relative).unwrap() += &format!(" inode {} times {times:?}", meta.ino());
    });
    found
}

/// How many bytes a tree takes on the disk.
pub(crate) fn room(root: &Path) -> u64 {
    let mut files = HashMap::new();
    walk(root, root, &mut |path, _| {
        let meta = fs::symlink_metadata(path).unwrap();
        files.insert(meta.ino(), 512 * meta.blocks());
    });
    files.values().sum()
}

/// The inode numbers by path.
pub(crate) fn numbers(root: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    walk(root, root, &mut |path, relative| {
        found.insert(relative.to_owned(), fs::symlink_metadata(path).unwrap().ino());
    });
    found
}

pub(crate) fn assert_equal(expected: &Tree, found: &Tree, what: &str) {
    let paths: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let differing = paths.into_iter().filter(|path| expected.get(*path) != found.get(*path));
    let lines: Vec<String> = differing
        .map(|path| format!("{path:?}:\n  expected {:?}\n  found    {:?}", expected.get(path), found.get(path)))
        .collect();
    assert!(lines.is_empty(), "{what}:\n{}", lines.join("\n"));
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::listxattr(path, &mut names).unwrap();
    let names = names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 4096];
        let length = rustix::fs::getxattr(path, std::ffi::OsStr::from_bytes(name), &mut value).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_owned(), value(name))).collect()
}

fn walk(root: &Path, at: &Path, visit: &mut impl FnMut(&Path, &Path)) {
    visit(at, at.strip_prefix(root).unwrap());
    let mut names: Vec<_> = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    for name in names {
        let path = at.join(name);
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            walk(root, &path, visit);
        } else {
            visit(&path, path.strip_prefix(root).unwrap());
        }
    }
}
