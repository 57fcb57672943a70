//! `fsnap hook`

use std::thread::JoinHandle;
use std::time::Duration;

use fsnap::catalog::PendingCheckpoint;
use fsnap::checkpoint::{EngineImages, PathText};
use fsnap::coordinator::{Coordinator, Request, Target, Window, writers_in};
use fsnap::engine::criu::{self, HookCall};
use fsnap::engine::{ImageRecord, MemberRecord, Phase};
use fsnap::processes::{Census, ProcessId, Tree};
use fsnap::{Error, failpoint};

use super::failure::say;
use super::{Context, Failure, Outcome, Output, environment};

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
    /// processes. An action that needs nothing done succeeds.
    Criu,
}

pub(crate) fn run(args: Args) -> Outcome {
    match args.engine {
        Engine::Criu => criu(),
    }
}

/// Does what CRIU's call asks for.
pub(crate) fn criu() -> Outcome {
    let Some(call) = HookCall::parse(|name| std::env::var_os(name), environment::parent())? else { return Ok(()) };
    match call.phase {
        Phase::Starting => start(&Context::load()?, &call),
        Phase::Frozen => {
            // Side by side with all that comes before the snapshots: the processes stand already.
            let census = std::thread::spawn(Census::take);
            take(&Context::load()?, &call, census)
        }
        Phase::Restoring => check(&Context::load()?, &call),
        Phase::Restored | Phase::Resumed => Ok(()),
    }
}

/// The processes run: plan, and do all that can be done ahead.
fn start(context: &Context, call: &HookCall) -> Outcome {
    let coordinator = context.write()?;
    let images = images(call);
    let Some(pid) = call.tree else { return Ok(()) };
    if let Some(begun) = coordinator.begun_in(&images)? {
        // Called twice for one dump: once more ahead.
        coordinator.prime(&begun)?;
        return Output::new().line(begun.pending().id);
    }
    let Some(targets) = targets(context, &coordinator, pid)? else {
        say("note", "the processes can write to no registered volume: nothing to take a snapshot of");
        return Ok(());
    };
    if let Some(target) = targets.iter().find(|target| call.images.path().starts_with(target.path.as_path())) {
        let (images, volume, path) = (images.images, target.volume.clone(), target.path.clone());
        return Err(Error::ImagesInVolume { images, volume, path }.into());
    }
    let begun = coordinator.begin(Request {
        targets,
        engine: Some(images),
        owner: Some(call.engine),
        tree: Some(ProcessId::of(pid)?),
        ..Request::default()
    })?;
    Output::new().line(begun.pending().id)
}

/// The volumes that are named for hooks, or those that the processes can write to; `None` if there are none.
fn targets(context: &Context, coordinator: &Coordinator, pid: i32) -> Result<Option<Vec<Target>>, Failure> {
    let named = environment::volumes(&context.config);
    if !named.is_empty() {
        return Ok(Some(coordinator.targets_named(&named)?));
    }
    match coordinator.targets_reached(&Tree::of_pid(pid)?) {
        Err(Error::NothingToTake { .. }) => Ok(None),
        targets => Ok(Some(targets?)),
    }
}

/// The processes stand: take the snapshots, and leave all else for later.
fn take(context: &Context, call: &HookCall, census: JoinHandle<fsnap::processes::Result<Census>>) -> Outcome {
    give_up_after(context.config.hook.deadline());
    let Some(pid) = call.tree else { return Ok(()) };
    failpoint::hit("hook:frozen");
    let images = images(call);
    let Some(mut window) = Window::reopen(&context.state, &images)? else {
        // Nothing was begun if there was nothing to take; anything else is a mistake that must not pass for a checkpoint.
        return match targets(context, &context.look()?, pid)? {
            None => Ok(()),
            Some(_) => Err(Error::NotBegun { engine: call.engine.to_string(), images: images.images }.into()),
        };
    };
    let id = window.pending().id;
    if window.taken().is_some() {
        return Output::new().line(id);
    }
    let ignore = [call.engine.pid, environment::parent()];
    let outside = move |pending: &PendingCheckpoint| {
        let census = census.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let tree = Tree::of_standing(&census, pid)?;
        writers_in(&census, pending, &tree, &ignore)
    };
    let taken = criu::complete(&call.images).map_err(Error::from).and_then(|()| {
        window.take(true, outside)?;
        failpoint::hit("hook:taken");
        Ok(call.images.write_record(&record(&window))?)
    });
    if let Err(error) = taken {
        let error = error.and_undo(call.images.remove_record().map_err(Error::from));
        return Err(window.give_up(error).into());
    }
    failpoint::hit("hook:written");
    window.leave();
    Output::new().line(id)
}

/// What is left beside the engine's images.
fn record(window: &Window) -> ImageRecord {
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
fn check(context: &Context, call: &HookCall) -> Outcome {
    let coordinator = context.read()?;
    match coordinator.check_restore(&call.images)? {
        Some(id) => Output::new().line(id),
        None => {
            say("note", "these images belong to no checkpoint of fsnap: their files are not checked");
            Ok(())
        }
    }
}

fn images(call: &HookCall) -> EngineImages {
    EngineImages { name: criu::NAME.into(), images: PathText(call.images.path().to_owned()) }
}

/// Ends the process after `deadline`, whatever it is doing: as long as it lives, the application stands.
///
/// What was taken so far is undone by the next command.
fn give_up_after(deadline: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(deadline);
        let what = "taking the snapshots".to_owned();
        Failure::Error(Error::Deadline { what, seconds: deadline.as_secs_f64() }).report();
        std::process::exit(1);
    });
}
