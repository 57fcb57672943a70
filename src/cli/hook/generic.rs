//! `fsnap hook generic`: the door for engines that fsnap does not know.

use std::path::PathBuf;

use fsnap::catalog::Access;
use fsnap::checkpoint::CheckpointId;
use fsnap::engine::criu::HookCall;
use fsnap::engine::{ANSWER_NAME, GENERIC, Images, Phase};
use serde_json::json;

use super::super::{Context, Failure, Outcome, environment, say};
use super::attendant;

/// The newest version of the answer.
const VERSION: u32 = 1;

/// Any engine's hook: called at each step of a dump or a restore, with the tree's root and the directory of images
///
/// A dump is: starting (the processes run), frozen (they are, and the images are complete), and then resumed or failed. A
/// restore is: restoring, restored. What fsnap answered is in fsnap_hook.json in the directory; the exit code
/// decides. The engine must call frozen again only after starting.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the engine stands
    #[arg(value_enum, hide_possible_values = true)]
    step: Step,
    /// The root of the process tree; needed for a dump
    #[arg(long, value_name = "PID", required_if_eq_any = [("step", "starting"), ("step", "frozen")])]
    tree: Option<i32>,
    /// The engine's directory of images
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The engine's process, which lives from starting to the end of the dump; the caller, if not given
    #[arg(long, value_name = "PID")]
    engine: Option<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Step {
    Starting,
    Frozen,
    Resumed,
    Failed,
    Restoring,
    Restored,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let call = call(args)?;
    let done = act(&call);
    if let Err(failure) = &done {
        answer(&call, Err(&failure.to_text()));
    }
    done
}

fn call(args: &Args) -> Result<HookCall, Failure> {
    let phase = match args.step {
        Step::Starting => Phase::Starting,
        Step::Frozen => Phase::Frozen,
        Step::Restoring => Phase::Restoring,
        Step::Restored => Phase::Restored,
        Step::Resumed => Phase::Resumed,
        Step::Failed => Phase::Failed,
    };
    // One name for one directory in all calls.
    let path = args.images.canonicalize().unwrap_or_else(|_| args.images.clone());
    let engine = args.engine.unwrap_or_else(environment::parent);
    Ok(HookCall { name: GENERIC, phase, images: Images::open(&path)?, tree: args.tree, engine })
}

fn act(call: &HookCall) -> Outcome {
    let context = Context::for_hook()?;
    // That there was nothing to do is said first: what has an id says it itself, and nothing comes after a note.
    answer(call, Ok(None));
    match call.phase {
        Phase::Starting => super::start(&context, call),
        Phase::Frozen => super::take(&context, call),
        Phase::Restoring => super::check(&context, call),
        Phase::Restored => Ok(()),
        // What was taken is sealed by whoever opens the catalog.
        Phase::Resumed => context.write().map(drop),
        Phase::Failed => undo(&context, call),
    }
}

/// The engine's part has failed: fsnap's is taken back, whether it was finished or not.
fn undo(context: &Context, call: &HookCall) -> Outcome {
    let images = super::images(call);
    attendant::dismiss(&context.state, &images);
    // Not recovered: that would seal it.
    let coordinator = context.open(Access::Write)?;
    let record = call.images.record();
    let id = record.as_ref().ok().and_then(|record| record.as_ref()?.checkpoint.parse().ok());
    coordinator.take_back(&images, id)?;
    if record?.is_some() {
        call.images.remove_record()?;
    }
    Ok(())
}

/// Leaves the answer beside the images; one that cannot be written is none to fail for.
pub(crate) fn answer(call: &HookCall, result: Result<Option<CheckpointId>, &str>) {
    let text = json!({
        "version": VERSION,
        "call": call.phase.to_string(),
        "ok": result.is_ok(),
        "checkpoint": result.ok().flatten(),
        "error": result.err().map(str::trim_end),
    });
    if let Err(error) = call.images.write(ANSWER_NAME, format!("{text:#}\n").as_bytes()) {
        say("warning", &error.to_string());
    }
}
