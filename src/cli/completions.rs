//! `fsnap completions`

use super::{Outcome, Output};

/// Print the completion script for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: Args, command: &mut clap::Command) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "fsnap", &mut script);
    Output::new().text(&String::from_utf8_lossy(&script))
}
