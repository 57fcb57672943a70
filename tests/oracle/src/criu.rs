//! Driving CRIU as tests need it: a dump that leaves the process running, and restores beside it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// A CRIU that works on this machine.
#[derive(Debug, Clone)]
pub struct Criu {
    program: PathBuf,
    env: Vec<(String, OsString)>,
}

/// Why CRIU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// CRIU ended with an error.
    #[error("criu {command}: {status}; the end of its log:\n{log}")]
    Failed {
        /// `dump` or `restore`.
        command: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// It could not be run, or its process not be found.
    #[error("criu {command}: {source}")]
    Io {
        /// `dump` or `restore`.
        command: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl Criu {
    /// Finds CRIU: the one that `FSNAP_CRIU` names, as for fsnap, or that `make setup` prepared above this program, else the one
    /// of the system.
    pub fn find() -> Self {
        if let Some(named) = std::env::var_os("FSNAP_CRIU") {
            return Self { program: named.into(), env: Vec::new() };
        }
        let own = std::env::current_exe().unwrap_or_default();
        let prepared = own.ancestors().map(|dir| dir.join("criu/criu")).find(|path| path.is_file());
        Self { program: prepared.unwrap_or_else(|| "criu".into()), env: Vec::new() }
    }

    /// Sets a variable of CRIU's environment, which its action scripts inherit.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// The program to run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Dumps the tree of `pid` into `images`, which must exist, and leaves it running.
    pub fn dump<A: AsRef<OsStr>>(
        &self,
        pid: i32,
        images: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<(), CriuError> {
        let io = |source| CriuError::Io { command: "dump", source };
        let status = Command::new(&self.program)
            .args(["dump", "-R", "-v2", "-o", "dump.log", "-t", &pid.to_string(), "-D"])
            .arg(images)
            .args(args)
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(io)?;
        check("dump", status, &images.join("dump.log"))
    }

    /// Restores `images` in namespaces of its own, where each pair's first directory is seen at the second's path.
    ///
    /// `pid` is the process id that was dumped.
    pub fn restore<A: AsRef<OsStr>>(
        &self,
        pid: i32,
        images: &Path,
        binds: &[(PathBuf, PathBuf)],
        args: impl IntoIterator<Item = A>,
    ) -> Result<Restored, CriuError> {
        let io = |source| CriuError::Io { command: "restore", source };
        // The shell stays as the init process of the pid namespace: when it dies, all in there die.
        let script = r#"
            images=$1; criu=$2; shift 2
            mount -t proc proc /proc
            while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done
            shift
            "$criu" restore -d -v2 -o restore.log -D "$images" "$@" || exit
            echo restored
            exec sleep infinity"#;
        let mut child = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"])
            .arg(images)
            .arg(&self.program)
            .args(binds.iter().flat_map(|(branch, path)| [branch, path]))
            .arg("--")
            .args(args)
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(io)?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut said).map_err(io)?;
        }
        if said != "restored\n" {
            let status = child.wait().map_err(io)?;
            check("restore", status, &images.join("restore.log"))?;
        }
        let mut restored = Restored { child, pid: 0 };
        restored.pid = descendant(restored.child.id() as i32, pid).map_err(io)?;
        Ok(restored)
    }
}

/// A restored process; killed on drop, with all in its pid namespace.
#[derive(Debug)]
pub struct Restored {
    child: Child,
    pid: i32,
}

impl Restored {
    /// The process id, as the caller sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        // It may be dead already; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn check(command: &'static str, status: ExitStatus, log: &Path) -> Result<(), CriuError> {
    if status.success() {
        return Ok(());
    }
    let log = fs::read_to_string(log).unwrap_or_else(|error| error.to_string());
    let lines: Vec<&str> = log.lines().collect();
    Err(CriuError::Failed { command, status, log: lines[lines.len().saturating_sub(20)..].join("\n") })
}

/// The descendant of `ancestor` that calls itself `inner` in its own pid namespace, as this process sees it.
pub fn descendant(ancestor: i32, inner: i32) -> io::Result<i32> {
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        for task in fs::read_dir(format!("/proc/{parent}/task"))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
                if inner_pid(child)? == Some(inner) {
                    return Ok(child);
                }
                parents.push(child);
            }
        }
    }
    let text = format!("no descendant of process {ancestor} is process {inner} in its own pid namespace");
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

/// What `pid` calls itself; none if it lives in this process's pid namespace.
fn inner_pid(pid: i32) -> io::Result<Option<i32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    Ok(numbers.split_whitespace().skip(1).last().and_then(|number| number.parse().ok()))
}
