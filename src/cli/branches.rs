//! `fsnap branches`

use super::{Context, Outcome, Output, json};

/// List the branches, the checkpoint each grew from, and where its files are
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.read()?;
    let branches = coordinator.catalog().branches()?;
    let (out, shown) = (Output::new(), coordinator.shown());
    if args.json {
        return out.json(&branches.iter().map(|branch| json::branch(&shown, branch)).collect::<Vec<_>>());
    }
    let rows = branches.iter().flat_map(|branch| {
        branch.members.iter().map(|member| {
            vec![
                branch.name.to_string(),
                branch.checkpoint.short(),
                out.time(branch.time),
                member.volume.to_string(),
                match shown.files_of(branch, member) {
                    Some(files) => fsnap::printable(files.as_os_str()),
                    None => "(not mounted)".to_owned(),
                },
            ]
        })
    });
    out.table(&["NAME", "CHECKPOINT", "MADE", "VOLUME", "PATH"], &rows.collect::<Vec<_>>())
}
