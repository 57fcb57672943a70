//! Removing images, and what nobody needs any more.
//!
//! A snapshot is removed in two steps. Its manifest is moved to `doomed`, which is the instant at which it is gone. Then
//! everything that its tree used and no other tree uses is removed: *live* is what a manifest, or a snapshot that was
//! begun, leads to. Cut short in between, the next removal finishes it.
//!
//! Only snapshots of one family share anything, so only their manifests are read. What a batch has is removed as a whole
//! when nothing of it is live; else its dead contents are removed one by one, and its records stay.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::Path;

use fsnap_backend::{Error, ErrorKind, IoContext, Locator, Result, beneath};

use crate::content::contents_of;
use crate::lock::Lock;
use crate::manifest::{Manifest, Partial};
use crate::patch::Index;
use crate::record::{BatchId, Body, ContentRef, Form, RecordRef};
use crate::restore;
use crate::store::{Inner, is_snapshot, is_volume, no_image, remove_file, remove_unfinished, sync_dir};

/// Removes the image at `at`, whole or partial.
pub(crate) fn delete(store: &Inner, at: &Locator) -> Result<()> {
    if is_volume(at) {
        return delete_volume(store, at);
    }
    if !is_snapshot(at) {
        return Err(no_image(at));
    }
    let _sweep = store.sweep_lock()?;
    withdraw(store, at)?;
    for doomed in store.snapshots_in("doomed")? {
        let path = store.path("doomed", doomed.as_str());
        let manifest = match store.read_frame(&path, Manifest::MAGIC, Manifest::decode) {
            // It tells nothing of what it used: everything is looked at.
            Err(Error::Damaged { .. }) => None,
            manifest => manifest?,
        };
        if sweep(store, &doomed, manifest.as_ref())? {
            remove_file(&path)?;
        }
    }
    Ok(())
}

fn delete_volume(store: &Inner, at: &Locator) -> Result<()> {
    let volumes = store.dir.join("volumes");
    let dir = File::open(&volumes).context("open", &volumes)?;
    let part = restore::remove(store, &dir, at)?;
    let whole = volumes.join(at.as_str());
    match fs::rename(&whole, volumes.join(&part)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A file system that may not be written refuses before it looks.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem && !exists(&whole)? => Ok(()),
        renamed => {
            renamed.context("remove", &whole)?;
            beneath::remove_tree(&dir, &part).context("remove", volumes.join(&part))?;
            sync_dir(&volumes)
        }
    }
}

fn exists(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        found => found.map(|_| true).context("look at", path),
    }
}

/// Takes a snapshot out of sight.
fn withdraw(store: &Inner, at: &Locator) -> Result<()> {
    let _lock = store.withdraw_lock()?;
    let path = store.manifest_path(at);
    match Lock::try_exclusive(&path, || format!("the snapshot {at}"), "a clone is being made of it") {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        locked => {
            let _manifest = locked?;
            let doomed = store.path("doomed", at.as_str());
            fs::rename(&path, &doomed).context("remove", &path)?;
            sync_dir(&store.dir.join("snapshots"))?;
        }
    }
    remove_unfinished(store, at)?;
    let path = store.partial_path(at);
    match store.partial(at) {
        Ok(None) => Ok(()),
        Ok(Some(partial)) => {
            let manifest = store.path("doomed", at.as_str());
            let batch = store.batch_dir(partial.batch);
            // Nothing else can refer to a batch whose snapshot was never whole.
            if fs::symlink_metadata(&manifest).is_err() && fs::symlink_metadata(&batch).is_ok() {
                let _batch = store.lock_batch(partial.batch, at)?;
                remove_batch(store, partial.batch)?;
            }
            remove_file(&path)
        }
        // A power cut left it empty; its batch is found by the next sweep of everything.
        Err(Error::Damaged { .. }) => remove_file(&path),
        Err(error) => Err(error),
    }
}

/// What trees lead to.
#[derive(Default)]
struct Used {
    /// Offsets of records, by batch.
    records: HashMap<BatchId, HashSet<u64>>,
    contents: HashMap<BatchId, HashSet<ContentRef>>,
    /// Contents whose files patches need.
    sources: HashMap<BatchId, HashSet<ContentRef>>,
}

impl Used {
    fn mark(&mut self, store: &Inner, root: RecordRef) -> Result<()> {
        let mut waiting = vec![root];
        while let Some(at) = waiting.pop() {
            // A record that was seen has led to everything below it.
            if !self.records.entry(at.batch).or_default().insert(at.offset) {
                continue;
            }
            for item in store.record(&at)?.items {
                match item.body {
                    Body::Dir(below) => waiting.push(below),
                    Body::File(Some(content)) => self.mark_content(store, content)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn mark_content(&mut self, store: &Inner, content: ContentRef) -> Result<()> {
        if self.contents.entry(content.batch).or_default().insert(content) && content.form == Form::Patch {
            // Of a source its file is needed, not what that may lead to in its turn: see `patch`.
            for source in Index::read(&store.content_path(&content))?.sources {
                self.sources.entry(source.batch).or_default().insert(source);
            }
        }
        Ok(())
    }

    fn has_content(&self, content: &ContentRef) -> bool {
        [&self.contents, &self.sources]
            .iter()
            .any(|used| used.get(&content.batch).is_some_and(|used| used.contains(content)))
    }

    fn has_batch(&self, batch: BatchId) -> bool {
        self.records.contains_key(&batch) || self.contents.contains_key(&batch) || self.sources.contains_key(&batch)
    }

    fn batches(self) -> HashSet<BatchId> {
        self.records.into_keys().chain(self.contents.into_keys()).chain(self.sources.into_keys()).collect()
    }
}

/// Removes what only the snapshot `at` used; returns whether all of it could go.
fn sweep(store: &Inner, at: &Locator, doomed: Option<&Manifest>) -> Result<bool> {
    let known = match doomed.map(|doomed| used_by(store, doomed)) {
        Some(Err(Error::Damaged { .. })) | None => None,
        Some(used) => Some(used?),
    };
    // Locked, so that no batch is seen whose snapshot is not yet written down.
    let lock = store.withdraw_lock()?;
    let candidates = known.map_or_else(|| all_batches(store), Ok)?;
    let mut begun = Vec::new();
    for at in store.snapshots_in("partials")? {
        begun.extend(store.partial(&at)?);
    }
    drop(lock);
    let live = match live(store, &begun, doomed) {
        // What a damaged tree uses is not known: all of it stays until that one is removed, too.
        Err(Error::Damaged { .. }) => return Ok(false),
        live => live?,
    };
    for batch in candidates.into_iter().filter(|batch| begun.iter().all(|begun| begun.batch != *batch)) {
        if live.has_batch(batch) {
            remove_dead_contents(store, batch, &live)?;
        } else {
            remove_batch(store, batch)?;
        }
    }
    // While one that was begun may still use it, the manifest stays as a reminder for the next sweep.
    Ok(begun.iter().all(|begun| begun.base.as_ref() != Some(at)))
}

/// What every other snapshot of the family uses, whole or begun.
fn live(store: &Inner, begun: &[Partial], doomed: Option<&Manifest>) -> Result<Used> {
    let mut live = Used::default();
    for partial in begun {
        if let Some(primed) = &partial.primed {
            live.mark(store, primed.root)?;
        }
        if let Some(base) = &partial.base {
            let withdrawn = store.path("doomed", base.as_str());
            for path in [store.manifest_path(base), withdrawn] {
                if let Some(manifest) = store.read_frame(&path, Manifest::MAGIC, Manifest::decode)? {
                    live.mark(store, manifest.root)?;
                }
            }
        }
    }
    for at in store.snapshots_in("snapshots")? {
        match store.manifest(&at)? {
            Some(manifest) if doomed.is_none_or(|doomed| doomed.family == manifest.family) => {
                live.mark(store, manifest.root)?;
            }
            _ => {}
        }
    }
    Ok(live)
}

/// The batches that a snapshot may have been the last to use.
fn used_by(store: &Inner, doomed: &Manifest) -> Result<HashSet<BatchId>> {
    let mut used = Used::default();
    used.mark(store, doomed.root)?;
    let mut batches = used.batches();
    // Where nothing had changed, nothing in the snapshot's own batch is used.
    batches.insert(doomed.batch);
    Ok(batches)
}

fn all_batches(store: &Inner) -> Result<HashSet<BatchId>> {
    let names = store.names("batches")?;
    let id = |name: &String| {
        let digits = (name.len() == 32).then(|| u128::from_str_radix(name, 16).ok()).flatten()?;
        Some(BatchId(digits.to_be_bytes()))
    };
    Ok(names.iter().filter_map(id).collect())
}

fn remove_batch(store: &Inner, batch: BatchId) -> Result<()> {
    store.forget(batch);
    let batches = store.dir.join("batches");
    let dir = File::open(&batches).context("open", &batches)?;
    beneath::remove_tree(&dir, batch.to_string().as_ref()).context("remove", store.batch_dir(batch))
}

fn remove_dead_contents(store: &Inner, batch: BatchId, live: &Used) -> Result<()> {
    for content in contents_of(store, batch)?.into_iter().filter(|content| !live.has_content(content)) {
        store.remove_content(&content)?;
    }
    Ok(())
}
