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
use clap::{Args, CommandFactory, Parser, Subcommand};

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
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const CKPT_HELP: &str = "CKPT is an id, a unique prefix of one (4 digits or more), a tag, @latest, or X~N, the N-th \
                         checkpoint before X.\n\nExit codes: 0 done, 1 failed, 2 wrong usage.";

/// The commands, in the order of the help: what is typed, and the module that knows what to do.
macro_rules! commands {
    ($($(#[$when:meta])? $name:literal => $variant:ident($module:ident),)*) => {
        #[derive(Debug, Subcommand)]
        enum Command {
            $($(#[$when])? #[command(name = $name)] $variant($module::Args),)*
        }

        fn run(command: Command) -> Outcome {
            match command {
                $($(#[$when])? Command::$variant(args) => self::$module::run(args),)*
            }
        }

        /// The command that was typed, put together without the others.
        fn typed(arguments: &[OsString]) -> Option<Command> {
            match arguments.get(1)?.to_str()? {
                $($(#[$when])? $name => read::<$module::Args>($name, &arguments[1..]).map(Command::$variant),)*
                _ => None,
            }
        }
    };
}

commands! {
    "init" => Init(init),
    "volumes" => Volumes(volumes),
    "checkpoint" => Checkpoint(checkpoint),
    "audit" => Audit(audit),
    "log" => Log(log),
    "show" => Show(show),
    "diff" => Diff(diff),
    "branch" => Branch(branch),
    "branches" => Branches(branches),
    "restore" => Restore(restore),
    "run" => Run(run),
    "ps" => Ps(ps),
    "logs" => Logs(logs),
    "stop" => Stop(stop),
    "rm" => Rm(rm),
    "tag" => Tag(tag),
    #[cfg(feature = "fuse")]
    "mount" => Mount(mount),
    #[cfg(feature = "fuse")]
    "overlay" => Overlay(overlay),
    #[cfg(feature = "fuse")]
    "umount" => Umount(umount),
    "verify" => Verify(verify),
    #[cfg(feature = "dm-thin")]
    "pool" => Pool(pool),
    "recover" => Recover(recover),
    "doctor" => Doctor(doctor),
    "install-hooks" => InstallHooks(install_hooks),
    "engine" => Engine(engine),
    "hook" => Hook(hook),
    "criu-args" => CriuArgs(criu_args),
    "completions" => Completions(completions),
    "man" => Man(man),
}

/// The arguments of one command; `None` if that is not what was typed.
fn read<T: Args>(name: &'static str, arguments: &[OsString]) -> Option<T> {
    let command = T::augment_args(clap::Command::new(name));
    T::from_arg_matches(&command.try_get_matches_from(arguments).ok()?).ok()
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
    if arguments.len() == 1 && fsnap::engine::is_for_timers(environment::of_engine) {
        return finish(internal::timers());
    }
    // What is not for users is no part of the help, the completions and the manual.
    let parsed = if arguments.get(1).is_some_and(|command| command == internal::NAME) {
        internal::Args::try_parse_from(&arguments[1..]).map(internal::run)
    } else {
        // To put all commands together takes longer than most commands do, and only the help, and what is said of wrong usage, have a use
        // for them.
        let command = typed(&arguments).map_or_else(|| Cli::try_parse_from(&arguments).map(|cli| cli.command), Ok);
        command.map(run)
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

/// All commands.
fn whole() -> clap::Command {
    Cli::command()
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
