//! A catalog with ten thousand checkpoints.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use fsnap::catalog::{Access, Catalog, Intent, PendingCheckpoint};
use fsnap::checkpoint::{Checkpoint, CheckpointId};

use crate::measure::{Failure, head, in_turns, ms, ratio, row, time};
use crate::site::{Site, run};

const MANY: usize = 10_000;

/// `fsnap log`, and a new checkpoint, with one checkpoint in the catalog and with ten thousand.
pub fn ten_thousand(site: &Site) -> Result<(), Failure> {
    let rounds = 9;
    let [few_log, few] = both(site, rounds)?;
    fill(&site.path("state"))?;
    let [many_log, many] = both(site, rounds)?;
    head("the catalog", &["", "few", "10,000", "10,000 / few", "goal"]);
    row(&["fsnap log".into(), ms(few_log), ms(many_log), ratio(many_log, few_log), "< 100 ms".into()]);
    row(&["fsnap checkpoint".into(), ms(few), ms(many), ratio(many, few), "<= 1.50 x".into()]);
    Ok(())
}

fn both(site: &Site, rounds: usize) -> Result<[Duration; 2], Failure> {
    in_turns(
        rounds,
        [&mut || time(|| run(site.fsnap().arg("log").stdout(Stdio::null()))), &mut || {
            let time = time(|| run(site.fsnap().arg("checkpoint").stdout(Stdio::null())))?;
            run(site.fsnap().args(["rm", "@latest"]))?;
            Ok(time)
        }],
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
