//! What the rsync backend costs, beside a bare walk and the programs that people use today, in one run.
//!
//! `cargo bench --bench rsync` makes a tree of small files and one large file on a loop-mounted btrfs, changes one file in
//! a hundred and a hundredth of the large one before each round, and lets everybody take it in turns. Only ratios mean
//! anything. Before fsnap's turn lies a pause: what changed in the second before `prime` is looked at once more in the frozen part,
//! because a file's times do not tell yet whether it is still being written; nothing is measured of that here. Requires root, btrfs, rsync and restic. `FSNAP_BENCH_FILES` says how many files there are (100,000);
//! the large file shrinks with it.

#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr, reason = "a program")]

#[path = "rsync/changing.rs"]
mod changing;
mod measure;
mod tree;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use changing::Changing;
use fsnap_backend::{Backend, Locator, Source, Volume};
use fsnap_rsync::Store;
use measure::{Failure, head, in_turns, ms, ratio, row, run, time};
use tree::Tree;

/// How often each contender is measured.
const ROUNDS: usize = 3;

/// A file that was not written to for so long is not looked at twice.
const SETTLED: Duration = Duration::from_millis(1_100);

/// The backend under test: a store, its volume, and the snapshot that is being taken.
struct Ours {
    store: Store,
    volume: Volume,
    at: Locator,
    spent: Duration,
}

impl Ours {
    fn new(tree: &Tree) -> Result<Self, Failure> {
        let store = Store::create(&tree.beside("store"))?;
        let volume = store.adopt(&tree.volume())?;
        let at = store.reserve(Source::Volume(&volume), &BTreeSet::new())?;
        Ok(Self { store, volume, at, spent: Duration::ZERO })
    }

    fn prime(&mut self) -> Result<Duration, Failure> {
        self.at = self.store.reserve(Source::Volume(&self.volume), &BTreeSet::new())?;
        self.spent = time(|| Ok(self.store.prime(&self.volume, &self.at)?))?;
        Ok(self.spent)
    }

    fn snapshot(&mut self) -> Result<Duration, Failure> {
        let taken = time(|| {
            self.store.snapshot(&self.volume, &self.at)?;
            Ok(())
        })?;
        self.spent += taken;
        Ok(taken)
    }

    fn settle(&mut self) -> Result<Duration, Failure> {
        let taken = time(|| {
            self.store.settle(&self.at)?;
            Ok(())
        })?;
        self.spent += taken;
        Ok(taken)
    }
}

/// A program that keeps a copy of each round, and shares with the one before.
struct Copies<'a> {
    tree: &'a Tree,
    name: &'static str,
    round: Cell<usize>,
}

impl<'a> Copies<'a> {
    fn new(tree: &'a Tree, name: &'static str) -> Result<Self, Failure> {
        fs::create_dir(tree.beside(name))?;
        Ok(Self { tree, name, round: Cell::new(0) })
    }

    /// `command` makes the second directory; the first is the copy of the round before.
    fn take(&self, command: impl FnOnce(&Path, &Path) -> Command) -> Result<Duration, Failure> {
        self.tree.flush()?;
        let round = self.round.replace(self.round.get() + 1);
        let copy = |round: usize| self.tree.beside(self.name).join(round.to_string());
        let (before, now) = (copy(round.wrapping_sub(1)), copy(round));
        let taken = time(|| run(&mut command(&before, &now)))?;
        if before.exists() {
            fs::remove_dir_all(before)?;
        }
        Ok(taken)
    }
}

fn restic(tree: &Tree) -> Command {
    let mut command = Command::new("restic");
    command.env("RESTIC_PASSWORD", "x").arg("--quiet").arg("--repo").arg(tree.beside("restic"));
    command.arg("--cache-dir").arg(tree.beside("restic-cache"));
    command
}

fn bench() -> Result<(), Failure> {
    let tree = Tree::new()?;
    let (volume, changing) = (tree.volume(), Changing::new(&tree));
    let mut ours = Ours::new(&tree)?;
    let first = ours.prime()? + ours.snapshot()? + ours.settle()?;
    let inodes = tree::walk(&tree.beside("store"))?;
    changing.change()?;
    ours.prime()?;
    ours.snapshot()?;
    ours.settle()?;
    let more = tree::walk(&tree.beside("store"))? - inodes;

    let (linked, cloned) = (Copies::new(&tree, "rsync")?, Copies::new(&tree, "cp")?);
    run(restic(&tree).arg("init"))?;
    let ours = std::cell::RefCell::new(ours);
    let [walk, bytes, prime, frozen, settle, whole, rsync, cp, restic] = in_turns(
        ROUNDS,
        [
            &mut || {
                changing.change()?;
                time(|| {
                    assert!(tree::walk(&volume)? > tree.files());
                    Ok(())
                })
            },
            &mut || changing.copy_what_changed(),
            &mut || {
                std::thread::sleep(SETTLED);
                ours.borrow_mut().prime()
            },
            &mut || ours.borrow_mut().snapshot(),
            &mut || ours.borrow_mut().settle(),
            &mut || Ok(ours.borrow().spent),
            &mut || {
                linked.take(|before, now| {
                    let mut command = Command::new("rsync");
                    command.arg("-a").arg("--link-dest").arg(before).arg(volume.join(".")).arg(now);
                    command.stderr(Stdio::null());
                    command
                })
            },
            &mut || {
                cloned.take(|_, now| {
                    let mut command = Command::new("cp");
                    command.args(["-a", "--reflink=auto"]).arg(&volume).arg(now);
                    command
                })
            },
            &mut || {
                tree.flush()?;
                time(|| run(restic(&tree).arg("backup").arg(&volume)))
            },
        ],
    )?;

    let title = format!("{} files and {} MiB in one, 1 % changed", tree.files(), tree.large() >> 20);
    head(&title, &["", "time", "x walk"]);
    for (name, taken) in [
        ("statx walk, 1 thread", walk),
        ("copying the changed bytes", bytes),
        ("fsnap, first snapshot", first),
        ("fsnap, second snapshot", whole),
        ("  prime", prime),
        ("  snapshot: the frozen part", frozen),
        ("  settle", settle),
        ("rsync -a --link-dest", rsync),
        ("cp -a --reflink=auto", cp),
        ("restic backup", restic),
    ] {
        row(&[name, &ms(taken), &ratio(taken, walk)]);
    }
    head("goals", &["", "ratio", "goal", ""]);
    for (name, taken, of, goal) in [
        ("second / (3 walks + changed bytes)", whole, 3 * walk + bytes, 1.0),
        ("frozen part / walk", frozen, walk, 1.5),
        ("second / rsync --link-dest", whole, rsync, 0.10),
        ("second / restic", whole, restic, 0.12),
        ("second / cp --reflink", whole, cp, 0.15),
    ] {
        let met = taken.as_secs_f64() <= goal * of.as_secs_f64();
        row(&[name, &ratio(taken, of), &format!("{goal:.2} x"), if met { "met" } else { "missed" }]);
    }
    // A batch has a directory, records, a table and sums, one directory for each 256 contents, and its manifest.
    let changed = tree.files() / 100 + 1;
    let goal = changed + changed / 100 + 16;
    let met = if more <= goal { "met" } else { "missed" };
    row(&["inodes that a second snapshot adds", &more.to_string(), &format!("{goal}"), met]);
    row(&["inodes of the first", &inodes.to_string()]);
    Ok(())
}

fn main() -> ExitCode {
    // `cargo test --benches` runs it too, and asks only whether it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return ExitCode::SUCCESS;
    }
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark could not run: {error}");
            ExitCode::FAILURE
        }
    }
}
