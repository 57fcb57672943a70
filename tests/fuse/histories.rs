//! Random histories of branches of `fsnap mount`, done to plain directories as well.
//!
//! A branch is changed, taken, branched again, mounted again, and its server killed. Every answer must be what the plain directory
//! answers, and after every step everything that users can see; at the end, every branch and every state that was taken.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use rustix::fs::OFlags;
use rustix::mount::MountFlags;

use crate::Case;
use crate::operations::{self, Operation, PATHS, errno, fill, open, operation};
use crate::past::{Past, until};
use crate::tree::{self, Tree};

pub(crate) const CASES: &[Case] = &[("over_btrfs", || histories("btrfs")), ("over_rsync", || histories("rsync"))];

const HISTORIES: u32 = 16;

#[derive(Debug, Clone)]
enum Step {
    Change(Operation),
    /// A file stays open from now on; what was open before is closed.
    Hold(usize),
    /// To the file that is open.
    WriteHeld(u32, u16, u8),
    /// A checkpoint of the branch.
    Take,
    /// A new branch from one of the checkpoints; the next steps are done to it.
    Grow(usize),
    /// The next steps are done to another branch.
    Turn(usize),
    /// One of the checkpoints is removed.
    Remove(usize),
    Remount,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    use Step::*;
    prop_oneof![
        40 => operation().prop_map(Change),
        3 => (0..PATHS.len()).prop_map(Hold),
        3 => (0..300_000_u32, 1..9000_u16, any::<u8>()).prop_map(|(o, l, b)| WriteHeld(o, l, b)),
        5 => Just(Take),
        3 => any::<usize>().prop_map(Grow),
        2 => any::<usize>().prop_map(Turn),
        2 => any::<usize>().prop_map(Remove),
        1 => Just(Remount),
        1 => Just(Kill),
    ]
}

/// A branch, and the plain directory that has lived the same.
struct Line {
    name: String,
    /// The checkpoint that it grew from.
    from: String,
    plain: PathBuf,
    /// The file that is open in the plain directory, and in the branch.
    held: Option<(File, File)>,
}

/// A checkpoint of a branch.
struct Taken {
    id: String,
    then: Tree,
    /// What a plain directory had then.
    copy: PathBuf,
}

/// A catalog with one checkpoint to grow branches from.
struct Ground {
    past: Past,
    base: String,
    made: u32,
}

impl Ground {
    fn new(backend: &str) -> Self {
        let past = Past::new();
        fill(&past.volume("db", backend));
        let base = past.checkpoint();
        // What is a device in the one must be none in the other, either.
        let plain = past.path("disk").join("plain");
        fs::create_dir(&plain).unwrap();
        rustix::mount::mount_bind(&plain, &plain).unwrap();
        rustix::mount::mount_remount(&plain, MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID, "").unwrap();
        past.mount();
        Self { past, base, made: 0 }
    }

    /// A new plain directory, with all that `original` has.
    fn copy(&mut self, original: &Path) -> PathBuf {
        self.made += 1;
        let copy = self.past.path("disk/plain").join(self.made.to_string());
        assert!(Command::new("cp").arg("-a").args([original, &copy]).status().unwrap().success());
        copy
    }

    fn grow(&mut self, from: &str, original: &Path) -> Line {
        let plain = self.copy(original);
        let name = format!("b{}", self.made);
        fs::create_dir(self.past.at(&format!("branches/{name}@{from}"))).unwrap();
        Line { name, from: from.to_owned(), plain, held: None }
    }

    fn dir(&self, line: &Line) -> PathBuf {
        self.past.at(&format!("branches/{}/db", line.name))
    }

    fn assert_same(&self, line: &Line, what: &str) {
        tree::assert_equal(&tree::of(&line.plain), &tree::of(&self.dir(line)), what);
        if let Some((expected, found)) = &line.held {
            let content = |file: &File| {
                let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                (bytes.len(), blake3::hash(&bytes))
            };
            assert_eq!(content(expected), content(found), "{what}: the open file");
        }
    }

    fn assert_as_then(&self, taken: &Taken, what: &str) {
        tree::assert_equal(&taken.then, &tree::of(&self.past.at(&format!("ids/{}/db", taken.id))), what);
    }

    /// Ends the server, one way or the other, and starts another one.
    fn restart(&self, lines: &mut [Line], end: impl FnOnce(&Past)) {
        let before: Vec<_> = lines.iter().map(|line| tree::numbers(&self.dir(line))).collect();
        lines.iter_mut().for_each(|line| line.held = None);
        end(&self.past);
        self.past.mount();
        for (line, before) in lines.iter().zip(before) {
            assert_eq!(before, tree::numbers(&self.dir(line)), "the inode numbers have changed");
        }
    }

    fn remove(&self, arguments: &[&str]) {
        // A program that another case starts has our descriptors for a moment.
        until("it is removed", || self.past.command().args(arguments).output().unwrap().status.success());
    }
}

fn history(ground: &mut Ground, steps: &[Step]) {
    let (base, volume) = (ground.base.clone(), ground.past.path("disk/db"));
    let mut lines = vec![ground.grow(&base, &volume)];
    let (mut at, mut taken) = (0, Vec::<Taken>::new());
    for step in steps {
        let line = &mut lines[at];
        let dir = ground.dir(line);
        match *step {
            Step::Change(ref operation) => {
                assert_eq!(operation.apply(&line.plain), operation.apply(&dir), "{operation:?}");
            }
            Step::Hold(path) => {
                line.held = None;
                let [plain, written] = [&line.plain, &dir].map(|root| open(&root.join(PATHS[path]), OFlags::RDWR));
                assert_eq!(plain.as_ref().err(), written.as_ref().err(), "{step:?}");
                line.held = plain.ok().zip(written.ok()).filter(|(plain, _)| plain.metadata().unwrap().is_file());
            }
            Step::WriteHeld(offset, length, byte) => {
                if let Some((plain, written)) = &line.held {
                    let write = |file: &File| file.write_all_at(&vec![byte; length.into()], offset.into());
                    assert_eq!(write(plain).map_err(errno), write(written).map_err(errno), "{step:?}");
                }
            }
            Step::Take => {
                let id = ground.past.fsnap(["checkpoint", "--branch", &line.name]);
                let then = tree::of(&line.plain);
                let copy = ground.copy(&line.plain);
                taken.push(Taken { id, then, copy });
                ground.assert_as_then(taken.last().unwrap(), "taken");
            }
            Step::Grow(which) if !taken.is_empty() => {
                let Taken { id, copy, .. } = &taken[which % taken.len()];
                lines.push(ground.grow(id, copy));
                at = lines.len() - 1;
            }
            Step::Turn(which) => at = which % lines.len(),
            Step::Remove(which) if !taken.is_empty() => {
                let which = which % taken.len();
                if !lines.iter().any(|line| line.from == taken[which].id) {
                    ground.remove(&["rm", &taken.remove(which).id]);
                }
            }
            Step::Grow(_) | Step::Remove(_) => {}
            Step::Remount => ground.restart(&mut lines, |past| drop(past.unmount())),
            Step::Kill => ground.restart(&mut lines, Past::kill),
        }
        ground.assert_same(&lines[at], &format!("{step:?}"));
    }
    ground.restart(&mut lines, |past| drop(past.unmount()));
    for line in &lines {
        ground.assert_same(line, &format!("{} at the end", line.name));
    }
    for (number, taken) in taken.iter().enumerate() {
        ground.assert_as_then(taken, &format!("checkpoint {number} at the end"));
    }
    for line in &lines {
        ground.remove(&["rm", "--branch", &line.name]);
    }
    for taken in taken {
        ground.remove(&["rm", &taken.id]);
    }
    assert_eq!(ground.past.fsnap(["recover"]), "nothing is half done");
    for dir in fs::read_dir(ground.past.path("disk/plain")).unwrap() {
        fs::remove_dir_all(dir.unwrap().path()).unwrap();
    }
}

fn histories(backend: &str) {
    let ground = RefCell::new(None);
    operations::run(HISTORIES, step(), |steps| {
        // What a history that failed has left is not used again.
        let mut mine = ground.take().unwrap_or_else(|| Ground::new(backend));
        history(&mut mine, steps);
        ground.replace(Some(mine));
    });
    if let Some(Ground { past, .. }) = ground.take() {
        past.unmount();
    }
}
