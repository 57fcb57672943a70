//! Sockets that are bound to files.
//!
//! Which file that is stands in the kernel's list of all sockets of a network namespace, with the path as the process
//! gave it. A path that was not given from the root, and one with a symbolic link in it, cannot be told for certain.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::observer::in_volume;
use super::proc_dir::{ProcDir, parse, read_all};
use super::reach::Survey;
use super::{AuditRules, FilePlace, Medium};
use crate::checkpoint::PathText;
use crate::name::Name;

/// The sockets of processes, by network namespace.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    namespaces: BTreeMap<PathBuf, Namespace>,
}

#[derive(Debug)]
struct Namespace {
    /// `net/unix` of a process in it.
    list: OwnedFd,
    /// Who has which, by inode: the process's index and the descriptor.
    holders: HashMap<u64, Vec<(usize, i32)>>,
}

/// A socket that is bound to a file.
#[derive(Debug)]
pub(super) struct Socket {
    /// Whose: the index that it was added with.
    pub(super) process: usize,
    pub(super) fd: i32,
    /// The file, from the root of whoever bound it.
    path: PathBuf,
}

impl Sockets {
    pub(super) fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
    }

    /// Adds the sockets of a process, each an inode and a descriptor.
    pub(super) fn add(&mut self, dir: &ProcDir, process: usize, sockets: Vec<(u64, i32)>) -> io::Result<()> {
        use std::collections::btree_map::Entry;
        let namespace = match self.namespaces.entry(dir.link("ns/net")?) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Namespace { list: dir.open("net/unix")?, holders: HashMap::new() }),
        };
        for (inode, fd) in sockets {
            namespace.holders.entry(inode).or_default().push((process, fd));
        }
        Ok(())
    }

    /// Those that are bound to a file.
    pub(super) fn bound(self) -> Vec<Socket> {
        let mut found = Vec::new();
        for Namespace { list, holders } in self.namespaces.into_values() {
            let list = read_all(list).unwrap_or_default();
            for (inode, path) in list.split(|&byte| byte == b'\n').filter_map(bound) {
                let holders = holders.get(&inode).into_iter().flatten();
                found.extend(holders.map(|&(process, fd)| Socket { process, fd, path: path.to_owned() }));
            }
        }
        found.sort_by_key(|socket| (socket.process, socket.fd));
        found
    }
}

impl Socket {
    /// Where its file is for the process that has it, and on what.
    pub(super) fn locate(
        &self,
        dir: &ProcDir,
        survey: &mut Survey<'_>,
        names: &[Name],
        rules: &AuditRules,
    ) -> io::Result<(FilePlace, Option<(String, Medium)>)> {
        let view = survey.views.of(dir)?;
        let below = self.path.strip_prefix("/").unwrap_or(&self.path);
        let text = dir.link("root")?.join(below);
        let volume = in_volume(survey, names, &survey.views.locate(&view, &text, None));
        let mount = view.resolve(&text).and_then(|mount| rules.concerned(mount));
        Ok((FilePlace { path: PathText(text), volume, unlinked: false }, mount))
    }
}

/// The inode and the path of a socket, of a line of `/proc/PID/net/unix`.
fn bound(line: &[u8]) -> Option<(u64, &Path)> {
    // Num RefCount Protocol Flags Type St Inode Path
    let mut rest = line;
    let mut next = || {
        let start = rest.trim_ascii_start();
        let (field, after) = start.split_at(start.iter().position(|&byte| byte == b' ')?);
        rest = after;
        Some(field)
    };
    for _ in 0..6 {
        next()?;
    }
    let inode = parse(next()?)?;
    let path = Path::new(OsStr::from_bytes(rest.strip_prefix(b" ")?));
    path.is_absolute().then_some((inode, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_with_a_file_are_bound() {
        let line = b"0000000000000000: 00000002 00000000 00010000 0001 01  5213 /run/a b.sock";
        assert_eq!(bound(line), Some((5213, Path::new("/run/a b.sock"))));
        for other in [
            &b"0000000000000000: 00000003 00000000 00000000 0001 03  9721"[..],
            b"0000000000000000: 00000002 00000000 00010000 0001 01  5213 @/tmp/abstract",
            b"0000000000000000: 00000002 00000000 00010000 0001 01  5213 relative",
            b"Num       RefCount Protocol Flags    Type St Inode Path",
            b"",
        ] {
            assert_eq!(bound(other), None, "{}", String::from_utf8_lossy(other));
        }
    }
}
