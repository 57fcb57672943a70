//! Processes that know what their files must hold.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fsnap_oracle::{Kind, Verdict};
use rustix::process::{Pid, Signal, WaitOptions};

use crate::site::LONG;

/// The first argument that makes this program an oracle.
pub(crate) const ORACLE: &str = "oracle";

/// A running oracle; killed when dropped.
#[derive(Debug)]
pub(crate) struct Oracle {
    pub(crate) pid: i32,
    pub(crate) reports: PathBuf,
    asked: Cell<u32>,
}

impl Oracle {
    /// Starts one that writes to the directories in all these ways, and waits until it does.
    ///
    /// `pace` is its longest pause, in microseconds.
    pub(crate) fn start(reports: PathBuf, dirs: &[PathBuf], kinds: &[Kind], pace: u32) -> Self {
        std::fs::create_dir_all(&reports).unwrap();
        let kinds: Vec<String> = kinds.iter().map(Kind::to_string).collect();
        let mut args = vec![ORACLE.into(), "run".into(), "--reports".into(), reports.clone().into_os_string()];
        args.extend(["--kinds".into(), kinds.join(",").into(), "--pace".into(), pace.to_string().into()]);
        args.extend(dirs.iter().map(Into::into));
        let pid = fsnap_oracle::start(&std::env::current_exe().unwrap(), args).unwrap();
        Self { pid, reports, asked: Cell::new(0) }
    }

    /// What it says.
    pub(crate) fn ask(&self) -> Verdict {
        self.asked.set(self.asked.get() + 1);
        ask(self.pid, &self.reports, &format!("original-{}", self.asked.get()))
    }

    /// Makes sure that it still works, and that it has noticed nothing.
    pub(crate) fn goes_on(&self) {
        let first = self.ask();
        assert!(first.ok, "the process noticed: {first}");
        let deadline = Instant::now() + LONG;
        loop {
            let last = self.ask();
            assert!(last.ok, "the process noticed: {last}");
            if last.steps() > first.steps() {
                return;
            }
            assert!(Instant::now() < deadline, "the process makes no step any more");
        }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    }
}

/// Asks the oracle with that pid, a restored one perhaps.
pub(crate) fn ask(pid: i32, reports: &Path, tag: &str) -> Verdict {
    fsnap_oracle::ask(pid, reports, tag, Duration::from_secs(60)).unwrap()
}
