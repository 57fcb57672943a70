//! Progress on a terminal: one line on standard error, which goes when the work ends.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use fsnap::progress::{Progress, Work};
use indicatif::{ProgressBar, ProgressStyle};

/// How often the line is drawn again while no step is done.
const TICK: Duration = Duration::from_millis(200);

/// The line. Between two pieces of work nothing is drawn, and no thread is left that would draw.
#[derive(Debug)]
pub(crate) struct TerminalProgress {
    bar: Mutex<Option<ProgressBar>>,
}

impl TerminalProgress {
    /// On a terminal; `None` in a pipe.
    pub(crate) fn new() -> Option<Self> {
        std::io::stderr().is_terminal().then(|| Self { bar: Mutex::default() })
    }

    fn replace(&self, bar: Option<ProgressBar>) -> Option<ProgressBar> {
        std::mem::replace(&mut *self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner()), bar)
    }
}

impl Progress for TerminalProgress {
    fn begin(&self, work: Work, steps: Option<usize>) {
        let (bar, template) = match steps {
            Some(steps @ 2..) => (ProgressBar::new(steps as u64), "{spinner} {msg} {bar:24} {pos}/{len} {elapsed}"),
            // Of one step, all that can be shown is that it goes on.
            Some(_) => (ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}"),
            None => (ProgressBar::new_spinner(), "{spinner} {msg} {pos} {elapsed}"),
        };
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(work.to_string());
        bar.tick();
        bar.enable_steady_tick(TICK);
        self.replace(Some(bar));
    }

    fn step(&self) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            bar.inc(1);
        }
    }

    fn end(&self) {
        if let Some(bar) = self.replace(None) {
            bar.disable_steady_tick();
            bar.finish_and_clear();
        }
    }
}
