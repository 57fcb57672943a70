//! Making a snapshot durable, and telling whether one that was cut short is whole.
//!
//! `snapshot` writes its manifest last, so where processes die the manifest's presence is enough. A power cut may leave
//! the manifest and lose what it names. Therefore an unsettled manifest names the start of the system that wrote it; under
//! another, everything that the snapshot added is read and checked before it counts as whole.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use fsnap_backend::{Error, IoContext, Locator, Result, Snapshot};

use crate::chunks::{self, Chunks};
use crate::content::{self, BUFFER, contents_of};
use crate::format::{self, Reader};
use crate::lock::Lock;
use crate::manifest::{Known, Made, Manifest, SUMS_MAGIC, Sum, Sums, Unsettled, Way, encode_sums};
use crate::patch::Index;
use crate::record::{BatchId, Body, ContentRef, Form, RecordRef};
use crate::snapshot::{boot_id, snapshot_of};
use crate::store::{Inner, is_snapshot, no_image, read_file, remove_file, remove_unfinished, write_file};

/// Makes the snapshot at `at` durable, if it is whole.
pub(crate) fn settle(store: &Inner, at: &Locator) -> Result<Snapshot> {
    if !is_snapshot(at) {
        return Err(no_image(at));
    }
    let manifest = || match store.manifest(at) {
        Err(Error::Damaged { .. }) => Err(no_image(at)),
        manifest => manifest?.ok_or_else(|| no_image(at)),
    };
    let found = manifest()?;
    if found.unsettled.is_none() {
        return Ok(snapshot_of(at, &found));
    }
    // A removal meanwhile is told that the snapshot is busy; a second call waits for the first.
    let path = store.manifest_path(at);
    let _held = Lock::try_shared(&path, || format!("the snapshot {at}"), "it is being removed")?;
    let _batch = store.wait_for_batch(found.batch)?;
    let manifest = manifest()?;
    match &manifest.unsettled {
        None => Ok(snapshot_of(at, &manifest)),
        Some(unsettled) => {
            let keep = |content: &ContentRef, chunks: &Chunks| chunks.write(store, content);
            let (sums, needed) = match new_sums(store, &manifest, unsettled, &keep) {
                Err(Error::Damaged { .. }) => return Err(no_image(at)),
                new => new?,
            };
            make_durable(store, at, manifest, &sums, &needed)
        }
    }
}

/// Whether what an unsettled manifest names can be there without looking.
pub(crate) fn is_of_this_boot(unsettled: &Unsettled) -> bool {
    boot_id() == Some(unsettled.boot)
}

fn make_durable(
    store: &Inner,
    at: &Locator,
    mut manifest: Manifest,
    sums: &Sums,
    needed: &BTreeSet<ContentRef>,
) -> Result<Snapshot> {
    let dir = store.batch_dir(manifest.batch);
    drop_superseded(store, manifest.batch, sums, needed)?;
    write_file(&dir.join("sums"), &format::seal(SUMS_MAGIC, encode_sums(sums)), false)?;
    remove_unfinished(store, at)?;
    // One flush of the file system instead of one for each content, and only then the manifest that relies on it.
    store.sync()?;
    manifest.unsettled = None;
    write_file(&store.manifest_path(at), &format::seal(Manifest::MAGIC, manifest.encode()), true)?;
    remove_file(&dir.join("table"))?;
    write_file(&store.hint_path(&manifest.volume), at.as_str().as_bytes(), false)?;
    Ok(snapshot_of(at, &manifest))
}

/// The sums of all contents that a snapshot added and uses, while it is unsettled.
pub(crate) fn sums_of(store: &Inner, manifest: &Manifest) -> Result<Sums> {
    let new = |unsettled| new_sums(store, manifest, unsettled, &|_, _| Ok(()));
    let new = manifest.unsettled.as_ref().map(new).transpose()?;
    Ok(new.map_or_else(Sums::new, |(sums, _)| sums))
}

/// The sums of all contents that a snapshot added and uses, and what else of its batch is needed. [`Error::Damaged`]
/// where the snapshot is not whole. `keep` is given the sums of chunks that were computed.
fn new_sums(
    store: &Inner,
    manifest: &Manifest,
    unsettled: &Unsettled,
    keep: &dyn Fn(&ContentRef, &Chunks) -> Result<()>,
) -> Result<(Sums, BTreeSet<ContentRef>)> {
    let path = store.batch_dir(manifest.batch).join("table");
    let table = read_file(&path)?;
    let damaged = |reason: &str| Error::Damaged { what: path.display().to_string(), reason: reason.to_owned() };
    if blake3::hash(&table).as_bytes() != &unsettled.table {
        return Err(damaged("its hash is wrong"));
    }
    let mut reader = Reader::new(&table);
    let mut made = BTreeMap::new();
    while !reader.is_empty() {
        let one = Made::decode(&mut reader).map_err(|malformed| malformed.of(path.display().to_string()))?;
        made.insert(one.number, one);
    }
    let trusted = is_of_this_boot(unsettled);
    let mut sums = Sums::new();
    let (mut unknown, mut large) = (Vec::new(), Vec::new());
    let new = New::of(store, manifest.batch, manifest.root, &made)?;
    for (content, length) in new.contents {
        match made.get(&content.number) {
            Some(&Made { length: found, known: Known::Sum(hash), .. }) if trusted && found == length => {
                sums.insert(content.number, Sum { length, way: Way::AtOnce, hash });
            }
            Some(found) if found.length != length => return Err(damaged("a content has another length in it")),
            Some(found) if found.sum().is_none() && length > chunks::FROM => large.push((content, *found)),
            Some(found) => unknown.push((content, *found)),
            None => return Err(damaged("a content is missing in it")),
        }
    }
    for (content, found) in large {
        // What an earlier start of the system left is read, all of it.
        let before = trusted.then(|| settled_before(manifest.batch, &made, found)).flatten();
        let chunks = chunks::sum_after(store, &content, found.length, before.as_ref())?;
        keep(&content, &chunks)?;
        sums.insert(content.number, Sum { length: found.length, way: Way::InChunks, hash: chunks.total() });
    }
    sums.extend(compute(store, &unknown)?);
    Ok((sums, new.needed))
}

/// The content of an earlier snapshot that a file had before.
///
/// `snapshot` may have taken it again after `prime`: that content leads on to the one before.
fn settled_before(batch: BatchId, made: &BTreeMap<u64, Made>, mut of: Made) -> Option<ContentRef> {
    for _ in 0..=made.len() {
        match of.known {
            Known::Before(content) if content.batch == batch => of = *made.get(&content.number)?,
            Known::Before(content) => return Some(content),
            Known::Nothing | Known::Sum(_) => return None,
        }
    }
    None
}

/// What of one batch a tree uses. Only records and patches of that batch can refer to it.
#[derive(Default)]
struct New {
    /// The contents of its files, and whole contents that patches among them need.
    contents: BTreeMap<ContentRef, u64>,
    /// Patches whose data other patches need: whoever reads those checks these.
    needed: BTreeSet<ContentRef>,
}

impl New {
    fn of(store: &Inner, batch: BatchId, root: RecordRef, made: &BTreeMap<u64, Made>) -> Result<Self> {
        let mut new = Self::default();
        let mut waiting = vec![root];
        let mut seen = HashSet::new();
        while let Some(at) = waiting.pop() {
            if at.batch != batch || !seen.insert(at.offset) {
                continue;
            }
            for item in store.record(&at)?.items {
                match item.body {
                    Body::Dir(below) => waiting.push(below),
                    Body::File(Some(content)) if content.batch == batch => {
                        new.contents.insert(content, item.meta.size);
                    }
                    _ => {}
                }
            }
        }
        let patches: Vec<_> = new.contents.keys().filter(|content| content.form == Form::Patch).copied().collect();
        for patch in patches {
            let index = Index::read(&store.content_path(&patch))?;
            for source in index.sources.into_iter().filter(|source| source.batch == batch) {
                match (source.form, made.get(&source.number)) {
                    (Form::Whole, Some(made)) => drop(new.contents.entry(source).or_insert(made.length)),
                    _ => drop(new.needed.insert(source)),
                }
            }
        }
        Ok(new)
    }
}

/// Reads contents and computes their sums, two at a time; checks those that are known.
fn compute(store: &Inner, contents: &[(ContentRef, Made)]) -> Result<Vec<(u64, Sum)>> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(contents.len()));
    let work = || -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        while let Some((content, made)) = contents.get(next.fetch_add(1, Ordering::Relaxed)) {
            let path = store.content_path(content);
            let opened = content::open(store, content, made.length)?;
            let hash = content::sum(&*opened, &mut buffer).context("read", &path)?;
            if made.sum().is_some_and(|known| known != hash) {
                let reason = "its sum is wrong".to_owned();
                return Err(Error::Damaged { what: path.display().to_string(), reason });
            }
            let sum = (content.number, Sum { length: made.length, way: Way::AtOnce, hash });
            results.lock().unwrap_or_else(PoisonError::into_inner).push(sum);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let done = work();
        other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(done)
    })?;
    Ok(results.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Removes contents that `prime` made and `snapshot` replaced, or that a call left that was cut short.
fn drop_superseded(store: &Inner, batch: BatchId, sums: &Sums, needed: &BTreeSet<ContentRef>) -> Result<()> {
    let used = |content: &ContentRef| sums.contains_key(&content.number) || needed.contains(content);
    for content in contents_of(store, batch)?.into_iter().filter(|content| !used(content)) {
        store.remove_content(&content)?;
    }
    Ok(())
}
