//! `fsnap hook`, and CRIU's action script.

pub(crate) mod attendant;
mod generic;
mod search;

use fsnap::checkpoint::{CheckpointId, EngineImages, PathText};
use fsnap::coordinator::{Begun, Coordinator, Request, Target, Window};
use fsnap::engine::criu::{self, HookCall};
use fsnap::engine::{ImageRecord, Images, MemberRecord, Phase, arm_timers};
use fsnap::processes::{Policy, ProcessId, Tree};
use fsnap::{Error, failpoint};

use super::process::deadline::{Deadline, hold_off_signals};
use super::{Context, Failure, Outcome, Output, environment, internal, say};
use search::Search;

/// The name under which fsnap is CRIU's action script.
pub(crate) const CRIU_HOOK_NAME: &str = "fsnap-criu-hook";

/// Be called by a checkpoint engine
///
/// For CRIU, make a link to fsnap named `fsnap-criu-hook`, and give its path as --action-script, for dump and for
/// restore.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    engine: Engine,
}

#[derive(Debug, clap::Subcommand)]
enum Engine {
    /// CRIU's action script, which is told everything by the environment (CRTOOLS_*)
    ///
    /// FSNAP_VOLUMES, names separated by commas, sets the volumes of the checkpoint; else they are found from the
    /// processes. FSNAP_OUTSIDE=refuse makes the dump fail if they can write to anything else. FSNAP_MESSAGE is what to say
    /// of the checkpoint. An action that needs nothing done succeeds.
    Criu,
    Generic(generic::Args),
}

pub(crate) fn run(args: Args) -> Outcome {
    match args.engine {
        Engine::Criu => criu(),
        Engine::Generic(args) => generic::run(&args),
    }
}

/// Does what CRIU's call asks for.
pub(crate) fn criu() -> Outcome {
    let Some(call) = HookCall::parse(environment::of_engine, environment::parent())? else { return Ok(()) };
    if environment::is_outer(call.images.path()) {
        return Ok(());
    }
    match call.phase {
        Phase::Starting => start(&Context::for_hook()?, &call),
        Phase::Frozen => take(&Context::for_hook()?, &call),
        Phase::Restoring => check(&Context::for_hook()?, &call),
        Phase::Restored => {
            wind_up(&call);
            Ok(())
        }
        Phase::Resumed | Phase::Failed => Ok(()),
    }
}

/// The processes are there, and do not run yet: sets those timers going that CRIU has left still.
fn wind_up(call: &HookCall) {
    let Some(Ok(tree)) = call.tree.map(Tree::of_pid) else { return };
    arm_timers(&tree).unwrap_or_else(|error| internal::warn_of_timers(&error));
}

/// The processes run: plan, and do all that can be done ahead.
pub(crate) fn start(context: &Context, call: &HookCall) -> Outcome {
    let coordinator = context.create()?;
    let images = images(call);
    let Some(pid) = call.tree else { return Ok(()) };
    attendant::dismiss(&context.state, &images);
    let mut begun = coordinator.begun_in(&images)?;
    if begun.as_ref().is_some_and(Begun::may_be_taken) {
        // An earlier dump's, with which somebody was busy a moment ago. To go on with it would call its snapshots this dump's.
        drop(begun);
        environment::tell(&coordinator.recover()?);
        begun = coordinator.begun_in(&images)?;
        if begun.as_ref().is_some_and(Begun::may_be_taken) {
            return Err(Error::Unsealed { images: images.images }.into());
        }
    }
    let tree = Tree::of_pid(pid)?;
    if let Some(begun) = begun {
        // Called twice for one dump: once more ahead.
        coordinator.prime(&begun, Some(&tree))?;
        return leave(context, &coordinator, begun, call);
    }
    let Some(targets) = targets(context, &coordinator, &tree)? else {
        say("note", "the processes can write to no registered volume: nothing to take a snapshot of");
        return Ok(());
    };
    if let Some(target) = targets.iter().find(|target| call.images.path().starts_with(target.path.as_path())) {
        let (images, volume, path) = (images.images, target.volume.clone(), target.path.clone());
        return Err(Error::ImagesInVolume { images, volume, path }.into());
    }
    let audit = environment::audit(&context.config)?;
    coordinator.refuse_outside(&tree, &targets, &audit)?;
    let begun = coordinator.begin(Request {
        targets,
        message: environment::message(),
        engine: Some(images),
        owner: Some(call.engine()?),
        tree: Some(ProcessId::of(pid)?),
        processes: Some(tree),
        external: environment::is_told_to_leave_files_out(call.engine),
        audit,
        ..Request::default()
    })?;
    leave(context, &coordinator, begun, call)
}

/// Leaves what was begun to the next hook, and a process that stands by for it.
fn leave(context: &Context, coordinator: &Coordinator, begun: Begun, call: &HookCall) -> Outcome {
    let id = begun.pending().id;
    if context.config.hook.attendant {
        let left =
            coordinator.stores_of(&begun).and_then(|stores| attendant::leave(begun, &stores, &call.images, context));
        // The next hook does all by itself.
        left.unwrap_or_else(|error| say("warning", &format!("nobody stands by for the freeze: {error}")));
    }
    say_id(call, id);
    Ok(())
}

/// The volumes that are named for hooks, or those that the processes can write to; `None` if there are none.
fn targets(context: &Context, coordinator: &Coordinator, tree: &Tree) -> Result<Option<Vec<Target>>, Failure> {
    let named = environment::volumes(&context.config);
    if !named.is_empty() {
        return Ok(Some(coordinator.targets_named(&named)?));
    }
    match coordinator.targets_reached(tree) {
        Err(Error::NothingReached { .. }) => Ok(None),
        targets => Ok(Some(targets?)),
    }
}

/// What CRIU is told to leave to a hook that takes those volumes.
pub(crate) fn external_files(
    context: &Context,
    coordinator: &Coordinator,
    tree: &Tree,
) -> Result<Vec<String>, Failure> {
    match targets(context, coordinator, tree)? {
        Some(targets) => Ok(coordinator.external_files(tree, &targets)?),
        None => Ok(Vec::new()),
    }
}

/// The processes are frozen: take the snapshots, and leave all else for later.
pub(crate) fn take(context: &Context, call: &HookCall) -> Outcome {
    // As long as this process lives, the application is frozen. What was taken so far is undone by the next command.
    let limit = environment::deadline(&context.config);
    let late = Error::Deadline { what: "taking the snapshots".to_owned(), seconds: limit.as_secs_f64() };
    let cannot = |source| Error::Io { action: "set", object: "the deadline".into(), source };
    let deadline = Deadline::set(limit, &late.into()).map_err(cannot)?;
    let Some(pid) = call.tree else { return Ok(()) };
    failpoint::hit("hook:frozen");
    let images = images(call);
    let ignore = vec![call.engine, environment::parent()];
    if let Some((id, note)) = attendant::take(&context.state, &images, &call.images, pid, &ignore)? {
        deadline.removes(&note.path()).map_err(cannot)?;
        environment::wait_for_the_rest()?;
        say_id(call, id);
        hold_off_signals().map_err(cannot)?;
        return Ok(note.appear()?);
    }
    let Some(mut window) = Window::reopen(&context.state, &images, &context.config.stores())? else {
        // Nothing was begun if there was nothing to take; anything else is a mistake that must not pass for a checkpoint.
        return match targets(context, &context.look()?, &Tree::of_pid(pid)?)? {
            None => Ok(()),
            Some(_) => Err(Error::NotBegun { engine: call.engine.to_string(), images: images.images }.into()),
        };
    };
    let id = window.pending().id;
    if let Some(begun) = window.pending().tree.filter(|begun| begun.pid != pid) {
        return Err(Error::OtherTree { begun: begun.pid, called: pid, images: images.images }.into());
    }
    if window.taken().is_some() {
        let (mine, pending) = ((ProcessId::of(pid).ok(), call.engine().ok()), window.pending());
        if (pending.tree, pending.owner) != mine {
            return Err(Error::Unsealed { images: images.images }.into());
        }
        say_id(call, id);
        return Ok(());
    }
    // The engine takes a hook that is late for one that has failed, whatever was taken by then.
    deadline.removes(&window.note()).map_err(cannot)?;
    let search = Search::start(&window, pid, ignore, limit);
    let taken = take_all(&mut window, &call.images).and_then(|()| environment::wait_for_the_rest()).and_then(|()| {
        say_id(call, id);
        let unlinked = match &search {
            Ok(search) => search.knows_the_tree(&window.pending().audit)?,
            Err(error) if window.pending().audit.policy == Policy::Refuse => {
                return Err(Error::Outside { what: error.to_string() });
            }
            // The checkpoint claims less, and is whole.
            Err(error) => {
                say("warning", &error.to_string());
                true
            }
        };
        if unlinked || window.pending().external {
            search::look_and_keep(&mut window, &call.images, pid)?;
        }
        let note = window.write_note()?;
        // Last of all: a hook that is killed before has failed, and so has the dump; one that was not must have noted it.
        hold_off_signals().map_err(cannot)?;
        Ok(note.appear()?)
    });
    if let Err(error) = taken {
        return Err(take_back(window, &call.images, error).into());
    }
    window.leave();
    let _ = search.map(Search::leave);
    Ok(())
}

/// Takes every snapshot, and leaves the record of them beside the engine's images.
pub(crate) fn take_all(window: &mut Window, images: &Images) -> fsnap::Result<()> {
    let engine = window.pending().engine.as_ref().map_or(criu::NAME, |engine| &engine.name);
    fsnap::engine::complete(engine, images)?;
    window.take(true, || Ok(None))?;
    failpoint::hit("hook:taken");
    images.write_record(&record(window))?;
    failpoint::hit("hook:written");
    Ok(())
}

/// Undoes that, because of `error`, which is returned with what went wrong in the undoing.
pub(crate) fn take_back(window: Window, images: &Images, error: Error) -> Error {
    window.give_up(error.and_undo(images.remove_record().map_err(Error::from)))
}

/// A full disk under the engine's log is no reason to call the checkpoint a failure.
///
/// Said before the note appears: nothing may come after that.
fn say_id(call: &HookCall, id: CheckpointId) {
    let _ = Output::new().line(id);
    if call.name == fsnap::engine::GENERIC {
        generic::answer(call, Ok(Some(id)));
    }
}

/// What is left beside the engine's images.
pub(super) fn record(window: &Window) -> ImageRecord {
    let members = window.taken().into_iter().flat_map(|taken| &taken.members).map(|member| MemberRecord {
        volume: member.volume.to_string(),
        path: member.path.0.clone(),
        backend: member.backend.clone(),
        store: member.store.clone(),
        identity: member.identity.clone(),
        at: member.snapshot.at.clone(),
        snapshot: member.snapshot.identity.clone(),
    });
    ImageRecord::new(window.pending().id.to_string(), members.collect())
}

/// A restore begins: refuse the wrong files.
pub(crate) fn check(context: &Context, call: &HookCall) -> Outcome {
    let coordinator = context.read()?;
    match coordinator.check_restore(&call.images)? {
        Some(id) => say_id(call, id),
        None => say("note", "these images belong to no checkpoint of fsnap: their files are not checked"),
    }
    Ok(())
}

pub(crate) fn images(call: &HookCall) -> EngineImages {
    EngineImages { name: call.name.into(), images: PathText(call.images.path().to_owned()) }
}
