//! The test programs that are run in machines: the same files that `cargo test` runs natively.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::error::Context;
use crate::machine::{Kind, Machine};
use crate::{Error, Result, kernel_log, run};

/// How long a program may take: several times what the slowest takes on a busy computer with two cores.
const DEADLINE: Duration = Duration::from_secs(2700);

/// What is run if nothing else is asked for: what the kernels of most hosts cannot run, and of the rest what shows that
/// another kernel makes no difference. The longest come first.
const USUAL: &[&str] = &[
    "fsnap::engines",
    "fsnap::power_loss",
    "fsnap-dm-thin::conformance",
    "fsnap::recovery",
    "fsnap::cli",
    "fsnap-nilfs2::conformance",
    "fsnap-rsync::conformance",
    "fsnap::dm_thin",
    "fsnap-dm-thin::faults",
    "fsnap-nilfs2::history",
    "fsnap-btrfs::conformance",
    "fsnap::nilfs2",
    "fsnap::fuse",
];

/// Programs that need what only QEMU's kernel has; all others run in user-mode Linux.
const IN_QEMU: &[&str] = &["fsnap::engines"];

/// Of some programs, only a part is usual; several parts have a machine each. The rest runs on every host, makes no difference here,
/// and takes several times as long.
///
/// * `engines`: CRIU with each backend, against the oracle. What its other tests look at does not depend on where a volume lies.
/// * `cli`: what is said of checkpoints, and the tests that take every kind of volume in turn. What is said of pools and of the history
///   of NILFS2 has programs of its own.
/// * `recovery`: the volumes that only these kernels can have, killed in all that makes and removes images, in an engine's hooks, and in
///   the recovery from that. Left to btrfs and rsync on the host are calls that fail, since an error of a backend is undone in the same
///   way for all and the backends' own suites have theirs fail, and kills of what tags or freezes processes.
/// * `fuse`: branches over those volumes, and their snapshots attached.
const USUAL_PARTS: &[(&str, Sample)] = &[
    ("fsnap::engines", Sample { with: &["consistency::"], without: &[] }),
    (
        "fsnap::cli",
        Sample { with: &["checkpoint::", "processes::the_processes_", "faults::two_removals_"], without: &[] },
    ),
    ("fsnap::recovery", Sample { with: &["dm-thin::"], without: ELSEWHERE }),
    ("fsnap::recovery", Sample { with: &["nilfs2::"], without: ELSEWHERE }),
    ("fsnap::fuse", Sample { with: &["branches::over_"], without: &[] }),
    ("fsnap::fuse", Sample { with: &["native::over_"], without: &[] }),
];

/// The tests of recovery that say nothing new of a backend.
const ELSEWHERE: &[&str] =
    &["::exit_at_failpoints", "::a_call_fails", "::the_disk_is_full", "::checkpoint_", "::hook_before_", "::tag::"];

/// Programs that take long are run in two machines at once: the tests with this in their names, and the others.
const DIVIDED: &[(&str, &str)] = &[("fsnap-dm-thin::conformance", "ext4::")];

const NO_CRIU: &str = "user-mode Linux has no checkpoint and restore";

const OLD_TMPFS: &str = "tmpfs has no extended attributes for users before Linux 6.6";

/// A test that cannot pass on the machine's kernel, and why.
const SKIPPED: &[(&str, &str, &str)] = &[
    ("fsnap-rsync::snapshots", "everything_is_kept_on_tmpfs", OLD_TMPFS),
    ("fsnap-rsync::conformance", "tmpfs::", OLD_TMPFS),
    // It runs where anybody may write, which is a tmpfs in this machine.
    ("fsnap-rsync::conformance", "nobody::", OLD_TMPFS),
    (
        "fsnap::engines",
        "both_in_one_checkpoint_at_any_moment",
        "all_in_one_checkpoint_at_any_moment has both of them, and two more",
    ),
    ("fsnap::cli", "doctor::criu_is_what_is_installed", NO_CRIU),
    // They keep attributes that are given to a branch with the state, which is a tmpfs there.
    ("fsnap::fuse", "programs::work_on_a_branch_over_btrfs", OLD_TMPFS),
];

/// One test program.
#[derive(Debug, Clone)]
struct Suite {
    /// Where it runs.
    kind: Kind,
    /// Its package and target.
    name: String,
    program: PathBuf,
    /// Which of its tests are run, if not all.
    part: Option<Part>,
    /// The directory of its package, where `cargo test` starts it as well.
    dir: PathBuf,
}

/// A part of a program's tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// No more than these, although there is more.
    Sample(Sample),
    /// Those with this in their names.
    With(&'static str),
    /// The others.
    Without(&'static str),
}

/// The tests with one of several texts in their names, and none of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sample {
    /// More than one only for programs of the usual harness: others take one.
    with: &'static [&'static str],
    without: &'static [&'static str],
}

/// What running one came to.
struct Done {
    suite: Suite,
    output: Vec<u8>,
    complaints: Vec<String>,
    kernel_log: String,
}

/// Runs the [`USUAL`] suites, or those whose name contains one of `only`; all in machines of that kind, if one is named.
/// Of those, no more than the [usual parts](USUAL_PARTS), if `usual`.
pub(crate) fn run(only: &[String], kind: Option<Kind>, usual: bool) -> Result<ExitCode> {
    let wanted = |suite: &Suite| match only {
        [] => USUAL.contains(&suite.name.as_str()),
        only => only.iter().any(|part| suite.name.contains(part.as_str())),
    };
    let (mut suites, others): (Vec<Suite>, Vec<Suite>) = find()?.into_iter().partition(wanted);
    if suites.is_empty() || only.is_empty() && suites.len() != USUAL.len() {
        let there = suites.into_iter().chain(others).map(|suite| suite.name).collect();
        let only = if only.is_empty() { USUAL.iter().map(|name| (*name).to_owned()).collect() } else { only.to_vec() };
        return Err(Error::NoSuite { only, there });
    }
    suites.sort_by_key(|suite| USUAL.iter().position(|name| *name == suite.name));
    let suites = suites.into_iter().map(|suite| Suite { kind: kind.unwrap_or(suite.kind), ..suite });
    let suites: Vec<_> = suites.flat_map(|suite| divide(suite, usual || only.is_empty())).collect();
    // Each machine keeps about one processor busy.
    let lanes = thread::available_parallelism().map_or(1, usize::from).min(suites.len());
    let waiting = Mutex::new(VecDeque::from(suites));
    let verdicts = Mutex::new(Vec::new());
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let lane = || -> Result<()> {
            loop {
                let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(suite) = next else { return Ok(()) };
                let done = in_machine(suite)?;
                // Held while it is written, so that the output of two does not mix.
                let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
                show(&done).during("write", "standard output")?;
                verdicts.push((done.suite.kind, done.suite.name, done.complaints.is_empty()));
            }
        };
        let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().map(|lane| lane.join().unwrap_or(Err(Error::Interrupted))).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    let verdicts = verdicts.into_inner().unwrap_or_else(PoisonError::into_inner);
    sum_up(&verdicts).during("write", "standard output")
}

/// The suite, its usual part, or its two parts.
fn divide(suite: Suite, usual: bool) -> Vec<Suite> {
    let samples = USUAL_PARTS.iter().filter(|(name, _)| usual && *name == suite.name);
    let of = |&(_, sample): &(_, Sample)| Suite { part: Some(Part::Sample(sample)), ..suite.clone() };
    let samples: Vec<_> = samples.map(of).collect();
    if !samples.is_empty() {
        return samples;
    }
    match DIVIDED.iter().find(|(name, _)| *name == suite.name) {
        None => vec![suite],
        Some((name, part)) => {
            let of = |how, which| Suite { name: format!("{name} {how} {part}"), part: Some(which), ..suite.clone() };
            vec![of("with", Part::With(part)), of("without", Part::Without(part))]
        }
    }
}

fn in_machine(suite: Suite) -> Result<Done> {
    let machine = Machine { deadline: Some(DEADLINE), ..Machine::new(suite.kind) };
    let mut command = vec![suite.program.to_string_lossy().into_owned()];
    match suite.part {
        Some(Part::Sample(Sample { with, without })) => {
            command.extend(with.iter().map(|&part| part.into()));
            command.extend(without.iter().flat_map(|part| ["--skip".into(), (*part).into()]));
        }
        Some(Part::With(part)) => command.push(part.into()),
        Some(Part::Without(part)) => command.extend(["--skip".into(), part.into()]),
        None => {}
    }
    for (_, test, _) in skipped(&suite.name) {
        command.extend(["--skip".into(), (*test).into()]);
    }
    let mut job = run::job(&machine, command)?;
    // What a test would pass over on a kernel that lacks it has to run here.
    job.environment.insert("FSNAP_VM".into(), "1".into());
    // Where every system call takes ten times as long, fewer of them are tried.
    job.environment.entry("FSNAP_TEST_STEPS".into()).or_insert_with(|| "2".into());
    job.dir.clone_from(&suite.dir);
    let mut output = Vec::new();
    let outcome = machine.run(&job, &mut output)?;
    let mut complaints = outcome.complaints();
    match outcome.code {
        Ok(0) | Err(_) => {}
        Ok(code) => complaints.push(format!("the program ended with exit code {code}")),
    }
    if !String::from_utf8_lossy(&output).contains("test result: ") {
        complaints.push("the program gave no result".into());
    }
    Ok(Done { suite, output, complaints, kernel_log: outcome.kernel_log })
}

fn skipped(suite: &str) -> impl Iterator<Item = &'static (&'static str, &'static str, &'static str)> {
    SKIPPED.iter().filter(move |(of, ..)| *of == suite)
}

fn show(done: &Done) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let Suite { kind, name, program, part, .. } = &done.suite;
    writeln!(out, "     Running {name} in {} ({})", kind.shown(), program.display())?;
    if let Some(Part::Sample(Sample { with, without })) = part {
        let but = if without.is_empty() { String::new() } else { format!(", without {}", without.join(" and ")) };
        writeln!(
            out,
            "             no more than its tests with {} in their names{but}; `--only {name}` runs all of it here",
            with.join(" or ")
        )?;
    }
    out.write_all(&done.output)?;
    if !done.complaints.is_empty() {
        writeln!(out, "\n{}", kernel_log::tail(&done.kernel_log, 40))?;
    }
    for complaint in &done.complaints {
        writeln!(out, "error: {}: {complaint}", done.suite.name)?;
    }
    out.flush()
}

/// One more result in libtest's format: of each machine, whether it ran to its end and its kernel had nothing to say.
fn sum_up(verdicts: &[(Kind, String, bool)]) -> io::Result<ExitCode> {
    let mut out = io::stdout().lock();
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    writeln!(out)?;
    for (kind, name, ok) in verdicts {
        let kind = kind.name();
        writeln!(out, "test {kind}::{name} ... {}", if *ok { "ok" } else { "FAILED" })?;
        *(if *ok { &mut passed } else { &mut failed }) += 1;
        for (_, test, why) in skipped(name) {
            writeln!(out, "test {kind}::{name}::{test} ... ignored, {why}")?;
            ignored += 1;
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    writeln!(
        out,
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out"
    )?;
    out.flush()?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the test programs of all backends and finds them.
fn find() -> Result<Vec<Suite>> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let mut command = Command::new("cargo");
    command.args(["test", "--locked", "--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    let output =
        command.current_dir(top).stdin(Stdio::null()).stderr(Stdio::inherit()).output().during("run", "cargo")?;
    if !output.status.success() {
        return Err(Error::Command { command: format!("{command:?}"), said: output.status.to_string() });
    }
    let mut suites: Vec<_> =
        String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| suite(line, top)).collect();
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(suites)
}

/// The suite that a message of cargo is about, if it is a test program of a backend or one of the whole program.
fn suite(message: &str, top: &Path) -> Option<Suite> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    if !message["profile"]["test"].as_bool()? {
        return None;
    }
    let program = PathBuf::from(message["executable"].as_str()?);
    let dir = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let target = message["target"]["name"].as_str()?;
    let kinds: Vec<_> = message["target"]["kind"].as_array()?.iter().filter_map(|kind| kind.as_str()).collect();
    let name = match dir.strip_prefix(top.join("backends")) {
        // These two need no kernel.
        Ok(backend) if ["api", "conformance"].iter().any(|name| backend == Path::new(name)) => return None,
        Ok(backend) => format!("fsnap-{}::{target}", backend.to_str()?),
        // What looks at the sources, and what the library tests in itself, need no kernel either.
        Err(_) if dir == top && kinds.contains(&"test") && target != "tidy" => format!("fsnap::{target}"),
        Err(_) => return None,
    };
    let kind = if IN_QEMU.contains(&name.as_str()) { Kind::Qemu } else { Kind::Uml };
    Some(Suite { kind, name, program, part: None, dir })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(dir: &str, target: &str, test: bool) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","manifest_path":"{dir}/Cargo.toml","target":{{"name":"{target}","kind":["test"]}},
            "profile":{{"test":{test}}},"executable":"target/{target}"}}"#
        )
    }

    fn found(dir: &str, target: &str, test: bool) -> Option<Suite> {
        suite(&message(dir, target, test), Path::new("/top"))
    }

    #[test]
    fn test_programs_of_backends_are_suites() {
        let found = found("/top/backends/btrfs", "conformance", true).unwrap();
        assert_eq!(found.name, "fsnap-btrfs::conformance");
        assert_eq!(found.dir, Path::new("/top/backends/btrfs"));
    }

    #[test]
    fn so_are_those_of_the_whole_program() {
        let nilfs2 = found("/top", "nilfs2", true).unwrap();
        assert_eq!((nilfs2.name.as_str(), nilfs2.kind), ("fsnap::nilfs2", Kind::Uml));
        assert_eq!(found("/top", "engines", true).unwrap().kind, Kind::Qemu);
    }

    #[test]
    fn every_test_is_in_one_part() {
        let whole = found("/top/backends/dm-thin", "conformance", true).unwrap();
        let parts: Vec<_> = divide(whole, true).into_iter().map(|suite| suite.part).collect();
        assert_eq!(parts, [Some(Part::With("ext4::")), Some(Part::Without("ext4::"))]);
        assert_eq!(divide(found("/top/backends/btrfs", "conformance", true).unwrap(), true).len(), 1);
        let samples = |usual| {
            let parts = divide(found("/top", "recovery", true).unwrap(), usual).into_iter().map(|suite| suite.part);
            let with = |part| if let Some(Part::Sample(Sample { with, .. })) = part { with } else { &[] };
            parts.map(with).collect::<Vec<&[&str]>>()
        };
        assert_eq!((samples(true), samples(false)), (vec![&["dm-thin::"][..], &["nilfs2::"]], vec![&[][..]]));
    }

    #[test]
    fn nothing_else_is() {
        for (dir, target, test) in [
            ("/top/backends/api", "fsnap_backend", true),
            ("/top", "tidy", true),
            ("/top/tests/oracle", "oracle", true),
            ("/top/backends/btrfs", "conformance", false),
        ] {
            assert!(found(dir, target, test).is_none(), "{dir} {target}");
        }
        assert!(suite(r#"{"reason":"build-finished"}"#, Path::new("/top")).is_none());
    }
}
