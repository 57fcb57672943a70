//! `fsnap recover`

use fsnap::catalog::Access;
use fsnap::coordinator::Recovered;
use fsnap::run::sweep_images;
use serde_json::json;

use super::environment::LOST_END;
use super::{Context, Failure, Outcome, Output};

/// Finish or undo what a killed fsnap or engine left half done
///
/// Every command does the same when it starts; this one says what it did. It also removes process images that no checkpoint
/// needs, and names the snapshots and clones in the stores that fsnap did not record; they are never touched. Exits with 1 if something had to be left half done.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.open(Access::Write)?;
    let recovered = coordinator.recover()?;
    let mut told: Vec<(&str, String)> = recovered
        .iter()
        .map(|one| match one {
            Recovered::Sealed(id) => ("sealed", format!("checkpoint {}", id.short())),
            Recovered::Undone(id) => ("undone", format!("checkpoint {}", id.short())),
            Recovered::BranchRemoved(name) => ("undone", format!("branch {name}")),
            Recovered::BranchFinished(name) => ("finished", format!("branch {name}")),
            Recovered::Removed => ("finished", "a removal".into()),
            Recovered::RunUndone(name) => ("undone", format!("run {name}")),
            Recovered::RestoreUndone(name) => ("undone", format!("restore onto branch {name}")),
            Recovered::Mounted(name) => ("mounted", format!("branch {name}")),
            Recovered::Forgotten { what } => ("forgotten", format!("{what}: {LOST_END}")),
            Recovered::Postponed { what, error } => ("postponed", format!("{what}: {error}")),
        })
        .collect();
    match sweep_images(coordinator.catalog())? {
        0 => {}
        1 => told.push(("removed", "a process image that no checkpoint needs".into())),
        several => told.push(("removed", format!("{several} process images that no checkpoint needs"))),
    }
    told.extend(coordinator.strays()?.iter().map(|stray| ("unknown", stray.to_string())));
    let out = Output::new();
    if args.json {
        out.json(&told.iter().map(|(done, what)| json!({ "done": done, "what": what })).collect::<Vec<_>>())?;
    } else if told.is_empty() {
        out.line("nothing is half done")?;
    } else {
        told.iter().try_for_each(|(done, what)| out.line(format_args!("{done}: {what}")))?;
    }
    let postponed = recovered.iter().any(|one| matches!(one, Recovered::Postponed { .. }));
    if postponed { Err(Failure::Reported) } else { Ok(()) }
}
