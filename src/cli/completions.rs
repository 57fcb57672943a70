//! `fsnap completions`

use super::{Outcome, Output};

/// Print the completion script for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: Args) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::whole(), "fsnap", &mut script);
    Output::new().text(&String::from_utf8_lossy(&script))
}
