//! A catalog with ten thousand checkpoints.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use fsnap::catalog::{Access, Catalog, Intent, PendingCheckpoint};
use fsnap::checkpoint::{Checkpoint, CheckpointId};

use crate::dump::{goal, post_dump};
use crate::measure::{Failure, head, in_turns, ms, ratio, row, time, times};
use crate::site::{Site, run};

const MANY: usize = 10_000;

/// What it costs to have ten thousand checkpoints in the catalog, and not just a few.
pub fn ten_thousand(site: &Site) -> Result<(), Failure> {
    let rounds = 9;
    run(site.fsnap().arg("checkpoint").stdout(Stdio::null()))?;
    let [few_log, few, few_hook] = measure(site, rounds)?;
    fill(&site.path("state"))?;
    let [many_log, many, many_hook] = measure(site, rounds)?;
    head("the catalog, by the number of its checkpoints", &["", "few", "10,000", "10,000 / few", "goal"]);
    let log_goal = goal(many_log.as_secs_f64() * 1e3, 100.0, "ms");
    row(&["fsnap log".into(), ms(few_log), ms(many_log), ratio(many_log, few_log), log_goal]);
    for (what, few, many) in [("fsnap checkpoint", few, many), ("post-dump hook", few_hook, many_hook)] {
        row(&[what.into(), ms(few), ms(many), ratio(many, few), goal(times(many, few), 1.5, "x")]);
    }
    Ok(())
}

/// `fsnap log`, `fsnap checkpoint`, and what stands while processes do.
fn measure(site: &Site, rounds: usize) -> Result<[Duration; 3], Failure> {
    in_turns(
        rounds,
        [
            &mut || time(|| run(site.fsnap().arg("log").stdout(Stdio::null()))),
            &mut || {
                let time = time(|| run(site.fsnap().arg("checkpoint").stdout(Stdio::null())))?;
                run(site.fsnap().args(["rm", "@latest"]))?;
                Ok(time)
            },
            &mut || post_dump(site),
        ],
    )
}

/// Records copies of the newest checkpoint, each the parent of the next.
fn fill(state: &Path) -> Result<(), Failure> {
    let catalog = Catalog::open(state, Access::Create, Duration::from_secs(10))?;
    let mut last = catalog.latest()?.ok_or("there is no checkpoint to copy")?;
    for number in 0..MANY {
        let id = CheckpointId::random()?;
        let pending = PendingCheckpoint {
            id,
            branch: None,
            message: String::new(),
            tags: Vec::new(),
            engine: None,
            owner: None,
            tree: None,
            boot: String::new(),
            freeze: None,
            members: Vec::new(),
            pinned: false,
        };
        let (intent, lock) = catalog.begin(&Intent::Checkpoint(Box::new(pending)))?;
        let mut members = last.members.clone();
        for member in &mut members {
            member.snapshot.at = format!("s-{number:016x}").parse()?;
        }
        last = Checkpoint { id, parent: Some(last.id), members, ..last };
        catalog.seal(intent, &last, &[])?;
        lock.finish();
    }
    Ok(())
}
