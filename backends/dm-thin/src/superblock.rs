//! The file systems that a volume may have: how they are told apart, and how their copies are mounted.
//!
//! A copy has the UUID of its origin, and it was frozen when it was made: nothing has to be replayed in it, and
//! nothing may be.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A file system that the kernel freezes when its device is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileSystem {
    /// ext4, and its ancestors, which the same driver mounts.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs on one device.
    Btrfs,
}

impl FileSystem {
    /// By the name that the kernel has for it.
    pub(crate) fn named(name: &[u8]) -> Option<Self> {
        match name {
            b"ext2" | b"ext3" | b"ext4" => Some(Self::Ext4),
            b"xfs" => Some(Self::Xfs),
            b"btrfs" => Some(Self::Btrfs),
            _ => None,
        }
    }

    /// As mount(2) wants it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// The options by which a snapshot is mounted so that nothing in it changes.
    ///
    /// XFS wants the UUID of each mounted file system for itself. A log that was quiesced still says that unlinked
    /// files are to be removed; they are left.
    pub(crate) fn snapshot_options(self) -> &'static str {
        match self {
            Self::Ext4 => "noload",
            Self::Xfs => "norecovery,nouuid",
            Self::Btrfs => "rescue=nologreplay",
        }
    }

    /// The options by which a clone is mounted beside its relatives.
    pub(crate) fn clone_options(self) -> &'static str {
        match self {
            Self::Xfs => "nouuid",
            Self::Ext4 | Self::Btrfs => "",
        }
    }

    /// Reads the file system's UUID from its device; `None` if there is no such file system on it.
    pub(crate) fn uuid_on(self, device: &Path) -> io::Result<Option<String>> {
        // Offsets from the start of the device: of the magic, the magic itself, and of the UUID.
        let (magic_at, magic, uuid_at): (u64, &[u8], u64) = match self {
            Self::Ext4 => (0x438, b"\x53\xef", 0x468),
            Self::Xfs => (0, b"XFSB", 32),
            Self::Btrfs => (0x1_0040, b"_BHRfS_M", 0x1_0020),
        };
        let device = File::open(device)?;
        let mut found = vec![0; magic.len()];
        let mut uuid = [0; 16];
        device.read_exact_at(&mut found, magic_at)?;
        device.read_exact_at(&mut uuid, uuid_at)?;
        Ok((found == magic).then(|| uuid.iter().map(|byte| format!("{byte:02x}")).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_magic_has_a_uuid() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        temp.as_file().set_len(1 << 20).unwrap();
        assert_eq!(FileSystem::Xfs.uuid_on(temp.path()).unwrap(), None);
        temp.as_file().write_all_at(b"XFSB", 0).unwrap();
        temp.as_file().write_all_at(&[0xab; 16], 32).unwrap();
        assert_eq!(FileSystem::Xfs.uuid_on(temp.path()).unwrap(), Some("ab".repeat(16)));
        assert_eq!(FileSystem::Ext4.uuid_on(temp.path()).unwrap(), None);
    }
}
