//! What is looked for beside the snapshots: who else writes, what the tree has in use, and what of that lies outside.

use std::path::Path;

use super::{Coordinator, Target};
use crate::catalog::{PendingCheckpoint, SearchAnswer, WriterLists};
use crate::checkpoint::{OtherWriters, PathText, SeenWriter};
use crate::name::Name;
use crate::processes::{
    self, AuditRules, BootTicks, Candidate, CandidateKind, FrozenTree, How, Observation, Outlook, Policy, Tree,
    TreeRecord, Via, WriterScan,
};
use crate::{Error, Result};

/// A search for those outside a tree who have files of a checkpoint's volumes open for writing; and a look at the tree.
#[derive(Debug)]
pub struct WriterSearch {
    volumes: Vec<(Name, Candidate)>,
    /// Who belongs together, and when they did: while they were frozen, if they did.
    tree: Tree,
    moment: BootTicks,
    ignore: Vec<i32>,
    rules: AuditRules,
    observed: Option<processes::Result<Observation>>,
    seen: Option<TreeRecord>,
}

impl WriterSearch {
    /// Opens what it needs: the volumes must be there now, and need not be while it runs.
    ///
    /// If the tree is frozen now, it may run again when the search does: what it forks from now on belongs to it.
    ///
    /// The processes in `ignore`, such as the engine, are left out.
    pub fn new(pending: &PendingCheckpoint, tree: Tree, ignore: Vec<i32>) -> Result<Self> {
        let rules = pending.audit.clone();
        let moment = BootTicks::now();
        Ok(Self { volumes: planned(pending)?, tree, moment, ignore, rules, observed: None, seen: None })
    }

    /// Looks at a tree while it is frozen: at who belongs to it, and at what has to be read then.
    ///
    /// `outlook` is one for the [members](Self::outlook) of the checkpoint, which may have been made long before.
    pub fn of_frozen(outlook: Outlook, frozen: FrozenTree, ignore: Vec<i32>) -> Self {
        let (volumes, rules) = (outlook.volumes().to_vec(), outlook.rules().clone());
        let (tree, moment) = (frozen.tree().clone(), BootTicks::now());
        let observed = Some(outlook.observe(frozen));
        Self { volumes, tree, moment, ignore, rules, observed, seen: None }
    }

    /// What a look at a tree needs, as far as it can be made while nobody is frozen.
    pub fn outlook(pending: &PendingCheckpoint) -> Result<Outlook> {
        Ok(Outlook::new(planned(pending)?, pending.audit.clone())?)
    }

    /// Looks at a tree that was read before it was frozen.
    #[must_use]
    pub fn observing(mut self, tree: &Tree) -> Self {
        self.observed = Some(processes::observe(tree, self.volumes.clone(), &self.rules));
        self
    }

    /// What was seen of the tree; `None` if nobody looked at it, or it could not be looked at.
    pub fn observation(&self) -> Option<&Observation> {
        self.observed.as_ref()?.as_ref().ok()
    }

    /// Why there may be no checkpoint of the tree that was observed, if the rules say so.
    pub fn objection(&self) -> Option<Error> {
        let what = match self.observed.as_ref()? {
            Ok(observation) => observation.objection()?,
            Err(error) if self.rules.policy == Policy::Refuse => error.to_string(),
            Err(_) => return None,
        };
        Some(Error::Outside { what })
    }

    /// Learns what need not be learnt while the tree is frozen. From here on it has no files open.
    pub fn learn(&mut self) {
        // What cannot be looked at makes a checkpoint that knows less.
        if let Some(Ok(observation)) = self.observed.take() {
            self.seen = Some(observation.finish());
        }
    }

    /// Searches: one list per member, in words.
    pub fn run(mut self) -> Result<SearchAnswer> {
        self.learn();
        Ok(SearchAnswer { writers: self.writers()?, tree: self.seen })
    }

    fn writers(&self) -> Result<WriterLists> {
        let candidates: Vec<_> = self.volumes.iter().map(|(_, candidate)| candidate.clone()).collect();
        let scan = processes::writers_at(self.moment, &candidates, &self.tree, &self.ignore)?;
        let mut lists = vec![OtherWriters::default(); candidates.len()];
        for writer in scan.writers {
            let path = crate::printable(writer.path.as_os_str());
            let list = &mut lists[writer.candidate];
            list.texts.push(format!("{} ({}) {}: {path}", writer.process.pid, writer.command, writer.how));
            list.seen.push(SeenWriter {
                pid: writer.process.pid,
                command: writer.command,
                via: match writer.how {
                    How::Descriptor(fd) => Via::Descriptor { fd },
                    How::Mapping => Via::Mapping,
                    // A search finds writers by their files only.
                    How::Cwd | How::Root | How::Directory(_) | How::Mount(_) => Via::Mount,
                },
                path: PathText(writer.path),
            });
        }
        // What the kernel hides even from root is a process that no user could name or freeze either.
        if !rustix::process::geteuid().is_root() {
            let text = match scan.unseen.as_slice() {
                [] => return Ok(lists),
                [one] => format!("{} ({}) perhaps, whose files this user may not look at", one.id.pid, one.command),
                several => format!("{} processes perhaps, whose files this user may not look at", several.len()),
            };
            lists.iter_mut().for_each(|list| list.texts.push(text.clone()));
        }
        Ok(lists)
    }
}

/// What an audit found.
#[derive(Debug)]
pub struct Audit {
    /// The volumes, with those outside the tree who have files of them open for writing.
    pub volumes: Vec<(Target, OtherWriters)>,
    /// The tree, and what it can write to outside them.
    pub tree: TreeRecord,
    /// Why a checkpoint would be refused, if the rules say so.
    pub objection: Option<Error>,
}

impl Coordinator {
    /// Looks at what a checkpoint of the running tree would not hold.
    pub fn audit(&self, tree: &Tree, targets: Vec<Target>, rules: &AuditRules) -> Result<Audit> {
        let volumes = aimed_at(&targets)?;
        let observed = Some(Ok(processes::observe(tree, volumes.clone(), rules)?));
        let (tree, rules, moment) = (tree.clone(), rules.clone(), BootTicks::now());
        let search = WriterSearch { volumes, tree, moment, ignore: Vec::new(), rules, observed, seen: None };
        let objection = search.objection();
        let SearchAnswer { writers, tree } = search.run()?;
        let nothing = || Error::NothingToTake { why: "there is no process to look at".into() };
        Ok(Audit { volumes: targets.into_iter().zip(writers).collect(), tree: tree.ok_or_else(nothing)?, objection })
    }

    /// Refuses a tree that can write to what the targets do not hold, if the rules say so, before anything is begun.
    pub fn refuse_outside(&self, tree: &Tree, targets: &[Target], rules: &AuditRules) -> Result<()> {
        if rules.policy != Policy::Refuse {
            return Ok(());
        }
        let volumes = aimed_at(targets)?;
        match processes::observe(tree, volumes, rules)?.objection() {
            Some(what) => Err(Error::Outside { what }),
            None => Ok(()),
        }
    }
}

/// Finds who outside `tree` has files of the members open for writing.
pub fn find_writers(pending: &PendingCheckpoint, tree: &Tree, ignore: &[i32]) -> Result<WriterScan> {
    let candidates: Vec<_> = planned(pending)?.into_iter().map(|(_, candidate)| candidate).collect();
    Ok(processes::writers(&candidates, tree, ignore)?)
}

pub(super) fn aimed_at(targets: &[Target]) -> Result<Vec<(Name, Candidate)>> {
    candidates(targets.iter().map(|target| (&target.volume, target.path.as_path())))
}

pub(super) fn planned(pending: &PendingCheckpoint) -> Result<Vec<(Name, Candidate)>> {
    candidates(pending.members.iter().map(|member| (&member.volume, member.path.as_path())))
}

fn candidates<'a>(volumes: impl Iterator<Item = (&'a Name, &'a Path)>) -> Result<Vec<(Name, Candidate)>> {
    let candidate = |(name, path): (&Name, &Path)| {
        let found = Candidate::of(path, CandidateKind::Registered).map_err(|source| Error::Io {
            action: "open the directory",
            object: crate::printable(path.as_os_str()),
            source,
        })?;
        Ok((name.clone(), found))
    };
    volumes.map(candidate).collect()
}
