//! Directories below one, opened by the names on the way to them, however many these are.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::Result;
use super::object;

/// Every so many levels, a directory on the way stays open.
const STRIDE: usize = 32;

/// Opens one directory after the other. Those that are near the one before take few steps, also in a tree of thousands of levels.
///
/// Nothing below the one that was opened last is remembered: who opens a directory can move what is in it.
#[derive(Debug)]
pub(super) struct OpenDirs {
    root: Arc<OwnedFd>,
    /// The one that was opened last.
    path: Vec<u8>,
    last: Arc<OwnedFd>,
    /// Some of those above it, the uppermost first: how long their paths are, and how deep they lie.
    above: Vec<(usize, usize, Arc<OwnedFd>)>,
}

impl OpenDirs {
    pub(super) fn new(root: Arc<OwnedFd>) -> Self {
        Self { last: root.clone(), root, path: Vec::new(), above: Vec::new() }
    }

    pub(super) fn root(&self) -> Arc<OwnedFd> {
        self.root.clone()
    }

    /// Opens the directory at `path`.
    pub(super) fn open(&mut self, path: &[u8]) -> Result<Arc<OwnedFd>> {
        if path == self.path {
            return Ok(self.last.clone());
        }
        let same = self.path.iter().zip(path).take_while(|(a, b)| a == b).count();
        let ends = |path: &[u8], length: usize| path.get(length).is_none_or(|&byte| byte == b'/');
        let own = std::mem::take(&mut self.path);
        while self.above.pop_if(|(length, ..)| *length > same || !ends(&own, *length) || !ends(path, *length)).is_some()
        {
        }
        let (from, depth, dir) = self.above.last().cloned().unwrap_or((0, 0, self.root.clone()));
        // A child of the last one is where most go next.
        let below_last = !own.is_empty() && same == own.len() && ends(path, same);
        let own_depth = own.iter().filter(|&&byte| byte == b'/').count() + 1;
        let (mut at, mut depth, mut dir) =
            if below_last { (same, own_depth, self.last.clone()) } else { (from, depth, dir) };
        while at < path.len() {
            let start = at + usize::from(at > 0);
            let end = path[start..].iter().position(|&byte| byte == b'/').map_or(path.len(), |length| start + length);
            dir = Arc::new(object::open_dir(&dir, OsStr::from_bytes(&path[start..end]))?);
            (at, depth) = (end, depth + 1);
            if depth.is_multiple_of(STRIDE) {
                self.above.push((at, depth, dir.clone()));
            }
        }
        (self.path, self.last) = (path.to_owned(), dir.clone());
        Ok(dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_leads_to_its_directory() {
        let base = tempfile::tempdir().unwrap();
        let root = Arc::new(OwnedFd::from(std::fs::File::open(base.path()).unwrap()));
        let deep =
            |name: &str, levels: usize| [name].into_iter().chain(vec!["d"; levels]).collect::<Vec<_>>().join("/");
        let paths: Vec<String> =
            [("a", 0), ("a", 100), ("a", 63), ("a", 64), ("ab", 100), ("a", 31), ("ab", 1), ("a", 99)]
                .map(|(name, levels)| deep(name, levels))
                .into();
        for path in &paths {
            std::fs::create_dir_all(base.path().join(path)).unwrap();
        }
        let mut dirs = OpenDirs::new(root);
        let paths = paths.iter().map(String::as_str).chain(["", "a/d", ""]);
        for path in paths.clone().chain(paths.rev().collect::<Vec<_>>()) {
            let opened = rustix::fs::fstat(dirs.open(path.as_bytes()).unwrap()).unwrap();
            assert_eq!(opened.st_ino, rustix::fs::stat(base.path().join(path)).unwrap().st_ino, "{path:?}");
            assert!(dirs.above.len() <= 101 / STRIDE);
        }
        assert_eq!(dirs.open(b"a/none").unwrap_err(), rustix::io::Errno::NOENT);
        assert!(dirs.open(b"a/d").is_ok(), "after one that is not there");
    }
}
