//! Medians, and tables of them.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub type Failure = Box<dyn std::error::Error>;

/// Runs the contenders in turns, `rounds` times each, and returns the median of each.
///
/// Each contender prepares what is not measured, and returns how long the rest took.
pub fn in_turns<const N: usize>(
    rounds: usize,
    mut contenders: [&mut dyn FnMut() -> Result<Duration, Failure>; N],
) -> Result<[Duration; N], Failure> {
    let mut times: [Vec<Duration>; N] = std::array::from_fn(|_| Vec::with_capacity(rounds));
    for round in 0..rounds + 1 {
        for (contender, times) in contenders.iter_mut().zip(&mut times) {
            let time = contender()?;
            // The first round warms the caches.
            if round > 0 {
                times.push(time);
            }
        }
    }
    Ok(times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    }))
}

/// How long `work` takes.
pub fn time(work: impl FnOnce() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// Prints the head of a table.
pub fn head(title: &str, columns: &[&str]) {
    println!("\n{title}");
    row(columns);
}

/// Prints a row.
pub fn row<T: AsRef<str>>(cells: &[T]) {
    let mut line = format!("{:<40}", cells[0].as_ref());
    for cell in &cells[1..] {
        line.push_str(&format!("{:>18}", cell.as_ref()));
    }
    println!("{}", line.trim_end());
}

/// Milliseconds.
pub fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// How many times `of` goes into `time`.
pub fn times(time: Duration, of: Duration) -> f64 {
    time.as_secs_f64() / of.as_secs_f64()
}

/// One time as a multiple of another, in words.
pub fn ratio(time: Duration, of: Duration) -> String {
    format!("{:.2} x", times(time, of))
}

/// Runs a command that must succeed, and whose output nobody reads.
pub fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.stdout(Stdio::null()).status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}
