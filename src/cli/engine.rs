//! `fsnap engine`: fsnap calls the engine, where the engine cannot call fsnap.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fsnap::Error;
use fsnap::checkpoint::{EngineImages, PathText};
use fsnap::coordinator::{Coordinator, Request, Window};
use fsnap::engine::{Images, criu, reasons_in};
use fsnap::processes::{Cgroup, ProcessId, Tree};
use fsnap::quiesce::Quiesce;

use super::checkpoint::{everyone_in, print, take_standing};
use super::{Context, Failure, Outcome, environment, hook, internal};

/// Call a container runtime that cannot call fsnap
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    engine: Engine,
}

#[derive(Debug, clap::Subcommand)]
enum Engine {
    /// The container runtime runc
    Runc(Runc),
}

#[derive(Debug, clap::Args)]
struct Runc {
    #[command(subcommand)]
    command: RuncCommand,
}

#[derive(Debug, clap::Subcommand)]
enum RuncCommand {
    /// Save a container, its processes and its volumes, at one instant, and let it run on
    ///
    /// For a CRIU that runc may not give hooks (`fsnap install-hooks` tells). fsnap freezes the container's control group, lets runc
    /// save the processes, takes the snapshots, and thaws it: it stands still for all of that. Prints the new checkpoint's id.
    Checkpoint(Checkpoint),
}

#[derive(Debug, clap::Args)]
struct Checkpoint {
    /// The container
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// Where the process image goes: a directory that is empty or missing, outside of every volume
    #[arg(long, value_name = "DIR")]
    image_path: PathBuf,
    /// Where runc keeps the state of its containers
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Give up, and let the container run, if it does not stand after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    deadline: u32,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    /// Further arguments for runc's checkpoint, after --
    #[arg(last = true, value_name = "RUNC ARGS")]
    args: Vec<OsString>,
}

pub(crate) fn run(args: Args) -> Outcome {
    let Engine::Runc(Runc { command: RuncCommand::Checkpoint(args) }) = args.engine;
    let context = Context::load()?;
    let coordinator = context.write()?;
    let pid = args.pid()?;
    let tree = Tree::of_cgroup(Cgroup::open(&freezer_of(pid)?)?)?;
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
        audit,
        engine: Some(EngineImages { name: criu::NAME.into(), images: PathText(path.clone()) }),
        owner: Some(ProcessId::of(std::process::id().cast_signed())?),
        tree: Some(ProcessId::of(pid)?),
        ..Request::default()
    })?;
    let mut window = coordinator.window(begun)?;
    let taken = args.take(&coordinator, &mut window, tree, &images);
    let noted = taken.and_then(|()| Ok(window.write_note()?.appear()?));
    let begun = window.close();
    if let Err(error) = noted {
        let error = error.and_undo(images.remove_record().map_err(Error::from));
        return Err(coordinator.give_up(begun, error).into());
    }
    let checkpoint = coordinator.seal(begun)?;
    print(&coordinator, &checkpoint, args.json)
}

impl Checkpoint {
    /// Freezes the container, has everything saved, and sets it running again, whatever fails.
    fn take(&self, coordinator: &Coordinator, window: &mut Window, tree: Tree, images: &Images) -> fsnap::Result<()> {
        let quiesce = Quiesce::prepare(tree, &internal::guard_command())?;
        coordinator.record_freeze(window, quiesce.record().clone())?;
        let frozen = quiesce.freeze(Duration::from_secs(self.deadline.into()))?;
        self.save(images.path())?;
        criu::complete(images)?;
        let search = take_standing(window, everyone_in(&frozen), Some(frozen.tree()))?;
        images.write_record(&hook::record(window))?;
        frozen.check()?;
        frozen.thaw()?;
        window.tell(search.run()?);
        Ok(())
    }

    fn runc(&self) -> Command {
        let mut command = Command::new("runc");
        if let Some(root) = &self.root {
            command.arg("--root").arg(root);
        }
        command.stdin(Stdio::null());
        command
    }

    /// The container's first process, as runc knows it.
    fn pid(&self) -> Result<i32, Failure> {
        let output = self.runc().arg("state").arg(&self.container).output();
        let output = output.map_err(failed("run", Path::new("runc")))?;
        if !output.status.success() {
            return Err(Error::HookFailed { said: text(&output.stderr) }.into());
        }
        let state: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let pid = state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).filter(|&pid| pid > 0);
        let name = fsnap::printable(self.container.as_ref());
        pid.ok_or_else(|| Error::NothingToTake { why: format!("the container {name} does not run") }.into())
    }

    /// Has runc save the processes, which stand and go on standing.
    fn save(&self, images: &Path) -> fsnap::Result<()> {
        let mut command = self.runc();
        if let Some(criu) = std::env::var_os("FSNAP_CRIU").filter(|criu| !criu.is_empty()) {
            command.arg("--criu").arg(criu);
        }
        command.args(["checkpoint", "--leave-running", "--image-path"]).arg(images).arg("--work-path").arg(images);
        let output = command.args(&self.args).arg(&self.container).output().map_err(|source| Error::Io {
            action: "run",
            object: "runc".into(),
            source,
        })?;
        if output.status.success() {
            return Ok(());
        }
        let mut log = Vec::new();
        let _ = fs::File::open(images.join("dump.log")).and_then(|file| file.take(16 << 20).read_to_end(&mut log));
        let reasons = reasons_in(&String::from_utf8_lossy(&log));
        let said = if reasons.is_empty() { text(&output.stderr) } else { reasons.join("\n") };
        Err(Error::HookFailed { said: format!("runc could not save the container:\n{said}") })
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
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

fn failed(action: &'static str, object: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let object = fsnap::printable(object.as_os_str());
    move |source| Error::Io { action, object, source }.into()
}
