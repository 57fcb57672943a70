//! What users write for a checkpoint: an id, a prefix of one, a tag, `@latest`, or `X~N`.

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
