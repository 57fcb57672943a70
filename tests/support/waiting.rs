//! Waiting for what other processes or the kernel bring about a moment later: the one place that says for how long.

use std::time::{Duration, Instant};

/// On the slowest machine, with others at work: whoever waits this long waits in vain.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until it holds, and not for ever.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "within {PATIENCE:?} did not come about: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
