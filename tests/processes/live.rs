//! Processes under test, and the helpers among them.

// What a helper has to say, its parent reads from its standard output.
#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use fsnap::engine::criu::{self, HookCall};
use fsnap::engine::{self, StageCommand};
use fsnap::processes::{Cgroup, ProcessId, Tree};
use fsnap::quiesce::{GuardCommand, Quiesce, run_guard};

pub(crate) use crate::waiting::wait_until;

/// A case of a suite: its name, and what it does.
pub(crate) type Case = (&'static str, fn());

/// Says why a case, or a part of it, cannot run here.
pub(crate) fn skip(reason: &str) {
    println!("skipped: {reason}");
}

/// Behaves as one of fsnap's hidden commands.
pub(crate) fn helper(args: &[String]) -> ExitCode {
    match args.first().map(String::as_str) {
        Some("guard") => match run_guard(io::stdin(), io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Some("stage") => engine::run_stage(io::stdin(), io::stdout()).into(),
        Some("freeze") => {
            let tree = Tree::of_pid(args[1].parse().unwrap()).unwrap();
            let frozen = Quiesce::prepare(tree, &guard()).unwrap().freeze(LONG).unwrap();
            println!("{}", serde_json::to_string(frozen.record()).unwrap());
            loop {
                std::thread::park();
            }
        }
        Some("enter-and-freeze") => {
            std::fs::write(Path::new(&args[1]).join("cgroup.procs"), std::process::id().to_string()).unwrap();
            let tree = Tree::of_cgroup(Cgroup::open(Path::new(&args[1])).unwrap()).unwrap();
            println!("{}", Quiesce::prepare(tree, &guard()).unwrap_err());
            ExitCode::SUCCESS
        }
        Some("hook") => {
            let call = HookCall::parse(|name| std::env::var_os(name), 0).unwrap();
            if let Some(call) = call {
                let alive = if call.engine().is_ok_and(|engine| engine.is_alive()) { "alive" } else { "gone" };
                let complete = criu::complete(&call.images).is_ok();
                let (phase, images, tree) = (call.phase, call.images.path(), call.tree.unwrap());
                let mut said = fs::File::options().create(true).append(true).open(&args[1]).unwrap();
                writeln!(said, "{phase:?} {images:?} {tree} {alive} complete={complete}").unwrap();
            }
            ExitCode::SUCCESS
        }
        other => panic!("no helper {other:?}"),
    }
}

/// Longer than anything takes that works.
pub(crate) const LONG: Duration = Duration::from_secs(20);

fn this_program() -> PathBuf {
    std::env::current_exe().unwrap()
}

pub(crate) fn guard() -> GuardCommand {
    GuardCommand { program: this_program(), args: vec!["helper".into(), "guard".into()] }
}

pub(crate) fn stage() -> StageCommand {
    StageCommand { program: this_program(), args: vec!["helper".into(), "stage".into()] }
}

/// Starts this program as the named helper.
pub(crate) fn helper_command(args: &[&str]) -> Command {
    let mut command = Command::new(this_program());
    command.arg("helper").args(args);
    command
}

/// The helper in C, built once.
fn c_helper() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/processes/helper.c");
        let program = scratch().join("helper");
        let built = Command::new("cc").args(["-O1", "-Wall", "-pthread", "-o"]).arg(&program).arg(source).status();
        assert!(built.expect("a C compiler is needed").success());
        program
    })
}

fn scratch() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("fsnap-processes-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        dir
    })
}

/// Removes what the helpers needed.
pub(crate) fn clean_up() {
    let _ = fs::remove_dir_all(scratch());
}

/// A process under test; killed with all its descendants when dropped.
#[derive(Debug)]
pub(crate) struct Live {
    child: Child,
    pub(crate) id: ProcessId,
}

impl Live {
    /// The helper in C.
    pub(crate) fn program() -> &'static Path {
        c_helper()
    }

    /// Starts a behaviour of the C helper and waits until it has begun.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::run(Command::new(c_helper()).args(args))
    }

    /// Starts it behind a shell script that ends with `exec "$@"`, in a mount namespace of its own.
    pub(crate) fn start_in_namespace(script: &str, args: &[&str]) -> Self {
        let script = format!("set -e; {script}\nexec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh"]);
        Self::run(command.arg(c_helper()).args(args))
    }

    pub(crate) fn run(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let id = ProcessId::of(child.id().cast_signed()).unwrap();
        let live = Self { child, id };
        assert_eq!(line, "ready\n", "{command:?}");
        live
    }

    pub(crate) fn pid(&self) -> i32 {
        self.id.pid
    }

    pub(crate) fn tree(&self) -> Tree {
        Tree::of_pid(self.pid()).unwrap()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // Stopped first, so that none can fork between the look and the kill. One whose parent has ended meanwhile is no
        // longer found below it, but stands because of us.
        let mut stopped = BTreeSet::new();
        let mut found = BTreeSet::from([self.id]);
        for _ in 0..100 {
            found.iter().for_each(|&id| signal(id, "STOP"));
            let known = found.is_subset(&stopped);
            stopped.append(&mut found);
            let Ok(tree) = Tree::of_pid(self.pid()) else { break };
            if known {
                break;
            }
            found = tree.members().map(|member| member.id).collect();
        }
        stopped.into_iter().chain(found).for_each(|id| signal(id, "KILL"));
        let _ = self.child.wait();
    }
}

/// Sends a signal by name; the process may have ended.
pub(crate) fn signal(id: ProcessId, name: &str) {
    let process = nix::unistd::Pid::from_raw(id.pid);
    if id.is_alive() {
        let _ = nix::sys::signal::kill(process, format!("SIG{name}").parse::<nix::sys::signal::Signal>().unwrap());
    }
}

/// The state letters of all threads.
pub(crate) fn states(id: ProcessId) -> String {
    let mut states = Vec::new();
    for thread in fs::read_dir(format!("/proc/{id}/task")).unwrap() {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        states.push(stat[stat.rfind(')').unwrap() + 2..].chars().next().unwrap());
    }
    states.sort_unstable();
    states.into_iter().collect()
}

/// The number of bytes in the file or, for a directory, in all files of it.
pub(crate) fn size(path: &Path) -> u64 {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => fs::read_dir(path).unwrap().map(|entry| size(&entry.unwrap().path())).sum(),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    }
}

/// Checks that nobody adds to the file or directory for longer than any of the helpers pauses.
pub(crate) fn assert_still(path: &Path) {
    let before = size(path);
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(size(path), before, "{path:?} grew");
}

/// Waits until somebody adds to it.
pub(crate) fn wait_for_growth(path: &Path) {
    let before = size(path);
    wait_until("growth", || size(path) > before);
}
