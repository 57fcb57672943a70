//! `fsnap engine RUNTIME restore`

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use fsnap::branch::Branch;
use fsnap::checkpoint::{Checkpoint, PathText};
use fsnap::coordinator::Coordinator;
use fsnap::engine::bundle::{Bundle, Move};
use fsnap::engine::{self, Images, RuntimeKind};
use fsnap::name::Name;
use fsnap::run::{Place, Restores};
use fsnap::{Error, failpoint, reference};
use serde_json::json;

use super::super::output::json::{branch as branch_json, with_path};
use super::super::{Context, Failure, Outcome, Output};
use super::runtime::Container;
use super::{Runtime, failed};

/// Where the bundles are, in the state directory.
const BUNDLES: &str = "bundles";

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

pub(super) fn run(kind: RuntimeKind, args: &Args) -> Outcome {
    let context = Context::load()?;
    let runtime = Runtime::find(kind, args.root.as_deref(), &context)?;
    let coordinator = context.write()?;
    let checkpoint = reference::resolve(coordinator.catalog(), &args.checkpoint)?;
    let images = coordinator.images_of(&checkpoint)?;
    let first = args.first(&images)?;
    let restores = Restores::of(&context.state);
    sweep(&coordinator, &context.state, &restores)?;
    let second = args.second(kind, &context.state)?;
    let bundle = second.bundle.clone();
    let place = restores.create(&args.name, Some(second))?;
    let restored =
        args.branch_and_restore(&coordinator, &runtime, (&checkpoint, &images), first, &place, bundle.as_path());
    let (branch, container) = match restored {
        Ok(restored) => restored,
        // The next command tries again to undo it.
        Err(error @ Error::Several(_)) => return Err(error.into()),
        Err(error) => return Err(error.and_undo(place.discard()).into()),
    };
    let told = args.tell(&coordinator, &branch, &container, bundle.as_path());
    // Not before it was told that there is one.
    place.told()?;
    // What cannot be removed now goes with the next command.
    let _ = place.discard();
    told
}

impl Args {
    /// The second container, as it will be.
    fn second(&self, runtime: RuntimeKind, state: &Path) -> Result<engine::Container, Failure> {
        let root =
            self.root.as_deref().map(|root| std::path::absolute(root).map_err(failed("find the directory", root)));
        let state = state.canonicalize().map_err(failed("find the directory", state))?;
        let bundle = PathText(state.join(BUNDLES).join(self.name.as_str()));
        Ok(engine::Container { runtime, root: root.transpose()?.map(PathText), name: self.name.clone(), bundle })
    }

    /// Makes the branch, and has the container restored onto it; if that fails, nothing of both is left.
    fn branch_and_restore(
        &self,
        coordinator: &Coordinator,
        runtime: &Runtime<'_>,
        (checkpoint, images): (&Checkpoint, &Images),
        first: Bundle,
        place: &Place,
        bundle: &Path,
    ) -> fsnap::Result<(Branch, Container)> {
        let branch = coordinator.branch_and_tell(checkpoint, &self.name, &|branch| {
            // Without it, `fsnap branches` shows what a kill leaves.
            let _ = place.branch_is_recorded(branch);
        })?;
        let moves = checkpoint.members.iter().map(|member| {
            let grown = branch.members.iter().find(|grown| grown.volume == member.volume);
            let files = grown.and_then(|grown| coordinator.shown().files_of(&branch, grown));
            let to = files.ok_or_else(|| Error::NotShown { name: branch.name.clone() })?;
            Ok(Move { from: member.path.0.clone(), to })
        });
        let restored = moves.collect::<fsnap::Result<Vec<_>>>().and_then(|moves| {
            let cannot = |error: engine::bundle::NotMoved| engine::Error::Restore {
                step: format!("make the container {}", self.name),
                reason: error.to_string(),
            };
            self.restore(runtime, &first.moved(&moves).map_err(cannot)?, images, place, bundle)
        });
        match restored {
            Ok(container) => Ok((branch, container)),
            Err(error) => Err(error.and_undo(coordinator.remove_branch(&branch.name))),
        }
    }

    /// What the first container is made of.
    fn first(&self, images: &Images) -> Result<Bundle, Failure> {
        if let Some(dir) = &self.bundle {
            return Ok(Bundle::open(&dir.canonicalize().map_err(failed("find the bundle", dir))?)?);
        }
        let none = || engine::Error::Bundle {
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
        place: &Place,
        dir: &Path,
    ) -> fsnap::Result<Container> {
        let make = |source| Error::Io { action: "make the bundle", object: fsnap::printable(dir.as_os_str()), source };
        remove(dir)?;
        let made = fs::create_dir_all(dir).and_then(|()| bundle.write(dir)).map_err(make);
        failpoint::hit("container:bundled");
        let name = self.name.as_str().as_ref();
        let restored = made.and_then(|()| runtime.restore(name, (dir, images.path(), dir), &self.args, place));
        restored.map_err(|error| error.and_undo(remove(dir)))
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

fn remove(place: &Path) -> fsnap::Result<()> {
    match fs::remove_dir_all(place) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { action: "remove", object: fsnap::printable(place.as_os_str()), source })
        }
        _ => Ok(()),
    }
}

/// Removes the bundles whose branches are gone, but for those of restores that are under way.
fn sweep(coordinator: &Coordinator, state: &Path, restores: &Restores) -> fsnap::Result<()> {
    let branches = coordinator.catalog().branches()?;
    let is_free = |name: &Name| !restores.is_taken(name) && branches.iter().all(|branch| branch.name != *name);
    let bundles = fs::read_dir(state.join(BUNDLES)).into_iter().flatten().flatten();
    let free = bundles.filter(|bundle| {
        bundle.file_name().to_str().and_then(|name| name.parse().ok()).is_some_and(|name| is_free(&name))
    });
    free.map(|bundle| bundle.path()).try_for_each(|path| remove(&path))
}
