//! The ways in which writers change files.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::chain::Chain;
use crate::log::Log;
use crate::names::Names;
use crate::replace::Replace;
use crate::slots::{Mapped, Slots};
use crate::{Fault, Stream};

/// A thread's part in memory, and the files that must agree with it.
pub(crate) trait Writer: Send {
    /// How many steps were made.
    fn done(&self) -> u64;

    /// Makes one step; compares everything that it overwrites just before.
    fn step(&mut self, pause: &mut dyn FnMut()) -> Result<(), Fault>;

    /// Compares all bytes of all files of this writer, read by path where there is one, with memory.
    fn check(&self) -> Result<(), Fault>;
}

/// One way to change files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Records appended to a log, which is truncated when it is long.
    Append,
    /// Records of an odd length overwritten in place.
    Overwrite,
    /// Words stored through a shared mapping whose file is no longer open.
    Mmap,
    /// A file written beside the old one and renamed over it.
    Rename,
    /// Two files: the second is written after the first, always.
    Order,
    /// Records here and there in a file of 4 GiB that is mostly holes.
    Sparse,
    /// Symbolic links made and removed in a directory.
    Names,
    /// Records in a file that has no name any more.
    Unlinked,
    /// One file per volume: each is written after the one in the volume before.
    Volumes,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Append,
        Self::Overwrite,
        Self::Mmap,
        Self::Rename,
        Self::Order,
        Self::Sparse,
        Self::Names,
        Self::Unlinked,
        Self::Volumes,
    ];

    /// The kinds of a run that does not choose: all but unlinked files, which need the engine's help.
    pub fn usual() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|&kind| kind != Self::Unlinked)
    }

    /// The name of this kind's writer in the volume `index`.
    pub fn writer_name(self, index: usize) -> String {
        match self {
            Self::Volumes => self.to_string(),
            _ => format!("{self}@{index}"),
        }
    }

    /// Makes the files of this kind's writer in the volume `dirs[index]`, and the writer.
    pub(crate) fn create(self, run: u64, index: usize, dirs: &[PathBuf]) -> Result<Box<dyn Writer>, Fault> {
        let stream = Stream::new(run, &self.writer_name(index));
        let dir = &dirs[index];
        Ok(match self {
            Self::Append => Box::new(Log::create(stream, dir.join("append"))?),
            Self::Overwrite => Box::new(Slots::create(stream, dir.join("overwrite"), Slots::OVERWRITE)?),
            Self::Mmap => Box::new(Slots::<Mapped>::create_mapped(stream, dir.join("mmap"), Slots::MMAP)?),
            Self::Rename => Box::new(Replace::create(stream, dir.join("rename"))?),
            Self::Order => Box::new(Chain::create(vec![dir.join("order-first"), dir.join("order-second")])?),
            Self::Sparse => Box::new(Slots::create(stream, dir.join("sparse"), Slots::SPARSE)?),
            Self::Names => Box::new(Names::create(stream, dir.join("names"))?),
            Self::Unlinked => Box::new(Slots::create_unlinked(stream, dir.join("unlinked"), Slots::OVERWRITE)?),
            Self::Volumes => Box::new(Chain::create(dirs.iter().map(|dir| dir.join("volumes")).collect())?),
        })
    }

    /// Finds out how many steps the writer had made when the files of the tree at `dirs[index]` were as they are.
    pub(crate) fn examine(self, run: u64, index: usize, dirs: &[PathBuf]) -> Result<u64, Fault> {
        let stream = Stream::new(run, &self.writer_name(index));
        let dir = &dirs[index];
        match self {
            Self::Append => Log::examine(stream, &dir.join("append")),
            Self::Overwrite => Slots::examine(stream, &dir.join("overwrite"), Slots::OVERWRITE),
            Self::Mmap => Slots::examine(stream, &dir.join("mmap"), Slots::MMAP),
            Self::Rename => Replace::examine(stream, &dir.join("rename")),
            Self::Order => Chain::examine(&[dir.join("order-first"), dir.join("order-second")]),
            Self::Sparse => Slots::examine(stream, &dir.join("sparse"), Slots::SPARSE),
            Self::Names => Names::examine(stream, &dir.join("names")),
            // Its file is in no tree.
            Self::Unlinked => Ok(0),
            Self::Volumes => Chain::examine(&dirs.iter().map(|dir| dir.join("volumes")).collect::<Vec<_>>()),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Append => "append",
            Self::Overwrite => "overwrite",
            Self::Mmap => "mmap",
            Self::Rename => "rename",
            Self::Order => "order",
            Self::Sparse => "sparse",
            Self::Names => "names",
            Self::Unlinked => "unlinked",
            Self::Volumes => "volumes",
        })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == text).ok_or_else(|| {
            let all: Vec<String> = Self::ALL.iter().map(Self::to_string).collect();
            format!("no such kind; there are {}", all.join(", "))
        })
    }
}
