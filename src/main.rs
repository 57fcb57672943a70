//! Parses the command line, runs it, exits.
//!
//! Begins where the C library does, without the start of Rust's runtime: half of the time from a start of the hook to its first
//! instruction, while processes stand. Most of that finds the end of the stack, for words about an overflow; the rest is in
//! `cli::process::prepare`.

#![cfg_attr(not(test), no_main)]

mod cli;

/// Of the test program: that one begins in its own `main`.
#[cfg(test)]
fn main() -> std::process::ExitCode {
    cli::main(std::env::args_os().collect()).into()
}
