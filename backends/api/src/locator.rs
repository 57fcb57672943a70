//! Where an image lives, and what it is.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where an image lives in its store, in the backend's own words; opaque to all others.
///
/// 1 to 128 characters of `[A-Za-z0-9._:-]`, not beginning with a dot or a dash, so that a locator read from an untrusted record can never be a
/// path that leads anywhere.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Locator(String);

impl Locator {
    /// The locator's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Locator {
    type Err = InvalidLocator;

    fn from_str(text: &str) -> Result<Self, InvalidLocator> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for Locator {
    type Error = InvalidLocator;

    fn try_from(text: String) -> Result<Self, InvalidLocator> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        let starts_well = !text.starts_with(['.', '-']);
        if (1..=128).contains(&text.len()) && starts_well && text.bytes().all(allowed) {
            Ok(Self(text))
        } else {
            Err(InvalidLocator { text })
        }
    }
}

impl From<Locator> for String {
    fn from(locator: Locator) -> String {
        locator.0
    }
}

impl fmt::Display for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Locator({})", self.0)
    }
}

/// A text that no backend could have made as a locator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid locator {text:?}: 1 to 128 of [A-Za-z0-9._:-], not beginning with a dot or a dash")]
pub struct InvalidLocator {
    /// The refused text.
    pub text: String,
}

/// Names one store, volume or snapshot and no other, for as long as it exists.
///
/// Made of what the file system itself guarantees (a file-system UUID, a subvolume UUID, a device id), so that a tree
/// that was deleted and made again under the same path has another identity. Printable, compared as a whole.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(String);

impl Identity {
    /// Makes an identity of a backend's own words.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The identity's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may come from an untrusted record: never let it speak to a terminal.
        self.0.escape_debug().fmt(f)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locator_cannot_lead_anywhere() {
        for bad in ["", ".", "..", "a/b", "/etc", "-rf", "a\nb", "é", &"x".repeat(129)] {
            assert!(bad.parse::<Locator>().is_err(), "{bad:?} was accepted");
        }
        for good in ["7", "cp:42", "thin:3", "s-0b1c", &"x".repeat(128)] {
            assert_eq!(good.parse::<Locator>().map(String::from).as_deref(), Ok(good));
        }
    }
}
