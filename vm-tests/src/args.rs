//! The command line.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::machine::{Kind, Machine};
use crate::{Result, bench, guest, run, suites};

/// Runs the tests of fsnap on real kernels, in virtual machines
#[derive(Debug, Parser)]
#[command(name = "vm-tests")]
struct Cli {
    /// Give a prompt in a machine
    #[arg(long, value_name = "MACHINE", num_args = 0..=1, default_missing_value = "uml")]
    shell: Option<Kind>,
    /// Run only the suites whose name contains this; may be given again
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Of these suites, run the part that is run without `--only`
    #[arg(long, requires = "only")]
    usual: bool,
    /// Run the suites in machines of this kind
    #[arg(long, value_name = "MACHINE", requires = "only")]
    machine: Option<Kind>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one program in user-mode Linux; the exit code is the program's
    Uml(Program),
    /// Run one program in QEMU; the exit code is the program's
    Qemu(Program),
    /// Be the first process before there is a root
    #[command(hide = true)]
    Initramfs {
        /// The directory that both sides see
        exchange: PathBuf,
        /// This program, on the host's root
        guest: PathBuf,
    },
    /// Be the first process of a machine that is tried
    #[command(hide = true)]
    Probe,
    /// Measure the backends that most hosts' kernels lack against bare calls; build with --release
    Bench {
        /// What to measure, if not all
        part: Vec<bench::Part>,
        /// Measure in a machine of this kind
        #[arg(long, value_name = "MACHINE", default_value = "uml")]
        machine: Kind,
    },
    /// Be the first process of a machine
    #[command(hide = true)]
    Guest {
        /// Which machine
        kind: Kind,
        /// The directory that both sides see
        exchange: PathBuf,
        /// What the kernel adds
        rest: Vec<String>,
    },
}

/// One program in a machine.
#[derive(Debug, Args)]
struct Program {
    /// The machine's memory, in MiB
    #[arg(long)]
    memory: Option<u32>,
    /// When to give up, in seconds
    #[arg(long, default_value_t = 1800)]
    deadline: u64,
    /// The program and its arguments; it sees this computer's files below a writable layer, and an empty /tmp
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Parses, runs, and says what went wrong.
pub(crate) fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    run(Cli::parse_from(args)).unwrap_or_else(|error| {
        // Nobody to tell if this fails.
        let _ = writeln!(io::stderr(), "error: {error}");
        ExitCode::FAILURE
    })
}

fn run(cli: Cli) -> Result<ExitCode> {
    if let Some(Command::Guest { kind, exchange, .. }) = &cli.command {
        guest::main(*kind, exchange);
    }
    if let Some(Command::Initramfs { exchange, guest }) = &cli.command {
        return Ok(guest::initramfs(exchange, guest));
    }
    if let Some(Command::Probe) = &cli.command {
        return Ok(guest::probe());
    }
    run::catch_signals()?;
    if let Some(kind) = cli.shell {
        return run::shell(&Machine::new(kind));
    }
    match cli.command {
        Some(Command::Uml(program)) => in_machine(Kind::Uml, program),
        Some(Command::Qemu(program)) => in_machine(Kind::Qemu, program),
        Some(Command::Bench { part, machine }) => bench::run(&part, machine),
        Some(Command::Guest { .. } | Command::Initramfs { .. } | Command::Probe) | None => {
            suites::run(&cli.only, cli.machine, cli.usual)
        }
    }
}

fn in_machine(kind: Kind, program: Program) -> Result<ExitCode> {
    let deadline = Some(Duration::from_secs(program.deadline));
    let usual = Machine::new(kind);
    let memory_mib = program.memory.unwrap_or(usual.memory_mib);
    let machine = Machine { memory_mib, deadline, ..usual };
    run::program(&machine, program.command)
}
