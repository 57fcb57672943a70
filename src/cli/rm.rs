//! `fsnap rm`

use fsnap::Error;
use fsnap::name::Name;
use fsnap::reference;
use fsnap::run::Runs;

use super::{Context, Outcome};

/// Remove checkpoints, a branch, an ended run, or a volume from fsnap's care
///
/// A checkpoint is kept while branches that grew from it exist. A removed branch's files are deleted. A removed
/// volume's own files are not touched, and its checkpoints stay.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub(crate) struct Args {
    /// The checkpoints to remove; none goes if one is still needed
    #[arg(value_name = "CKPT", group = "what")]
    checkpoints: Vec<String>,
    /// Remove this branch and its files
    #[arg(long, value_name = "NAME", group = "what")]
    branch: Option<Name>,
    /// Forget this volume; its files and checkpoints stay
    #[arg(long, value_name = "NAME", group = "what")]
    volume: Option<Name>,
    /// Remove what is left of this run: its record and its log; its branch stays
    #[arg(long, value_name = "NAME", group = "what")]
    run: Option<Name>,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    if let Some(name) = &args.run {
        return remove_run(&context, name);
    }
    let coordinator = context.write()?;
    // All are looked up before the first is removed: a typing error removes nothing, and `@latest` means one thing.
    let found = args.checkpoints.iter().map(|text| reference::resolve(coordinator.catalog(), text));
    let found = found.collect::<fsnap::Result<Vec<_>>>()?;
    // So is what is still needed: all go, or none.
    coordinator.check_removable(&found)?;
    let mut removed = std::collections::BTreeSet::new();
    for checkpoint in &found {
        if removed.insert(checkpoint.id) {
            coordinator.remove_checkpoint(&checkpoint.id)?;
        }
    }
    if let Some(name) = &args.branch {
        coordinator.remove_branch(name)?;
    }
    if let Some(name) = &args.volume {
        coordinator.unregister(name)?;
    }
    Ok(())
}

fn remove_run(context: &Context, name: &Name) -> Outcome {
    let runs = Runs::of(&context.state);
    let was_there = !matches!(runs.get(name), Err(Error::NoSuchRun { .. }));
    // One whose start was cut short has a branch as well: both go now, and that is said.
    context.write()?;
    match runs.remove(name) {
        Err(Error::NoSuchRun { .. }) if was_there => Ok(()),
        removed => Ok(removed?),
    }
}
