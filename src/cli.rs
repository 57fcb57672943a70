//! The command line: from arguments to one call of the library, and from its answer to text or JSON.
//!
//! Results go to standard output, all else to standard error. Exit codes: 0 done, 1 failed, 2 usage; with `--tty`, once the command runs,
//! the command's.
//!
//! A file is a command, named as it is typed (`criu_args.rs` is `fsnap criu-args`), and what stands in the directory of that name is a part
//! of that command: what its own subcommands do, or what only it needs. Each has an `Args`, whose documentation is the command's help, and a
//! `run`. No command, but shared by them, are three:
//!
//! | module | what it knows |
//! |---|---|
//! | [`environment`] | the settings and the environment, and the catalog as these say: how a command begins |
//! | [`output`] | tables, JSON, progress, failures and hints: how it ends |
//! | [`process`](mod@process) | its own process: limits, signals, its deadline, and children that go on without it |
//!
//! [`internal`] is a command that only fsnap itself types: the processes that it starts of itself.

mod environment;
mod output;
mod process;

mod internal;

mod audit;
mod branch;
mod branches;
mod checkpoint;
mod completions;
mod criu_args;
mod diff;
mod doctor;
mod engine;
mod hook;
mod init;
mod install_hooks;
mod log;
mod logs;
mod man;
#[cfg(feature = "fuse")]
mod mount;
#[cfg(feature = "fuse")]
mod overlay;
#[cfg(feature = "dm-thin")]
mod pool;
mod ps;
mod recover;
mod restore;
mod rm;
mod run;
mod show;
mod stop;
mod tag;
#[cfg(feature = "fuse")]
mod umount;
mod verify;
mod volumes;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::error::{ContextKind, ContextValue};
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub(crate) use environment::Context;
pub(crate) use output::{Failure, Outcome, Output, all_of, json, say};

/// Snapshot the files of processes at their checkpoints, and branch from any of them
///
/// A checkpoint engine such as CRIU freezes and saves processes; fsnap takes a snapshot of every volume that they can
/// write to at the same instant. Each checkpoint can be browsed, compared, and made into a writable branch, onto which
/// the processes can be restored.
///
/// Begin with `fsnap init DIR`, then `fsnap checkpoint`, `fsnap log`, `fsnap branch @latest`.
#[derive(Debug, Parser)]
#[command(name = "fsnap", version, max_term_width = 100, after_help = CKPT_HELP)]
struct Cli<const LATE: bool> {
    #[command(subcommand)]
    command: Command<LATE>,
}

/// The arguments of a command; put together, if `LATE`, only when that command is the one that was typed.
///
/// To put those of all commands together takes longer than most commands do, and only the help has a use for them.
#[derive(Debug)]
struct Typed<T, const LATE: bool>(T);

impl<T: Args, const LATE: bool> Args for Typed<T, LATE> {
    fn augment_args(command: clap::Command) -> clap::Command {
        if LATE { command.defer(T::augment_args) } else { T::augment_args(command) }
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        if LATE { command.defer(T::augment_args_for_update) } else { T::augment_args_for_update(command) }
    }
}

impl<T: FromArgMatches, const LATE: bool> FromArgMatches for Typed<T, LATE> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        T::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

const CKPT_HELP: &str = "CKPT is an id, a unique prefix of one (4 digits or more), a tag, @latest, or X~N, the N-th \
                         checkpoint before X.\n\nExit codes: 0 done, 1 failed, 2 wrong usage.";

#[derive(Debug, Subcommand)]
enum Command<const LATE: bool> {
    Init(Typed<init::Args, LATE>),
    Volumes(Typed<volumes::Args, LATE>),
    Checkpoint(Typed<checkpoint::Args, LATE>),
    Audit(Typed<audit::Args, LATE>),
    Log(Typed<log::Args, LATE>),
    Show(Typed<show::Args, LATE>),
    Diff(Typed<diff::Args, LATE>),
    Branch(Typed<branch::Args, LATE>),
    Branches(Typed<branches::Args, LATE>),
    Restore(Typed<restore::Args, LATE>),
    Run(Typed<run::Args, LATE>),
    Ps(Typed<ps::Args, LATE>),
    Logs(Typed<logs::Args, LATE>),
    Stop(Typed<stop::Args, LATE>),
    Rm(Typed<rm::Args, LATE>),
    Tag(Typed<tag::Args, LATE>),
    #[cfg(feature = "fuse")]
    Mount(Typed<mount::Args, LATE>),
    #[cfg(feature = "fuse")]
    Overlay(Typed<overlay::Args, LATE>),
    #[cfg(feature = "fuse")]
    Umount(Typed<umount::Args, LATE>),
    Verify(Typed<verify::Args, LATE>),
    #[cfg(feature = "dm-thin")]
    Pool(Typed<pool::Args, LATE>),
    Recover(Typed<recover::Args, LATE>),
    Doctor(Typed<doctor::Args, LATE>),
    InstallHooks(Typed<install_hooks::Args, LATE>),
    Engine(Typed<engine::Args, LATE>),
    Hook(Typed<hook::Args, LATE>),
    CriuArgs(Typed<criu_args::Args, LATE>),
    Completions(Typed<completions::Args, LATE>),
    Man(Typed<man::Args, LATE>),
}

/// The exit code of a command that did what it was called for.
const DONE: u8 = 0;

/// The exit code of one that did not.
const FAILED: u8 = 1;

/// The exit code of one that was called in a way in which it cannot be.
const WRONG_USAGE: u8 = 2;

/// Runs the command that the arguments name, and returns its exit code.
pub(crate) fn main(arguments: Vec<OsString>) -> u8 {
    process::prepare();
    // CRIU starts its action script without arguments: the name tells that it is us who is called.
    let called = arguments.first().map(Path::new);
    if called.is_some_and(|program| program == Path::new(internal::OWN_PROGRAM)) {
        // Process lists would call it `exe`.
        let _ = rustix::thread::set_name(c"fsnap");
    }
    let called = called.and_then(Path::file_name);
    if called.is_some_and(|name| name == hook::CRIU_HOOK_NAME) {
        return finish(hook::criu());
    }
    if arguments.len() == 1 && fsnap::engine::is_relay(Path::new(&arguments[0]), environment::of_engine) {
        return finish(internal::relay());
    }
    // What is not for users is no part of the help, the completions and the manual.
    let parsed = if arguments.get(1).is_some_and(|command| command == internal::NAME) {
        internal::Args::try_parse_from(&arguments[1..]).map(internal::run)
    } else {
        // What it says of wrong usage, or as help, it says of all commands.
        let parsed = Cli::<true>::try_parse_from(&arguments).map(|cli| run(cli.command));
        parsed.or_else(|_| Cli::<false>::try_parse_from(&arguments).map(|cli| run(cli.command)))
    };
    match parsed {
        Ok(outcome) => finish(outcome),
        Err(mut error) => {
            quote(&mut error);
            let code = if error.use_stderr() { WRONG_USAGE } else { DONE };
            // What cannot be written there cannot be said at all.
            let _ = match arguments.iter().any(|argument| argument.as_bytes().iter().any(u8::is_ascii_control)) {
                false => error.print(),
                // The message repeats the argument: it may come from a script, and must not speak to the terminal.
                true => output::plain(&error.render().to_string()),
            };
            code
        }
    }
}

/// Keeps what was typed on one line: no line of a message is then what somebody else chose.
fn quote(error: &mut clap::Error) {
    for kind in [ContextKind::InvalidArg, ContextKind::InvalidValue, ContextKind::InvalidSubcommand] {
        if let Some(ContextValue::String(typed)) = error.get(kind) {
            let printable = fsnap::printable(typed.as_ref());
            error.insert(kind, ContextValue::String(printable));
        }
    }
}

fn run<const LATE: bool>(command: Command<LATE>) -> Outcome {
    match command {
        Command::Init(Typed(args)) => init::run(args),
        Command::Volumes(Typed(args)) => volumes::run(args),
        Command::Checkpoint(Typed(args)) => checkpoint::run(args),
        Command::Audit(Typed(args)) => audit::run(args),
        Command::Log(Typed(args)) => log::run(args),
        Command::Show(Typed(args)) => show::run(args),
        Command::Diff(Typed(args)) => diff::run(args),
        Command::Branch(Typed(args)) => branch::run(args),
        Command::Branches(Typed(args)) => branches::run(args),
        Command::Restore(Typed(args)) => restore::run(args),
        Command::Run(Typed(args)) => self::run::run(args),
        Command::Ps(Typed(args)) => ps::run(args),
        Command::Logs(Typed(args)) => logs::run(args),
        Command::Stop(Typed(args)) => stop::run(args),
        Command::Rm(Typed(args)) => rm::run(args),
        Command::Tag(Typed(args)) => tag::run(args),
        #[cfg(feature = "fuse")]
        Command::Mount(Typed(args)) => mount::run(args),
        #[cfg(feature = "fuse")]
        Command::Overlay(Typed(args)) => overlay::run(args),
        #[cfg(feature = "fuse")]
        Command::Umount(Typed(args)) => umount::run(args),
        Command::Verify(Typed(args)) => verify::run(args),
        #[cfg(feature = "dm-thin")]
        Command::Pool(Typed(args)) => pool::run(args),
        Command::Recover(Typed(args)) => recover::run(args),
        Command::Doctor(Typed(args)) => doctor::run(args),
        Command::InstallHooks(Typed(args)) => install_hooks::run(args),
        Command::Engine(Typed(args)) => engine::run(args),
        Command::Hook(Typed(args)) => hook::run(args),
        Command::CriuArgs(Typed(args)) => criu_args::run(&args),
        Command::Completions(Typed(args)) => completions::run(args, &mut Cli::<false>::command()),
        Command::Man(Typed(args)) => man::run(args, Cli::<false>::command()),
    }
}

fn finish(outcome: Outcome) -> u8 {
    match outcome {
        Ok(()) => DONE,
        // Whoever read our output has seen enough.
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => DONE,
        Err(failure) => {
            failure.report();
            match failure {
                Failure::Usage(_) => WRONG_USAGE,
                Failure::Ended(code) => code,
                _ => FAILED,
            }
        }
    }
}
