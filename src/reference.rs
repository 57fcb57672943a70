//! What users write for a checkpoint: an id, a prefix of one, a tag, `@latest`, or `X~N`; and for a past state that none is of,
//! `VOLUME@TIME` or `VOLUME@cp:N`.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use crate::catalog::Catalog;
use crate::checkpoint::{Checkpoint, CheckpointId};
use crate::name::Name;
use crate::{Error, Result};

/// Shorter prefixes are refused: they would soon be ambiguous, and a typing error would hit something.
const SHORTEST_PREFIX: usize = 4;

/// Finds the checkpoint that `reference` means.
///
/// A tag goes before an id's prefix of the same digits. Unknown and ambiguous references are errors that name what
/// may have been meant.
pub fn resolve(catalog: &Catalog, reference: &str) -> Result<Checkpoint> {
    let Some((base, steps)) = split_steps(reference)? else { return resolve_base(catalog, reference) };
    let from = resolve_base(catalog, base)?;
    let mut at = from.clone();
    for depth in 0..steps {
        let Some(parent) = at.parent else {
            return Err(Error::TooFarBack { reference: reference.to_owned(), id: from.id, depth });
        };
        at = catalog.checkpoint(&parent)?.ok_or_else(|| unknown(&parent.to_string(), Vec::new()))?;
    }
    Ok(at)
}

/// A past state of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Past {
    /// As of that time.
    Time(Timestamp),
    /// By the number that its file system gave it.
    Number(u64),
}

impl fmt::Display for Past {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) => write!(f, "at or before {time}"),
            Self::Number(number) => write!(f, "cp:{number}"),
        }
    }
}

/// Takes `VOLUME@TIME` or `VOLUME@cp:N` apart; `None` if it is neither.
///
/// A time is RFC 3339, or a date and a time of day, to be understood in `zone`. That is asked for only then: to find the system's
/// time zone takes a hundred system calls.
pub fn past(reference: &str, zone: impl FnOnce() -> TimeZone) -> Result<Option<(&str, Past)>> {
    let Some((volume, past)) = reference.rsplit_once('@').filter(|(volume, _)| !volume.is_empty()) else {
        return Ok(None);
    };
    let bad = |reason| Error::BadReference { reference: reference.to_owned(), reason };
    if let Some(number) = past.strip_prefix("cp:") {
        let number = number.parse().map_err(|_| bad("a number belongs after cp:"))?;
        return Ok(Some((volume, Past::Number(number))));
    }
    if let Ok(time) = past.parse::<Timestamp>() {
        return Ok(Some((volume, Past::Time(time))));
    }
    let local = past.parse::<DateTime>().ok().and_then(|local| zone().to_timestamp(local).ok());
    let time = local.ok_or_else(|| bad("a time such as 2026-03-01 12:30, or cp: and a number, belongs after the @"))?;
    Ok(Some((volume, Past::Time(time))))
}

/// Splits `X~N` (or `X~`, which is `X~1`); `None` if there is no `~`.
fn split_steps(reference: &str) -> Result<Option<(&str, usize)>> {
    let Some((base, steps)) = reference.rsplit_once('~') else { return Ok(None) };
    let steps = if steps.is_empty() { Ok(1) } else { steps.parse() };
    let bad = |_| Error::BadReference { reference: reference.to_owned(), reason: "a number belongs after the ~" };
    Ok(Some((base, steps.map_err(bad)?)))
}

fn resolve_base(catalog: &Catalog, reference: &str) -> Result<Checkpoint> {
    if let Some(symbol) = reference.strip_prefix('@') {
        return match symbol {
            "latest" => catalog.latest()?.ok_or_else(|| unknown(reference, Vec::new())),
            _ => {
                Err(Error::BadReference { reference: reference.to_owned(), reason: "of the @ names there is @latest" })
            }
        };
    }
    if let Ok(tag) = reference.parse::<Name>()
        && let Some(id) = catalog.tagged(&tag)?
    {
        return by_id(catalog, &id);
    }
    let prefix = reference.to_ascii_lowercase();
    if prefix.is_empty() || prefix.len() > 32 || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(unknown(reference, near(catalog)?));
    }
    if prefix.len() < SHORTEST_PREFIX {
        return Err(Error::BadReference {
            reference: reference.to_owned(),
            reason: "no tag has this name, and a prefix of an id has at least 4 digits",
        });
    }
    let found = catalog.ids_with_prefix(&prefix, 8)?;
    match found.as_slice() {
        [] => Err(unknown(reference, near(catalog)?)),
        [id] => by_id(catalog, id),
        several => Err(Error::Ambiguous {
            reference: reference.to_owned(),
            candidates: several.iter().map(ToString::to_string).collect(),
        }),
    }
}

/// Reads a whole id that a record names.
pub(crate) fn parse_id(text: &str) -> Result<CheckpointId> {
    text.parse().map_err(|_| unknown(text, Vec::new()))
}

fn by_id(catalog: &Catalog, id: &CheckpointId) -> Result<Checkpoint> {
    catalog.checkpoint(id)?.ok_or_else(|| unknown(&id.to_string(), Vec::new()))
}

fn unknown(reference: &str, near: Vec<String>) -> Error {
    Error::NoSuchCheckpoint { reference: reference.to_owned(), near }
}

/// The names of all tags, sorted.
pub fn tag_names(catalog: &Catalog) -> Result<Vec<String>> {
    let mut names: Vec<String> = catalog.tags()?.into_values().flatten().map(String::from).collect();
    names.sort();
    Ok(names)
}

/// The newest checkpoint and the tags: one of them may have been meant.
fn near(catalog: &Catalog) -> Result<Vec<String>> {
    let mut near = tag_names(catalog)?;
    near.truncate(8);
    near.extend(catalog.latest()?.map(|latest| format!("{} (@latest)", latest.id.short())));
    Ok(near)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_understood_where_they_are_written() {
        let zone = || TimeZone::fixed(jiff::tz::offset(2));
        let time = |text: &str| match past(text, zone).unwrap() {
            Some(("db", Past::Time(time))) => time.to_string(),
            other => panic!("{text:?} is {other:?}"),
        };
        assert_eq!(time("db@2026-03-01T12:30:00Z"), "2026-03-01T12:30:00Z");
        assert_eq!(time("db@2026-03-01T12:30:00+01:00"), "2026-03-01T11:30:00Z");
        assert_eq!(time("db@2026-03-01 12:30"), "2026-03-01T10:30:00Z");
        assert_eq!(time("db@2026-03-01 12:30:15"), "2026-03-01T10:30:15Z");
        assert_eq!(time("db@1969-12-31 12:30"), "1969-12-31T10:30:00Z");
        assert_eq!(past("db@cp:7", zone).unwrap(), Some(("db", Past::Number(7))));
        assert_eq!(past("/srv/a@b@cp:7", zone).unwrap(), Some(("/srv/a@b", Past::Number(7))));
        for other in ["@latest", "0123abcd", "tag~2", "@"] {
            let unasked = || panic!("{other:?} has no time in it");
            assert_eq!(past(other, unasked).unwrap(), None, "{other:?} was taken for a past state");
        }
        for bad in ["db@", "db@cp:", "db@cp:-1", "db@cp:x", "db@noon", "db@2026-02-30 12:00", "db@12:30"] {
            assert!(past(bad, zone).is_err(), "{bad:?} was taken");
        }
    }
}
