//! `fsnap verify`

use fsnap::coordinator::Finding;
use fsnap::reference;
use serde_json::json;

use super::{Context, Failure, Outcome, Output};

/// Read checkpoints again and name what is damaged
///
/// Without arguments, the catalog and every checkpoint. Exits with 1 if anything is damaged.
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
    let checkpoints = if args.checkpoints.is_empty() {
        catalog.checkpoints()?
    } else {
        args.checkpoints.iter().map(|text| reference::resolve(catalog, text)).collect::<fsnap::Result<_>>()?
    };
    let mut findings = coordinator.verify_catalog()?;
    findings.extend(coordinator.verify(&checkpoints));
    let out = Output::new();
    if args.json {
        let list: Vec<_> =
            findings.iter().map(|Finding { place, what }| json!({ "place": place, "what": what })).collect();
        out.json(&json!({ "checkpoints": checkpoints.len(), "damage": list }))?;
    } else {
        for finding in &findings {
            out.line(format_args!("{}: {}", finding.place, finding.what))?;
        }
        let (count, plural) = (checkpoints.len(), if checkpoints.len() == 1 { "" } else { "s" });
        out.line(format_args!("verified the catalog and {count} checkpoint{plural}: {} damaged", findings.len()))?;
    }
    if findings.is_empty() { Ok(()) } else { Err(Failure::Reported) }
}
