//! `fsnap init`

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use fsnap::coordinator::Registration;
use fsnap::name::Name;
use fsnap::stores::KINDS;
use fsnap_backend::Capabilities;
use serde_json::json;

use super::{Context, Outcome, Output, json, say};

/// Begin to track a directory as a volume
///
/// From then on, checkpoints take a snapshot of it. The directory itself is not changed. Its snapshots are kept in a
/// store on the same file system where possible: on btrfs in the subvolume `.fsnap` at the root of the mount; else in a
/// directory beside it. What the snapshots cannot keep is said.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory; for btrfs, a subvolume
    dir: PathBuf,
    /// The volume's name; the directory's, if not given
    #[arg(long)]
    name: Option<Name>,
    /// What keeps the snapshots; auto is the first that can hold the directory
    #[arg(long, default_value = "auto", value_parser = kinds())]
    backend: String,
    /// Where the snapshots are kept, outside the directory
    #[arg(long, value_name = "PLACE")]
    store: Option<PathBuf>,
    /// Print the volume as JSON
    #[arg(long)]
    json: bool,
}

fn kinds() -> PossibleValuesParser {
    PossibleValuesParser::new(["auto"].into_iter().chain(KINDS.iter().map(|kind| kind.name)))
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.create()?;
    let wanted = Registration { dir: args.dir, name: args.name, backend: Some(args.backend), store: args.store };
    let registered = coordinator.register(wanted)?;
    // The last takes any directory, and more time than those before it.
    let is_last = KINDS.last().is_some_and(|last| last.name == registered.store.store().kind);
    if is_last && !registered.passed_over.is_empty() {
        let dir = &registered.volume.path;
        say("note", &format!("`fsnap doctor {dir}` tells why other backends cannot hold it"));
    }
    for limit in limits(&registered.store.store().capabilities) {
        say("note", limit);
    }
    let (volume, kind) = (&registered.volume, registered.store.store().kind);
    let out = Output::new();
    if args.json {
        let object = json!({ "name": volume.name, "backend": kind, "store": registered.place.to_string_lossy() });
        return out.json(&json::with_path(object, "path", volume.path.as_path()));
    }
    let place = fsnap::printable(registered.place.as_os_str());
    out.line(format_args!("volume {} at {}: {kind} snapshots in {place}", volume.name, volume.path))
}

/// What a store does not keep or cannot do, and its user may take for granted.
fn limits(can: &Capabilities) -> Vec<&'static str> {
    let limits = [
        (can.xattrs, "its snapshots keep no extended attributes, and so no file capabilities"),
        (can.acls, "its snapshots keep no ACLs"),
        (can.ownership, "its snapshots keep no owners and no device nodes"),
        (
            can.clones || !can.mountable,
            "its branches are overlays over the snapshots, which the kernel's overlayfs makes",
        ),
        (can.clones || can.mountable, "its branches are seen where `fsnap mount` shows them"),
    ];
    limits.into_iter().filter(|(kept, _)| !kept).map(|(_, limit)| limit).collect()
}
