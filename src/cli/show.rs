//! `fsnap show`

use fsnap::checkpoint::Checkpoint;
use fsnap::name::Name;
use fsnap::reference;

use super::{Context, Outcome, Output, json};

/// Show one checkpoint: its volumes, their consistency, and what is not in it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint: an id, a prefix of one, a tag, @latest, or X~N
    #[arg(value_name = "CKPT")]
    checkpoint: String,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.read()?;
    let checkpoint = reference::resolve(coordinator.catalog(), &args.checkpoint)?;
    let tags = coordinator.catalog().tags_of(&checkpoint.id)?;
    let out = Output::new();
    if args.json { out.json(&json::checkpoint(&checkpoint, &tags)) } else { print(&out, &checkpoint, &tags) }
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
    Ok(())
}
