//! What a machine is told to do, and what it says when it is done: two files in a directory that both sides see.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::{Error, Result};

/// The file that the host writes.
const JOB: &str = "job.json";
/// The file that the guest writes at its very end.
const REPORT: &str = "report.json";

/// What a machine is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The program, by a path of the host, and its arguments.
    pub(crate) command: Vec<String>,
    /// Where it starts.
    pub(crate) dir: PathBuf,
    /// Its environment.
    pub(crate) environment: BTreeMap<String, String>,
    /// Whether a person sits at the console.
    pub(crate) interactive: bool,
    /// Where the kernel's modules are: the directory that is named after its release.
    pub(crate) module_dir: PathBuf,
    /// The modules that are loaded first, with those that they need.
    pub(crate) modules: Vec<String>,
}

/// What a machine says when the program has ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The exit code of the program, or 128 and the signal that ended it.
    pub(crate) code: i32,
}

impl Job {
    /// Leaves the job for the guest.
    pub(crate) fn write(&self, exchange: &Path) -> Result<()> {
        write(&exchange.join(JOB), self)
    }

    /// Reads the job that the host left.
    pub(crate) fn read(exchange: &Path) -> Result<Self> {
        read(&exchange.join(JOB))
    }
}

impl Report {
    /// Leaves the report for the host.
    pub(crate) fn write(&self, exchange: &Path) -> Result<()> {
        let path = exchange.join(REPORT);
        write(&path, self)?;
        // The guest has a cache of its own between this and the host's file.
        fs::File::open(&path).and_then(|file| file.sync_all()).during("sync", &path)
    }

    /// Reads the report, if the guest came so far.
    pub(crate) fn read(exchange: &Path) -> Result<Option<Self>> {
        match read(&exchange.join(REPORT)) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            report => report.map(Some),
        }
    }
}

fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(std::io::Error::from).during("encode", path)?;
    fs::write(path, text).during("write", path)
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read(path).during("read", path)?;
    serde_json::from_slice(&text).map_err(std::io::Error::from).during("decode", path)
}
