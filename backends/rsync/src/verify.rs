//! Reading all of a snapshot and naming what is damaged.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use fsnap_backend::{Content, Damage, Error, Result, Snapshot};

use crate::chunks::{self, Chunks};
use crate::content::{self, BUFFER};
use crate::manifest::{SUMS_MAGIC, Sum, Sums, Way, decode_sums};
use crate::patch::Patch;
use crate::record::{BatchId, Body, ContentRef, Form, RecordRef};
use crate::settle;
use crate::store::Inner;

/// Reads the whole snapshot; each damaged file is named once for every name that it has there.
pub(crate) fn verify(store: &Inner, snapshot: &Snapshot) -> Result<Vec<Damage>> {
    let manifest = match store.whole(snapshot) {
        Err(Error::Damaged { what, reason }) => return Ok(vec![whole(format!("{what}: {reason}"))]),
        manifest => manifest?,
    };
    let mut found = Vec::new();
    let files = collect(store, manifest.root, &mut found)?;
    let mut sums = HashMap::new();
    if manifest.unsettled.is_some() {
        // Its sums are not computed yet; the table has those that are known.
        match settle::sums_of(store, &manifest) {
            Ok(of_new) => drop(sums.insert(manifest.batch, Some(of_new))),
            Err(error) => {
                sums.insert(manifest.batch, None);
                found.push(whole(reason_of(error)?));
            }
        }
    }
    for batch in files.keys().map(|content| content.batch) {
        if let Entry::Vacant(entry) = sums.entry(batch) {
            match read_sums(store, batch) {
                Ok(read) => drop(entry.insert(Some(read))),
                Err(error) => {
                    entry.insert(None);
                    found.push(whole(reason_of(error)?));
                }
            }
        }
    }
    let work: Vec<_> = files.iter().collect();
    let next = AtomicUsize::new(0);
    let damaged = Mutex::new(Vec::new());
    let check_all = || -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        while let Some((content, users)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let Some(Some(sums)) = sums.get(&content.batch) else { continue };
            if let Some(what) = check(store, content, users.length, sums.get(&content.number), &mut buffer)? {
                let mut damaged = damaged.lock().unwrap_or_else(PoisonError::into_inner);
                damaged.extend(users.paths.iter().map(|path| Damage { path: path.clone(), what: what.clone() }));
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(check_all);
        let done = check_all();
        other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(done)
    })?;
    found.extend(damaged.into_inner().unwrap_or_else(PoisonError::into_inner));
    found.sort_by(|one, other| one.path.as_bytes().cmp(other.path.as_bytes()));
    Ok(found)
}

/// What uses one content.
struct Users {
    length: u64,
    paths: Vec<OsString>,
}

/// All contents of a tree; directories whose records are damaged are named in `found`.
fn collect(store: &Inner, root: RecordRef, found: &mut Vec<Damage>) -> Result<BTreeMap<ContentRef, Users>> {
    let mut files: BTreeMap<ContentRef, Users> = BTreeMap::new();
    let mut waiting = vec![(root, PathBuf::new())];
    while let Some((at, path)) = waiting.pop() {
        let record = match store.record(&at) {
            Ok(record) => record,
            Err(error) => {
                found.push(Damage { path: path.into(), what: format!("the directory: {}", reason_of(error)?) });
                continue;
            }
        };
        for item in record.items {
            let path = path.join(&item.name);
            match item.body {
                Body::Dir(below) => waiting.push((below, path)),
                Body::File(Some(content)) => {
                    let users = files.entry(content).or_insert(Users { length: item.meta.size, paths: Vec::new() });
                    users.paths.push(path.into());
                }
                _ => {}
            }
        }
    }
    Ok(files)
}

fn check(
    store: &Inner,
    content: &ContentRef,
    length: u64,
    sum: Option<&Sum>,
    buffer: &mut [u8],
) -> Result<Option<String>> {
    let Some(sum) = sum.filter(|sum| sum.length == length) else {
        return Ok(Some("its content has no sum, or one of another length".into()));
    };
    let opened = match content::open(store, content, length) {
        Ok(opened) => opened,
        Err(error) => return reason_of(error).map(Some),
    };
    Ok(match sum_in_its_way(&*opened, sum.way, buffer) {
        Ok((hash, _)) if hash == sum.hash => None,
        Ok(_) if content.form == Form::Patch => Some(blame(store, content, buffer)?),
        Ok((_, found)) => Some(match found.and_then(|found| first_damage(store, content, sum, &found)) {
            Some(range) => format!("{CHANGED}, first in the bytes {} to {}", range.start, range.end - 1),
            None => CHANGED.into(),
        }),
        // A medium that cannot read it has damaged it.
        Err(error) => Some(format!("its content cannot be read: {error}")),
    })
}

/// The sum of a content, computed as the known one was.
fn sum_in_its_way(content: &dyn Content, way: Way, buffer: &mut [u8]) -> io::Result<([u8; 32], Option<Chunks>)> {
    match way {
        Way::AtOnce => Ok((content::sum(content, buffer)?, None)),
        Way::InChunks => chunks::sum(content, buffer).map(|chunks| (chunks.total(), Some(chunks))),
    }
}

/// Where a content that was summed in chunks is damaged, if the sums of its chunks are still what they were.
fn first_damage(store: &Inner, content: &ContentRef, sum: &Sum, found: &Chunks) -> Option<Range<u64>> {
    let known = Chunks::read(store, content).filter(|known| known.total() == sum.hash)?;
    known.first_difference(found)
}

const CHANGED: &str = "its content changed below fsnap: the sum is wrong";

/// Which of the files that a damaged patch leads to is damaged.
fn blame(store: &Inner, content: &ContentRef, buffer: &mut [u8]) -> Result<String> {
    let patch = Patch::open(store, content)?;
    let mut damaged = Vec::new();
    for file in std::iter::once(content).chain(&patch.index.sources) {
        let intact = match file.form {
            Form::Patch => Patch::open_alone(store, file).and_then(|patch| patch.has_its_data(buffer)),
            Form::Whole => read_sums(store, file.batch).and_then(|sums| {
                let Some(sum) = sums.get(&file.number) else { return Ok(true) };
                let opened = content::open(store, file, sum.length)?;
                Ok(sum_in_its_way(&*opened, sum.way, buffer).is_ok_and(|(hash, _)| hash == sum.hash))
            }),
        };
        if !intact.unwrap_or(false) {
            damaged.push(store.content_path(file).display().to_string());
        }
    }
    Ok(match &*damaged {
        [] => CHANGED.to_owned(),
        damaged => format!("its content is kept in parts, and these changed below fsnap: {}", damaged.join(", ")),
    })
}

fn read_sums(store: &Inner, batch: BatchId) -> Result<Sums> {
    let path = store.batch_dir(batch).join("sums");
    let missing = || Error::Damaged { what: path.display().to_string(), reason: "it is missing".into() };
    store.read_frame(&path, SUMS_MAGIC, decode_sums)?.ok_or_else(missing)
}

fn whole(what: String) -> Damage {
    Damage { path: OsString::new(), what }
}

/// The text of an error that means damage; other errors say nothing about the snapshot.
fn reason_of(error: Error) -> Result<String> {
    match error {
        Error::Damaged { .. } => Ok(error.to_string()),
        error => Err(error),
    }
}
