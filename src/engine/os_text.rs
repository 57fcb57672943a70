//! Paths and arguments in JSON: text where they are text, else their bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum OsText {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<OsString> for OsText {
    fn from(value: OsString) -> Self {
        value.into_string().map_or_else(|value| Self::Bytes(value.into_vec()), Self::Text)
    }
}

impl From<OsText> for OsString {
    fn from(value: OsText) -> Self {
        match value {
            OsText::Text(text) => text.into(),
            OsText::Bytes(bytes) => Self::from_vec(bytes),
        }
    }
}

pub(crate) fn serialize<S: Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    OsText::from(path.as_os_str().to_owned()).serialize(serializer)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = OsString::from(OsText::deserialize(deserializer)?);
    // The kernel ends a path at a NUL, so one within it would name another file than the one that was checked.
    if path.as_bytes().contains(&0) {
        return Err(serde::de::Error::custom("a path with a NUL byte"));
    }
    Ok(path.into())
}

/// The same for a list of arguments.
pub(crate) mod list {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(list: &[OsString], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|item| OsText::from(item.clone())))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<OsString>, D::Error> {
        Ok(Vec::<OsText>::deserialize(deserializer)?.into_iter().map(OsString::from).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Holder(#[serde(with = "super")] PathBuf);

    #[test]
    fn any_path_survives_and_text_stays_readable() {
        for (bytes, json) in [(&b"/srv/db\n"[..], r#""/srv/db\n""#), (b"/a\xff", "[47,97,255]")] {
            let holder = Holder(OsString::from_vec(bytes.to_vec()).into());
            let written = serde_json::to_string(&holder).unwrap();
            assert_eq!(written, json);
            assert_eq!(serde_json::from_str::<Holder>(&written).unwrap().0.as_os_str().as_bytes(), bytes);
        }
    }

    #[test]
    fn a_path_that_the_kernel_would_cut_is_refused() {
        assert!(serde_json::from_str::<Holder>(r#""/srv\u0000/db""#).is_err());
        assert!(serde_json::from_str::<Holder>("[47,0]").is_err());
    }
}
