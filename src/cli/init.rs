//! `fsnap init`

use std::path::PathBuf;

use fsnap::coordinator::Registration;
use fsnap::name::Name;
use fsnap_backend::Capabilities;
use serde_json::json;

use super::failure::say;
use super::{Context, Outcome, Output};

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
    /// What keeps the snapshots: auto, btrfs, nilfs2, rsync
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Where the snapshots are kept, outside the directory
    #[arg(long, value_name = "PLACE")]
    store: Option<PathBuf>,
    /// Print the volume as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.write()?;
    let wanted = Registration { dir: args.dir, name: args.name, backend: Some(args.backend), store: args.store };
    let registered = coordinator.register(wanted)?;
    for (kind, why) in &registered.passed_over {
        say("note", &format!("not {kind}: {why}"));
    }
    for limit in limits(&registered.store.store().capabilities) {
        say("note", limit);
    }
    let (volume, kind) = (&registered.volume, registered.store.store().kind);
    let out = Output::new();
    if args.json {
        return out.json(&json!({
            "name": volume.name,
            "path": volume.path.as_path().to_string_lossy(),
            "backend": kind,
            "store": registered.place.to_string_lossy(),
        }));
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
        (can.clones, "its branches are overlays over the snapshots, which the kernel's overlayfs makes"),
    ];
    limits.into_iter().filter(|(kept, _)| !kept).map(|(_, limit)| limit).collect()
}
