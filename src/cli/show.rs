//! `fsnap show`

use fsnap::checkpoint::Checkpoint;
use fsnap::name::Name;
use fsnap::reference;

use super::output::processes;
use super::{Context, Outcome, Output, audit, json};

/// Show one checkpoint: its volumes, their consistency, and what is not in it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint: an id, a prefix of one, a tag, @latest, or X~N
    #[arg(value_name = "CKPT")]
    checkpoint: String,
    /// Show its processes instead, as they stood: their descriptors, and the files that they had mapped
    #[arg(long)]
    processes: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.read()?;
    let checkpoint = reference::resolve(coordinator.catalog(), &args.checkpoint)?;
    let tags = coordinator.catalog().tags_of(&checkpoint.id)?;
    let tree = coordinator.catalog().tree(&checkpoint.id)?;
    let out = Output::new();
    if args.processes {
        let tree = tree.ok_or(fsnap::Error::NoProcesses { id: checkpoint.id })?;
        return if args.json { out.json(&json::processes(&tree)) } else { processes::print(&out, &tree) };
    }
    if args.json {
        let mut object = json::checkpoint(&checkpoint, &tags);
        json::add_outside(&mut object, tree.as_ref());
        return out.json(&object);
    }
    print(&out, &checkpoint, &tags)?;
    match tree {
        Some(tree) if !tree.outside.is_empty() || tree.ignored > 0 || tree.cut_off => {
            out.line("")?;
            audit::outside(&out, &tree)
        }
        _ => Ok(()),
    }
}

fn print(out: &Output, checkpoint: &Checkpoint, tags: &[Name]) -> Outcome {
    out.line(format_args!("checkpoint {}", checkpoint.id))?;
    if let Some(parent) = checkpoint.parent {
        out.line(format_args!("parent     {parent}"))?;
    }
    if let Some(branch) = &checkpoint.branch {
        out.line(format_args!("branch     {branch}"))?;
    }
    out.line(format_args!("time       {}", out.time(checkpoint.time)))?;
    if !tags.is_empty() {
        out.line(format_args!("tags       {}", tags.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")))?;
    }
    if let Some(engine) = &checkpoint.engine {
        out.line(format_args!("engine     {}, images in {}", engine.name, engine.images))?;
    }
    for line in checkpoint.message.lines() {
        out.line(format_args!("message    {}", fsnap::printable(line.as_ref())))?;
    }
    for member in &checkpoint.members {
        out.line("")?;
        out.line(format_args!("volume {} at {}", member.volume, member.path))?;
        out.line(format_args!("  backend      {}", member.backend))?;
        out.line(format_args!("  snapshot     {}", member.snapshot.at))?;
        out.line(format_args!("  consistency  {}", member.consistency))?;
        for writer in &member.writers {
            out.line(format_args!("  also written by {}", fsnap::printable(writer.as_ref())))?;
        }
        for omission in &member.snapshot.omissions {
            out.line(format_args!("  not kept: {}: {}", fsnap::printable(omission.path.as_ref()), omission.reason))?;
        }
    }
    if !checkpoint.kept.is_empty() {
        out.line("\nfiles in use that had no name:")?;
    }
    for kept in &checkpoint.kept {
        let path = &kept.place.path;
        match (&kept.lost, &kept.external) {
            (Some(reason), _) => out.line(format_args!("  {path}: not kept: {reason}"))?,
            (None, Some(_)) => out.line(format_args!("  {path}: {} bytes, kept here alone", kept.attributes.size))?,
            (None, None) => out.line(format_args!("  {path}: {} bytes", kept.attributes.size))?,
        }
    }
    Ok(())
}
