//! The coverage audit: what processes can write to that a checkpoint does not hold.
//!
//! It looks at what can be written *now*: open descriptors, shared mappings, the files of sockets, and mounts that a
//! process sees and may enter. What no snapshot can hold is not named: the kernel's own file systems, such as proc, and
//! memory that has no name, which the engine saves with the processes.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Pattern;
use super::mounts::{Mount, NETWORK};
use crate::checkpoint::PathText;

/// What is done about what lies outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// There is no checkpoint then.
    Refuse,
    /// It is recorded with the checkpoint.
    #[default]
    Record,
    /// Nothing: nobody looks.
    Ignore,
}

/// How the audit is made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditRules {
    /// What is done about what lies outside.
    pub policy: Policy,
    /// What does not matter.
    pub ignore: Vec<Pattern>,
    /// Mounts, by the kernel's numbers, that are the processes' own: what lies there is saved with them, and not outside.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub own: BTreeSet<u64>,
}

impl AuditRules {
    /// Whether it does not matter.
    pub(super) fn ignores(&self, outside: &Outside) -> bool {
        self.ignore.iter().any(|pattern| pattern.matches(outside.path.as_path(), &outside.file_system))
    }

    /// The type of the file system and what that keeps its files on, of a mount that is of concern.
    pub(super) fn concerned(&self, mount: &Mount) -> Option<(String, Medium)> {
        if self.own.contains(&mount.id) { None } else { told(mount) }
    }
}

/// One way in which a process can write to what a checkpoint does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// The process.
    pub pid: i32,
    /// Its name, for messages.
    pub command: String,
    /// In what way.
    #[serde(flatten)]
    pub via: Via,
    /// The file, in the words of its own mount namespace.
    pub path: PathText,
    /// The type of its file system, as the mount table has it.
    pub file_system: String,
    /// What becomes of it if the machine or its peers go away.
    pub medium: Medium,
    /// It has no name any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unlinked: bool,
}

/// How something can be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "via")]
pub enum Via {
    /// By a descriptor that is open for writing.
    Descriptor {
        /// Its number.
        fd: i32,
    },
    /// By a shared mapping.
    Mapping,
    /// By a socket that is bound to it.
    Socket {
        /// The socket's descriptor.
        fd: i32,
    },
    /// By its name, on a mount that the process sees.
    Mount,
}

/// What a file system keeps its files on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Medium {
    /// A device, or another file system of this machine.
    Disk,
    /// Memory.
    Memory,
    /// Another machine.
    Network,
    /// A process that serves it.
    Fuse,
    /// Nobody can tell.
    Unknown,
}

impl Medium {
    /// What a type of file system keeps its files on; `None` if it has no files of anybody's.
    pub(super) fn of(file_system: &[u8]) -> Option<Self> {
        const KERNEL: &[&[u8]] = &[
            b"bdev",
            b"binfmt_misc",
            b"bpf",
            b"cgroup",
            b"cgroup2",
            b"configfs",
            b"debugfs",
            b"devpts",
            b"efivarfs",
            b"fusectl",
            b"mqueue",
            b"nsfs",
            b"pipefs",
            b"proc",
            b"pstore",
            b"resctrl",
            b"rpc_pipefs",
            b"securityfs",
            b"selinuxfs",
            b"smackfs",
            b"sockfs",
            b"sysfs",
            b"tracefs",
        ];
        const MEMORY: &[&[u8]] = &[b"devtmpfs", b"hugetlbfs", b"ramfs", b"tmpfs"];
        Some(match file_system {
            kernel if KERNEL.contains(&kernel) => return None,
            memory if MEMORY.contains(&memory) => Self::Memory,
            network if NETWORK.contains(&network) => Self::Network,
            fuse if fuse == b"fuse" || fuse.starts_with(b"fuse.") => Self::Fuse,
            _ => Self::Disk,
        })
    }
}

/// The type of a mount's file system, and what that keeps its files on; `None` if it has no files of anybody's.
pub(super) fn told(mount: &Mount) -> Option<(String, Medium)> {
    let medium = Medium::of(&mount.fstype)?;
    Some((String::from_utf8_lossy(&mount.fstype).into_owned(), medium))
}

impl fmt::Display for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, command, via, path, file_system, medium, unlinked } = self;
        write!(f, "{pid} ({command}) ")?;
        match via {
            Via::Descriptor { fd } => write!(f, "has descriptor {fd} open for writing: {path}")?,
            Via::Mapping => write!(f, "has a shared mapping that it can write to: {path}")?,
            Via::Socket { fd } => write!(f, "has a socket bound as descriptor {fd}: {path}")?,
            Via::Mount => write!(f, "can write to the mount at {path}")?,
        }
        let file_system = crate::printable(file_system.as_ref());
        match medium {
            Medium::Disk | Medium::Memory | Medium::Fuse => write!(f, " ({file_system}")?,
            Medium::Network => write!(f, " ({file_system}, on another machine")?,
            Medium::Unknown => f.write_str(" (on a file system that cannot be told")?,
        }
        f.write_str(if *unlinked { ", unlinked)" } else { ")" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_type_of_file_system_is_told_by_what_it_keeps_its_files_on() {
        for (file_system, medium) in [
            ("ext4", Some(Medium::Disk)),
            ("overlay", Some(Medium::Disk)),
            ("tmpfs", Some(Medium::Memory)),
            ("nfs4", Some(Medium::Network)),
            ("fuse.sshfs", Some(Medium::Fuse)),
            ("fuseblk", Some(Medium::Disk)),
            ("proc", None),
            ("cgroup2", None),
        ] {
            assert_eq!(Medium::of(file_system.as_bytes()), medium, "{file_system}");
        }
    }

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let outside = Outside {
            pid: 7,
            command: "a".into(),
            via: Via::Descriptor { fd: 3 },
            path: PathText("/tmp/a".into()),
            file_system: "tmpfs".into(),
            medium: Medium::Memory,
            unlinked: true,
        };
        let json = serde_json::to_value(&outside).unwrap();
        assert_eq!(json["via"], "descriptor");
        assert_eq!(json["fd"], 3);
        assert_eq!(serde_json::from_value::<Outside>(json).unwrap(), outside);
        assert_eq!(outside.to_string(), "7 (a) has descriptor 3 open for writing: /tmp/a (tmpfs, unlinked)");
    }
}
