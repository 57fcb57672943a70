//! `fsnap engine RUNTIME checkpoint`

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fsnap::Error;
use fsnap::checkpoint::{EngineImages, PathText};
use fsnap::coordinator::{Coordinator, Request, Window};
use fsnap::engine::bundle::KEPT_CONFIG;
use fsnap::engine::{Images, criu};
use fsnap::processes::{Cgroup, ProcessId, Tree};
use fsnap::quiesce::Quiesce;

use super::super::checkpoint::{everyone_in, print, take_frozen};
use super::super::{Context, Failure, Outcome, environment, hook, internal, say};
use super::{Runtime, RuntimeKind, failed};

/// Save a container, its processes and its volumes, at one instant, and let it run on
///
/// For a CRIU that container runtimes may not give hooks (`fsnap install-hooks` tells). fsnap freezes the container's control group,
/// has the runtime save the processes, takes the snapshots, and thaws it: it is frozen for all of that. A hook that is
/// installed keeps still. Prints the new checkpoint's id.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// Where the process image goes: a directory that is empty or missing, outside of every volume
    #[arg(long, value_name = "DIR")]
    image_path: PathBuf,
    /// What to say of it
    #[arg(short, long, default_value = "", hide_default_value = true)]
    message: String,
    /// Where the runtime keeps the state of its containers
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Give up, and let the container run, if it is not frozen after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    deadline: u32,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    /// Further arguments for the runtime's checkpoint, after --
    #[arg(last = true, value_name = "RUNTIME ARGS")]
    args: Vec<OsString>,
}

pub(super) fn run(kind: RuntimeKind, args: &Args) -> Outcome {
    let context = Context::load()?;
    let runtime = Runtime::find(kind, args.root.as_deref(), &context)?;
    let coordinator = context.write()?;
    let container = runtime.container(args.container.as_ref())?;
    let bundle = container.bundle();
    let tree = Tree::of_cgroup(Cgroup::open(&freezer_of(container.pid)?)?)?;
    fs::create_dir_all(&args.image_path).map_err(failed("make the directory", &args.image_path))?;
    let path = args.image_path.canonicalize().map_err(failed("find the directory", &args.image_path))?;
    let images = Images::open(&path)?;
    let targets = coordinator.targets_reached(&tree)?;
    if let Some(target) = targets.iter().find(|target| path.starts_with(target.path.as_path())) {
        let (volume, volume_path) = (target.volume.clone(), target.path.clone());
        return Err(Error::ImagesInVolume { images: PathText(path), volume, path: volume_path }.into());
    }
    let audit = environment::audit(&context.config)?;
    coordinator.refuse_outside(&tree, &targets, &audit)?;
    let begun = coordinator.begin(Request {
        targets,
        message: args.message.clone(),
        audit,
        engine: Some(EngineImages { name: criu::NAME.into(), images: PathText(path) }),
        owner: Some(ProcessId::of(std::process::id().cast_signed())?),
        tree: Some(ProcessId::of(container.pid)?),
        ..Request::default()
    })?;
    let mut window = coordinator.window(begun)?;
    let kept = match bundle {
        Ok(bundle) => bundle.keep(&images),
        Err(error) => {
            say("warning", &format!("a restore will need --bundle: {error}"));
            images.remove(KEPT_CONFIG)
        }
    };
    let taken = kept.map_err(Error::from).and_then(|()| args.take(&coordinator, &mut window, &runtime, tree, &images));
    let noted = taken.and_then(|()| Ok(window.write_note()?.appear()?));
    let begun = window.close();
    if let Err(error) = noted {
        let removed = images.remove_record().and(images.remove(KEPT_CONFIG));
        return Err(coordinator.give_up(begun, error.and_undo(removed.map_err(Error::from))).into());
    }
    let checkpoint = coordinator.seal(begun)?;
    print(&coordinator, &checkpoint, args.json)
}

impl Args {
    /// Freezes the container, has everything saved, and sets it running again, whatever fails.
    fn take(
        &self,
        coordinator: &Coordinator,
        window: &mut Window,
        runtime: &Runtime<'_>,
        tree: Tree,
        images: &Images,
    ) -> fsnap::Result<()> {
        let within = Duration::from_secs(self.deadline.into());
        let turn = coordinator.catalog().turn_to_freeze(&tree, within)?;
        environment::tell(&coordinator.recover_frozen(&tree)?);
        // The runtime and the guard, which may outlive this process.
        let kept = turn.keep()?;
        let quiesce = Quiesce::prepare(tree, &internal::guard_command())?;
        coordinator.record_freeze(window, quiesce.record().clone())?;
        let mut frozen = quiesce.freeze(within)?;
        runtime.save(self.container.as_ref(), images.path(), &self.args, |engine| Ok(frozen.engine_works(engine)?))?;
        drop(kept);
        criu::complete(images)?;
        let search = take_frozen(window, everyone_in(&frozen), Some(frozen.tree()))?;
        images.write_record(&hook::record(window))?;
        frozen.check()?;
        frozen.thaw()?;
        window.tell(search.run()?);
        Ok(())
    }
}

/// The control group that freezes the process: of the freezer where there is one, else of the unified hierarchy.
fn freezer_of(pid: i32) -> Result<PathBuf, Failure> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let groups = fs::read_to_string(&path).map_err(failed("read", &path))?;
    let of = |wanted: &str| {
        groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, group) = rest.split_once(':')?;
            controllers
                .split(',')
                .any(|controller| controller == wanted)
                .then(|| group.trim_start_matches('/').to_owned())
        })
    };
    let candidates = [("/sys/fs/cgroup/freezer", "freezer"), ("/sys/fs/cgroup", ""), ("/sys/fs/cgroup/unified", "")];
    let found = candidates.into_iter().filter_map(|(top, controller)| Some(Path::new(top).join(of(controller)?)));
    let mut found =
        found.filter(|dir| dir.join("cgroup.procs").is_file() && dir.parent() != Some(Path::new("/sys/fs")));
    found
        .next()
        .ok_or_else(|| Error::NothingToTake { why: "the container has no control group of its own".into() }.into())
}
