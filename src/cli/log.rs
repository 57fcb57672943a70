//! `fsnap log`

use std::collections::{BTreeMap, BTreeSet};

use fsnap::checkpoint::{Checkpoint, CheckpointId};
use fsnap::coordinator::{Coordinator, time_of};
use fsnap::name::Name;
use fsnap_backend::{Kept, Moment};
use renderdag::{Ancestor, GraphRowRenderer, Renderer};
use serde_json::json;

use super::output::rfc3339;
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
    /// List every past state of this volume that its file system still has, asked for or not
    ///
    /// `fsnap branch VOLUME@cp:N` grows a branch from one. NILFS2 keeps such states; what nobody needs, its cleaner takes.
    #[arg(long, value_name = "VOLUME", conflicts_with = "graph")]
    all: Option<String>,
    /// Print an array of JSON objects
    #[arg(long, conflicts_with = "graph")]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.read()?;
    if let Some(volume) = &args.all {
        return history(&coordinator, volume, &args);
    }
    let (catalog, limit) = (coordinator.catalog(), args.limit.unwrap_or(usize::MAX));
    let tags = catalog.tags()?;
    let tags_of = |id: &CheckpointId| tags.get(id).map_or(&[][..], Vec::as_slice);
    let out = Output::new();
    if args.json {
        return out.json(&catalog.newest(limit, |one| json::checkpoint(&one, tags_of(&one.id)))?);
    }
    let branches = branches_by_checkpoint(&coordinator)?;
    let grown = |id: &CheckpointId| branches.get(id).map_or(&[][..], Vec::as_slice);
    if args.graph {
        return graph(&out, &catalog.newest(limit, |one| one)?, tags_of, grown);
    }
    let row = |one: Checkpoint| {
        let parent = one.parent.map(|parent| parent.short()).unwrap_or_default();
        let volumes = names(one.members.iter().map(|member| &member.volume));
        vec![
            one.id.short(),
            out.time(one.time),
            parent,
            one.branch.as_ref().map(ToString::to_string).unwrap_or_default(),
            volumes,
            decorated(&one, tags_of(&one.id), grown(&one.id)),
        ]
    };
    out.table(&["ID", "TIME", "PARENT", "BRANCH", "VOLUMES", "MESSAGE"], &catalog.newest(limit, row)?)
}

fn history(coordinator: &Coordinator, volume: &str, args: &Args) -> Outcome {
    let mut moments = coordinator.history(volume)?;
    moments.reverse();
    moments.truncate(args.limit.unwrap_or(usize::MAX));
    let recorded = coordinator.catalog().checkpoints()?;
    let of = |moment: &Moment| -> Vec<CheckpointId> {
        let snapshots = moment.kept.snapshots();
        if snapshots.is_empty() {
            return Vec::new();
        }
        let holds = |one: &&Checkpoint| one.members.iter().any(|member| snapshots.contains(&member.snapshot.at));
        recorded.iter().filter(holds).map(|one| one.id).collect()
    };
    let kept = |moment: &Moment| match moment.kept {
        Kept::Not => None,
        Kept::ByStore(_) => Some("fsnap"),
        Kept::ByOthers => Some("others"),
        Kept::ByBoth(_) => Some("fsnap and others"),
    };
    let out = Output::new();
    if args.json {
        let list = moments.iter().map(|moment| {
            Ok(json!({
                "number": moment.number,
                "time": rfc3339(time_of(moment)?),
                "kept_by": kept(moment),
                "same_as_before": moment.same,
                "checkpoints": of(moment),
            }))
        });
        return out.json(&list.collect::<fsnap::Result<Vec<_>>>()?);
    }
    let rows = moments.iter().map(|moment| {
        let ids: Vec<_> = of(moment).iter().map(CheckpointId::short).collect();
        let note = if moment.same { "same as before" } else { "" };
        Ok(vec![
            format!("cp:{}", moment.number),
            out.time(time_of(moment)?),
            kept(moment).unwrap_or_default().to_owned(),
            ids.join(","),
            note.to_owned(),
        ])
    });
    out.table(&["STATE", "TIME", "KEPT BY", "CHECKPOINTS", "NOTE"], &rows.collect::<fsnap::Result<Vec<_>>>()?)
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
