//! `fsnap man`

use std::path::PathBuf;

use clap_mangen::Man;

use super::{Failure, Outcome, Output};

/// Print the manual page, or write the pages of all commands into a directory
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Write one page per command here
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Outcome {
    let command = super::whole();
    if let Some(dir) = args.dir {
        let written = std::fs::create_dir_all(&dir).and_then(|()| clap_mangen::generate_to(command, &dir));
        let object = fsnap::printable(dir.as_os_str());
        return Ok(written.map_err(|source| fsnap::Error::Io { action: "write the pages to", object, source })?);
    }
    let mut page = Vec::new();
    Man::new(command).render(&mut page).map_err(Failure::Output)?;
    Output::new().text(&String::from_utf8_lossy(&page))
}
