//! `fsnap checkpoint`

use std::ffi::OsString;
use std::path::PathBuf;
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use fsnap::Error;
use fsnap::checkpoint::Checkpoint;
use fsnap::coordinator::{Coordinator, Request, Window, WriterSearch, find_writers};
use fsnap::failpoint;
use fsnap::name::Name;
use fsnap::processes::{Cgroup, ProcessId, Tree};
use fsnap::quiesce::{Frozen, Quiesce};
use fsnap::run::{Run, RunCheckpoint, Runs, sweep_images};

use super::audit::Rules;
use super::{Context, Failure, Outcome, Output, environment, hook, internal, json, say};

/// How long freezing may take, if nothing else is asked for.
const WITHIN: Duration = Duration::from_secs(10);

/// Take a snapshot of every volume at one instant, and print the new checkpoint's id
///
/// With --pid or --cgroup, the processes are frozen meanwhile, and the volumes are those that they can write to; the
/// snapshots are then one point in time. Without, every volume is taken as it is while its writers run, and the
/// checkpoint records that weaker consistency.
///
/// With the name of a run (`fsnap run`), its processes are saved as well, by CRIU, and go on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to say of it
    #[arg(short, long, default_value = "", hide_default_value = true)]
    message: String,
    /// A name for it; may be given several times
    #[arg(short, long = "tag", value_name = "TAG")]
    tags: Vec<Name>,
    /// Freeze this process and all its descendants
    #[arg(long, conflicts_with = "cgroup")]
    pid: Option<i32>,
    /// Freeze all processes of this control group
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Freeze others that have files of the volumes open for writing, too
    #[arg(long)]
    freeze_writers: bool,
    /// Give up, and let the processes run, if they are not frozen after so many seconds, 10 if not given; or if those of a run stand for so many, by default as
    /// long as in a hook
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    deadline: Option<f64>,
    /// Take the volumes of this branch
    #[arg(long, value_name = "NAME", conflicts_with = "volumes")]
    branch: Option<Name>,
    #[command(flatten)]
    rules: Rules,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    /// The volumes, by name or path; if none is given, all that the processes can write to, or all there are; or one run
    #[arg(value_name = "VOLUME|RUN")]
    volumes: Vec<String>,
    /// Further arguments for the engine's dump of a run, after --
    #[arg(last = true, value_name = "ENGINE ARGS")]
    args: Vec<OsString>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds from 0.1 to 3600".into()),
    }
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = context.write()?;
    if let Some(run) = named_run(&context, &coordinator, &args)? {
        return checkpoint_run(&context, coordinator, &run, &args);
    }
    let tree = match (args.pid, &args.cgroup) {
        (Some(pid), _) => Some(Tree::of_pid(pid)?),
        (None, Some(path)) => Some(Tree::of_cgroup(Cgroup::open(path)?)?),
        (None, None) => None,
    };
    let targets = match (&args.branch, &tree) {
        _ if !args.volumes.is_empty() => coordinator.targets_named(&args.volumes)?,
        (Some(branch), _) => coordinator.targets_of_branch(branch)?,
        (None, Some(tree)) => coordinator.targets_reached(tree)?,
        (None, None) => coordinator.targets()?,
    };
    let audit = args.rules.over(context.config.audit.rules());
    if let Some(tree) = &tree {
        coordinator.refuse_outside(tree, &targets, &audit)?;
    }
    let request = Request {
        targets,
        message: args.message,
        tags: args.tags,
        tree: args.pid.map(ProcessId::of).transpose()?,
        processes: tree.clone(),
        audit,
        ..Request::default()
    };
    let mut window = coordinator.window(coordinator.begin(request)?)?;
    let within = args.deadline.map_or(WITHIN, Duration::from_secs_f64);
    let taken = if tree.is_some() || args.freeze_writers {
        freeze_and_take(&coordinator, &mut window, tree, args.freeze_writers, within)
    } else {
        take_running(&mut window)
    };
    // Not before everything was checked: what is noted is sealed, by the next command if this one is killed.
    let noted = taken.and_then(|()| Ok(window.write_note()?.appear()?));
    let begun = window.close();
    if let Err(error) = noted {
        return Err(Failure::Error(coordinator.give_up(begun, error)));
    }
    failpoint::hit("take:recorded");
    let checkpoint = coordinator.seal_or_undo(begun)?;
    print(&coordinator, &checkpoint, args.json)
}

pub(super) fn print(coordinator: &Coordinator, checkpoint: &Checkpoint, as_json: bool) -> Outcome {
    let out = Output::new();
    if as_json {
        let tags = coordinator.catalog().tags_of(&checkpoint.id)?;
        let mut object = json::checkpoint(checkpoint, &tags);
        json::add_outside(&mut object, coordinator.catalog().tree(&checkpoint.id)?.as_ref());
        return out.json(&object);
    }
    out.line(checkpoint.id)
}

/// The run that the arguments name, if they name one and no volume.
fn named_run(context: &Context, coordinator: &Coordinator, args: &Args) -> Result<Option<Run>, Failure> {
    if args.volumes.is_empty() {
        return Ok(None);
    }
    let (runs, volumes) = (Runs::of(&context.state), coordinator.catalog().volumes()?);
    let is_volume = |name: &Name| volumes.iter().any(|volume| volume.name == *name);
    let [name] = &args.volumes[..] else {
        let mut names = args.volumes.iter().filter_map(|name| name.parse::<Name>().ok());
        return match names.find(|name| !is_volume(name) && matches!(runs.find(name), Ok(Some(_)))) {
            Some(name) => Err(Failure::Usage(format!("{name} is a run: it is saved with its volumes, and by itself"))),
            None => Ok(None),
        };
    };
    let Ok(name) = name.parse::<Name>() else { return Ok(None) };
    let Some(run) = runs.find(&name)? else { return Ok(None) };
    if is_volume(&name) {
        return Err(Error::Ambiguous {
            reference: name.to_string(),
            candidates: vec![format!("the volume {name}"), format!("the run {name}")],
        }
        .into());
    }
    Ok(Some(run))
}

/// Saves a run, its processes and its files.
fn checkpoint_run(context: &Context, coordinator: Coordinator, run: &Run, args: &Args) -> Outcome {
    for (given, flag) in [
        (args.pid.is_some() || args.cgroup.is_some(), "--pid and --cgroup name other processes than the run's"),
        (args.freeze_writers, "--freeze-writers is for checkpoints without an engine"),
        (args.branch.is_some(), "a run is saved with the branch that it works on"),
    ] {
        if given {
            return Err(Failure::Usage(flag.to_owned()));
        }
    }
    // Before anything is saved, not when it is too late.
    coordinator.refuse_taken(&args.tags)?;
    sweep_images(coordinator.catalog())?;
    let tree = Tree::of_pid(run.running()?.1.pid)?;
    // If the run can write to no volume, the hook says so.
    let external = hook::external_files(context, &coordinator, &tree)?;
    // The hook and this process would wait for each other.
    drop(coordinator);
    let taken = RunCheckpoint {
        run,
        state: &context.state,
        criu: &environment::find_criu(&context.config)?,
        args: &args.args,
        external: &external,
        audit: &args.rules.over(environment::audit(&context.config)?),
        deadline: args.deadline.map(Duration::from_secs_f64),
        stage: &internal::dump_command(),
        hook: &internal::hook_command(),
        message: &args.message,
        dismiss: hook::attendant::dismiss,
        stores: &context.config.stores(),
    }
    .take();
    // In any case: what the hook took is sealed, what it began in vain is undone.
    let coordinator = context.write();
    let (id, coordinator) = (taken?, coordinator?);
    let missing = || Error::NoSuchCheckpoint { reference: id.to_string(), near: Vec::new() };
    let checkpoint = coordinator.catalog().checkpoint(&id)?.ok_or_else(missing)?;
    for tag in &args.tags {
        // Who has taken it meanwhile keeps it: losing the checkpoint for it would be worse.
        if let Some(other) = coordinator.tag(tag, &id, false)? {
            let other = other.short();
            say(
                "warning",
                &format!("the checkpoint has no tag {tag}: it names checkpoint {other} since this one was begun"),
            );
        }
    }
    print(&coordinator, &checkpoint, args.json)
}

/// Freezes the tree, and other writers if asked to, takes the snapshots, and sets all running again.
///
/// Whatever fails, everything runs again before this returns.
fn freeze_and_take(
    coordinator: &Coordinator,
    window: &mut Window,
    tree: Option<Tree>,
    writers_too: bool,
    within: Duration,
) -> fsnap::Result<()> {
    let observed = tree.is_some();
    let tree = tree.unwrap_or_else(|| Tree::of_processes([]));
    let outside = if writers_too { find_writers(window.pending(), &tree, &[])?.writers } else { Vec::new() };
    let outside: Vec<ProcessId> = outside.into_iter().map(|writer| writer.process).collect();
    // Before it is seen which of them others have stopped.
    let members = tree.members().map(|member| member.id);
    let all = Tree::of_processes(members.chain(outside.iter().copied()));
    let turn = coordinator.catalog().turn_to_freeze(&all, within)?;
    environment::tell(&coordinator.recover_frozen(&all)?);
    // Should this process be killed, it is nobody's turn before the guard has set all running.
    let kept = turn.keep()?;
    let mut quiesce = Quiesce::prepare(tree, &internal::guard_command())?;
    drop(kept);
    quiesce.also(outside);
    coordinator.record_freeze(window, quiesce.record().clone())?;
    let mut frozen = quiesce.freeze(within)?;
    if writers_too {
        freeze_late_writers(window, &mut frozen)?;
    }
    let tree = observed.then(|| frozen.tree());
    let search = take_frozen(window, everyone_in(&frozen), tree)?;
    frozen.check()?;
    frozen.thaw()?;
    window.tell(search.run()?);
    Ok(())
}

/// Takes the snapshots while nobody is frozen, and searches meanwhile for writers.
fn take_running(window: &mut Window) -> fsnap::Result<()> {
    let pending = window.pending().clone();
    std::thread::scope(|scope| {
        let search = scope.spawn(move || WriterSearch::new(&pending, Tree::of_processes([]), Vec::new())?.run());
        window.take(false, || joined(search).map(Some))
    })
}

/// Takes the snapshots while all in `frozen` are, and learns meanwhile what the thaw would change about `tree`.
///
/// Returns the search for other writers, for when everything runs again: nobody need be frozen for it.
pub(super) fn take_frozen(window: &mut Window, frozen: Tree, tree: Option<&Tree>) -> fsnap::Result<WriterSearch> {
    let pending = window.pending().clone();
    std::thread::scope(|scope| {
        let search = scope.spawn(move || {
            let search = WriterSearch::new(&pending, frozen, Vec::new())?;
            Ok(match tree {
                Some(tree) => search.observing(tree),
                None => search,
            })
        });
        window.take(true, || Ok(None))?;
        let search: WriterSearch = joined::<fsnap::Result<_>>(search)?;
        search.objection().map_or(Ok(()), Err)?;
        window.keep(search.observation(), None)?;
        Ok(search)
    })
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Freezes those that opened a file for writing after the first look; ends, for those that are frozen open nothing.
fn freeze_late_writers(window: &Window, frozen: &mut Frozen) -> fsnap::Result<()> {
    loop {
        let late = find_writers(window.pending(), &everyone_in(frozen), &[])?.writers;
        if late.is_empty() {
            return Ok(());
        }
        frozen.add(late.into_iter().map(|writer| writer.process))?;
    }
}

/// All that are frozen: the tree, and the writers beside it.
pub(super) fn everyone_in(frozen: &Frozen) -> Tree {
    let tree = frozen.tree().members().map(|member| member.id);
    Tree::of_processes(tree.chain(frozen.record().processes.iter().copied()))
}
