//! Which volumes a checkpoint is to hold.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fsnap_backend::{Identity, Locator, mounts};

use super::{Coordinator, Shown};
use crate::branch::{Branch, BranchMember};
use crate::catalog::{ImageRef, PlannedMember};
use crate::checkpoint::PathText;
use crate::error::IoContext;
use crate::mount::SERVED;
use crate::name::Name;
use crate::processes::{self, Candidate, CandidateKind, Tree};
use crate::volume::RegisteredVolume;
use crate::{Error, Result};

/// One volume that a checkpoint is to hold: a registered one, or a branch's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The volume's name.
    pub volume: Name,
    /// Where its files are.
    pub path: PathText,
    /// What it was when it was recorded.
    pub identity: Identity,
    /// The branch it belongs to.
    pub branch: Option<Name>,
    /// The backend's name.
    pub backend: String,
    /// The store for the snapshot.
    pub store: Identity,
    /// Images below it, without which the snapshot could not be read.
    pub needs: Vec<ImageRef>,
}

impl Target {
    /// Its part in a checkpoint, with a snapshot at that place.
    pub(super) fn planned(self, at: Locator) -> PlannedMember {
        let Self { volume, path, identity, backend, store, needs, .. } = self;
        PlannedMember { volume, path, identity, backend, store, at, needs }
    }
}

impl Coordinator {
    /// Every registered volume.
    pub fn targets(&self) -> Result<Vec<Target>> {
        self.catalog.volumes()?.into_iter().map(|volume| self.registered(volume)).collect()
    }

    /// The registered volumes of these names or paths.
    pub fn targets_named(&self, wanted: &[String]) -> Result<Vec<Target>> {
        let targets = self.targets()?;
        let mut found: BTreeMap<Name, Target> = BTreeMap::new();
        for text in wanted {
            let path = Path::new(text).canonicalize().ok();
            let matches = |target: &&Target| {
                target.volume.as_str() == text || path.as_deref().is_some_and(|path| path == target.path.as_path())
            };
            let target = targets.iter().find(matches).ok_or_else(|| self.no_such_volume(text))?;
            found.insert(target.volume.clone(), target.clone());
        }
        Ok(found.into_values().collect())
    }

    /// The volumes of a branch.
    pub fn targets_of_branch(&self, name: &Name) -> Result<Vec<Target>> {
        let branch = self.catalog.branch(name)?.ok_or_else(|| self.no_such_branch(name))?;
        let shown = self.shown();
        if branch.members.iter().any(|member| shown.files_of(&branch, member).is_none()) {
            return Err(Error::NotShown { name: name.clone() });
        }
        Ok(branch.members.iter().map(|member| on_branch(&shown, &branch, member)).collect())
    }

    /// The volumes that the processes of `tree` can write to: registered ones by use and by reach, a branch's by use
    /// and by being mounted where the processes see it.
    pub fn targets_reached(&self, tree: &Tree) -> Result<Vec<Target>> {
        let (mut targets, shown) = (self.targets()?, self.shown());
        for branch in self.catalog.branches()? {
            targets.extend(branch.members.iter().map(|member| on_branch(&shown, &branch, member)));
        }
        let (candidates, mut targets) = candidates(targets);
        let reached = processes::reach(tree, &candidates)?;
        let mut found: BTreeMap<Name, Target> = BTreeMap::new();
        for target in reached.iter().filter_map(|reach| targets[reach.candidate].take()) {
            // Under one name, what the processes work on is the branch: its volume is merely within reach as well.
            if target.branch.is_some() || !found.contains_key(&target.volume) {
                found.insert(target.volume.clone(), target);
            }
        }
        if found.is_empty() {
            return Err(Error::NothingReached { why: self.why_nothing_is_reached()? });
        }
        Ok(found.into_values().collect())
    }

    fn why_nothing_is_reached(&self) -> Result<String> {
        let volumes = self.catalog.volumes()?;
        if volumes.is_empty() {
            return Ok("no volume is registered: `fsnap init DIR` registers one".into());
        }
        let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        Ok(format!("the processes can write to none of the registered volumes: {}", names.join(", ")))
    }

    pub(super) fn registered(&self, volume: RegisteredVolume) -> Result<Target> {
        let store = self.catalog.store(&volume.store)?;
        let backend = store.map(|store| store.backend).ok_or_else(|| {
            let what = format!("the store of volume {}, in the catalog,", volume.name);
            Error::Backend(fsnap_backend::Error::NotFound { what })
        })?;
        let RegisteredVolume { name, path, identity, store } = volume;
        Ok(Target { volume: name, path, identity, branch: None, backend, store, needs: Vec::new() })
    }

    /// Who works on a branch: has its files open, or sees it mounted, as restored processes do.
    pub(super) fn users(&self, branch: &Branch) -> Result<Vec<String>> {
        let shown = self.shown();
        let (candidates, _) =
            candidates(branch.members.iter().map(|member| on_branch(&shown, branch, member)).collect());
        let mut users = processes::users(&candidates)?;
        // A server goes on when its mount is taken off here, for copies in mount namespaces of their own.
        let served = branch.members.iter().filter(|member| member.form.layers().is_some());
        let served: Vec<PathBuf> = served.map(|member| Shown::in_mount(branch, member)).collect();
        if !served.is_empty() {
            users.extend(processes::users_elsewhere(SERVED, self.catalog.state(), &served)?);
        }
        Ok(users.iter().map(|user| format!("{} ({})", user.id.pid, user.command)).collect())
    }

    /// Where something is mounted among the files of a branch.
    pub(super) fn mounted_in(&self, branch: &Branch) -> Result<Option<PathBuf>> {
        let shown = self.shown();
        let roots: Vec<PathText> = branch.members.iter().map(|member| on_branch(&shown, branch, member).path).collect();
        let is_inside =
            |point: &PathBuf| roots.iter().any(|root| point != root.as_path() && point.starts_with(root.as_path()));
        let mounted = mounts::own().context("read", "/proc/thread-self/mountinfo")?;
        Ok(mounted.into_iter().map(|mount| mount.point).find(is_inside))
    }
}

fn on_branch(shown: &Shown<'_>, branch: &Branch, member: &BranchMember) -> Target {
    // An overlay is nothing that the backend of the snapshot below could capture.
    let keeper = member.form.over_snapshot().and_then(|overlay| overlay.keeper.as_ref());
    let (backend, store) = keeper.map_or((&member.backend, &member.store), |keeper| (&keeper.backend, &keeper.store));
    let below = member.form.layers().map(|_| ImageRef { store: member.store.clone(), at: member.at.clone() });
    let needs = below.into_iter().chain(member.needs.iter().cloned()).collect();
    Target {
        volume: member.volume.clone(),
        path: shown.files_of(branch, member).map_or_else(|| member.path.clone(), PathText),
        identity: member.identity.clone(),
        branch: Some(branch.name.clone()),
        backend: backend.clone(),
        store: store.clone(),
        needs,
    }
}

/// The targets that are there, as candidates and by the same indices.
fn candidates(targets: Vec<Target>) -> (Vec<Candidate>, Vec<Option<Target>>) {
    let there = targets.into_iter().filter_map(|target| {
        let kind = if target.branch.is_some() { CandidateKind::Branch } else { CandidateKind::Registered };
        // A volume whose directory is gone is within nobody's reach.
        Some((Candidate::of(target.path.as_path(), kind).ok()?, Some(target)))
    });
    there.unzip()
}
