//! What changes in the tree, from round to round.

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::measure::{Failure, time};
use crate::tree::{PER_DIRECTORY, Tree, noise};

/// The piece in which the large file changes.
const PIECE: usize = 64 << 10;

/// One file in so many changes, which is one of each directory, and one piece in so many of the large file.
const PART: usize = PER_DIRECTORY;

/// A tree that changes.
pub struct Changing<'a> {
    tree: &'a Tree,
    round: Cell<usize>,
}

impl<'a> Changing<'a> {
    pub fn new(tree: &'a Tree) -> Self {
        Self { tree, round: Cell::new(0) }
    }

    /// The files that change in this round: one of each directory.
    fn changing(&self) -> impl Iterator<Item = usize> {
        (self.round.get() % PART..self.tree.files()).step_by(PART)
    }

    /// Where the large file changes in this round.
    fn pieces(&self) -> impl Iterator<Item = u64> {
        let piece = PIECE as u64;
        let first = (self.round.get() % PART) as u64 * piece;
        (first..self.tree.large() - piece).step_by(PIECE * PART)
    }

    /// Changes a hundredth of everything, and writes it out.
    pub fn change(&self) -> Result<(), Failure> {
        let round = self.round.get() + 1;
        self.round.set(round);
        self.changing().try_for_each(|number| self.tree.write_small(number, round))?;
        let large = File::options().write(true).open(self.tree.volume().join("large"))?;
        for at in self.pieces() {
            large.write_all_at(&noise(at + round as u64, PIECE), at)?;
        }
        self.tree.flush()
    }

    /// The least that anybody has to do: reads what changed and writes it elsewhere.
    pub fn copy_what_changed(&self) -> Result<Duration, Failure> {
        let to = self.tree.beside("changed");
        fs::create_dir(&to)?;
        let taken = time(|| {
            for number in self.changing() {
                fs::write(to.join(number.to_string()), fs::read(self.tree.small(number))?)?;
            }
            let (from, to) = (File::open(self.tree.volume().join("large"))?, File::create(to.join("large"))?);
            let mut buffer = vec![0; PIECE];
            for at in self.pieces() {
                from.read_exact_at(&mut buffer, at)?;
                to.write_all_at(&buffer, at)?;
            }
            rustix::fs::syncfs(&to)?;
            Ok(())
        })?;
        fs::remove_dir_all(to)?;
        self.tree.flush()?;
        Ok(taken)
    }
}
