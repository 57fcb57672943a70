//! `fsnap diff`

use fsnap::coordinator::Side;
use fsnap::processes::process_changes;
use fsnap::reference;
use serde_json::json;

use super::output::processes;
use super::{Context, Failure, Outcome, Output, json, say};

/// List the files that differ between two checkpoints, or between a checkpoint and now
///
/// A was added, D was removed, M has another content, a has other attributes only.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The older checkpoint: an id, a prefix of one, a tag, @latest, or X~N
    #[arg(value_name = "A")]
    old: String,
    /// The newer checkpoint; the files as they are now, if not given
    #[arg(value_name = "B")]
    new: Option<String>,
    /// List what differs between the processes instead
    ///
    /// + was started, - has ended, o opened a file, c closed one, d has another working directory.
    #[arg(long, requires = "new")]
    processes: bool,
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.read()?;
    let catalog = coordinator.catalog();
    let old = reference::resolve(catalog, &args.old)?;
    let new = args.new.as_deref().map(|new| reference::resolve(catalog, new)).transpose()?;
    let out = Output::new();
    if let (true, Some(new)) = (args.processes, &new) {
        let tree = |id| Ok::<_, Failure>(catalog.tree(&id)?.ok_or(fsnap::Error::NoProcesses { id })?);
        let (old, new) = (tree(old.id)?, tree(new.id)?);
        let changes = process_changes(&old, &new);
        if args.json {
            return out.json(&changes.iter().map(json::process_change).collect::<Vec<_>>());
        }
        return changes.iter().try_for_each(|change| out.line(processes::change(change)));
    }
    let mut changes = Vec::new();
    let side = new.as_ref().map_or(Side::Now, Side::Checkpoint);
    let skipped = coordinator.diff(&old, side, &mut |change| changes.push(change))?;
    for volume in skipped {
        let why = if new.is_some() { "is in only one of the two checkpoints" } else { "is tracked no more" };
        say("note", &format!("volume {volume} {why}"));
    }
    if args.json {
        let list: Vec<_> = changes
            .iter()
            .map(|change| {
                let object = json!({ "volume": change.volume, "change": change.kind.word() });
                json::with_path(object, "path", &change.path)
            })
            .collect();
        return out.json(&list);
    }
    changes.iter().try_for_each(|change| out.line(format_args!("{} {}", change.kind.letter(), change.shown())))
}
