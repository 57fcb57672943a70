//! What a user is told when something was not done.

use std::io::Write;

use fsnap::{Error, catalog, engine};
use fsnap_backend::ErrorKind;

use super::super::environment::is_root;

/// How a command ends.
pub(crate) type Outcome = Result<(), Failure>;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// fsnap could not do it.
    Error(Error),
    /// It is not to be called so: the arguments, each understood, do not fit what there is.
    Usage(String),
    /// The output could not be written.
    Output(std::io::Error),
    /// The findings were printed already; the command has failed.
    Reported,
    /// Another process of fsnap could not do it, and these are its words.
    Told(String),
    /// The command that fsnap stayed in front of has ended with this code, which is to be its own.
    Ended(u8),
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

impl Failure {
    /// Says on standard error what failed, and what can be done about it.
    pub(crate) fn report(&self) {
        let _ = anstream::stderr().write_all(self.to_text().as_bytes());
    }

    /// What there is to say: whole lines, or nothing.
    pub(crate) fn to_text(&self) -> String {
        match self {
            Self::Error(error) => {
                let hint = hint(error).map(|hint| line("hint", &hint)).unwrap_or_default();
                line("error", &error.to_string()) + &hint
            }
            Self::Usage(text) => line("error", text),
            Self::Output(error) => line("error", &format!("cannot write the output: {error}")),
            Self::Reported | Self::Ended(_) => String::new(),
            Self::Told(text) => text.clone(),
        }
    }
}

/// Goes on to the end whatever fails, says of each what failed, and fails if one did.
pub(crate) fn all_of(outcomes: impl IntoIterator<Item = Outcome>) -> Outcome {
    let mut all = Ok(());
    for failure in outcomes.into_iter().filter_map(Result::err) {
        failure.report();
        all = Err(Failure::Reported);
    }
    all
}

/// Writes a line on standard error; what cannot be written there cannot be said at all.
pub(crate) fn say(label: &str, text: &str) {
    let _ = anstream::stderr().write_all(line(label, text).as_bytes());
}

/// Writes a text of several lines on standard error, so that nothing in it speaks to the terminal.
pub(crate) fn plain(text: &str) -> std::io::Result<()> {
    let lines = text.lines().map(|line| fsnap::printable(line.as_ref()) + "\n");
    std::io::stderr().write_all(lines.collect::<String>().as_bytes())
}

/// A message that no name in it can forge: nothing in it speaks to the terminal, and further lines are indented.
fn line(label: &str, text: &str) -> String {
    let lines: Vec<String> = text.trim_end().split('\n').map(|line| fsnap::printable(line.as_ref())).collect();
    format!("fsnap: {label}: {}\n", lines.join("\n    "))
}

fn hint(error: &Error) -> Option<String> {
    let hint = match error {
        // What begins with an @ is meant as a checkpoint.
        Error::NoSuchCheckpoint { reference, .. } if reference.find('@').is_some_and(|at| at > 0) => {
            "a past state that is no checkpoint can only be branched: `fsnap branch VOLUME@TIME NAME`"
        }
        Error::NoSuchCheckpoint { .. } => "`fsnap log` lists the checkpoints",
        Error::Ambiguous { .. } => "write more digits of the one you mean",
        Error::NoSuchVolume { .. } => {
            "`fsnap volumes` lists the volumes, `fsnap ps` the runs; `fsnap init DIR` registers a volume"
        }
        Error::NoSuchState { volume, .. } => {
            return Some(format!("`fsnap log --all {volume}` lists the states that are left"));
        }
        Error::NoSuchPool { .. } => "`fsnap pool list` lists the pools of this machine",
        Error::NoSuchBranch { .. } => "`fsnap branches` lists the branches",
        Error::Needed { .. } => "remove the branch first: `fsnap rm --branch NAME`",
        Error::BranchInUse { .. } => "end these processes first",
        Error::MountedInBranch { .. } => "unmount it first",
        Error::VolumeAway { .. } => {
            "move it back or mount it there again, after `fsnap pool start` if its pool was made by fsnap; or forget it with `fsnap rm --volume NAME`"
        }
        Error::WrongVolume { .. } => {
            "mount the right file system there, or forget the volume with `fsnap rm --volume NAME` and register it anew"
        }
        Error::WrongFiles { checkpoint, .. } => {
            return Some(format!(
                "`fsnap restore {}` restores the processes onto a branch with the right files",
                checkpoint.short()
            ));
        }
        Error::ImagesInVolume { .. } => "let the engine write its images to a directory outside every volume",
        Error::NoProcessImage { .. } => "`fsnap branch` gives you its files",
        Error::Outside { .. } => {
            "`fsnap audit PID` lists all of it; confine the processes, or say what does not matter by --ignore or the settings"
        }
        Error::NotKept { .. } | Error::LeftOut { .. } => {
            "the processes run on: ask `fsnap criu-args PID` again, and dump again"
        }
        Error::Doubles { .. } => {
            "mount each of the subvolumes by itself (`mount -o subvol=…`), or use `fsnap run`, which does"
        }
        Error::OutOfReach { .. } => {
            "start the run as root; `fsnap checkpoint --pid PID` takes its files without its processes"
        }
        Error::Engine(fsnap::engine::Error::SharedImages { .. }) => {
            "if they are yours all the same, make root their owner and take the others' rights away: chown, chmod"
        }
        Error::NoProcesses { .. } => {
            "they are recorded by `fsnap checkpoint --pid`, by --cgroup, and by an engine's hook"
        }
        Error::NotAPlace { .. } => "name a place outside every volume by --store",
        Error::NoSuchTag { .. } => "`fsnap log` shows the tags",
        Error::NameTaken { what: "the branch", .. } => {
            "choose another name, or remove the branch: `fsnap rm --branch NAME`"
        }
        Error::NoSuchRun { .. } => "`fsnap ps --all` lists the runs",
        Error::NoHooks { .. } => "`fsnap engine runc checkpoint` does without hooks",
        Error::RunHalfDone { .. } => "`fsnap recover` undoes it, or says what stands in the way",
        Error::RunLives { .. } => "end it first: `fsnap stop NAME`",
        Error::BadRun { path, .. } if path.as_path().ends_with("run.json") => {
            "once it has ended, `fsnap rm --run NAME` removes what is left of it"
        }
        Error::RunElsewhere { .. } => "call fsnap where it was started, or outside of that",
        Error::RunAround { .. } => "call fsnap outside of it",
        Error::RunEnded { .. } => "`fsnap logs NAME` shows what it said",
        Error::RunHasNoRoot { .. } => "start the command so that it stays: servers have an option for the foreground",
        Error::IsOfARun { .. } => "`fsnap branch CKPT --run` makes a copy of it on a branch",
        Error::NotOfARun { .. } => "`fsnap restore` restores processes that fsnap did not start",
        Error::NameTaken { what: "the run", .. } => "choose another name by --name, or end that one: `fsnap stop NAME`",
        Error::Engine(engine::Error::EngineFailed { .. }) if !is_root() => {
            "not everything can be restored without root; `fsnap branch CKPT` gives you the files all the same"
        }
        Error::Engine(engine::Error::Directory { .. }) => {
            "show it to the run, by --volume, --rw or --ro, or start the run from a directory that it sees"
        }
        Error::NoOverlay { .. } => "name a directory on ext4, XFS, btrfs or tmpfs by `branches` in the settings",
        Error::Catalog(catalog::Error::Damaged { .. }) => {
            "restore it from a backup; the snapshots themselves are not touched"
        }
        Error::Catalog(catalog::Error::Full { .. }) => {
            "free some space there; `fsnap recover` tells whether anything was begun"
        }
        Error::Catalog(catalog::Error::ReadOnly { .. }) => {
            "be the user whose it is; to read it only, copy its directory and name the copy by FSNAP_STATE"
        }
        Error::Catalog(catalog::Error::Missing { .. }) => {
            "`fsnap init DIR` makes one; FSNAP_STATE names another state directory"
        }
        Error::Catalog(catalog::Error::Database { .. }) => "`fsnap recover` finishes or undoes what was begun",
        Error::Unsealed { .. } => {
            "`fsnap recover` seals it, or tells why it cannot; or let the engine write to another directory"
        }
        Error::Catalog(
            catalog::Error::Locked { .. } | catalog::Error::InHand { .. } | catalog::Error::Freezing { .. },
        ) => "try again when the other command is done",
        Error::StoreAway { .. } => "mount the file system that holds them there again, or move them back",
        Error::Backend(error) | Error::NoSnapshot { source: error, .. } => match error.kind() {
            ErrorKind::NoSpace => "free some space, then try again; nothing was left behind",
            ErrorKind::ReadOnly => "mount it writable first",
            ErrorKind::Permission => "run fsnap as root, or use a directory and a store of your own",
            ErrorKind::Changed => "let fsnap freeze the writers: --pid, --cgroup or --freeze-writers",
            ErrorKind::NotAVolume => "`fsnap doctor DIR` tells what each backend says of a directory; rsync takes any",
            ErrorKind::Exists => "choose another name, or remove what is there first",
            // It says already what to do.
            ErrorKind::Busy if error.to_string().contains('`') => return None,
            ErrorKind::Busy => "unmount it, or end the processes that use it, first",
            _ => return None,
        },
        _ => return None,
    };
    Some(hint.to_owned())
}
