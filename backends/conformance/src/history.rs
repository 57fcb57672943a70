//! Random histories, compared with the model after every step.

use std::collections::BTreeMap;

use fsnap_backend::{Capabilities, ErrorKind, FileKind, ImageKind, Locator, Snapshot, Timestamp};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

use crate::failure::{During, Failure, Verdict, ensure};
use crate::model::is_at_or_below;
use crate::op::{Op, TreePath};
use crate::view::{View, is_root};
use crate::{Listing, LiveVolume, Model, Site, samples};

/// One step of a history. Numbers choose among what there is, so that a shortened history still makes sense.
#[derive(Debug, Clone)]
enum Step {
    /// Changes a volume, the first one or a clone.
    Change(usize, Vec<Wish>),
    /// Takes a snapshot of a volume; some changes are made between prime and it.
    Snapshot(usize, Vec<Wish>),
    /// Takes a snapshot without prime.
    SnapshotAtOnce(usize),
    /// Clones a snapshot.
    Clone(usize),
    DeleteSnapshot(usize),
    DeleteClone(usize),
    Verify(usize),
    Reopen,
}

/// A change of a tree that does not know the tree yet.
#[derive(Debug, Clone)]
enum Wish {
    Create(usize, usize),
    MakeDir(usize, usize),
    Symlink(usize, usize),
    Fifo(usize, usize),
    Link(usize, usize, usize),
    Rename(usize, usize, usize),
    Remove(usize),
    Write(usize, u64, usize),
    Store(usize, u64),
    Truncate(usize, u64),
    Punch(usize, u64, u64),
    Chmod(usize, usize),
    Chown(usize, u32),
    Touch(usize, i64, u32),
    SetXattr(usize, usize, usize),
    RemoveXattr(usize),
    SetAcl(usize),
}

/// Few, so that names meet again.
const NAMES: [&[u8]; 6] = [b"a", b"b", b"a-", b"\xff\n", b"long long long long long long long long name", b".c"];

const ACL: &str = "system.posix_acl_access";

fn wish() -> impl Strategy<Value = Wish> {
    let (any, name, far) = (0..100_usize, 0..NAMES.len(), 0..200_000_u64);
    let place = || (any.clone(), name.clone());
    prop_oneof![
        4 => place().prop_map(|(dir, name)| Wish::Create(dir, name)),
        2 => place().prop_map(|(dir, name)| Wish::MakeDir(dir, name)),
        1 => place().prop_map(|(dir, name)| Wish::Symlink(dir, name)),
        1 => place().prop_map(|(dir, name)| Wish::Fifo(dir, name)),
        2 => (any.clone(), place()).prop_map(|(file, (dir, name))| Wish::Link(file, dir, name)),
        3 => (any.clone(), place()).prop_map(|(file, (dir, name))| Wish::Rename(file, dir, name)),
        2 => any.clone().prop_map(Wish::Remove),
        4 => (any.clone(), far.clone(), 1..9_000_usize).prop_map(|(file, at, len)| Wish::Write(file, at, len)),
        2 => (any.clone(), far.clone()).prop_map(|(file, at)| Wish::Store(file, at)),
        2 => (any.clone(), far.clone()).prop_map(|(file, len)| Wish::Truncate(file, len)),
        1 => (any.clone(), far, 1..50_000_u64).prop_map(|(file, at, len)| Wish::Punch(file, at, len)),
        1 => (any.clone(), 0..4_usize).prop_map(|(file, mode)| Wish::Chmod(file, mode)),
        1 => (any.clone(), 0..3_u32).prop_map(|(file, owner)| Wish::Chown(file, owner)),
        1 => (any.clone(), -10..4_000_000_000_i64, 0..1_000_000_000_u32).prop_map(|(file, s, n)| Wish::Touch(file, s, n)),
        1 => (any.clone(), 0..2_usize, 0..300_usize).prop_map(|(file, key, len)| Wish::SetXattr(file, key, len)),
        1 => any.clone().prop_map(Wish::RemoveXattr),
        1 => any.prop_map(Wish::SetAcl),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let any = 0..100_usize;
    prop_oneof![
        4 => (any.clone(), vec(wish(), 1..8)).prop_map(|(volume, wishes)| Step::Change(volume, wishes)),
        4 => (any.clone(), vec(wish(), 0..3)).prop_map(|(volume, wishes)| Step::Snapshot(volume, wishes)),
        1 => any.clone().prop_map(Step::SnapshotAtOnce),
        2 => any.clone().prop_map(Step::Clone),
        2 => any.clone().prop_map(Step::DeleteSnapshot),
        1 => any.clone().prop_map(Step::DeleteClone),
        1 => any.prop_map(Step::Verify),
        1 => Just(Step::Reopen),
    ]
}

impl Wish {
    /// What it comes to in the tree that `model` holds; nothing, if there is nothing for it.
    fn ops(&self, model: &Model, capabilities: &Capabilities, punches: bool) -> Vec<Op> {
        let paths: Vec<(&TreePath, FileKind)> = model.paths().map(|(path, item)| (path, item.kind)).collect();
        let pick = |index: &usize, fits: &dyn Fn(&TreePath, FileKind) -> bool| {
            let fitting: Vec<_> = paths.iter().filter(|(path, kind)| fits(path, *kind)).collect();
            (!fitting.is_empty()).then(|| fitting[index % fitting.len()].0.clone())
        };
        let below = |dir: &usize, name: &usize| {
            let dir = pick(dir, &|_, kind| kind == FileKind::Dir)?;
            let separator: &[u8] = if dir.is_empty() { b"" } else { b"/" };
            Some([&dir[..], separator, NAMES[*name]].concat())
        };
        let kind_of = |path: &TreePath| paths.iter().find(|(other, _)| *other == path).map(|(_, kind)| *kind);
        let new = |dir: &usize, name: &usize| below(dir, name).filter(|path| kind_of(path).is_none());
        let file = |index: &usize| pick(index, &|_, kind| kind == FileKind::File);
        let opens = |index: &usize| pick(index, &|_, kind| matches!(kind, FileKind::File | FileKind::Dir));
        let named = |index: &usize| pick(index, &|path, _| !path.is_empty());
        let size =
            |path: &TreePath| model.paths().find(|(other, _)| *other == path).map_or(0, |(_, i)| i.content.len());

        let ops = match self {
            Self::Create(dir, name) => new(dir, name).map(|path| vec![Op::Create(path)]),
            Self::MakeDir(dir, name) => new(dir, name).map(|path| vec![Op::MakeDir(path)]),
            Self::Symlink(dir, name) => new(dir, name).map(|path| vec![Op::Symlink(path, b"a/b".to_vec())]),
            Self::Fifo(dir, name) => new(dir, name).map(|path| vec![Op::Fifo(path)]),
            Self::Link(from, dir, name) => pick(from, &|_, kind| kind != FileKind::Dir)
                .zip(new(dir, name))
                .map(|(from, to)| vec![Op::Link(from, to)]),
            Self::Rename(from, dir, name) => named(from).zip(below(dir, name)).and_then(|(from, to)| {
                let replaces = kind_of(&to).is_some();
                let dirs = kind_of(&from) == Some(FileKind::Dir) || kind_of(&to) == Some(FileKind::Dir);
                let refused = is_at_or_below(&to, &from) || (replaces && dirs);
                (!refused).then(|| vec![Op::Rename(from, to)])
            }),
            Self::Remove(index) => {
                let is_empty = |path: &TreePath| !paths.iter().any(|(p, _)| *p != path && is_at_or_below(p, path));
                pick(index, &|path, _| !path.is_empty() && is_empty(path)).map(|path| vec![Op::Remove(path)])
            }
            Self::Write(index, at, len) => {
                file(index).map(|path| vec![Op::Write(path, *at, samples::noise(*at, *len))])
            }
            Self::Store(index, at) => file(index).filter(|path| size(path) > 0).map(|path| {
                let (size, data) = (size(&path), samples::noise(*at, 10));
                let at = at % size;
                let len = data.len().min((size - at) as usize);
                vec![Op::Store(path, at, data[..len].to_vec())]
            }),
            Self::Truncate(index, len) => file(index).map(|path| vec![Op::Truncate(path, *len)]),
            Self::Punch(index, at, len) => file(index).filter(|_| punches).map(|path| vec![Op::Punch(path, *at, *len)]),
            Self::Chmod(index, mode) => opens(index).map(|path| {
                // The mode and the ACL say the same thing in part: first the ACL goes.
                // Whoever has no privileges must be able to go on looking into a directory of their own.
                let searchable = if is_root() { 0 } else { 0o100 };
                let mode = Op::Chmod(path.clone(), [0o755, 0o600, 0o700, 0o1777][*mode] | searchable);
                if capabilities.acls { vec![Op::RemoveXattr(path, ACL.into()), mode] } else { vec![mode] }
            }),
            Self::Chown(index, owner) => {
                let allowed = is_root() && capabilities.ownership;
                named(index).filter(|_| allowed).map(|path| vec![Op::Chown(path, *owner, 1000 + owner)])
            }
            Self::Touch(index, seconds, nanoseconds) => pick(index, &|_, _| true)
                .map(|path| vec![Op::Touch(path, Timestamp { seconds: *seconds, nanoseconds: *nanoseconds })]),
            Self::SetXattr(index, key, len) => opens(index)
                .filter(|_| capabilities.xattrs)
                .map(|path| vec![Op::SetXattr(path, ["user.one", "user.two"][*key].into(), samples::noise(0, *len))]),
            Self::RemoveXattr(index) => {
                opens(index).filter(|_| capabilities.xattrs).map(|path| vec![Op::RemoveXattr(path, "user.one".into())])
            }
            Self::SetAcl(index) => opens(index).filter(|_| capabilities.acls).map(|path| {
                let remove = Op::RemoveXattr(path.clone(), ACL.into());
                vec![remove, Op::Chmod(path.clone(), 0o750), Op::SetXattr(path, ACL.into(), samples::acl(1234))]
            }),
        };
        ops.unwrap_or_default()
    }
}

/// What there is at one point of a history.
struct World<'s, 'a> {
    site: &'s mut Site<'a>,
    original: LiveVolume,
    clones: Vec<(Locator, LiveVolume, View)>,
    snapshots: Vec<(Snapshot, Listing)>,
}

impl World<'_, '_> {
    fn volume(&mut self, index: usize) -> &mut LiveVolume {
        match index % (self.clones.len() + 1) {
            0 => &mut self.original,
            clone => &mut self.clones[clone - 1].1,
        }
    }

    fn change(&mut self, volume: usize, wishes: &[Wish]) -> Verdict {
        let (capabilities, punches) = (self.site.capabilities(), self.site.fixture.reports_holes());
        let live = self.volume(volume);
        for wish in wishes {
            let ops = wish.ops(&live.model, &capabilities, punches);
            live.apply(&ops)?;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Verdict {
        let number = self.snapshots.len();
        match step {
            Step::Change(volume, wishes) => self.change(*volume, wishes)?,
            Step::Snapshot(volume, wishes) => {
                let at = self.reserve(*volume)?;
                let store = self.site.store.clone();
                store.prime(&self.volume(*volume).volume, &at).during("prime")?;
                self.change(*volume, wishes)?;
                self.snapshot(*volume, &at)?;
            }
            Step::SnapshotAtOnce(volume) => {
                let at = self.reserve(*volume)?;
                self.snapshot(*volume, &at)?;
            }
            Step::Clone(snapshot) if number > 0 && self.site.capabilities().clones => {
                let (snapshot, listing) = self.snapshots[snapshot % number].clone();
                let at = self.site.clone_of(&snapshot)?;
                let (live, view) = self.site.adopt_clone(&at, &listing)?;
                self.clones.push((at, live, view));
            }
            Step::DeleteSnapshot(snapshot) if number > 0 => {
                let index = snapshot % number;
                match self.site.store.delete(&self.snapshots[index].0.at) {
                    Ok(()) => drop(self.snapshots.remove(index)),
                    Err(error) if error.kind() == ErrorKind::Busy && !self.clones.is_empty() => {}
                    Err(error) => return Err(error).during("delete of a snapshot"),
                }
            }
            Step::DeleteClone(clone) if !self.clones.is_empty() => {
                let (at, live, view) = self.clones.remove(clone % self.clones.len());
                drop((live, view));
                self.site.store.deactivate(&at)?;
                self.site.store.delete(&at).during("delete of a clone")?;
            }
            Step::Verify(snapshot) if number > 0 => {
                let (snapshot, _) = &self.snapshots[snapshot % number];
                let damage = self.site.store.verify(snapshot).during("verify")?;
                ensure!(damage.is_empty(), "a snapshot is damaged: {damage:?}");
            }
            Step::Reopen => self.reopen()?,
            Step::Clone(_) | Step::DeleteSnapshot(_) | Step::DeleteClone(_) | Step::Verify(_) => {}
        }
        self.compare()
    }

    fn reserve(&mut self, volume: usize) -> Verdict<Locator> {
        let (store, known) = (self.site.store.clone(), self.site.known.clone());
        let at = store.reserve(fsnap_backend::Source::Volume(&self.volume(volume).volume), &known).during("reserve")?;
        self.site.known.insert(at.clone());
        Ok(at)
    }

    fn snapshot(&mut self, volume: usize, at: &Locator) -> Verdict {
        let index = volume % (self.clones.len() + 1);
        let live = if index == 0 { &self.original } else { &self.clones[index - 1].1 };
        self.snapshots.push((self.site.snapshot_at(&live.volume, at)?, live.listing()));
        Ok(())
    }

    /// Opens the store again, and adopts every volume again, as after a restart.
    fn reopen(&mut self) -> Verdict {
        self.site.reopen()?;
        let lives = std::iter::once(&mut self.original).chain(self.clones.iter_mut().map(|(_, live, _)| live));
        for live in lives {
            let again = self.site.store.adopt(&live.dir).during("adopt again")?;
            ensure!(again.identity() == live.volume.identity(), "a volume has another identity than before");
            live.volume = again;
        }
        Ok(())
    }

    /// Compares everything with the model.
    fn compare(&self) -> Verdict {
        let snapshots = self.snapshots.iter().map(|(snapshot, _)| (&snapshot.at, ImageKind::Snapshot));
        let clones = self.clones.iter().map(|(at, ..)| (at, ImageKind::Volume));
        self.site.expect_images(snapshots.chain(clones))?;
        let mut tokens: BTreeMap<[u8; 32], (usize, &Listing)> = BTreeMap::new();
        for (index, (snapshot, listing)) in self.snapshots.iter().enumerate() {
            self.site.expect(&snapshot.at, listing, &format!("snapshot {index}"))?;
            let Some(token) = self.site.token(&snapshot.at)? else { continue };
            if let Some((other, before)) = tokens.insert(token, (index, listing)) {
                let what = format_args!("snapshot {other} shares its token with snapshot {index}, which");
                before.expect(listing, &self.site.capabilities(), what)?;
            }
        }
        self.site.expect_live(&self.original, "the volume")?;
        for (index, (_, live, _)) in self.clones.iter().enumerate() {
            self.site.expect_live(live, &format!("clone {index}"))?;
        }
        Ok(())
    }
}

fn run(site: &mut Site<'_>, steps: &[Step]) -> Verdict {
    let original = site.volume("volume")?;
    let mut world = World { site, original, clones: Vec::new(), snapshots: Vec::new() };
    for (index, step) in steps.iter().enumerate() {
        world.step(step).during(format_args!("step {index}"))?;
    }
    // In the end everything can go.
    for (at, live, view) in std::mem::take(&mut world.clones) {
        drop((live, view));
        world.site.store.deactivate(&at)?;
        world.site.store.delete(&at).during("delete of a clone at the end")?;
    }
    for (snapshot, _) in std::mem::take(&mut world.snapshots) {
        world.site.store.delete(&snapshot.at).during("delete of a snapshot at the end")?;
    }
    world.compare()
}

/// Runs random histories, each on a store of its own, and shows the shortest that fails.
pub(crate) fn histories(site: &mut Site<'_>) -> Verdict {
    let mut config = Config { failure_persistence: None, max_shrink_iters: 150, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = site.fixture.histories();
    }
    let mut runner = TestRunner::new(config);
    let number = std::cell::Cell::new(0);
    let outcome = runner.run(&vec(step(), 1..16), |steps| {
        number.set(number.get() + 1);
        let mut site =
            site.another(&number.get().to_string()).map_err(|failure| TestCaseError::fail(failure.to_string()))?;
        run(&mut site, &steps).map_err(|failure| TestCaseError::fail(failure.to_string()))
    });
    match outcome {
        Ok(()) => Ok(()),
        Err(TestError::Fail(reason, steps)) => Err(Failure::new(format!("{reason}\nthe history was {steps:#?}"))),
        Err(TestError::Abort(reason)) => Err(Failure::new(reason.to_string())),
    }
}
