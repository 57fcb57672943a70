//! Settings, merged from files; the caller says which.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::name::Name;
use crate::processes::{AuditRules, Pattern, Policy};
use crate::stores::{Options, Room};
use crate::{Error, Result};

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the catalog is; overridden by `FSNAP_STATE`.
    pub state: Option<PathBuf>,
    /// Where overlays keep what differs from their snapshots; `branches` in the state directory, if not set.
    pub branches: Option<PathBuf>,
    /// What engines' hooks do.
    pub hook: Hook,
    /// The engine CRIU.
    pub criu: Criu,
    /// What is done about what processes can write to outside their checkpoint.
    pub audit: Audit,
    /// Stores in thin pools.
    #[serde(rename = "dm-thin")]
    pub dm_thin: Room,
}

/// What engines' hooks do.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hook {
    /// After so many seconds a hook gives up, so that the processes run again.
    pub deadline_seconds: f64,
    /// The volumes of every checkpoint; found from the processes, if none is named.
    pub volumes: Vec<Name>,
    /// Whether a process stands by from before the freeze on, so that less is to be done within it.
    pub attendant: bool,
}

impl Default for Hook {
    fn default() -> Self {
        Self { deadline_seconds: 10.0, volumes: Vec::new(), attendant: true }
    }
}

impl Hook {
    /// The deadline: between 0.1 s and an hour, whatever the file says.
    pub fn deadline(&self) -> Duration {
        let seconds = if self.deadline_seconds.is_finite() { self.deadline_seconds } else { 10.0 };
        Duration::from_secs_f64(seconds.clamp(0.1, 3600.0))
    }
}

/// The engine CRIU.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Criu {
    /// The program; searched for, if not set.
    pub program: Option<PathBuf>,
}

/// What is done about what processes can write to outside their checkpoint.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// What is done about it.
    pub policy: Policy,
    /// What does not matter.
    pub ignore: Vec<Pattern>,
}

impl Audit {
    /// The rules that it makes.
    pub fn rules(&self) -> AuditRules {
        AuditRules { policy: self.policy, ignore: self.ignore.clone(), ..AuditRules::default() }
    }
}

impl Config {
    /// What it says of stores.
    pub fn stores(&self) -> Options {
        Options { dm_thin: self.dm_thin }
    }

    /// Reads the files that exist, later ones over earlier ones, table by table.
    ///
    /// A file that another user can write is refused: fsnap would do as they say.
    pub fn load(files: &[PathBuf]) -> Result<Self> {
        let mut merged = toml::Table::new();
        for path in files {
            let bad = |reason: String| Error::Config { path: path.clone(), reason };
            let text = match read_trusted(path) {
                Ok(Some(text)) => text,
                Ok(None) => continue,
                Err(reason) => return Err(bad(reason)),
            };
            let table: toml::Table = text.parse().map_err(|error: toml::de::Error| bad(error.to_string()))?;
            // Each file by itself, so that the message names the file with the mistake.
            Self::deserialize(toml::Value::Table(table.clone())).map_err(|error| bad(error.to_string()))?;
            merge(&mut merged, table);
        }
        Self::deserialize(toml::Value::Table(merged))
            .map_err(|error| Error::Config { path: PathBuf::from("(merged)"), reason: error.to_string() })
    }
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(table)) => merge(inner, table),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn read_trusted(path: &Path) -> std::result::Result<Option<String>, String> {
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let meta = file.metadata().map_err(|error| error.to_string())?;
    if !meta.is_file() {
        return Err("it is not a regular file".into());
    }
    let me = rustix::process::geteuid().as_raw();
    if meta.uid() != 0 && meta.uid() != me {
        return Err(format!("it belongs to user {}, who could make fsnap do anything", meta.uid()));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!("others can write it (mode {:04o}): chmod go-w", meta.mode() & 0o7777));
    }
    let mut text = String::new();
    file.by_ref().take(1 << 20).read_to_string(&mut text).map_err(|error| error.to_string())?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn later_files_go_over_earlier_ones() {
        let temp = tempfile::tempdir().unwrap();
        let (a, b) = (temp.path().join("a.toml"), temp.path().join("b.toml"));
        std::fs::write(&a, "state = '/a'\n[hook]\ndeadline_seconds = 3\nvolumes = ['x']\n").unwrap();
        std::fs::write(&b, "[hook]\ndeadline_seconds = 4\n[dm-thin]\nfree_data = 20\n").unwrap();
        let config = Config::load(&[a, b, temp.path().join("absent.toml")]).unwrap();
        assert_eq!(config.state.as_deref(), Some(Path::new("/a")));
        assert_eq!(config.hook.deadline(), Duration::from_secs(4));
        assert_eq!(config.hook.volumes, ["x".parse().unwrap()]);
        assert_eq!(config.stores().dm_thin, Room { free_data: Some(20), free_metadata: None });
    }

    #[test]
    fn mistakes_and_strangers_are_refused_by_file() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("c.toml");
        std::fs::write(&path, "[hook]\ndeadline = 3\n").unwrap();
        let error = Config::load(std::slice::from_ref(&path)).unwrap_err().to_string();
        assert!(error.contains("c.toml") && error.contains("deadline"), "{error}");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(Config::load(&[path]).unwrap_err().to_string().contains("others can write it"));
    }
}
