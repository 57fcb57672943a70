//! `fsnap restore`

use std::ffi::OsString;

use fsnap::branch::Branch;
use fsnap::coordinator::{Coordinator, RestoreRequest};
use fsnap::engine::{PidSpace, Restored};
use fsnap::name::Name;
use fsnap::run::{Restores, RunRecord};
use fsnap::{Error, reference};
use serde_json::json;

use super::branch::free_name;
use super::output::processes::tell_lost_locks;
use super::process::interrupt::{Interrupts, undone};
use super::{Context, Failure, Outcome, Output, environment, internal, json};

/// Restore a checkpoint's processes onto a new branch with the files of the same instant
///
/// The branch is mounted over the volume's path in a mount namespace of its own, and the engine's restore runs in it.
/// The processes get their old pids in a pid namespace of their own, so that one checkpoint can be restored many times
/// side by side. It returns when they run; end them by killing the namespace's first process, whose pid is printed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint: an id, a prefix of one, a tag, @latest, or X~N
    #[arg(value_name = "CKPT")]
    checkpoint: String,
    /// The name of the new branch; one is made up, if not given
    #[arg(long, value_name = "NAME")]
    branch: Option<Name>,
    /// Take back the pids on this machine, instead of a pid namespace
    #[arg(long)]
    host_pids: bool,
    /// Wait until the restored processes have ended
    #[arg(long)]
    wait: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    /// Further arguments for the engine's restore, after --
    #[arg(last = true, value_name = "ENGINE ARGS")]
    args: Vec<OsString>,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = context.write()?;
    let checkpoint = reference::resolve(coordinator.catalog(), &args.checkpoint)?;
    if let Some(run) = RunRecord::of_images(&coordinator.images_of(&checkpoint)?)? {
        return Err(Error::IsOfARun { id: checkpoint.id, name: run.name }.into());
    }
    let name = match args.branch {
        Some(name) => name,
        None => free_name(&coordinator, &checkpoint.id)?,
    };
    let criu = environment::find_criu(&context.config)?;
    let interrupts = Interrupts::new()?;
    let place = Restores::of(&context.state).create(&name, None)?;
    let request = RestoreRequest {
        checkpoint: &checkpoint,
        branch: &name,
        criu: &criu,
        args: &args.args,
        stage: &internal::stage_command(),
        pids: if args.host_pids { PidSpace::Host } else { PidSpace::New },
        place: &place,
        run: None,
    };
    let restored = restore(&coordinator, &request, &interrupts, args.json);
    interrupts.release();
    let restored = restored?;
    tell_lost_locks(&coordinator, &checkpoint)?;
    if args.wait {
        restored.wait();
    }
    Ok(())
}

fn restore(
    coordinator: &Coordinator,
    request: &RestoreRequest<'_>,
    interrupts: &Interrupts,
    as_json: bool,
) -> Result<Restored, Failure> {
    let what = format!("the branch {}", request.branch);
    let (branch, mut restored) = match coordinator.restore(request, &|| interrupts.hold(&what, None)) {
        Ok(restored) => restored,
        // The next command tries again to remove the branch.
        Err(error @ Error::Several(_)) => return Err(error.into()),
        Err(error) => return Err(error.and_undo(request.place.discard()).into()),
    };
    if interrupts.waits() {
        let ended = restored.kill();
        ended.map_err(|source| Error::Io { action: "end", object: "the restored processes".into(), source })?;
        coordinator.remove_branch(&branch.name)?;
        request.place.discard()?;
        return Err(undone(&what));
    }
    let told = tell(coordinator, &branch, &restored, as_json);
    // Not before it was told which processes those are. When they go on, nobody undoes them.
    request.place.told()?;
    restored.keep()?;
    // What cannot be removed now goes with the next command.
    let _ = request.place.discard();
    told?;
    Ok(restored)
}

fn tell(coordinator: &Coordinator, branch: &Branch, restored: &Restored, as_json: bool) -> Outcome {
    let out = Output::new();
    if as_json {
        let mut object = json::branch(&coordinator.shown(), branch);
        object["init"] = json!(restored.init.pid);
        object["pid"] = json!(restored.root.map(|root| root.pid));
        return out.json(&object);
    }
    let root = restored.root.map_or_else(|| "which has ended already".into(), |root| root.pid.to_string());
    out.line(format_args!("restored onto branch {}: process {root}, under {}", branch.name, restored.init.pid))?;
    branch.members.iter().try_for_each(|member| out.line(&member.path))
}
