//! `fsnap doctor`

use std::path::{Path, PathBuf};

use fsnap::coordinator::proposed_place;
use fsnap::engine::criu::Diagnosis;
use fsnap::processes::Cgroup;
use fsnap::stores::KINDS;
#[cfg(feature = "dm-thin")]
use fsnap::stores::Room;
#[cfg(feature = "dm-thin")]
use fsnap::stores::pools::{Limits, PoolState, STORES, survey};
use rustix::fs::{Access, access};
use serde_json::json;

use super::{Context, Outcome, Output, environment};

/// Tell what this machine can do, and why not: every backend, every engine, fsnap's own state
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory that the backends are asked about
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

/// One thing that was examined.
struct Finding {
    what: String,
    works: bool,
    why: String,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let mut findings = Vec::new();
    let mut found = |what: &str, works: bool, why: String| findings.push(Finding { what: what.to_owned(), works, why });

    let dir = args.dir.canonicalize().unwrap_or(args.dir);
    for kind in KINDS {
        match proposed_place(kind, &dir, &context.state) {
            Ok(place) => {
                let (dir, place) = (fsnap::printable(dir.as_os_str()), fsnap::printable(place.as_os_str()));
                found(kind.name, true, format!("{dir} can be a volume; its snapshots would be in {place}"));
            }
            Err(error) => found(kind.name, false, error.to_string()),
        }
    }
    #[cfg(feature = "dm-thin")]
    // Without device-mapper there are none, which was said already.
    for pool in survey(Path::new(STORES)).unwrap_or_default() {
        let works = pool.not_for_us.is_none()
            && pool.trouble.is_none()
            && pool.fill.is_none_or(|fill| fill.refusal(&limits(&pool, &context.config.dm_thin)).is_none());
        found("pool", works, told(&pool, &context.config.dm_thin));
    }
    match environment::find_criu(&context.config) {
        Err(super::Failure::Error(error)) => found("criu", false, error.to_string()),
        Err(other) => return Err(other),
        Ok(criu) => {
            let version = criu.version().map_or_else(|error| error.to_string(), |version| version.to_string());
            let name = format!("{} {version}", criu.program().display());
            match criu.diagnose() {
                Ok(Diagnosis::Works) => found("criu", true, format!("{name} works on this kernel")),
                Ok(Diagnosis::TooOld { needed }) => {
                    found("criu", false, format!("{name} is too old for this kernel: {needed} or later is needed"));
                }
                Ok(Diagnosis::Fails { said }) => found("criu", false, format!("{name} says: {said}")),
                Err(error) => found("criu", false, format!("{name}: {error}")),
            }
        }
    }
    match freezer() {
        Ok(why) => found("freezer", true, why),
        Err(why) => {
            found("freezer", false, format!("{why}: processes are stopped by signals instead, which they can notice"))
        }
    }
    match context.read() {
        Ok(coordinator) => {
            let count = coordinator.catalog().checkpoints()?.len();
            let pending = coordinator.catalog().intents()?.len();
            let state = fsnap::printable(context.state.as_os_str());
            found("catalog", true, format!("{state}: {count} checkpoints, {pending} pending changes"));
        }
        Err(super::Failure::Error(error)) => found("catalog", false, error.to_string()),
        Err(other) => return Err(other),
    }

    let out = Output::new();
    if args.json {
        let list = findings.iter().map(|one| json!({ "what": one.what, "works": one.works, "why": one.why }));
        return out.json(&list.collect::<Vec<_>>());
    }
    findings.iter().try_for_each(|Finding { what, works, why }| {
        out.line(format_args!("{:3} {what}: {why}", if *works { "ok" } else { "no" }))
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
fn told(pool: &PoolState, set: &Room) -> String {
    let Some(fill) = pool.fill else { return format!("{} is {}", pool.name, super::pool::state(pool)) };
    let (data, metadata) = super::pool::room(&fill, pool.block);
    let why = match (pool.not_for_us, fill.refusal(&limits(pool, set))) {
        (Some(why), _) => format!("; {why}"),
        (None, Some(refusal)) => format!("; it takes no snapshots: {refusal}"),
        (None, None) => String::new(),
    };
    format!("{} {}; data {data}, metadata {metadata}{why}", pool.name, super::pool::state(pool))
}

/// Whether control groups can be frozen by this user, and why not.
fn freezer() -> Result<String, String> {
    let root = Cgroup::open(Path::new("/")).map_err(|_| "no unified hierarchy of control groups is mounted")?;
    let dir = root.dir();
    let groups = std::fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    // The root itself cannot be frozen; where there is no other group, one can be made.
    let first = groups.flatten().map(|entry| entry.path().join("cgroup.freeze")).find(|control| control.exists());
    let writable = access(first.as_deref().unwrap_or(dir), Access::WRITE_OK);
    writable.map_err(|error| {
        format!("the control groups below {} cannot be frozen by this user: {error}", dir.display())
    })?;
    Ok(format!("control groups below {} can be frozen", dir.display()))
}
