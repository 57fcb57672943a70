//! What users see: tables and JSON on standard output; on standard error what failed, and how long work goes on.

mod failure;
pub(crate) mod json;
pub(crate) mod processes;
pub(crate) mod progress;

use std::io::{self, IsTerminal, Write};

use jiff::{Timestamp, Unit};
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

pub(crate) use failure::{Failure, Outcome, all_of, plain, say};

/// Blanks between the columns of a table.
const GAP: usize = 2;

/// Standard output.
#[derive(Debug)]
pub(crate) struct Output {
    terminal: bool,
}

impl Output {
    /// Looks at what standard output is.
    pub(crate) fn new() -> Self {
        Self { terminal: io::stdout().is_terminal() }
    }

    /// Writes a line.
    pub(crate) fn line(&self, text: impl std::fmt::Display) -> Outcome {
        writeln!(io::stdout().lock(), "{text}").map_err(Failure::Output)
    }

    /// Writes text that has its line ends.
    pub(crate) fn text(&self, text: &str) -> Outcome {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
    }

    /// Writes one JSON value.
    pub(crate) fn json(&self, value: &impl Serialize) -> Outcome {
        let mut out = io::BufWriter::new(io::stdout().lock());
        serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from).map_err(Failure::Output)?;
        writeln!(out).and_then(|()| out.flush()).map_err(Failure::Output)
    }

    /// Writes a table without borders; nothing at all if it has no rows.
    pub(crate) fn table(&self, head: &[&str], rows: &[Vec<String>]) -> Outcome {
        if rows.is_empty() {
            return Ok(());
        }
        let mut widths: Vec<usize> = head.iter().map(|title| title.width()).collect();
        for row in rows {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = (*widest).max(cell.width());
            }
        }
        // A write for each line takes longer than the line.
        let mut out = io::BufWriter::new(io::stdout().lock());
        let head: Vec<String> = head.iter().copied().map(String::from).collect();
        let mut line = String::new();
        for row in std::iter::once(&head).chain(rows) {
            line.clear();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width - cell.width() + GAP));
            }
            writeln!(out, "{}", line.trim_end()).map_err(Failure::Output)?;
        }
        out.flush().map_err(Failure::Output)
    }

    /// A time: how long ago on a terminal, RFC 3339 in a pipe.
    pub(crate) fn time(&self, time: Timestamp) -> String {
        if self.terminal { ago(Timestamp::now(), time) } else { rfc3339(time) }
    }
}

/// RFC 3339, in UTC, to the millisecond.
pub(crate) fn rfc3339(time: Timestamp) -> String {
    let rounded = time.round(Unit::Millisecond).unwrap_or(time);
    format!("{rounded:.3}")
}

fn ago(now: Timestamp, time: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(time.as_second());
    let (count, unit) = match seconds {
        ..0 => return "in the future".into(),
        0..60 => return "just now".into(),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        86_400..2_592_000 => (seconds / 86_400, "day"),
        _ => return rfc3339(time)[..10].to_owned(),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_people_tell_them() {
        let now: Timestamp = "2026-03-01T12:00:00Z".parse().unwrap();
        let tell = |text: &str| ago(now, text.parse().unwrap());
        assert_eq!(tell("2026-03-01T11:59:30Z"), "just now");
        assert_eq!(tell("2026-03-01T11:58:59Z"), "1 minute ago");
        assert_eq!(tell("2026-03-01T09:00:00Z"), "3 hours ago");
        assert_eq!(tell("2026-02-27T12:00:00Z"), "2 days ago");
        assert_eq!(tell("2025-03-01T12:00:00Z"), "2025-03-01");
        assert_eq!(tell("2026-03-01T12:00:05Z"), "in the future");
        assert_eq!(rfc3339(now), "2026-03-01T12:00:00.000Z");
    }
}
