//! What the oracle says.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Fault;

/// Whether files are what they must be, writer by writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// All writers agree with their files.
    pub ok: bool,
    /// The run whose files these are, in hexadecimal.
    pub run: String,
    /// Who was asked; absent where files were judged without their process.
    #[serde(flatten)]
    pub asked: Option<Asked>,
    /// One entry per writer.
    pub writers: Vec<WriterVerdict>,
}

/// The process that gave a verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Its process id, as itself sees it.
    pub pid: u32,
    /// What the asker wrote into `request`.
    pub tag: String,
    /// How often this process, or the one that it was restored from, was asked: kept in memory, so that it is carried
    /// by checkpoints.
    pub generation: u64,
    /// The longest time between two steps of one writer, in milliseconds: at least the longest frozen window.
    pub longest_pause_ms: u64,
}

/// What one writer says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterVerdict {
    /// Its kind and volume, such as `append@0`.
    pub name: String,
    /// Its counter: how many steps it made.
    pub done: u64,
    /// The difference between memory and file; none if they agree.
    pub fault: Option<Fault>,
}

impl Verdict {
    pub(crate) fn new(run: u64, asked: Option<Asked>, writers: Vec<WriterVerdict>) -> Self {
        Self { ok: writers.iter().all(|writer| writer.fault.is_none()), run: format!("{run:016x}"), asked, writers }
    }

    /// How many steps all writers made.
    pub fn steps(&self) -> u64 {
        self.writers.iter().map(|writer| writer.done).sum()
    }

    /// The counter of the writer `name`.
    pub fn done(&self, name: &str) -> Option<u64> {
        self.writers.iter().find(|writer| writer.name == name).map(|writer| writer.done)
    }

    /// The names of the writers that disagree with their files.
    pub fn faulty(&self) -> Vec<&str> {
        self.writers.iter().filter(|writer| writer.fault.is_some()).map(|writer| writer.name.as_str()).collect()
    }

    /// The verdict as one line of JSON.
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("a verdict holds nothing that JSON cannot say");
        line.push('\n');
        line
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<String> =
            self.writers.iter().filter_map(|writer| Some(writer.fault.as_ref()?.to_string())).collect();
        let (writers, steps) = (self.writers.len(), self.steps());
        match (faults.is_empty(), self.asked.is_some()) {
            (true, true) => write!(f, "memory and files agree: {steps} steps of {writers} writers"),
            (true, false) => write!(f, "the files belong together: {steps} steps of {writers} writers"),
            (false, _) => write!(f, "the files are not what they must be: {}", faults.join("; ")),
        }
    }
}
