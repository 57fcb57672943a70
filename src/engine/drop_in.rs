//! The lines in CRIU's configuration that make fsnap its action script, for all who call CRIU.
//!
//! CRIU reads `/etc/criu/default.conf`, however it is called, and container runtimes name a file of their own to it. fsnap's
//! lines stand between two marks in such a file; what others wrote there is left as it is, and comes back exactly when they are removed,
//! but for a line's end that was missing. Each line is fsnap's by itself, so that a file that somebody has edited is mended, and cleared, too: a line that
//! calls a hook which is gone would make every dump fail.
//!
//! A CRIU before 3.19 that is called by a program instead of a user (`criu swrk`, `libcriu`) ends with SIGABRT when it has an action
//! script, so that it never gets one: not in `default.conf` either, which counts for both.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::criu::Version;

/// The name and place of fsnap as CRIU's action script.
pub const HOOK: &str = "/usr/libexec/fsnap/fsnap-criu-hook";

const BEGIN: &str = "# These lines are fsnap's: `fsnap install-hooks --uninstall` removes them.";
const END: &str = "# End of fsnap's lines.";

/// Who calls CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Users, and all others that do not override it.
    Criu,
    /// The container runtime runc.
    Runc,
    /// The container runtime crun.
    Crun,
}

impl Caller {
    const ALL: [Self; 3] = [Self::Criu, Self::Runc, Self::Crun];

    /// The configuration that CRIU reads when it is called so.
    pub fn file(self) -> &'static Path {
        Path::new(match self {
            Self::Criu => "/etc/criu/default.conf",
            Self::Runc => "/etc/criu/runc.conf",
            Self::Crun => "/etc/criu/crun.conf",
        })
    }

    /// The oldest CRIU that reads that file and can be given an action script by it, and what an older one does.
    pub fn needs(self) -> (Version, &'static str) {
        match self {
            Self::Criu | Self::Runc => (
                Version { major: 3, minor: 19, patch: 0 },
                "an older one that a container runtime calls aborts when it has an action script",
            ),
            Self::Crun => (
                Version { major: 4, minor: 2, patch: 0 },
                "crun hands no configuration to an older one, so that it calls no hook",
            ),
        }
    }
}

/// One change to the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A file gets this content.
    Write(PathBuf, String),
    /// A symbolic link is made.
    Link(PathBuf, PathBuf),
    /// A file or link goes.
    Remove(PathBuf),
}

/// What is to be changed below `root` so that CRIU calls `program` for `caller`; nothing if it does already.
pub fn install(root: &Path, caller: Caller, program: &Path) -> io::Result<Vec<Change>> {
    let (link, file) = (below(root, Path::new(HOOK)), below(root, caller.file()));
    let mut changes = Vec::new();
    if fs::read_link(&link).ok().as_deref() != Some(program) {
        changes.push(Change::Link(link, program.into()));
    }
    let (before, ours) = (read(&file)?, ours());
    let others = without_ours(&before);
    // Wherever they stand, if they are whole and nothing else is left of fsnap.
    if before.replacen(&ours, "", 1) != others || !before.contains(&ours) {
        changes.push(Change::Write(file, others + &ours));
    }
    Ok(changes)
}

/// What is to be changed below `root` so that CRIU calls fsnap for `caller` no more; the link goes with the last of its users.
pub fn uninstall(root: &Path, caller: Caller) -> io::Result<Vec<Change>> {
    let (link, file) = (below(root, Path::new(HOOK)), below(root, caller.file()));
    let mut changes = Vec::new();
    let before = read(&file)?;
    if has_ours(&before) {
        let after = without_ours(&before);
        changes.push(if after.is_empty() { Change::Remove(file) } else { Change::Write(file, after) });
    }
    let mut others = Caller::ALL.into_iter().filter(|other| *other != caller);
    let needed = others
        .try_fold(false, |needed, other| Ok::<_, io::Error>(needed || has_ours(&read(&below(root, other.file()))?)))?;
    if !needed && fs::symlink_metadata(&link).is_ok() {
        changes.push(Change::Remove(link));
    }
    Ok(changes)
}

impl Change {
    /// Makes it: at once, or not at all.
    pub fn make(&self) -> io::Result<()> {
        match self {
            Self::Write(path, content) => replace(path, |new| fs::write(new, content)),
            Self::Link(path, target) => replace(path, |new| symlink(target, new)),
            Self::Remove(path) => fs::remove_file(path),
        }
    }

    /// What is changed.
    pub fn path(&self) -> &Path {
        match self {
            Self::Write(path, _) | Self::Link(path, _) | Self::Remove(path) => path,
        }
    }
}

fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = path.with_extension("fsnap-new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    make(&new)?;
    if let Ok(before) = fs::metadata(path)
        && !fs::symlink_metadata(&new)?.is_symlink()
    {
        fs::set_permissions(&new, before.permissions())?;
    }
    fs::rename(&new, path)
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn read(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    }
}

/// What stands in a file for fsnap.
fn ours() -> String {
    format!("{BEGIN}\n{}\n{END}\n", call())
}

/// The line that CRIU understands.
fn call() -> String {
    format!("action-script {HOOK}")
}

fn has_ours(text: &str) -> bool {
    text.lines().any(is_ours)
}

fn is_ours(line: &str) -> bool {
    [BEGIN, END, &call()].contains(&line.trim())
}

/// The lines of others, each with its end.
fn without_ours(text: &str) -> String {
    text.lines().filter(|line| !is_ours(line)).flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(changes: io::Result<Vec<Change>>) -> usize {
        let changes = changes.unwrap();
        changes.iter().for_each(|change| change.make().unwrap());
        changes.len()
    }

    #[test]
    fn what_others_wrote_comes_back_exactly() {
        let temp = tempfile::tempdir().unwrap();
        let (root, program) = (temp.path(), Path::new("/usr/bin/fsnap"));
        let file = below(root, Caller::Runc.file());
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        for text in ["tcp-established\n", "# a comment\nlog-level 4\n"] {
            fs::write(&file, text).unwrap();
            assert_eq!(all(install(root, Caller::Runc, program)), 2);
            let installed = fs::read_to_string(&file).unwrap();
            assert!(
                installed.starts_with(text) && installed.contains(&format!("\naction-script {HOOK}\n")),
                "{installed}"
            );
            assert_eq!(all(install(root, Caller::Runc, program)), 0);
            assert_eq!(all(uninstall(root, Caller::Runc)), 2);
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
            assert_eq!(all(uninstall(root, Caller::Runc)), 0);
        }
    }

    #[test]
    fn lines_that_somebody_edited_are_mended_and_cleared() {
        let temp = tempfile::tempdir().unwrap();
        let (root, program) = (temp.path(), Path::new("/usr/bin/fsnap"));
        let file = below(root, Caller::Runc.file());
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let (call, others) = (call(), "tcp-established\nlog-level 4\n");
        for text in [
            // Without its end, without its beginning, without both, without what it is for, twice, and with a line of others between.
            format!("tcp-established\n{BEGIN}\n{call}\nlog-level 4\n"),
            format!("tcp-established\n{call}\n{END}\nlog-level 4"),
            format!("tcp-established\n  {call}\nlog-level 4\n"),
            format!("tcp-established\n{BEGIN}\n{END}\nlog-level 4\n"),
            format!("{0}tcp-established\n{0}log-level 4\n", ours()),
            format!("{BEGIN}\ntcp-established\n{call}\n{END}\nlog-level 4\n"),
        ] {
            fs::write(&file, &text).unwrap();
            all(install(root, Caller::Runc, program));
            assert_eq!(fs::read_to_string(&file).unwrap(), format!("{others}{}", ours()), "{text}");
            fs::write(&file, &text).unwrap();
            all(uninstall(root, Caller::Runc));
            assert_eq!(fs::read_to_string(&file).unwrap(), others, "{text}");
        }
        // Whole, it stays where it is.
        fs::write(&file, format!("{}{others}", ours())).unwrap();
        all(install(root, Caller::Runc, program));
        assert_eq!(all(install(root, Caller::Runc, program)), 0);
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("{}{others}", ours()));
    }

    #[test]
    fn the_link_stays_for_others() {
        let temp = tempfile::tempdir().unwrap();
        let (root, program) = (temp.path(), Path::new("/usr/bin/fsnap"));
        let link = below(root, Path::new(HOOK));
        assert_eq!((all(install(root, Caller::Criu, program)), all(install(root, Caller::Runc, program))), (2, 1));
        assert_eq!(fs::read_link(&link).unwrap(), program);
        // A new fsnap in another place.
        assert_eq!(all(install(root, Caller::Criu, Path::new("/opt/fsnap"))), 1);
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/opt/fsnap"));
        assert_eq!(all(uninstall(root, Caller::Criu)), 1);
        assert!(fs::symlink_metadata(&link).is_ok() && !below(root, Caller::Criu.file()).exists());
        assert_eq!(all(uninstall(root, Caller::Runc)), 2);
        assert!(fs::symlink_metadata(&link).is_err());
    }
}
