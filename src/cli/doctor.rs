//! `fsnap doctor`

use std::path::{Path, PathBuf};

use fsnap::catalog;
use fsnap::coordinator::{Coordinator, proposed_place, volume_dir};
use fsnap::engine::criu::Diagnosis;
use fsnap::engine::drop_in::Caller;
use fsnap::processes::Cgroup;
use fsnap::stores::KINDS;
#[cfg(feature = "dm-thin")]
use fsnap::stores::Room;
#[cfg(feature = "dm-thin")]
use fsnap::stores::pools::{Limits, PoolState, STORES, survey};
use rustix::fs::{Access, access};
use serde_json::json;

use super::{Context, Failure, Outcome, Output, environment, install_hooks};

/// Tell what this machine can do, and why not: every backend, every engine, fsnap's own state
///
/// Each line begins with `ok` or `no`, says what was examined, and then what was found: how it can be used, or why not.
/// Nothing is changed, but that half-done work is recovered, as by every command.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory that the backends are asked about
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

/// What can be done, or why not.
type Verdict = Result<String, String>;

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = context.read();
    // A backend is asked about the path as it is written: what `init` refuses is not to be praised here.
    let dir = std::path::absolute(&args.dir).unwrap_or(args.dir);
    let dir = if dir.is_symlink() { dir } else { dir.canonicalize().unwrap_or(dir) };

    let mut findings: Vec<(&str, Verdict)> = Vec::new();
    for kind in KINDS {
        let verdict = match proposed_place(kind, &dir, &context.state) {
            Ok(place) => Ok(format!("can hold {}; its snapshots would be in {}", shown(&dir), shown(&place))),
            Err(error) => Err(error.to_string()),
        };
        findings.push((kind.name, verdict));
    }
    let held = findings.iter().any(|(_, verdict)| verdict.is_ok());
    #[cfg(feature = "dm-thin")]
    // Without device-mapper there are none, which was said already.
    findings.extend(
        survey(Path::new(STORES)).unwrap_or_default().iter().map(|pool| ("pool", told(pool, &context.config.dm_thin))),
    );
    findings.push(("directory", directory(&dir, held, &context, coordinator.as_ref().ok())));
    findings.push(("criu", criu(&context)?));
    for (name, runtime) in [("runc", Caller::Runc), ("crun", Caller::Crun)] {
        findings.push((name, install_hooks::verdict(name, runtime)));
    }
    findings.push(("podman", podman(&findings)));
    findings.push(("freezer", freezer()));
    #[cfg(feature = "fuse")]
    findings.push(("fuse", fuse()));
    findings.push(("catalog", catalog(&context, coordinator)?));

    let out = Output::new();
    if args.json {
        let list = findings.iter().map(|(what, verdict)| {
            json!({ "what": what, "works": verdict.is_ok(), "why": verdict.as_ref().unwrap_or_else(|why| why) })
        });
        return out.json(&list.collect::<Vec<_>>());
    }
    findings.iter().try_for_each(|(what, verdict)| match verdict {
        Ok(how) => out.line(format_args!("ok  {what}: {how}")),
        Err(why) => out.line(format_args!("no  {what}: {why}")),
    })
}

/// How much of the pool must be free.
#[cfg(feature = "dm-thin")]
fn limits(pool: &PoolState, set: &Room) -> Limits {
    let said = pool.limits.unwrap_or_default();
    Limits {
        free_data: set.free_data.unwrap_or(said.free_data),
        free_metadata: set.free_metadata.unwrap_or(said.free_metadata),
    }
}

/// How full the pool is, and why it takes no snapshots, if so.
#[cfg(feature = "dm-thin")]
fn told(pool: &PoolState, set: &Room) -> Verdict {
    let Some(fill) = pool.fill else {
        let there = format!("{} is {}", pool.name, super::pool::state(pool));
        return if pool.not_for_us.is_none() && pool.trouble.is_none() { Ok(there) } else { Err(there) };
    };
    let (data, metadata) = super::pool::room(&fill, pool.block);
    let there = format!("{} {}; data {data}, metadata {metadata}", pool.name, super::pool::state(pool));
    match (&pool.not_for_us, fill.refusal(&limits(pool, set))) {
        (Some(why), _) => Err(format!("{there}; {why}")),
        (None, Some(refusal)) => Err(format!("{there}; it takes no snapshots: {refusal}")),
        (None, None) if pool.trouble.is_some() => Err(there),
        (None, None) => Ok(there),
    }
}

fn shown(path: &Path) -> String {
    fsnap::printable(path.as_os_str())
}

/// Whether `init` would take the directory, of which some backend says that it can hold it (`held`).
fn directory(dir: &Path, held: bool, context: &Context, coordinator: Option<&Coordinator>) -> Verdict {
    let volumes = coordinator.map(|open| open.catalog().volumes()).transpose().map_err(|error| error.to_string())?;
    let volumes = volumes.unwrap_or_default();
    if let Some(volume) = volumes.iter().find(|volume| volume.path.as_path() == dir) {
        return Ok(format!("{} is the volume {}", shown(dir), volume.name));
    }
    let real = volume_dir(dir, &context.state, &volumes).map_err(|error| error.to_string())?;
    coordinator.map_or(Ok(()), |open| open.check_no_store_in(&real)).map_err(|error| error.to_string())?;
    if !held {
        return Err(format!("{} cannot be a volume, for no backend can hold it", shown(dir)));
    }
    recordable(context).map_err(|why| format!("{} cannot be registered, for {why}", shown(dir)))?;
    Ok(format!("{} can become a volume: `fsnap init {0}`", shown(dir)))
}

/// Whether this user can change the catalog, or make one.
fn recordable(context: &Context) -> Result<(), String> {
    let file = context.state.join(catalog::format::FILE);
    let needed = if file.exists() { vec![file.as_path(), &context.state] } else { vec![context.state.as_path()] };
    needed.into_iter().try_for_each(|path| {
        // Of a state directory that is yet to be made, the nearest directory above counts.
        let there = path.ancestors().find(|above| above.exists()).unwrap_or(path);
        access(there, Access::WRITE_OK)
            .map_err(|error| format!("{} cannot be written by this user: {error}", shown(there)))
    })
}

/// Whether CRIU can be found and is content with this kernel.
fn criu(context: &Context) -> Result<Verdict, Failure> {
    let criu = match environment::find_criu(&context.config) {
        Ok(criu) => criu,
        Err(Failure::Error(error)) => return Ok(Err(error.to_string())),
        Err(other) => return Err(other),
    };
    let asked = criu.version().and_then(|version| Ok((version, criu.diagnose()?)));
    Ok(match asked {
        Err(error) => Err(error.to_string()),
        Ok((version, diagnosis)) => {
            let name = format!("{} {version}", shown(criu.program()));
            match diagnosis {
                Diagnosis::Works => Ok(format!("{name} works on this kernel")),
                Diagnosis::TooOld { needed } => {
                    Err(format!("{name} is too old for this kernel: {needed} or later is needed"))
                }
                Diagnosis::Fails { said } => {
                    let said = said.trim().replace('\n', "; ").replace(": ; ", ": ");
                    let only_runs = if environment::is_root() {
                        ""
                    } else {
                        "saves without root only what `fsnap run` started; of all else it "
                    };
                    Err(format!("{name} {only_runs}says: {said}"))
                }
            }
        }
    })
}

/// Whether podman is there, of whose runtimes something was said already.
///
/// Which of them it uses, only `podman info` knows, which makes its storage if there is none.
fn podman(said: &[(&str, Verdict)]) -> Verdict {
    let found = environment::in_search_path("podman");
    let podman = shown(&found.ok_or("no directory of PATH has a program podman")?);
    let works = |name| said.iter().any(|(what, verdict)| *what == name && verdict.is_ok());
    match [works("runc"), works("crun")] {
        [true, true] => Ok(format!("{podman} can call hooks: `fsnap install-hooks podman`")),
        [true, false] => Ok(format!("{podman} can call hooks if it uses runc: `fsnap install-hooks podman` tells")),
        [false, true] => Ok(format!("{podman} can call hooks if it uses crun: `fsnap install-hooks podman` tells")),
        [false, false] => Err(format!("{podman} can call no hooks, since neither runc nor crun can")),
    }
}

/// Whether control groups can be frozen by this user.
fn freezer() -> Verdict {
    let frozen_otherwise =
        |why: String| format!("{why}: processes are stopped by signals instead, which they can notice");
    let root = Cgroup::open(Path::new("/"))
        .map_err(|_| frozen_otherwise("no unified hierarchy of control groups is mounted".into()))?;
    let dir: &Path = &root.dir().components().collect::<PathBuf>();
    let groups = std::fs::read_dir(dir).map_err(|error| frozen_otherwise(format!("{}: {error}", shown(dir))))?;
    // The root itself cannot be frozen; where there is no other group, one can be made.
    let first = groups.flatten().map(|entry| entry.path().join("cgroup.freeze")).find(|control| control.exists());
    access(first.as_deref().unwrap_or(dir), Access::WRITE_OK).map_err(|error| {
        frozen_otherwise(format!("the control groups below {} cannot be frozen by this user: {error}", shown(dir)))
    })?;
    Ok(format!("control groups below {} can be frozen", shown(dir)))
}

/// Whether trees can be served: what `fsnap mount` and `fsnap overlay` need.
#[cfg(feature = "fuse")]
fn fuse() -> Verdict {
    const DEVICE: &str = "/dev/fuse";
    const HELPER: &str = "fusermount3";
    let opened = std::fs::File::options().read(true).write(true).open(DEVICE);
    opened.map_err(|error| {
        format!("{DEVICE} cannot be opened: {error}; load the module fuse, or have root give access to it")
    })?;
    if rustix::process::geteuid().is_root() {
        return Ok("`fsnap mount` and `fsnap overlay` can be used".into());
    }
    match environment::in_search_path(HELPER) {
        Some(helper) => Ok(format!("`fsnap mount` and `fsnap overlay` can be used, by the help of {}", shown(&helper))),
        None => Err(format!("without root, {HELPER} is needed, and it was not found: install fuse3")),
    }
}

/// What is recorded, and whether more can be.
fn catalog(context: &Context, coordinator: Result<Coordinator, Failure>) -> Result<Verdict, Failure> {
    let file = shown(&context.state.join(catalog::format::FILE));
    let recordable = recordable(context);
    let coordinator = match coordinator {
        Ok(coordinator) => coordinator,
        Err(Failure::Error(fsnap::Error::Catalog(catalog::Error::Missing { .. }))) => {
            return Ok(recordable.map_or_else(
                |why| Err(format!("there is none at {file}, and none can be made: {why}")),
                |()| Err(format!("there is none at {file} yet: `fsnap init DIR` makes it")),
            ));
        }
        Err(Failure::Error(error)) => return Ok(Err(error.to_string())),
        Err(other) => return Err(other),
    };
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    let checkpoints = count(coordinator.catalog().checkpoints()?.len(), "checkpoint");
    let pending = count(coordinator.catalog().intents()?.len(), "pending change");
    let there = format!("{file}: {checkpoints}, {pending}");
    Ok(match recordable {
        Ok(()) => Ok(there),
        Err(why) => Err(format!("{there}; it can only be read, for {why}")),
    })
}
