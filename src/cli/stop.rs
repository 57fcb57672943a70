//! `fsnap stop`

use std::io;
use std::time::Duration;

use fsnap::Error;
use fsnap::name::Name;
use fsnap::processes::ProcessId;
use fsnap::run::{Run, RunState, Runs};
use rustix::process::{Signal, pidfd_send_signal};

use super::{Context, Outcome, all_of};

/// End runs: ask each command to (SIGTERM), and kill what is left after a while
///
/// What they wrote stays: their branches, their logs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The runs
    #[arg(value_name = "RUN", required = true)]
    names: Vec<Name>,
    /// How long to wait before the rest is killed; 0 kills at once
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=3600))]
    time: u32,
}

pub(crate) fn run(args: Args) -> Outcome {
    let runs = Runs::of(&Context::load()?.state);
    let patience = Duration::from_secs(args.time.into());
    all_of(args.names.iter().map(|name| stop(&runs.get(name)?, patience)))
}

fn stop(run: &Run, patience: Duration) -> Outcome {
    let (init, root) = match run.state {
        RunState::Running { init, root } => (init, root),
        RunState::Elsewhere => return Err(Error::RunElsewhere { name: run.record.name.clone() }.into()),
        RunState::Within => return Err(Error::RunAround { name: run.record.name.clone() }.into()),
        RunState::Starting | RunState::Ended(_) => return Ok(()),
    };
    let failed = |source| Error::Io { action: "end", object: format!("the run {}", run.record.name), source };
    let signal = |process: ProcessId, signal| -> io::Result<bool> {
        // One that has ended meanwhile needs no signal.
        let Ok(process) = process.open() else { return Ok(true) };
        match pidfd_send_signal(&process, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(true),
            sent => Ok(sent.map(|()| false)?),
        }
    };
    if let Some(root) = root.filter(|_| !patience.is_zero()) {
        signal(root, Signal::TERM).map_err(failed)?;
        // One that was stopped hears nothing before it goes on.
        signal(root, Signal::CONT).map_err(failed)?;
        if init.ends_within(Some(patience)).map_err(failed)? {
            return Ok(());
        }
    }
    // All others in its pid namespace go with it.
    signal(init, Signal::KILL).map_err(failed)?;
    init.ends_within(None).map_err(failed)?;
    Ok(())
}
