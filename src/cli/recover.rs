//! `fsnap recover`

use fsnap::catalog::Access;
use fsnap::coordinator::{Coordinator, Recovered};
use serde_json::json;

use super::{Context, Failure, Outcome, Output};

/// Finish or undo what a killed fsnap or engine left half done
///
/// Every command does the same when it starts; this one says what it did. Images that fsnap did not record are never
/// touched. Exits with 1 if something had to be left as it is.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = Coordinator::open(&context.state, Access::Write, std::time::Duration::from_secs(30))?;
    let recovered = coordinator.recover()?;
    let told: Vec<(&str, String)> = recovered
        .iter()
        .map(|one| match one {
            Recovered::Sealed(id) => ("sealed", format!("checkpoint {}", id.short())),
            Recovered::Undone(id) => ("undone", format!("checkpoint {}", id.short())),
            Recovered::BranchRemoved(name) => ("undone", format!("branch {name}")),
            Recovered::Removed => ("finished", "a removal".into()),
            Recovered::Mounted(name) => ("mounted", format!("branch {name}")),
            Recovered::Postponed { what, error } => ("postponed", format!("{what}: {error}")),
        })
        .collect();
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
