//! The bundle of a container, as the [OCI runtime specification] has it: what makes a second container of the first one's.
//!
//! A configuration names the directories that a container works on: its root file system and the sources of its mounts. The one
//! of a second container names a branch's directories where the first one's lie in a volume, and is the same otherwise, so that the
//! engine finds every mount that it saved.
//!
//! Invariant: of what lies in a volume of the checkpoint, a second container gets the branch's files or nothing. A directory above a
//! volume would show the first container's files, so that it is refused.
//!
//! [OCI runtime specification]: https://github.com/opencontainers/runtime-spec/blob/main/config.md

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Error, Images, Result};

/// The name of a container's configuration in its bundle.
pub const CONFIG: &str = "config.json";

/// The name of the configuration that fsnap keeps beside the engine's images.
pub const KEPT_CONFIG: &str = "fsnap_config.json";

/// More than the longest list of forbidden system calls needs.
const CONFIG_LIMIT: u64 = 4 << 20;

/// What a container is made of, with every directory named from the root of the file system.
#[derive(Debug, Clone, PartialEq)]
pub struct Bundle(Value);

/// A volume's directory, and that of the same volume on a branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// Where the first container has it.
    pub from: PathBuf,
    /// Where the second one shall have it.
    pub to: PathBuf,
}

impl Bundle {
    /// Reads the bundle in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let wrong = |reason: String| Error::Bundle { dir: dir.into(), reason };
        let size = std::fs::metadata(&path).map_err(|error| wrong(format!("{CONFIG}: {error}")))?.len();
        if size > CONFIG_LIMIT {
            return Err(wrong(format!("{CONFIG} has {size} bytes")));
        }
        let text = std::fs::read(&path).map_err(|error| wrong(format!("{CONFIG}: {error}")))?;
        let mut config = serde_json::from_slice(&text).map_err(|error| wrong(format!("{CONFIG}: {error}")))?;
        // A path that leads nowhere is left as it is: the runtime says so better.
        for path in directories(&mut config) {
            let absolute = dir.join(path.as_str().unwrap_or_default());
            let found = absolute.canonicalize().or_else(|_| std::path::absolute(&absolute));
            if let Some(found) = found.ok().and_then(|found| found.into_os_string().into_string().ok()) {
                *path = found.into();
            }
        }
        Ok(Self(config))
    }

    /// Reads what was [kept](Self::keep) beside the images; `None` if nothing was.
    pub fn kept(images: &Images) -> Result<Option<Self>> {
        let wrong = |error: serde_json::Error| Error::Bundle {
            dir: images.path().into(),
            reason: format!("{KEPT_CONFIG}: {error}"),
        };
        let text = images.read(KEPT_CONFIG, CONFIG_LIMIT)?;
        text.map(|text| serde_json::from_slice(&text).map(Self).map_err(wrong)).transpose()
    }

    /// Keeps it beside the images, for it may be changed or gone when they are restored.
    pub fn keep(&self, images: &Images) -> Result<()> {
        images.write(KEPT_CONFIG, self.0.to_string().as_bytes())
    }

    /// Makes it one of a second container, which has each volume where `moves` says.
    pub fn moved(mut self, moves: &[Move]) -> Result<Self, NotMoved> {
        let mut used = vec![false; moves.len()];
        for path in directories(&mut self.0) {
            let Some(text) = path.as_str() else { continue };
            let before = Path::new(text);
            if let Some(volume) = moves.iter().find(|volume| volume.from != before && volume.from.starts_with(before)) {
                return Err(NotMoved::Above { dir: before.into(), volume: volume.from.clone() });
            }
            // Of volumes within volumes, the innermost has it.
            let within = moves.iter().enumerate().filter(|(_, volume)| before.starts_with(&volume.from));
            let Some((index, volume)) = within.max_by_key(|(_, volume)| volume.from.components().count()) else {
                continue;
            };
            used[index] = true;
            let rest = before.strip_prefix(&volume.from).unwrap_or(Path::new(""));
            let after = if rest.as_os_str().is_empty() { volume.to.clone() } else { volume.to.join(rest) };
            let Ok(after) = after.into_os_string().into_string() else {
                return Err(NotMoved::Text { dir: volume.to.clone() });
            };
            *path = after.into();
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            return Err(NotMoved::Unused { volume: moves[unused].from.clone() });
        }
        // The first container's control group is not for two: the runtime makes one of the second's name.
        if let Some(linux) = self.0.get_mut("linux").and_then(Value::as_object_mut) {
            linux.remove("cgroupsPath");
        }
        Ok(self)
    }

    /// Writes it to the directory of a new bundle.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        std::fs::write(dir.join(CONFIG), self.0.to_string())
    }
}

/// Why a container can have no second one on a branch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotMoved {
    /// A directory would show the first container's files.
    #[error("{dir:?} holds the volume at {volume:?}: let the container have the volume by a mount of its own")]
    Above {
        /// The directory.
        dir: PathBuf,
        /// Where the volume is.
        volume: PathBuf,
    },
    /// The checkpoint has a volume that the configuration does not mention.
    #[error("nothing in its configuration lies in the volume at {volume:?}: is it another container's?")]
    Unused {
        /// Where the volume is.
        volume: PathBuf,
    },
    /// A path that the configuration's format cannot hold.
    #[error("{dir:?} is not UTF-8, as a container's configuration must be")]
    Text {
        /// The directory.
        dir: PathBuf,
    },
}

/// The root file system, and the sources of all mounts that have a directory for one.
fn directories(config: &mut Value) -> Vec<&mut Value> {
    let Some(config) = config.as_object_mut() else { return Vec::new() };
    let (mut root, mut sources) = (None, Vec::new());
    for (key, value) in config {
        match key.as_str() {
            "root" => root = value.get_mut("path"),
            "mounts" => sources.extend(value.as_array_mut().into_iter().flatten().filter_map(bound)),
            _ => {}
        }
    }
    root.into_iter().chain(sources).filter(|path| path.is_string()).collect()
}

/// The source of a mount, if it is a directory or a file.
fn bound(mount: &mut Value) -> Option<&mut Value> {
    let options = mount.get("options").and_then(Value::as_array);
    let has = |name: &str| options.is_some_and(|options| options.iter().any(|option| option == name));
    let is_bind = mount.get("type").is_some_and(|kind| kind == "bind") || has("bind") || has("rbind");
    mount.get_mut("source").filter(|_| is_bind)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bundle() -> Bundle {
        Bundle(json!({
            "root": { "path": "/srv/root" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/data", "type": "bind", "source": "/srv/data/one", "options": ["rw"] },
                { "destination": "/logs", "source": "/srv/data/logs/two", "options": ["rbind"] },
                { "destination": "/etc/hosts", "type": "none", "source": "/etc/hosts", "options": ["bind", "ro"] },
            ],
            "linux": { "cgroupsPath": "/first", "namespaces": [] },
        }))
    }

    fn moves(of: &[(&str, &str)]) -> Vec<Move> {
        of.iter().map(|(from, to)| Move { from: from.into(), to: to.into() }).collect()
    }

    #[test]
    fn what_lies_in_a_volume_is_the_branchs() {
        let moves = moves(&[("/srv/root", "/b/root"), ("/srv/data", "/b/data"), ("/srv/data/logs", "/b/logs")]);
        let Bundle(moved) = bundle().moved(&moves).unwrap();
        assert_eq!(moved["root"]["path"], "/b/root");
        let sources: Vec<_> = moved["mounts"].as_array().unwrap().iter().map(|mount| &mount["source"]).collect();
        assert_eq!(sources, ["proc", "/b/data/one", "/b/logs/two", "/etc/hosts"]);
        assert_eq!(moved["linux"], json!({ "namespaces": [] }));
    }

    #[test]
    fn no_file_of_the_first_container_is_shown_to_the_second() {
        let above = bundle().moved(&moves(&[("/srv/root/var/lib", "/b/lib")]));
        assert_eq!(above, Err(NotMoved::Above { dir: "/srv/root".into(), volume: "/srv/root/var/lib".into() }));
        let other = bundle().moved(&moves(&[("/srv/root", "/b/root"), ("/srv/dat", "/b/dat")]));
        assert_eq!(other, Err(NotMoved::Unused { volume: "/srv/dat".into() }));
    }

    #[test]
    fn what_is_no_configuration_moves_nothing() {
        for config in [json!(null), json!([]), json!({ "root": 1, "mounts": { "source": "/srv" } })] {
            assert_eq!(Bundle(config.clone()).moved(&[]), Ok(Bundle(config)));
        }
    }

    #[test]
    fn paths_are_named_from_the_root() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().canonicalize().unwrap();
        std::fs::create_dir_all(dir.join("bundle/rootfs")).unwrap();
        std::os::unix::fs::symlink("rootfs", dir.join("bundle/link")).unwrap();
        let config = json!({ "root": { "path": "link" }, "mounts": [
            { "destination": "/d", "type": "bind", "source": "../gone" },
        ] });
        std::fs::write(dir.join("bundle").join(CONFIG), config.to_string()).unwrap();
        let Bundle(found) = Bundle::open(&dir.join("bundle")).unwrap();
        assert_eq!(found["root"]["path"], dir.join("bundle/rootfs").to_str().unwrap());
        assert_eq!(found["mounts"][0]["source"], dir.join("bundle/../gone").to_str().unwrap());
        let images = Images::open(&dir).unwrap();
        assert_eq!(Bundle::kept(&images).unwrap(), None);
        Bundle(found.clone()).keep(&images).unwrap();
        assert_eq!(Bundle::kept(&images).unwrap(), Some(Bundle(found)));
        assert!(matches!(Bundle::open(&dir), Err(Error::Bundle { .. })));
    }
}
