//! From errors to numbers: the one table.

use fsnap_backend::ErrorKind;
use rusqlite::ErrorCode::CannotOpen;
use rustix::io::Errno;

use crate::{Error, catalog};

/// The number that says most of what the error says.
pub(in crate::fuse) fn of(error: &Error) -> Errno {
    if let Some(error) = error.backend() {
        return backend(error);
    }
    match error {
        Error::Catalog(error) => catalog(error),
        Error::Fuse(error) => served(error),
        Error::NameTaken { .. } => Errno::EXIST,
        Error::InvalidName(_) | Error::BadReference { .. } | Error::Ambiguous { .. } => Errno::INVAL,
        Error::Needed { .. } | Error::BranchInUse { .. } | Error::MountedInBranch { .. } => Errno::BUSY,
        Error::Mount(crate::mount::Error::Io { source, .. }) | Error::Io { source, .. } => system(source),
        Error::NoSuchCheckpoint { .. }
        | Error::TooFarBack { .. }
        | Error::NoSuchBranch { .. }
        | Error::NoSuchVolume { .. } => Errno::NOENT,
        _ => Errno::IO,
    }
}

fn served(error: &crate::fuse::session::Error) -> Errno {
    use crate::fuse::{overlay, session};
    match error {
        session::Error::Overlay(overlay::Error::Locked { .. }) => Errno::BUSY,
        session::Error::Overlay(overlay::Error::Io { source, .. }) | session::Error::Io { source, .. } => {
            system(source)
        }
        session::Error::Mount(crate::mount::Error::Io { source, .. }) => system(source),
        _ => Errno::IO,
    }
}

fn system(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn backend(error: &fsnap_backend::Error) -> Errno {
    use fsnap_backend::Error as Backend;
    match error {
        Backend::Io { source, .. } => system(source),
        Backend::NotUndone { cause, .. } => backend(cause),
        _ => match error.kind() {
            ErrorKind::NotFound => Errno::NOENT,
            ErrorKind::Busy => Errno::BUSY,
            ErrorKind::WrongIdentity => Errno::STALE,
            ErrorKind::Unsupported => Errno::OPNOTSUPP,
            ErrorKind::Damaged => Errno::UCLEAN,
            ErrorKind::NoSpace => Errno::NOSPC,
            ErrorKind::ReadOnly => Errno::ROFS,
            ErrorKind::Permission => Errno::ACCESS,
            _ => Errno::IO,
        },
    }
}

fn catalog(error: &catalog::Error) -> Errno {
    match error {
        catalog::Error::Locked { .. } | catalog::Error::Searching { .. } => Errno::BUSY,
        catalog::Error::Damaged { .. } => Errno::UCLEAN,
        catalog::Error::Missing { .. } => Errno::NOENT,
        catalog::Error::Full { .. } => Errno::NOSPC,
        catalog::Error::Io { source, .. } => system(source),
        // SQLite does not say why it cannot open a file. It has up to three, and to close another one of them would take its locks away.
        catalog::Error::Database { source, .. } if source.sqlite_error_code() == Some(CannotOpen) => {
            let others = (0..3).map(|_| std::fs::File::open("/")).collect::<std::io::Result<Vec<_>>>();
            others.err().map_or(Errno::IO, |error| system(&error))
        }
        _ => Errno::IO,
    }
}
