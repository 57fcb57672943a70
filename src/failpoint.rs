//! Places at which a test makes fsnap die, fail or wait.
//!
//! Compiled into debug builds only: a release must not be steerable by whoever sets its environment.

/// Does what was [armed](arm) for the place `name`; nothing in a release build.
#[cfg(not(debug_assertions))]
pub fn hit(_name: &str) {}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub fn arm(_spec: &str) {}

#[cfg(debug_assertions)]
pub use armed::{arm, hit};

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use rustix::process::Signal;

    static ARMED: OnceLock<(String, String)> = OnceLock::new();
    static HITS: AtomicUsize = AtomicUsize::new(0);

    /// Arms a place: `NAME=kill`, `NAME=stop`, `NAME=exit` or `NAME=sleep:MILLISECONDS`; a name of digits counts places instead,
    /// so that `3=kill` dies at the third place whatever its name. What is stopped goes on when somebody sends it SIGCONT.
    pub fn arm(spec: &str) {
        if let Some((name, action)) = spec.split_once('=') {
            let _ = ARMED.set((name.to_owned(), action.to_owned()));
        }
    }

    /// Does what was armed for the place `name`.
    pub fn hit(name: &str) {
        let Some((place, action)) = ARMED.get() else { return };
        let count = HITS.fetch_add(1, Ordering::SeqCst) + 1;
        if place != name && *place != count.to_string() {
            return;
        }
        match action.split_once(':') {
            Some(("sleep", time)) => std::thread::sleep(Duration::from_millis(time.parse().unwrap_or(0))),
            _ if action == "exit" => std::process::exit(1),
            _ => {
                let signal = if action == "stop" { Signal::STOP } else { Signal::KILL };
                let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
            }
        }
    }
}
