//! `fsnap logs`

use std::io::{self, Write};
use std::time::Duration;

use fsnap::name::Name;
use fsnap::run::{RunState, Runs, read_on};

use super::{Context, Failure, Outcome};

/// Print what the processes of a run have written to standard output and standard error
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run
    #[arg(value_name = "RUN")]
    name: Name,
    /// Go on until it ends
    #[arg(short, long)]
    follow: bool,
}

/// How often it is looked for more.
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) fn run(args: Args) -> Outcome {
    let runs = Runs::of(&Context::load()?.state);
    let mut log = runs.get(&args.name)?.log()?;
    loop {
        // Asked first: what it said last is then read, too.
        let ended = matches!(runs.get(&args.name)?.state, RunState::Ended(_));
        let said = read_on(&mut log)?;
        let mut out = io::stdout().lock();
        out.write_all(&said).and_then(|()| out.flush()).map_err(Failure::Output)?;
        if ended || !args.follow {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}
