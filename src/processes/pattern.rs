//! What does not matter to an audit, as users write it.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A path with wildcards, which stands for itself and for all below it; or a type of file system.
///
/// `*` stands for any characters of one name, `**` for any names. What does not begin with a slash is a type, such as
/// `tmpfs` or `fuse.*`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

/// A text that is no [`Pattern`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is neither a path from the root nor a type of file system: {reason}")]
pub struct InvalidPattern {
    text: String,
    reason: &'static str,
}

impl Pattern {
    /// Whether it stands for a file at `path` on a file system of that type.
    pub(super) fn matches(&self, path: &Path, file_system: &str) -> bool {
        let Some(below_root) = self.0.strip_prefix('/') else {
            return name_matches(self.0.as_bytes(), file_system.as_bytes());
        };
        let pattern: Vec<&[u8]> = below_root.split('/').map(str::as_bytes).filter(|name| !name.is_empty()).collect();
        let names = path.as_os_str().as_bytes().split(|&byte| byte == b'/').filter(|name| !name.is_empty());
        path_matches(&pattern, &names.collect::<Vec<_>>())
    }
}

/// Whether the pattern stands for the path or for a directory on the way to it.
///
/// Like the matching of names, it goes back to the last wildcard only: no pattern makes it slow.
fn path_matches(pattern: &[&[u8]], names: &[&[u8]]) -> bool {
    let (mut at, mut name) = (0, 0);
    let mut last: Option<(usize, usize)> = None;
    loop {
        if at == pattern.len() {
            return true;
        }
        if pattern[at] == b"**" {
            last = Some((at + 1, name));
            at += 1;
        } else if name < names.len() && name_matches(pattern[at], names[name]) {
            at += 1;
            name += 1;
        } else if let Some((after, from)) = last.filter(|&(_, from)| from < names.len()) {
            last = Some((after, from + 1));
            (at, name) = (after, from + 1);
        } else {
            return false;
        }
    }
}

fn name_matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut byte) = (0, 0);
    let mut last: Option<(usize, usize)> = None;
    while byte < name.len() {
        if pattern.get(at) == Some(&b'*') {
            last = Some((at + 1, byte));
            at += 1;
        } else if pattern.get(at) == Some(&name[byte]) {
            at += 1;
            byte += 1;
        } else if let Some((after, from)) = last {
            last = Some((after, from + 1));
            (at, byte) = (after, from + 1);
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}

impl FromStr for Pattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for Pattern {
    type Error = InvalidPattern;

    fn try_from(text: String) -> Result<Self, InvalidPattern> {
        let refuse = |reason| Err(InvalidPattern { text: text.clone(), reason });
        if text.is_empty() || text.len() > 4096 {
            return refuse("it is empty, or far too long");
        }
        if text.split('/').any(|name| name == "..") {
            return refuse("`..` stands for nothing here");
        }
        if !text.starts_with('/') && text.contains('/') {
            return refuse("a type has no slash in it, and a path begins with one");
        }
        Ok(Self(text))
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.0
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str, file_system: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(Path::new(path), file_system)
    }

    #[test]
    fn a_path_stands_for_itself_and_for_all_below() {
        for (pattern, path) in [
            ("/tmp", "/tmp"),
            ("/tmp", "/tmp/a/b"),
            ("/tmp/", "/tmp/a"),
            ("/run/*/x", "/run/user/x"),
            ("/run/*.sock", "/run/a.b.sock"),
            ("/srv/**/cache", "/srv/a/b/cache/c"),
            ("/srv/**/cache", "/srv/cache"),
            ("/**/*.log", "/var/a.log.b.log"),
            ("/", "/anything"),
            ("/**", "/"),
        ] {
            assert!(matches(pattern, path, "ext4"), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("/tmp", "/tmpx"),
            ("/tmp/a", "/tmp"),
            ("/run/*/x", "/run/a/b/x"),
            ("/run/*/x", "/run/x"),
            ("/srv/**/cache", "/srv/a/b"),
            ("/*.log", "/a.logs"),
        ] {
            assert!(!matches(pattern, path, "ext4"), "{pattern} {path}");
        }
    }

    #[test]
    fn a_type_stands_for_whatever_lies_on_it() {
        assert!(matches("tmpfs", "/a/b", "tmpfs") && !matches("tmpfs", "/tmpfs", "ext4"));
        assert!(matches("fuse.*", "/a", "fuse.sshfs") && !matches("fuse.*", "/a", "fuseblk"));
    }

    #[test]
    fn what_would_never_stand_for_anything_is_refused() {
        for bad in ["", "a/b", "/a/../b", "../a", &"x".repeat(5000)] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn no_pattern_makes_it_slow() {
        let pattern = format!("/{}", "*a".repeat(1000));
        let path = format!("/{}", "a".repeat(4000));
        assert!(matches(&pattern, &path, "ext4"));
        let deep = format!("{}/z", "/**/a".repeat(500));
        assert!(!matches(&deep, &"/a".repeat(2000), "ext4"));
    }
}
