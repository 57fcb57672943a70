//! The container runtimes: programs with one command line, as far as fsnap calls them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fsnap::engine::bundle::Bundle;
use fsnap::engine::criu::Criu;
use fsnap::engine::{RuntimeKind, reasons_in};
use fsnap::processes::ProcessId;
use fsnap::run::Place;
use fsnap::{Error, failpoint};

use super::super::{Context, environment};
use super::{Failure, failed};

/// A runtime, and where it keeps the state of its containers.
#[derive(Debug)]
pub(super) struct Runtime<'a> {
    kind: RuntimeKind,
    root: Option<&'a Path>,
    criu: Criu,
}

/// A container that runs.
#[derive(Debug)]
pub(super) struct Container {
    /// Its first process.
    pub(super) pid: i32,
    /// Where its bundle is.
    bundle: PathBuf,
}

impl Container {
    /// What it is made of.
    pub(super) fn bundle(&self) -> fsnap::Result<Bundle> {
        Ok(Bundle::open(&self.bundle)?)
    }
}

impl<'a> Runtime<'a> {
    /// Makes sure that it can save and restore containers at all.
    pub(super) fn find(kind: RuntimeKind, root: Option<&'a Path>, context: &Context) -> Result<Self, Failure> {
        let runtime = Self { kind, root, criu: environment::find_criu(&context.config)? };
        let version = runtime.command().arg("--version").output().map_err(failed("run", Path::new(kind.name())))?;
        if kind == RuntimeKind::Crun && !text(&version.stdout).contains("+CRIU") {
            let said = "this crun was built without CRIU, and can neither save nor restore a container: use runc, or a crun with CRIU";
            return Err(Error::HookFailed { said: said.into() }.into());
        }
        Ok(runtime)
    }

    pub(super) fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn command(&self) -> Command {
        let mut command = self.kind.command(self.root);
        // crun calls the library of CRIU, and that the program of the search path.
        if self.kind == RuntimeKind::Runc {
            command.arg("--criu").arg(self.criu.program());
        }
        command
    }

    /// The container as the runtime knows it.
    pub(super) fn container(&self, name: &OsStr) -> fsnap::Result<Container> {
        let output = self.run(self.command().arg("state").arg(name))?;
        if !output.status.success() {
            let (runtime, name) = (self.name(), fsnap::printable(name));
            let said = format!("{runtime} cannot tell of the container {name}: {}", messages_in(&text(&output.stderr)));
            return Err(Error::HookFailed { said });
        }
        let state: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let pid = state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).filter(|&pid| pid > 0);
        let name = fsnap::printable(name);
        let pid = pid.ok_or_else(|| Error::NothingToTake { why: format!("the container {name} does not run") })?;
        Ok(Container { pid, bundle: state["bundle"].as_str().unwrap_or_default().into() })
    }

    /// Saves the processes of a container, which are frozen and stay so.
    ///
    /// fsnap's hook is told that these images are no business of its own. Calls `on_start` with the runtime's process.
    pub(super) fn save(
        &self,
        name: &OsStr,
        images: &Path,
        more: &[std::ffi::OsString],
        on_start: impl FnOnce(ProcessId) -> fsnap::Result<()>,
    ) -> fsnap::Result<()> {
        let mut command = self.command();
        command.env(environment::OUTER, images);
        command.args(["checkpoint", "--leave-running", "--image-path"]).arg(images).arg("--work-path").arg(images);
        let cannot = |source| Error::Io { action: "run", object: self.name().into(), source };
        command.args(more).arg(name).stdout(Stdio::piped()).stderr(Stdio::piped());
        let saving = command.spawn().map_err(cannot)?;
        let told = ProcessId::of(saving.id().cast_signed()).map_err(Error::from).and_then(on_start);
        let output = saving.wait_with_output().map_err(cannot)?;
        told?;
        match output.status.success() {
            true => Ok(()),
            false => Err(self.refusal("save", &images.join("dump.log"), &output.stderr)),
        }
    }

    /// Restores a container of that bundle from the images, and lets it run.
    ///
    /// The file `log` in the bundle has what the runtime says, and what the container does if it spoke to a pipe. Who finds the place
    /// unlocked may know that the runtime has ended.
    pub(super) fn restore(
        &self,
        name: &OsStr,
        (bundle, images, work): (&Path, &Path, &Path),
        more: &[std::ffi::OsString],
        place: &Place,
    ) -> fsnap::Result<Container> {
        let path = bundle.join("log");
        let open = |source| Error::Io { action: "create", object: fsnap::printable(path.as_os_str()), source };
        let log = File::create(&path).map_err(open)?;
        let mut command = self.command();
        command.stdout(log.try_clone().map_err(open)?).stderr(log);
        command.args(["restore", "--detach", "--bundle"]).arg(bundle).arg("--image-path").arg(images);
        let kept = place.keep_locked()?;
        // Whatever the container has inherited stays open: only the runtime is waited for.
        let output = self.run(command.arg("--work-path").arg(work).args(more).arg(name))?;
        drop(kept);
        failpoint::hit("container:restored");
        match output.status.success() {
            true => self.container(name),
            false => Err(self.refusal("restore", &work.join("restore.log"), &read(&path))),
        }
    }

    fn run(&self, command: &mut Command) -> fsnap::Result<Output> {
        command.output().map_err(|source| Error::Io { action: "run", object: self.name().into(), source })
    }

    fn refusal(&self, what: &str, log: &Path, said: &[u8]) -> Error {
        let reasons = reasons_in(&text(&read(log)));
        let said = if reasons.is_empty() { messages_in(&text(said)) } else { reasons.join("\n") };
        Error::HookFailed { said: format!("{} could not {what} the container:\n{said}", self.name()) }
    }
}

/// As much of a log as is sensible; nothing if there is none.
fn read(log: &Path) -> Vec<u8> {
    let mut content = Vec::new();
    let _ = fs::File::open(log).and_then(|file| file.take(16 << 20).read_to_end(&mut content));
    content
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// What a runtime says to people: runc wraps it in `time="…" level=error msg="…"`.
fn messages_in(said: &str) -> String {
    let message = |line: &str| match line.split_once(" msg=\"").and_then(|(_, rest)| rest.strip_suffix('"')) {
        Some(message) => message.replace("\\\"", "\""),
        None => line.to_owned(),
    };
    said.lines().map(message).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runc_says_is_unwrapped() {
        let said = "time=\"2026-11-28T13:54:35Z\" level=error msg=\"container \\\"web\\\" does not exist\"\nerror opening file `status`";
        assert_eq!(messages_in(said), "container \"web\" does not exist\nerror opening file `status`");
    }
}
