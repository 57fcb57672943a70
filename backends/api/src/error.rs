//! What can go wrong in a backend, in terms that a caller can act on.

use std::io;
use std::path::{Path, PathBuf};

use crate::Identity;

/// The result of a backend's method.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a backend's method failed.
///
/// Callers choose what to do by [`Error::kind`]; the fields are for people.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No whole image at the locator, or no such path.
    #[error("{what} does not exist")]
    NotFound {
        /// The missing object.
        what: String,
    },
    /// The place is taken.
    #[error("{what} exists already")]
    Exists {
        /// What stands there.
        what: String,
    },
    /// Somebody still uses the image.
    #[error("{what} is in use: {by}")]
    Busy {
        /// The object that was to be changed.
        what: String,
        /// Who uses it.
        by: String,
    },
    /// The directory cannot be a volume of this store.
    #[error("{} cannot be a volume of {kind}: {reason}", dir.display())]
    NotAVolume {
        /// The directory.
        dir: PathBuf,
        /// The backend's name.
        kind: &'static str,
        /// Why not.
        reason: String,
    },
    /// The directory cannot be a store.
    #[error("{} cannot hold a {kind} store: {reason}", dir.display())]
    NotAStore {
        /// The directory.
        dir: PathBuf,
        /// The backend's name.
        kind: &'static str,
        /// Why not.
        reason: String,
    },
    /// The object is not the one that was recorded.
    #[error("{what} is not the recorded one: expected {expected}, found {found}")]
    WrongIdentity {
        /// The object.
        what: String,
        /// What was recorded.
        expected: Identity,
        /// What is there.
        found: Identity,
    },
    /// The store cannot do this at all.
    #[error("{kind} cannot {action}: {reason}")]
    Unsupported {
        /// The backend's name.
        kind: &'static str,
        /// What was asked.
        action: &'static str,
        /// Why it cannot.
        reason: String,
    },
    /// A file kept changing while it was read.
    #[error("{} kept changing while it was read: stop its writers, or let fsnap freeze them", path.display())]
    Changed {
        /// The file, below the volume's root.
        path: PathBuf,
    },
    /// The store holds something that it could not have written.
    #[error("{what} is damaged: {reason}")]
    Damaged {
        /// The damaged object.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store was written by a later release.
    #[error("{what} has format version {found}; this fsnap reads up to {supported}")]
    NewerVersion {
        /// The object with a version.
        what: String,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// A system call failed.
    #[error("cannot {action} {object}: {source}")]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        object: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A change failed, and so did undoing it.
    #[error("{cause}; and undoing it failed: {undo}")]
    NotUndone {
        /// The first failure.
        #[source]
        cause: Box<Error>,
        /// The failure of the undoing.
        undo: Box<Error>,
    },
}

/// What a caller can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such image or path.
    NotFound,
    /// The place is taken: reserve another.
    Exists,
    /// In use: try again when its user is gone.
    Busy,
    /// The directory cannot be a volume here: choose another backend or directory.
    NotAVolume,
    /// The directory cannot be a store.
    NotAStore,
    /// Not the object that was recorded.
    WrongIdentity,
    /// The store can never do this.
    Unsupported,
    /// Writers must be stopped first.
    Changed,
    /// The store is damaged.
    Damaged,
    /// A later release wrote this.
    NewerVersion,
    /// No room: nothing was left behind; free some and repeat.
    NoSpace,
    /// The store or volume is mounted read-only.
    ReadOnly,
    /// Missing privileges.
    Permission,
    /// Anything else the system said.
    Io,
}

impl Error {
    /// What a caller can act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Exists { .. } => ErrorKind::Exists,
            Self::Busy { .. } => ErrorKind::Busy,
            Self::NotAVolume { .. } => ErrorKind::NotAVolume,
            Self::NotAStore { .. } => ErrorKind::NotAStore,
            Self::WrongIdentity { .. } => ErrorKind::WrongIdentity,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Changed { .. } => ErrorKind::Changed,
            Self::Damaged { .. } => ErrorKind::Damaged,
            Self::NewerVersion { .. } => ErrorKind::NewerVersion,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
                io::ErrorKind::PermissionDenied => ErrorKind::Permission,
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            },
            Self::NotUndone { cause, .. } => cause.kind(),
        }
    }

    /// Adds the failure of the undoing, if any, to the failure that made it necessary.
    pub fn and_undo(self, undone: Result<()>) -> Self {
        match undone {
            Ok(()) => self,
            Err(undo) => Self::NotUndone { cause: Box::new(self), undo: Box::new(undo) },
        }
    }
}

/// Says what was tried, and on what, when a system call fails.
pub trait IoContext<T> {
    /// Turns the system's answer into an [`Error::Io`]; `action` is a verb, as in "cannot *open* /srv/db".
    fn context(self, action: &'static str, object: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, object: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            // A hostile name must not speak to the terminal on which the message is shown.
            object: object.as_ref().to_string_lossy().chars().flat_map(escape_controls).collect(),
            source: source.into(),
        })
    }
}

fn escape_controls(c: char) -> impl Iterator<Item = char> {
    let escape = c.is_control();
    c.escape_default().filter(move |_| escape).chain((!escape).then_some(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_error_keeps_its_kind_and_names_its_object() {
        let full: std::result::Result<(), _> = Err(io::Error::from_raw_os_error(28));
        let error = full.context("write", "/srv/a\nb").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(error.to_string().starts_with("cannot write /srv/a\\nb: "), "{error}");
    }

    #[test]
    fn both_errors_are_kept() {
        let cause = Error::NotFound { what: "a".into() };
        let undo = Err(Error::NotFound { what: "b".into() });
        let both = cause.and_undo(undo);
        assert_eq!(both.to_string(), "a does not exist; and undoing it failed: b does not exist");
        assert_eq!(both.kind(), ErrorKind::NotFound);
    }
}
