//! Parses the command line, runs it, exits.

use std::process::ExitCode;

fn main() -> ExitCode {
    fsnap_oracle::main(std::env::args_os())
}
