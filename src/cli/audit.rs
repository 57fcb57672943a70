//! `fsnap audit`

use std::path::PathBuf;

use fsnap::coordinator::{Audit, Coordinator, Target};
use fsnap::processes::{AuditRules, Cgroup, Pattern, Policy, Tree};
use fsnap::run::Runs;

use super::{Context, Failure, Outcome, Output, json};

/// List what processes can write to that a checkpoint of them would not hold
///
/// It looks at the processes as they run: descriptors that are open for writing, shared mappings, the files of
/// sockets, and mounts that they see and may enter. Files of the volumes that other processes have open for writing
/// are listed too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The process, with all its descendants; or a run
    #[arg(value_name = "PID|RUN", required_unless_present = "cgroup", conflicts_with = "cgroup")]
    process: Option<String>,
    /// All processes of this control group
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// A volume of the checkpoint, by name or path; if none is given, all that the processes can write to
    #[arg(long = "volume", value_name = "VOLUME")]
    volumes: Vec<String>,
    #[command(flatten)]
    rules: Rules,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// How the audit is made, beside the settings.
#[derive(Debug, clap::Args)]
pub(crate) struct Rules {
    /// What to do if the processes can write to anything else: refuse it, record it, or do not look [default: record]
    #[arg(long, value_name = "POLICY", hide_possible_values = true)]
    outside: Option<Outside>,
    /// What does not matter: a path with all below it, or a type of file system; * and ** are wildcards
    #[arg(long, value_name = "PATTERN")]
    ignore: Vec<Pattern>,
}

/// What is done about what lies outside.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Outside {
    Refuse,
    Record,
    Ignore,
}

impl From<Outside> for Policy {
    fn from(outside: Outside) -> Self {
        match outside {
            Outside::Refuse => Self::Refuse,
            Outside::Record => Self::Record,
            Outside::Ignore => Self::Ignore,
        }
    }
}

impl Rules {
    /// The settings' rules, with what was asked for.
    pub(crate) fn over(&self, mut rules: AuditRules) -> AuditRules {
        rules.policy = self.outside.map_or(rules.policy, Policy::from);
        rules.ignore.extend(self.ignore.iter().cloned());
        rules
    }
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let coordinator = context.read()?;
    let mut rules = args.rules.over(context.config.audit.rules());
    let tree = match (&args.process, &args.cgroup) {
        (Some(process), _) => match process.parse() {
            Ok(pid) => Tree::of_pid(pid)?,
            Err(_) => {
                let run = Runs::of(&context.state).get(&process.parse()?)?;
                rules.own = run.own_mounts()?;
                Tree::of_pid(run.running()?.1.pid)?
            }
        },
        (None, Some(path)) => Tree::of_cgroup(Cgroup::open(path)?)?,
        (None, None) => return Err(Failure::Reported),
    };
    let targets = targets(&coordinator, &tree, &args.volumes)?;
    let audit = coordinator.audit(&tree, targets, &rules)?;
    let out = Output::new();
    if args.json {
        out.json(&json::audit(&audit))?
    } else {
        print(&out, &audit)?
    }
    match audit.objection {
        Some(_) => Err(Failure::Reported),
        None => Ok(()),
    }
}

/// The volumes that a checkpoint would hold: none, if the processes can write to none.
fn targets(coordinator: &Coordinator, tree: &Tree, named: &[String]) -> Result<Vec<Target>, Failure> {
    if !named.is_empty() {
        return Ok(coordinator.targets_named(named)?);
    }
    match coordinator.targets_reached(tree) {
        Err(fsnap::Error::NothingReached { .. }) => Ok(Vec::new()),
        targets => Ok(targets?),
    }
}

fn print(out: &Output, audit: &Audit) -> Outcome {
    for (target, writers) in &audit.volumes {
        out.line(format_args!("volume {} at {}", target.volume, target.path))?;
        for writer in &writers.texts {
            out.line(format_args!("  also written by {}", fsnap::printable(writer.as_ref())))?;
        }
    }
    for process in &audit.tree.processes {
        if let Some(reason) = &process.unread {
            out.line(format_args!("process {} ({}) cannot be looked at: {reason}", process.pid, process.command))?;
        }
    }
    outside(out, &audit.tree)
}

/// Lists what lies outside.
pub(crate) fn outside(out: &Output, tree: &fsnap::processes::TreeRecord) -> Outcome {
    if !tree.outside.is_empty() {
        out.line("outside, and in no snapshot:")?;
    }
    for outside in &tree.outside {
        out.line(format_args!("  {outside}"))?;
    }
    if tree.ignored > 0 {
        out.line(format_args!("  {} more that the settings ignore", tree.ignored))?;
    }
    if tree.cut_off {
        out.line("  perhaps more: the processes had too many files in use")?;
    }
    Ok(())
}
