//! Why a case failed.

use std::error::Error;
use std::fmt;

use fsnap_backend::ErrorKind;

/// A sentence that tells a developer what a backend did wrong.
///
/// Not a panic: the suite's own tests run every case on broken backends and expect it.
pub struct Failure(String);

/// The result of a case, and of its parts.
pub type Verdict<T = ()> = Result<T, Failure>;

impl Failure {
    /// Fails for the reason that `text` gives.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Says what was being done when it failed.
    pub fn during(self, what: impl fmt::Display) -> Self {
        Self(format!("{what}: {}", self.0))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Says what was being done when something failed.
pub trait During<T> {
    /// Puts `what` before the failure's text.
    fn during(self, what: impl fmt::Display) -> Verdict<T>;
}

impl<T, E: Into<Failure>> During<T> for Result<T, E> {
    fn during(self, what: impl fmt::Display) -> Verdict<T> {
        self.map_err(|failure| failure.into().during(what))
    }
}

/// Fails with a formatted sentence unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::failure::Failure::new(format!($($message)+)));
        }
    };
}
pub(crate) use ensure;

/// Requires that `result` is a failure of the given kind; `what` names the call.
pub(crate) fn refused<T: fmt::Debug>(what: &str, kind: ErrorKind, result: fsnap_backend::Result<T>) -> Verdict {
    match result {
        Err(error) if error.kind() == kind => Ok(()),
        Err(error) => {
            Err(Failure::new(format!("{what}: expected {kind:?}, but it failed with {:?}: {error}", error.kind())))
        }
        Ok(value) => Err(Failure::new(format!("{what}: expected {kind:?}, but it succeeded with {value:?}"))),
    }
}
