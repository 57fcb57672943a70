//! `fsnap doctor`

use std::path::PathBuf;

use fsnap::engine::criu::Diagnosis;
use fsnap::stores::KINDS;
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
        match (kind.probe)(&dir) {
            Ok(place) => {
                let (dir, place) = (fsnap::printable(dir.as_os_str()), fsnap::printable(place.as_os_str()));
                found(kind.name, true, format!("{dir} can be a volume; its snapshots would be in {place}"));
            }
            Err(error) => found(kind.name, false, error.to_string()),
        }
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
    match std::fs::read_to_string("/proc/filesystems") {
        Ok(list) if list.contains("\tcgroup2") => found("cgroup freezer", true, "control groups can be frozen".into()),
        _ => found("cgroup freezer", false, "no cgroup2: processes are stopped by signals instead".into()),
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
