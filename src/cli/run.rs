//! `fsnap run`

pub(crate) mod terminal;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use fsnap::checkpoint::PathText;
use fsnap::coordinator::{Coordinator, Target};
use fsnap::engine::{Confinement, MountPlan, Program, Restored, SCRATCH, Start};
use fsnap::mount::Restrictions;
use fsnap::name::Name;
use fsnap::run::{RunRecord, Runs, SeenVolume};
use fsnap_backend::MountSpec;

use super::{Context, Failure, Outcome, Output, internal, process};

/// Start a command so that it can be saved and copied live
///
/// It gets namespaces of its own (pids, mounts, IPC), in which everything is read-only but its volumes, so that a checkpoint
/// holds all that it can change. Each copy has its own /tmp, /var/tmp and /dev/shm in memory. It goes on in the background, and
/// what it says goes to a log (`fsnap logs`), unless it has a terminal. Prints the run's name.
///
/// With --tty, the exit code is the command's once that runs, or 128 and the number of the signal that killed it; what fsnap itself
/// could not do is told by a line `fsnap: error:`.
///
/// Then `fsnap checkpoint NAME` saves it, files and processes at one instant, and `fsnap branch CKPT --run` starts a copy.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run's name; one is made up from the command, if not given
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// A volume that it writes to, by name or path; may be given several times
    #[arg(long = "volume", value_name = "VOLUME")]
    volumes: Vec<String>,
    /// A directory that it writes to and that is in no checkpoint; all copies share it
    #[arg(long = "rw", value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// A directory that it sees read-only, also in a volume or below /tmp
    #[arg(long = "ro", value_name = "DIR")]
    read_only: Vec<PathBuf>,
    /// A directory that it sees empty, in memory, each copy its own
    #[arg(long = "tmp", value_name = "DIR")]
    scratch: Vec<PathBuf>,
    /// Give it this terminal, and stay until it ends, with its exit code
    #[arg(long)]
    tty: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = context.create()?;
    let targets = match args.volumes.is_empty() {
        true => Vec::new(),
        false => coordinator.targets_named(&args.volumes)?,
    };
    let runs = Runs::of(&context.state);
    let name = match args.name {
        Some(name) => name,
        None => free_name(&runs, &coordinator, &args.command)?,
    };
    refuse_volume(&coordinator, &name)?;
    let mut scratch: Vec<PathBuf> = SCRATCH.iter().map(PathBuf::from).collect();
    scratch.extend(directories(&args.scratch)?);
    if let Some(dir) = scratch.iter().find(|dir| std::env::join_paths([dir]).is_err()) {
        let dir = fsnap::printable(dir.as_os_str());
        return Err(Failure::Usage(format!("{dir}: the path of a directory for --tmp may not hold a colon")));
    }
    let confinement = Confinement {
        writable: directories(&args.writable)?.into_iter().map(PathText).collect(),
        read_only: directories(&args.read_only)?.into_iter().map(PathText).collect(),
        scratch: scratch.into_iter().map(PathText).collect(),
        output: PathText(runs.output()),
    };
    let volumes = targets.iter().map(|t| SeenVolume { volume: t.volume.clone(), at: t.path.clone() }).collect();
    let mut record = RunRecord::new(name, args.command.clone(), confinement, volumes);
    let terminal = match args.tty {
        true => Some(terminal::Terminal::open()?),
        false => None,
    };
    record.terminal = terminal.as_ref().map(|terminal| terminal.id());
    let restored = start(&runs, &record, &targets, terminal.as_ref())?;
    match terminal {
        Some(terminal) => terminal.relay(restored),
        None => Output::new().line(&record.name),
    }
}

fn start(
    runs: &Runs,
    record: &RunRecord,
    targets: &[Target],
    terminal: Option<&terminal::Terminal>,
) -> Result<Restored, Failure> {
    let mut mounts = Vec::with_capacity(targets.len());
    for target in targets {
        let at = target.path.0.clone();
        let restrictions = Restrictions::of(&at)?;
        mounts.push(MountPlan { spec: MountSpec::Bind { dir: at.clone(), read_only: false }, at, restrictions });
    }
    let directory = std::env::current_dir().unwrap_or_else(|_| Path::new("/").into());
    let mut program = Program::new(record.command.clone(), directory);
    program.open_files = process::open_files();
    program.terminal = terminal.map(|terminal| terminal.path().to_owned());
    let place = runs.create(record)?;
    let start = Start {
        program: &program,
        cell: (&record.confinement, place.path()),
        mounts: &mounts,
        log: &place.start_log(),
        stage: &internal::stage_command(),
        last_stage: &internal::program_command(),
    };
    match start.run() {
        Ok(mut started) => match place.started(started.root).and_then(|()| Ok(started.keep()?)) {
            Ok(()) => Ok(started),
            Err(error) => {
                let ended = started.kill();
                let object = || format!("the run {}", record.name);
                let ended = ended.map_err(|source| fsnap::Error::Io { action: "end", object: object(), source });
                Err(error.and_undo(ended.and_then(|()| place.discard())).into())
            }
        },
        Err(error) => Err(fsnap::Error::from(error).and_undo(place.discard()).into()),
    }
}

/// The directories as the processes will name them.
fn directories(dirs: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let canonical = |dir: &PathBuf| {
        let object = fsnap::printable(dir.as_os_str());
        match dir.canonicalize() {
            Ok(found) if found.is_dir() => Ok(found),
            // A mount holds on to the file that it was made of.
            Ok(_) => Err(Failure::Usage(format!(
                "{object} is not a directory: name the directory that holds it, for when another file takes the place of \
                 this one, the run would keep the old one, and its copies would get the new one"
            ))),
            Err(source) => Err(fsnap::Error::Io { action: "find the directory", object, source }.into()),
        }
    };
    dirs.iter().map(canonical).collect()
}

/// Makes sure that a run of that name can be told from the volumes.
pub(crate) fn refuse_volume(coordinator: &Coordinator, name: &Name) -> fsnap::Result<()> {
    if coordinator.catalog().volumes()?.iter().all(|volume| volume.name != *name) {
        return Ok(());
    }
    let by = "a run of that name would make `fsnap checkpoint NAME` mean either; choose another".to_owned();
    Err(fsnap::Error::NameTaken { what: "the volume", name: name.clone(), by: Some(by) })
}

/// A name that tells what runs, and that nothing has.
fn free_name(runs: &Runs, coordinator: &Coordinator, command: &[OsString]) -> fsnap::Result<Name> {
    let program = command.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
    let base = Name::derive_from(&program.to_string_lossy()).map_or_else(|| "run".to_owned(), |name| name.to_string());
    let base = base.chars().take(48).collect::<String>();
    let volumes = coordinator.catalog().volumes()?;
    let mut number = 1;
    loop {
        let name: Name = format!("{base}-{number}").parse()?;
        if runs.find(&name)?.is_none() && volumes.iter().all(|volume| volume.name != name) {
            return Ok(name);
        }
        number += 1;
    }
}
