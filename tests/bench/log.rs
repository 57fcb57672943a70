//! A catalog with ten thousand checkpoints.

use std::process::Stdio;
use std::time::Duration;

use crate::copies;
use crate::dump::{goal, post_dump};
use crate::measure::{Failure, head, in_turns, ms, ratio, row, run, time, times};
use crate::site::Site;

const MANY: usize = 10_000;

/// What it costs to have ten thousand checkpoints in the catalog, and not just a few.
pub fn ten_thousand(site: &Site) -> Result<(), Failure> {
    let rounds = 9;
    run(site.fsnap().arg("checkpoint").stdout(Stdio::null()))?;
    let [few_log, few, few_hook] = measure(site, rounds)?;
    copies::record_copies(&site.path("state"), MANY, |number, member| {
        member.snapshot.at = format!("s-{number:016x}").parse()?;
        Ok(())
    })?;
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
            &mut || {
                // What the hook of the turn before has left to be finished is not the list's work.
                run(site.fsnap().arg("recover").stdout(Stdio::null()))?;
                time(|| run(site.fsnap().arg("log").stdout(Stdio::null())))
            },
            &mut || {
                let time = time(|| run(site.fsnap().arg("checkpoint").stdout(Stdio::null())))?;
                run(site.fsnap().args(["rm", "@latest"]))?;
                Ok(time)
            },
            &mut || post_dump(site),
        ],
    )
}
