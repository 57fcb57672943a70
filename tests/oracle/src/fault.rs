//! A difference between memory and a file.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One difference between what a file must hold and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}: at byte {offset}: expected {expected}, found {found}", file.display())]
pub struct Fault {
    /// The file, as the writer names it.
    pub file: PathBuf,
    /// Where in the file the first difference is.
    pub offset: u64,
    /// What memory says.
    pub expected: String,
    /// What the file says.
    pub found: String,
}

/// How many bytes of each side a fault shows.
const SHOWN: usize = 16;

impl Fault {
    pub(crate) fn new(file: &Path, offset: u64, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { file: file.to_owned(), offset, expected: expected.into(), found: found.into() }
    }

    /// A system call on `file` that must succeed did not.
    pub(crate) fn call(file: &Path, call: &str, error: impl Into<io::Error>) -> Self {
        Self::new(file, 0, format!("{call} to succeed"), error.into().to_string())
    }
}

/// Compares bytes at `offset` of `file`; the fault names `what` they should have been.
pub(crate) fn compare(file: &Path, offset: u64, what: &str, expected: &[u8], found: &[u8]) -> Result<(), Fault> {
    if expected == found {
        return Ok(());
    }
    let same = expected.iter().zip(found).take_while(|(a, b)| a == b).count();
    Err(Fault::new(file, offset + same as u64, format!("{what}: {}", shown(expected, same)), shown(found, same)))
}

fn shown(bytes: &[u8], from: usize) -> String {
    let rest = &bytes[from..];
    let mut text = String::new();
    for byte in rest.iter().take(SHOWN) {
        let _ = write!(text, "{byte:02x}");
    }
    match rest.len() {
        0 => "the end".to_owned(),
        len if len > SHOWN => format!("{text}… ({len} bytes)"),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_named() {
        let fault = compare(Path::new("f"), 100, "step 3", b"abcd", b"abXd").unwrap_err();
        assert_eq!(fault.to_string(), "f: at byte 102: expected step 3: 6364, found 5864");
        let fault = compare(Path::new("f"), 0, "step 3", b"ab", b"a").unwrap_err();
        assert_eq!(fault.to_string(), "f: at byte 1: expected step 3: 62, found the end");
    }
}
