//! What the benchmarks of the backends share: medians, and lines of a table.

#![allow(clippy::print_stdout, reason = "a table on standard output is what a benchmark is for")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long `work` takes.
pub fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// Leaves so much data at the beginning of the file unwritten in the page cache.
///
/// # Panics
///
/// If it cannot be written.
pub fn dirty(file: &File, mebibytes: u64) {
    let chunk = vec![0x5a; 1 << 20];
    for at in 0..mebibytes {
        file.write_all_at(&chunk, at << 20).expect("write");
    }
}

/// The median, which one disturbed measurement does not move.
///
/// # Panics
///
/// If there are none.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// One time as a multiple of another.
pub fn ratio(time: Duration, to: Duration) -> f64 {
    time.as_secs_f64() / to.as_secs_f64()
}

/// Prints what the bare calls and fsnap took, and whether fsnap took at most `goal` times as long.
pub fn tell(what: &str, bare: Duration, fsnap: Duration, goal: f64) {
    let ratio = ratio(fsnap, bare);
    let verdict = if ratio <= goal { "met" } else { "missed" };
    println!("{what:<50}{:>9.2}{:>9.2}  ×{ratio:.2}  {verdict}", ms(bare), ms(fsnap));
}
