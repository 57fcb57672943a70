//! `fsnap branch CKPT --run`: live copies of a run.

use std::ffi::OsString;

use fsnap::Error;
use fsnap::branch::Branch;
use fsnap::checkpoint::Checkpoint;
use fsnap::coordinator::{Coordinator, RestoreRequest, RunRequest};
use fsnap::engine::{Images, PidSpace, Restored};
use fsnap::name::Name;
use fsnap::processes::ProcessId;
use fsnap::run::{Place, RunRecord, Runs, engine_args};
use serde_json::json;

use super::super::output::processes::tell_lost_locks;
use super::super::process::interrupt::{Interrupts, undone};
use super::super::run::refuse_volume;
use super::super::run::terminal::Terminal;
use super::super::{Context, Failure, Outcome, Output, environment, internal, json};

/// What copies are to be made.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The name of the branch and the run; of several, what their names begin with.
    pub(crate) name: Option<Name>,
    /// How many.
    pub(crate) count: u32,
    /// Whether it gets this terminal.
    pub(crate) tty: bool,
    /// Whether JSON is wanted.
    pub(crate) json: bool,
    /// Further arguments for the engine.
    pub(crate) args: Vec<OsString>,
}

impl Wanted {
    /// The names of the copies; of those that have none yet, one is made up when their turn comes.
    fn names(&self) -> Result<Vec<Option<Name>>, Failure> {
        let name = |number| match &self.name {
            Some(name) if self.count == 1 => Ok(Some(name.clone())),
            Some(name) => Ok(Some(format!("{name}-{number}").parse::<Name>()?)),
            None => Ok(None),
        };
        (1..=self.count).map(name).collect()
    }
}

/// Makes sure that nothing stands in the way of a copy of that name.
fn refuse_taken(context: &Context, coordinator: &Coordinator, name: &Name) -> fsnap::Result<()> {
    if coordinator.catalog().branch(name)?.is_some() {
        return Err(Error::NameTaken { what: "the branch", name: name.clone(), by: None });
    }
    refuse_volume(coordinator, name)?;
    Runs::of(&context.state).refuse_taken(name)
}

/// Restores copies, each onto a branch of its own and under its name, and prints the names.
///
/// When one cannot be made, those before it go on, and are told.
pub(crate) fn run(context: &Context, coordinator: &Coordinator, checkpoint: &Checkpoint, wanted: &Wanted) -> Outcome {
    let engine = checkpoint.engine.as_ref().ok_or(Error::NoProcessImage { id: checkpoint.id })?;
    let images = Images::open(engine.images.as_path())?;
    let original = RunRecord::of_images(&images)?.ok_or(Error::NotOfARun { id: checkpoint.id })?;
    if original.terminal.is_some() && !wanted.tty {
        return Err(Failure::Usage("the run has a terminal: give its copy one by --tty".into()));
    }
    if original.terminal.is_none() && wanted.tty {
        return Err(Failure::Usage("the run has no terminal, and its copy can have none: leave --tty out".into()));
    }
    let (mut made, interrupts) = (Vec::new(), Interrupts::new()?);
    let all = make_all(context, coordinator, (checkpoint, &original), wanted, &interrupts, &mut made);
    if !made.is_empty() {
        tell_lost_locks(coordinator, checkpoint)?;
    }
    if wanted.json && !made.is_empty() {
        let shown = coordinator.shown();
        let objects = made.iter().map(|(branch, init, root)| {
            let mut object = json::branch(&shown, branch);
            object["init"] = json!(init.pid);
            object["pid"] = json!(root.map(|root| root.pid));
            object
        });
        Output::new().json(&objects.collect::<Vec<_>>())?;
    }
    // Of what was undone it is said before the signal acts.
    if let Err(failure) = &all
        && interrupts.waits()
    {
        failure.report();
    }
    interrupts.release();
    all
}

/// A branch with a copy on it: its init, and the root of its tree, if that has not ended.
type Made = (Branch, ProcessId, Option<ProcessId>);

/// Makes them one after the other, and tells names, if JSON does not; those in this terminal are not among the `made`.
fn make_all(
    context: &Context,
    coordinator: &Coordinator,
    (checkpoint, original): (&Checkpoint, &RunRecord),
    wanted: &Wanted,
    interrupts: &Interrupts,
    made: &mut Vec<Made>,
) -> Outcome {
    let (out, names) = (Output::new(), wanted.names()?);
    // Before the first is made, and before anything of an ended run of such a name goes.
    names.iter().flatten().try_for_each(|name| refuse_taken(context, coordinator, name))?;
    for name in names {
        let name = match name {
            Some(name) => name,
            None => super::free_name(coordinator, &checkpoint.id)?,
        };
        let terminal = match original.terminal {
            Some(_) => Some(Terminal::open()?),
            None => None,
        };
        if interrupts.waits() {
            break;
        }
        let (branch, restored) =
            one(context, coordinator, (checkpoint, original), (name, &wanted.args), terminal.as_ref(), interrupts)?;
        if let Some(terminal) = terminal {
            interrupts.release();
            tell_lost_locks(coordinator, checkpoint)?;
            return terminal.relay(restored);
        }
        if !wanted.json {
            out.line(&branch.name)?;
            interrupts.release();
        }
        made.push((branch, restored.init, restored.root));
    }
    Ok(())
}

fn one(
    context: &Context,
    coordinator: &Coordinator,
    (checkpoint, original): (&Checkpoint, &RunRecord),
    (name, args): (Name, &[OsString]),
    terminal: Option<&Terminal>,
    interrupts: &Interrupts,
) -> Result<(Branch, Restored), Failure> {
    let runs = Runs::of(&context.state);
    let mut record = original.copied(name.clone(), checkpoint.id);
    let mut all_args = engine_args();
    all_args.extend_from_slice(args);
    let criu = environment::find_criu(&context.config)?;
    // The engine knows the terminal by the numbers that it had at first, and this copy's own by a path.
    let terminals = original.terminal.zip(terminal.map(Terminal::path));
    record.terminal = terminal.map(Terminal::id);
    let place = runs.create(&record)?;
    let request = RestoreRequest {
        checkpoint,
        branch: &name,
        criu: &criu,
        args: &all_args,
        stage: &internal::stage_command(),
        pids: PidSpace::New,
        place: &place,
        run: Some(RunRequest { record: &record, terminal: terminals }),
    };
    let what = format!("the copy {name}");
    let run = place.path().to_owned();
    let restored = coordinator.restore(&request, &|| interrupts.hold(&what, Some(run.clone())));
    let is_interrupted = interrupts.settle();
    match restored {
        Ok((branch, restored)) if is_interrupted => {
            undo(coordinator, &branch, restored, place)?;
            Err(undone(&what))
        }
        Ok((branch, mut restored)) => match place.started(restored.root).and_then(|()| Ok(restored.keep()?)) {
            Ok(()) => Ok((branch, restored)),
            Err(error) => Err(error.and_undo(undo(coordinator, &branch, restored, place)).into()),
        },
        // The undoing has failed as well.
        Err(error) if matches!(error, Error::Several(_)) || !is_interrupted => {
            Err(error.and_undo(place.discard()).into())
        }
        Err(_) => {
            place.discard()?;
            Err(undone(&what))
        }
    }
}

fn undo(coordinator: &Coordinator, branch: &Branch, restored: Restored, place: Place) -> fsnap::Result<()> {
    let ended = restored.kill();
    ended.map_err(|source| Error::Io { action: "end", object: format!("the run {}", branch.name), source })?;
    coordinator.remove_branch(&branch.name)?;
    place.discard()
}
