//! The command line.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand};

use crate::content::mix;
use crate::start::READY;
use crate::{Kind, Plan, Verdict};

/// A process that knows what its files must hold, and says whether they do
#[derive(Debug, Parser)]
#[command(name = "fsnap-oracle", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write until SIGTERM; give a verdict at each SIGUSR1
    Run(Run),
    /// Start `run` in the background, wait until it writes, and print its process id
    Start(Run),
    /// Ask a running oracle for a verdict and print it; exit 1 if memory and files differ
    Ask(Ask),
    /// Judge files without their process, such as a snapshot; exit 1 if they cannot belong together
    Examine {
        /// The directories, in the order in which the oracle was given them
        #[arg(required = true)]
        dirs: Vec<PathBuf>,
        /// Say it in one sentence instead of JSON
        #[arg(long)]
        brief: bool,
    },
}

#[derive(Debug, Args)]
struct Run {
    /// Where verdicts are written; must exist
    #[arg(long)]
    reports: PathBuf,
    /// How to write, separated by commas: append, overwrite, mmap, rename, order, sparse, names, unlinked, volumes
    /// [default: all but unlinked]
    #[arg(long, value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// The longest pause at one point of a step, in microseconds
    #[arg(long, default_value_t = 2000)]
    pace: u64,
    /// The number that decides all bytes [default: from the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// The directories to write in, one per volume; made if missing, and must not hold another run
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
}

#[derive(Debug, Args)]
struct Ask {
    /// Where the oracle reports
    #[arg(long)]
    reports: PathBuf,
    /// Names the verdict; may not be used twice [default: from the clock]
    #[arg(long)]
    tag: Option<String>,
    /// How long to wait, in seconds
    #[arg(long, default_value_t = 10)]
    deadline: u64,
    /// Say it in one sentence instead of JSON
    #[arg(long)]
    brief: bool,
    /// The oracle's process id
    pid: i32,
}

/// Runs the oracle's command line; the first of `args` is the program's name.
///
/// A library call, so that a test binary can be its own oracle.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let result = match cli.command {
        Command::Run(run) => run.run(),
        Command::Start(_) => start(&args),
        Command::Ask(ask) => ask.run(),
        Command::Examine { dirs, brief } => crate::examine(&dirs).and_then(|verdict| say(&verdict, brief)),
    };
    result.unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "fsnap-oracle: {error}");
        ExitCode::FAILURE
    })
}

impl Run {
    fn run(self) -> io::Result<ExitCode> {
        // Fails for a process that leads its session already, which is as good.
        let _ = rustix::process::setsid();
        let kinds = if self.kinds.is_empty() { Kind::usual().collect() } else { self.kinds };
        let plan = Plan {
            run: self.seed.unwrap_or_else(|| mix(now() ^ u64::from(std::process::id()))),
            dirs: self.dirs.iter().map(std::path::absolute).collect::<io::Result<_>>()?,
            kinds,
            reports: std::fs::canonicalize(self.reports)?,
            pace: Duration::from_micros(self.pace),
        };
        // A working directory is one more thing that an engine would have to find again.
        rustix::process::chdir("/")?;
        let verdict = crate::run(plan, || {
            io::stdout().write_all(READY)?;
            io::stdout().flush()?;
            detach()
        })?;
        Ok(if verdict.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Lets go of the standard streams, which lead to a terminal or to pipes that no engine can dump.
fn detach() -> io::Result<()> {
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// `args` are those of `start`, which are those of `run` but for that word.
fn start(args: &[OsString]) -> io::Result<ExitCode> {
    let run = args.iter().map(|arg| if arg == "start" { "run".into() } else { arg.clone() }).skip(1);
    let pid = crate::start(&std::env::current_exe()?, run).map_err(io::Error::other)?;
    writeln!(io::stdout(), "{pid}")?;
    Ok(ExitCode::SUCCESS)
}

impl Ask {
    fn run(self) -> io::Result<ExitCode> {
        let tag = self.tag.unwrap_or_else(|| format!("{:x}", now()));
        let verdict = crate::ask(self.pid, &self.reports, &tag, Duration::from_secs(self.deadline));
        say(&verdict.map_err(io::Error::other)?, self.brief)
    }
}

fn say(verdict: &Verdict, brief: bool) -> io::Result<ExitCode> {
    let text = if brief { format!("{verdict}\n") } else { verdict.to_line() };
    io::stdout().write_all(text.as_bytes())?;
    Ok(if verdict.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}
