//! Processes beside fsnap: one that it freezes, and one that stands for the engine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::images;
use crate::site::Shell;
use crate::waiting::wait_until;

/// What an operation needs beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beside {
    /// Nothing.
    Nobody,
    /// A process that can write to the volume.
    Writer,
    /// The same, in a control group of its own.
    WriterInCgroup,
    /// The same, with an engine whose images of it are complete.
    WriterAndEngine,
}

/// The processes, which end with the value.
#[derive(Debug)]
pub(crate) struct Companions {
    writer: Child,
    engine: Option<Child>,
    cgroup: Option<PathBuf>,
}

impl Companions {
    /// Starts what is needed.
    pub(crate) fn start(beside: Beside, shell: &Shell<'_>) -> Option<Self> {
        let spawn = |line: &str| {
            let mut command = shell.command(line);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start a process")
        };
        if beside == Beside::Nobody {
            return None;
        }
        let writer = spawn("exec 9>>db/a; exec sleep infinity");
        wait_until("the writer", || comm(writer.id()) == "sleep");
        let cgroup = (beside == Beside::WriterInCgroup).then(|| {
            let dir = unified().join(format!("fsnap-recovery-{}-{}", std::process::id(), writer.id()));
            fs::create_dir(&dir).expect("make a control group");
            fs::write(dir.join("cgroup.procs"), writer.id().to_string()).expect("fill the control group");
            dir
        });
        let engine = (beside == Beside::WriterAndEngine).then(|| {
            shell.run("rm -rf $T/images && mkdir $T/images");
            complete(&PathBuf::from(shell.run("echo $T/images")));
            let engine = spawn("exec 8<$T/images; exec sleep infinity");
            wait_until("the engine", || comm(engine.id()) == "sleep");
            engine
        });
        Some(Self { writer, engine, cgroup })
    }

    /// An argument or a variable with what is known only now.
    pub(crate) fn fill_in(&self, text: &str) -> String {
        let engine = self.engine.as_ref().map(Child::id).unwrap_or_default();
        let cgroup = self.cgroup.as_ref().map(|dir| dir.display().to_string()).unwrap_or_default();
        text.replace("%WRITER", &self.writer.id().to_string())
            .replace("%ENGINE", &engine.to_string())
            .replace("%CGROUP", &cgroup)
    }

    /// The writer runs, or soon does: whoever sets it running may need a moment.
    pub(crate) fn expect_running(&self) {
        wait_until("the end of the freeze", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.writer.id())).expect("the writer lives");
            let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
            let events = self.cgroup.as_ref().map(|dir| fs::read_to_string(dir.join("cgroup.events")).unwrap());
            state == Some('S') && events.is_none_or(|events| events.contains("frozen 0"))
        });
    }

    /// The engine ends, as it does when its hook has failed, or a little after it was done.
    pub(crate) fn end_engine(&mut self) {
        if let Some(mut engine) = self.engine.take() {
            end(&mut engine);
        }
    }
}

impl Drop for Companions {
    fn drop(&mut self) {
        self.end_engine();
        end(&mut self.writer);
        if let Some(dir) = &self.cgroup {
            // Whoever has ended leaves it a little later.
            let mut removed = fs::remove_dir(dir);
            for _ in 0..1000 {
                if removed.is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
                removed = fs::remove_dir(dir);
            }
            assert!(removed.is_ok() || std::thread::panicking(), "{}: {removed:?}", dir.display());
        }
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn comm(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn unified() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("a unified hierarchy is mounted");
    PathBuf::from(line.split(' ').nth(4).expect("a mount point"))
}

/// Fills a directory as an engine does: with the images of a process that CRIU dumped.
fn complete(dir: &Path) {
    // Without checkpoint and restore, as in user-mode Linux, the kernel has no such file.
    if !Path::new("/proc/sys/kernel/ns_last_pid").exists() {
        return images::pretend(dir).expect("write an image");
    }
    let criu = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/criu/criu");
    // A session of its own, which has nothing open that CRIU would have to know.
    let line =
        r#"for fd in /proc/$$/fd/*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done; exec sleep infinity"#;
    let mut dumped = Command::new("setsid");
    dumped.args(["bash", "-c", line]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut dumped = dumped.spawn().expect("start a process");
    wait_until("the process", || comm(dumped.id()) == "sleep");
    let output =
        Command::new(criu).args(["dump", "-R", "-o", "log", "-t", &dumped.id().to_string(), "-D"]).arg(dir).output();
    end(&mut dumped);
    let output = output.expect("run CRIU: tests/support/setup.sh prepares one");
    let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
    assert!(output.status.success() && dir.join("inventory.img").is_file(), "{output:?}\n{log}");
}
