//! `fsnap ps`

use fsnap::engine::Ended;
use fsnap::run::{Run, RunState, Runs};
use serde_json::{Value, json};

use super::output::rfc3339;
use super::{Context, Outcome, Output, all_of};

/// List the runs: the process, checkpoint and branch of each, and since when it runs
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Those that have ended as well, as long as their logs are kept
    #[arg(short, long)]
    all: bool,
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let (mut runs, mut unreadable) = (Vec::new(), Vec::new());
    for run in Runs::of(&context.state).list()? {
        match run {
            Ok(run) if args.all || !matches!(run.state, RunState::Ended(_)) => runs.push(run),
            Ok(_) => {}
            Err(error) => unreadable.push(Err(error.into())),
        }
    }
    print(runs, args.json)?;
    all_of(unreadable)
}

fn print(runs: Vec<Run>, as_json: bool) -> Outcome {
    let out = Output::new();
    if as_json {
        return out.json(&runs.iter().map(object).collect::<Vec<_>>());
    }
    let row = |run: Run| {
        let record = &run.record;
        vec![
            record.name.to_string(),
            root(&run).map(|pid| pid.to_string()).unwrap_or_default(),
            state(&run),
            record.checkpoint.map(|id| id.short()).unwrap_or_default(),
            record.branch.as_ref().map(ToString::to_string).unwrap_or_default(),
            out.time(record.since),
            command(&run),
        ]
    };
    out.table(
        &["NAME", "PID", "STATE", "CHECKPOINT", "BRANCH", "SINCE", "COMMAND"],
        &runs.into_iter().map(row).collect::<Vec<_>>(),
    )
}

fn root(run: &Run) -> Option<i32> {
    match run.state {
        RunState::Running { root, .. } => root.map(|root| root.pid),
        RunState::Starting | RunState::Elsewhere | RunState::Within | RunState::Ended(_) => None,
    }
}

/// How a run stands, in words.
pub(crate) fn state(run: &Run) -> String {
    match run.state {
        RunState::Starting => "starting".into(),
        RunState::Elsewhere => "running elsewhere".into(),
        RunState::Within => "running (this one)".into(),
        RunState::Running { root: Some(_), .. } => "running".into(),
        RunState::Running { root: None, .. } => "running without its command".into(),
        RunState::Ended(Ended::Exited(status)) => format!("exited {status}"),
        RunState::Ended(Ended::Killed(signal)) => format!("killed by signal {signal}"),
        RunState::Ended(Ended::Unknown) => "ended".into(),
    }
}

fn command(run: &Run) -> String {
    let words = run.record.command.iter().map(|word| fsnap::printable(word));
    words.collect::<Vec<_>>().join(" ").chars().take(60).collect()
}

fn object(run: &Run) -> Value {
    let record = &run.record;
    let (init, ended) = match run.state {
        RunState::Running { init, .. } => (Some(init.pid), None),
        RunState::Ended(ended) => (None, Some(ended)),
        RunState::Starting | RunState::Elsewhere | RunState::Within => (None, None),
    };
    json!({
        "name": record.name,
        "state": match run.state {
            RunState::Starting => "starting",
            RunState::Running { .. } | RunState::Elsewhere | RunState::Within => "running",
            RunState::Ended(_) => "ended",
        },
        "pid": root(run),
        "init": init,
        "ended": ended,
        "checkpoint": record.checkpoint,
        "branch": record.branch,
        "since": rfc3339(record.since),
        "command": record.command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>(),
        "volumes": record.volumes.iter().map(|seen| json!({ "volume": seen.volume, "at": seen.at })).collect::<Vec<_>>(),
    })
}
