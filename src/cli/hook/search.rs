//! The search for writers outside a frozen tree, in a process that outlives the hook.
//!
//! It is the longest part of a checkpoint on a machine with many processes, and nothing that the frozen processes need wait for: who is not
//! frozen is no more at rest during the freeze than some milliseconds later. So only what the thaw would change is learnt in time, which is
//! who belongs to the tree, and what these have in use; and then the process waits until the hook has ended. If the hook failed there is
//! nothing to do. Else it leaves its answer for whoever seals the checkpoint, who waits for it.
//!
//! Whatever ends it before, the checkpoint is whole, and claims no more than what a snapshot beside unknown writers is.

use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use fsnap::catalog::{PendingCheckpoint, SearchAnswer, SearchFile};
use fsnap::checkpoint::OtherWriters;
use fsnap::coordinator::{Window, WriterSearch};
use fsnap::engine::Images;
use fsnap::processes::{AuditRules, FrozenTree, Outlook, Policy};
use fsnap::{Error, failpoint};

use super::super::process::sys;

/// The longest that the hook is told.
const OBJECTION: usize = 4000;

/// What the hook is told of a tree against which nothing stands, and all of whose files have names. No objection is so short.
const ALL_NAMED: &str = "-";

/// The hook's end of it.
#[derive(Debug)]
pub(crate) struct Search {
    /// Says something, or ends, when the tree may run again.
    tree_is_known: PipeReader,
    /// Ends with the hook, however that ends.
    _hook_lives: PipeWriter,
}

/// What the process knows of the hook that started it.
struct Searcher<'a> {
    pending: &'a PendingCheckpoint,
    tree: i32,
    ignore: Vec<i32>,
    answer: SearchFile,
    note: PathBuf,
    tree_is_known: PipeWriter,
    hook_lives: PipeReader,
    limit: Duration,
}

impl Search {
    /// Starts it, beside the tree with the root `tree`, which is frozen; the processes in `ignore` are left out.
    ///
    /// It ends after `limit` at the latest. Must be called while the process has one thread.
    pub(crate) fn start(window: &Window, tree: i32, ignore: Vec<i32>, limit: Duration) -> fsnap::Result<Self> {
        let cannot = |source| Error::Io { action: "start", object: "the search for writers".into(), source };
        let (tree_is_known, tell) = std::io::pipe().map_err(cannot)?;
        let (listen, hook_lives) = std::io::pipe().map_err(cannot)?;
        let (pending, answer, note) = (window.pending(), window.begin_search()?, window.note());
        let searcher = Searcher { pending, tree, ignore, answer, note, tree_is_known: tell, hook_lives: listen, limit };
        sys::in_child(|| searcher.run()).map_err(cannot)?;
        Ok(Self { tree_is_known, _hook_lives: hook_lives })
    }

    /// Lets the process go on once this one has ended.
    pub(crate) fn leave(self) {
        std::mem::forget(self);
    }

    /// Waits until the tree may run again; in vain, and not for long, if the process is dead. Tells whether the tree may have files
    /// in use that have no name any more.
    ///
    /// Fails if the tree can write to what the checkpoint would not hold, and the rules forbid that, or if it cannot be told.
    pub(crate) fn knows_the_tree(&self, rules: &AuditRules) -> fsnap::Result<bool> {
        let mut said = String::new();
        let mut reader = BufReader::new((&self.tree_is_known).take(OBJECTION as u64));
        let heard = reader.read_line(&mut said).is_ok_and(|length| length > 0);
        match said.trim_end() {
            ALL_NAMED => Ok(false),
            "" if heard || rules.policy != Policy::Refuse => Ok(true),
            "" => Err(Error::Outside { what: "perhaps: the look at them was cut off".into() }),
            what => Err(Error::Outside { what: what.to_owned() }),
        }
    }
}

impl Searcher<'_> {
    fn run(mut self) {
        // What the engine gave the hook, and the hook's own volumes, are not to be kept busy by this.
        let kept = [self.answer.as_fd(), self.tree_is_known.as_fd(), self.hook_lives.as_fd()];
        if sys::end_after(self.limit).and_then(|()| sys::detach(&kept)).is_err() {
            return;
        }
        let outlook = WriterSearch::outlook(self.pending);
        let mut search = among_frozen(outlook, self.tree, std::mem::take(&mut self.ignore));
        let seen = search.as_ref().ok().and_then(WriterSearch::observation);
        let _ = self.tree_is_known.write(&match objection(&search, &self.pending.audit) {
            None if seen.is_some_and(|seen| seen.unlinked().is_empty()) => format!("{ALL_NAMED}\n").into_bytes(),
            objection => line(objection),
        });
        learn(&mut search);
        // The hook's end wakes this process up, and must not have to wait for it.
        sys::give_way();
        let _ = sys::wait_for_end(&mut self.hook_lives);
        if self.note.symlink_metadata().is_err() {
            return;
        }
        let members = self.pending.members.len();
        finish(search, members, self.answer);
    }
}

/// Learns what the thaw would change: who belongs to the tree with the root `tree`, which is frozen, and what they have in use.
///
/// `outlook` is [what that needs](WriterSearch::outlook), made ahead where somebody stood by.
pub(crate) fn among_frozen(
    outlook: fsnap::Result<Outlook>,
    tree: i32,
    ignore: Vec<i32>,
) -> fsnap::Result<WriterSearch> {
    failpoint::hit("search:started");
    let search = look(outlook, tree, ignore);
    failpoint::hit("search:tree");
    search
}

fn look(outlook: fsnap::Result<Outlook>, tree: i32, ignore: Vec<i32>) -> fsnap::Result<WriterSearch> {
    let frozen = FrozenTree::of(tree)?;
    Ok(WriterSearch::of_frozen(outlook?, frozen, ignore))
}

/// Looks at the tree with the root `tree` once more, and [keeps](keep) what has no name: for who has no other look at hand.
pub(crate) fn look_and_keep(window: &mut Window, images: &Images, tree: i32) -> fsnap::Result<()> {
    let seen = look(WriterSearch::outlook(window.pending()), tree, Vec::new());
    keep(&seen, window, images)
}

/// Why there may be no checkpoint of what was learnt, if the rules say so. Who cannot be asked does not agree.
pub(crate) fn objection(search: &fsnap::Result<WriterSearch>, rules: &AuditRules) -> Option<Error> {
    match search {
        Ok(search) => search.objection(),
        Err(_) if rules.policy != Policy::Refuse => None,
        Err(error) => Some(Error::Outside { what: format!("perhaps: {error}") }),
    }
}

/// Keeps what of the frozen tree has no name any more. Who cannot be asked may have what the engine relies on.
pub(crate) fn keep(search: &fsnap::Result<WriterSearch>, window: &mut Window, images: &Images) -> fsnap::Result<()> {
    window.keep(search.as_ref().ok().and_then(WriterSearch::observation), Some(images))
}

/// Learns what need not be learnt while the tree is frozen, from files that are open until then.
pub(crate) fn learn(search: &mut fsnap::Result<WriterSearch>) {
    if let Ok(search) = search {
        search.learn();
    }
}

/// Searches, and leaves the answer: one list for each of so many members.
pub(crate) fn finish(search: fsnap::Result<WriterSearch>, members: usize, answer: SearchFile) {
    let found = search.and_then(|search| search.run());
    failpoint::hit("search:found");
    let unknown = |error| vec![OtherWriters::in_words(format!("perhaps others: {error}")); members];
    let found = found.unwrap_or_else(|error| SearchAnswer { writers: unknown(error), tree: None });
    // Nobody listens any more; without an answer, the checkpoint claims less.
    let _ = answer.write(&found);
}

/// What the hook hears: an empty line, or what stands against the checkpoint. A pipe takes as much at once.
fn line(objection: Option<Error>) -> Vec<u8> {
    let what = match objection {
        None => String::new(),
        Some(Error::Outside { what }) => what,
        Some(error) => error.to_string(),
    };
    let mut said: Vec<u8> = fsnap::printable(what.as_ref()).into_bytes();
    // What is cut in the middle of a character gets longer.
    said.truncate(OBJECTION / 2);
    let mut line = String::from_utf8_lossy(&said).into_owned().into_bytes();
    line.push(b'\n');
    line
}
