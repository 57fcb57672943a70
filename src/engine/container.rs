//! Containers that fsnap had a runtime restore, so that one of which nobody was told can be ended.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Error, Result};
use crate::checkpoint::PathText;
use crate::name::Name;

/// Which program runs containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// runc.
    Runc,
    /// crun.
    Crun,
}

impl RuntimeKind {
    /// The program's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }

    /// A call of the program, which keeps its containers in `root`, or where it does of itself.
    pub fn command(self, root: Option<&Path>) -> Command {
        let mut command = Command::new(self.name());
        if let Some(root) = root {
            command.arg("--root").arg(root);
        }
        command.stdin(Stdio::null());
        command
    }
}

/// A container that a restore makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Which program runs it.
    pub runtime: RuntimeKind,
    /// Where that keeps its containers, if not where it does of itself.
    pub root: Option<PathText>,
    /// Its name.
    pub name: Name,
    /// Its bundle, which is in the state directory, and no other container's.
    pub bundle: PathText,
}

impl Container {
    /// Has the runtime end it, and forget it. One of that name with another bundle is somebody else's, and stays.
    pub fn end(&self) -> Result<()> {
        let listed = self.call(&["list", "--format", "json"])?;
        let found: Value = serde_json::from_slice(&listed).map_err(|error| self.failed("list", error.into()))?;
        let is_it = |container: &Value| {
            let bundle = container["bundle"].as_str().and_then(|bundle| Path::new(bundle).canonicalize().ok());
            container["id"] == self.name.as_str() && bundle.is_some_and(|bundle| bundle == self.bundle.as_path())
        };
        // runc has none where it says `null`.
        if found.as_array().into_iter().flatten().any(is_it) {
            self.call(&["delete", "--force", self.name.as_str()])?;
        }
        Ok(())
    }

    fn call(&self, args: &[&str]) -> Result<Vec<u8>> {
        let root = self.root.as_ref().map(PathText::as_path);
        let output = self.runtime.command(root).args(args).output().map_err(|error| self.failed(args[0], error))?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => {
                let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                Err(self.failed(args[0], io::Error::other(said)))
            }
        }
    }

    fn failed(&self, what: &str, error: io::Error) -> Error {
        Error::Restore {
            step: format!("end the container {}, of which nobody was told ({} {what})", self.name, self.runtime.name()),
            reason: error.to_string(),
        }
    }
}
