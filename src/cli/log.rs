//! `fsnap log`

use std::collections::{BTreeMap, BTreeSet};

use fsnap::checkpoint::{Checkpoint, CheckpointId};
use fsnap::coordinator::Coordinator;
use fsnap::name::Name;
use renderdag::{Ancestor, GraphRowRenderer, Renderer};

use super::{Context, Outcome, Output, json};

/// List the checkpoints, newest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Draw how checkpoints and branches grew from each other
    #[arg(long)]
    graph: bool,
    /// Show at most so many
    #[arg(short = 'n', long, value_name = "COUNT")]
    limit: Option<usize>,
    /// Print an array of JSON objects
    #[arg(long, conflicts_with = "graph")]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.read()?;
    let mut checkpoints = coordinator.catalog().checkpoints()?;
    checkpoints.truncate(args.limit.unwrap_or(usize::MAX));
    let tags = coordinator.catalog().tags()?;
    let tags_of = |id: &CheckpointId| tags.get(id).map_or(&[][..], Vec::as_slice);
    let out = Output::new();
    if args.json {
        let list: Vec<_> = checkpoints.iter().map(|one| json::checkpoint(one, tags_of(&one.id))).collect();
        return out.json(&list);
    }
    let branches = branches_by_checkpoint(&coordinator)?;
    let grown = |id: &CheckpointId| branches.get(id).map_or(&[][..], Vec::as_slice);
    if args.graph {
        return graph(&out, &checkpoints, tags_of, grown);
    }
    let rows = checkpoints.iter().map(|one| {
        let parent = one.parent.map(|parent| parent.short()).unwrap_or_default();
        let volumes = names(one.members.iter().map(|member| &member.volume));
        vec![
            one.id.short(),
            out.time(one.time),
            parent,
            one.branch.as_ref().map(ToString::to_string).unwrap_or_default(),
            volumes,
            decorated(one, tags_of(&one.id), grown(&one.id)),
        ]
    });
    out.table(&["ID", "TIME", "PARENT", "BRANCH", "VOLUMES", "MESSAGE"], rows.collect())
}

fn branches_by_checkpoint(coordinator: &Coordinator) -> fsnap::Result<BTreeMap<CheckpointId, Vec<Name>>> {
    let mut branches: BTreeMap<_, Vec<Name>> = BTreeMap::new();
    for branch in coordinator.catalog().branches()? {
        branches.entry(branch.checkpoint).or_default().push(branch.name);
    }
    Ok(branches)
}

fn names<'a>(names: impl Iterator<Item = &'a Name>) -> String {
    names.map(Name::as_str).collect::<Vec<_>>().join(",")
}

/// The message's first line, with the tags and the branches that grew from the checkpoint in front.
fn decorated(one: &Checkpoint, tags: &[Name], branches: &[Name]) -> String {
    let mut parts = Vec::new();
    if !tags.is_empty() {
        parts.push(format!("({})", names(tags.iter())));
    }
    if !branches.is_empty() {
        parts.push(format!("[{}]", names(branches.iter())));
    }
    parts.extend(one.message.lines().next().map(|line| fsnap::printable(line.as_ref())));
    parts.join(" ")
}

fn graph<'a>(
    out: &Output,
    checkpoints: &[Checkpoint],
    tags_of: impl Fn(&CheckpointId) -> &'a [Name],
    grown: impl Fn(&CheckpointId) -> &'a [Name],
) -> Outcome {
    let shown: BTreeSet<CheckpointId> = checkpoints.iter().map(|one| one.id).collect();
    let mut renderer = GraphRowRenderer::new().output().with_min_row_height(1).build_box_drawing();
    for one in checkpoints {
        let parents = one
            .parent
            .map(|parent| if shown.contains(&parent) { Ancestor::Parent(parent) } else { Ancestor::Anonymous });
        let mut text = format!("{}  {}", one.id.short(), out.time(one.time));
        if let Some(branch) = &one.branch {
            text.push_str(&format!("  on {branch}"));
        }
        let decorated = decorated(one, tags_of(&one.id), grown(&one.id));
        if !decorated.is_empty() {
            text.push_str(&format!("  {decorated}"));
        }
        out.text(&renderer.next_row(one.id, parents.into_iter().collect(), "○".into(), text))?;
    }
    Ok(())
}
