//! What can go wrong, beside a test that fails.

use std::io;
use std::path::{Path, PathBuf};

/// Why a machine did not run what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The system refused something.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A part of this computer is missing.
    #[error("{what} is missing: run tests/support/setup.sh as root, which gets it from Debian's package {package}")]
    Missing {
        /// The part.
        what: String,
        /// The package that has it.
        package: &'static str,
    },
    /// Another program failed.
    #[error("`{command}` failed: {said}")]
    Command {
        /// The program and its arguments.
        command: String,
        /// What it said, or how it ended.
        said: String,
    },
    /// Nothing is to be run.
    #[error("no suite has a name that contains one of {only:?}; there are: {}", there.join(", "))]
    NoSuite {
        /// What was asked for.
        only: Vec<String>,
        /// The names of all.
        there: Vec<String>,
    },
    /// A signal asked the runner to end.
    #[error("interrupted")]
    Interrupted,
}

/// The result of most functions here.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Names the object of a failed system call.
pub(crate) trait Context<T> {
    /// Says what was tried, and with which file.
    fn during(self, what: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn during(self, what: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|error| Error::Io { what, path: path.as_ref().to_owned(), source: error.into() })
    }
}
