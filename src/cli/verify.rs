//! `fsnap verify`

use fsnap::coordinator::Finding;
use fsnap::reference;
use serde_json::json;

use super::{Context, Failure, Outcome, Output, json};

/// Read checkpoints again and name what is damaged
///
/// Without arguments, the catalog and every checkpoint; it then also names the snapshots and clones in the stores that are
/// not recorded, which are no damage, and never touched. Exits with 1 if anything is damaged.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoints to verify; all, if none is given
    #[arg(value_name = "CKPT")]
    checkpoints: Vec<String>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let coordinator = Context::load()?.read()?;
    let catalog = coordinator.catalog();
    let all = args.checkpoints.is_empty();
    let checkpoints = if all {
        catalog.checkpoints()?
    } else {
        args.checkpoints.iter().map(|text| reference::resolve(catalog, text)).collect::<fsnap::Result<_>>()?
    };
    let mut findings = coordinator.verify_catalog()?;
    findings.extend(coordinator.verify(&checkpoints));
    let strays = if all { coordinator.strays()? } else { Vec::new() };
    let out = Output::new();
    if args.json {
        let list: Vec<_> =
            findings.iter().map(|Finding { place, what }| json!({ "place": place, "what": what })).collect();
        let unknown: Vec<_> = strays
            .iter()
            .map(|stray| {
                let object = json!({ "backend": stray.store.backend, "image": stray.at });
                json::with_path(object, "store", stray.store.place.as_path())
            })
            .collect();
        out.json(&json!({ "checkpoints": checkpoints.len(), "damage": list, "unknown": unknown }))?;
    } else {
        for finding in &findings {
            out.line(format_args!("{}: {}", finding.place, finding.what))?;
        }
        for stray in &strays {
            out.line(format_args!("unknown: {stray}"))?;
        }
        let (count, plural) = (checkpoints.len(), if checkpoints.len() == 1 { "" } else { "s" });
        out.line(format_args!("verified the catalog and {count} checkpoint{plural}: {} damaged", findings.len()))?;
    }
    if findings.is_empty() { Ok(()) } else { Err(Failure::Reported) }
}
