//! Names that users give to volumes, branches and tags.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a volume, a branch or a tag: 1 to 64 of `[A-Za-z0-9._-]`, not beginning with a dot or a dash.
///
/// Names become file names, command-line arguments and JSON, so that nothing in them may need quoting, hide a file
/// or lead out of a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Makes a name of any text, by replacing what a name may not hold; used for a volume named after its directory.
    pub fn derive_from(text: &str) -> Option<Self> {
        let kept: String = text.chars().map(|c| if allowed(c) { c } else { '-' }).take(64).collect();
        kept.trim_start_matches(['.', '-']).parse().ok()
    }
}

fn allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

impl FromStr for Name {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for Name {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        let good = (1..=64).contains(&text.len()) && text.chars().all(allowed) && !text.starts_with(['.', '-']);
        if good { Ok(Self(text)) } else { Err(InvalidName { text }) }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A text that cannot be a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash")]
pub struct InvalidName {
    /// The refused text.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_names() {
        for bad in ["", "..", ".a", "-a", "a/b", "a\nb", "\u{1b}[2J", "é", "a b", &"x".repeat(65)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "db.main", "A_b-9", &"x".repeat(64)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_directory_gives_a_name() {
        assert_eq!(Name::derive_from(".my data").unwrap().as_str(), "my-data");
        assert_eq!(Name::derive_from("..."), None);
    }
}
