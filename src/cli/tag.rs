//! `fsnap tag`

use fsnap::name::Name;
use fsnap::{Error, reference};

use super::{Context, Outcome};

/// Give a checkpoint a name
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint: an id, a prefix of one, a tag, @latest, or X~N; with --delete, the tag
    #[arg(value_name = "CKPT")]
    checkpoint: String,
    /// The tag
    #[arg(required_unless_present = "delete")]
    name: Option<Name>,
    /// Move the tag here if another checkpoint has it
    #[arg(long)]
    force: bool,
    /// Remove the tag
    #[arg(long, conflicts_with_all = ["name", "force"])]
    delete: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.write()?;
    let catalog = coordinator.catalog();
    let Some(tag) = args.name else {
        let tag: Name = args.checkpoint.parse().map_err(Error::from)?;
        if coordinator.untag(&tag)? {
            return Ok(());
        }
        return Err(Error::NoSuchTag { name: tag.into(), near: reference::tag_names(catalog)? }.into());
    };
    let checkpoint = reference::resolve(catalog, &args.checkpoint)?;
    match coordinator.tag(&tag, &checkpoint.id, args.force)? {
        None => Ok(()),
        Some(other) => {
            let by = Some(format!("it names checkpoint {}; move it with --force", other.short()));
            Err(Error::NameTaken { what: "the tag", name: tag, by }.into())
        }
    }
}
