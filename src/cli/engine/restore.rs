//! `fsnap engine RUNTIME restore`

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use fsnap::branch::Branch;
use fsnap::coordinator::Coordinator;
use fsnap::engine::Images;
use fsnap::engine::bundle::{Bundle, Move};
use fsnap::name::Name;
use fsnap::{Error, reference};
use serde_json::json;

use super::super::output::json::{branch as branch_json, with_path};
use super::super::{Context, Failure, Outcome, Output};
use super::runtime::Container;
use super::{Kind, Runtime, failed};

/// Restore a container's checkpoint as a second container, on a new branch, beside the first
///
/// The branch gets the container's name. The new container's configuration is the first one's, with the branch's directories where the first
/// one's lie in a volume; it is in `bundles` of the state directory, beside a log of what the container says to a pipe.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The checkpoint: an id, a prefix of one, a tag, @latest, or X~N
    #[arg(value_name = "CKPT")]
    checkpoint: String,
    /// The name of the new container, and of its branch
    #[arg(long, value_name = "NAME")]
    name: Name,
    /// The first container's bundle; needed where the checkpoint was not taken by `fsnap engine`, which keeps its configuration
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Where the runtime keeps the state of its containers
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    /// Further arguments for the runtime's restore, after --
    #[arg(last = true, value_name = "RUNTIME ARGS")]
    args: Vec<OsString>,
}

pub(super) fn run(kind: Kind, args: &Args) -> Outcome {
    let context = Context::load()?;
    let runtime = Runtime::find(kind, args.root.as_deref(), &context)?;
    let coordinator = context.write()?;
    let checkpoint = reference::resolve(coordinator.catalog(), &args.checkpoint)?;
    let images = coordinator.images_of(&checkpoint)?;
    let first = args.first(&images)?;
    let branch = coordinator.branch(&checkpoint, &args.name)?;
    let moves = checkpoint.members.iter().map(|member| {
        let grown = branch.members.iter().find(|grown| grown.volume == member.volume);
        let files = grown.and_then(|grown| coordinator.shown().files_of(&branch, grown));
        let to = files.ok_or_else(|| Error::NotShown { name: branch.name.clone() })?;
        Ok(Move { from: member.path.0.clone(), to })
    });
    let restored = moves.collect::<fsnap::Result<Vec<_>>>().and_then(|moves| {
        let cannot = |error: fsnap::engine::bundle::NotMoved| fsnap::engine::Error::Restore {
            step: format!("make the container {}", args.name),
            reason: error.to_string(),
        };
        let bundle = first.moved(&moves).map_err(cannot)?;
        args.restore(&runtime, &bundle, &images, &place(&context.state, &args.name))
    });
    let container = match restored {
        Ok(container) => container,
        Err(error) => return Err(error.and_undo(coordinator.remove_branch(&branch.name)).into()),
    };
    sweep(&coordinator, &context.state)?;
    args.tell(&coordinator, &branch, &container, &place(&context.state, &args.name))
}

impl Args {
    /// What the first container is made of.
    fn first(&self, images: &Images) -> Result<Bundle, Failure> {
        if let Some(dir) = &self.bundle {
            return Ok(Bundle::open(&dir.canonicalize().map_err(failed("find the bundle", dir))?)?);
        }
        let none = || fsnap::engine::Error::Bundle {
            dir: images.path().into(),
            reason: "no configuration was kept there: name the first container's bundle by --bundle".into(),
        };
        Ok(Bundle::kept(images)?.ok_or_else(none)?)
    }

    fn restore(
        &self,
        runtime: &Runtime<'_>,
        bundle: &Bundle,
        images: &Images,
        place: &Path,
    ) -> fsnap::Result<Container> {
        let make =
            |source| Error::Io { action: "make the bundle", object: fsnap::printable(place.as_os_str()), source };
        remove(place)?;
        let made = fs::create_dir_all(place).and_then(|()| bundle.write(place)).map_err(make);
        let restored =
            made.and_then(|()| runtime.restore(self.name.as_str().as_ref(), (place, images.path(), place), &self.args));
        restored.map_err(|error| error.and_undo(remove(place)))
    }

    fn tell(&self, coordinator: &Coordinator, branch: &Branch, container: &Container, place: &Path) -> Outcome {
        let (out, shown) = (Output::new(), coordinator.shown());
        if self.json {
            let mut object = with_path(branch_json(&shown, branch), "bundle", place);
            object["container"] = json!(self.name);
            object["pid"] = json!(container.pid);
            return out.json(&object);
        }
        out.line(format_args!(
            "restored onto branch {}: container {}, process {}",
            branch.name, self.name, container.pid
        ))?;
        branch.members.iter().try_for_each(|member| out.line(&member.path))
    }
}

/// Where the bundle of a branch's container is.
fn place(state: &Path, name: &Name) -> PathBuf {
    state.join("bundles").join(name.as_str())
}

fn remove(place: &Path) -> fsnap::Result<()> {
    match fs::remove_dir_all(place) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { action: "remove", object: fsnap::printable(place.as_os_str()), source })
        }
        _ => Ok(()),
    }
}

/// Removes the bundles whose branches are gone.
fn sweep(coordinator: &Coordinator, state: &Path) -> fsnap::Result<()> {
    let branches = coordinator.catalog().branches()?;
    let bundles = fs::read_dir(state.join("bundles")).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_needed = |path: &Path| branches.iter().any(|branch| path.file_name() == Some(branch.name.as_str().as_ref()));
    bundles.filter(|path| !is_needed(path)).try_for_each(|path| remove(&path))
}
