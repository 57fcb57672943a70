//! A recipe for making an image's files visible.

use std::path::PathBuf;
use std::sync::Arc;

use crate::Dir;

/// How to make the files of an activated image visible.
///
/// A recipe, not an effect: restored processes live in mount namespaces of their own, so whoever needs the files
/// carries it out where they are needed.
#[derive(Debug, Clone)]
pub enum MountSpec {
    /// They are visible at `dir` already; bind it where they are wanted.
    Bind {
        /// The root of the image.
        dir: PathBuf,
        /// The image is a snapshot.
        read_only: bool,
    },
    /// `mount(2)` makes them visible.
    Mount {
        /// The file system's type, such as `ext4`.
        fstype: String,
        /// The source, such as a block device.
        source: PathBuf,
        /// The data of the mount call, such as `norecovery,nouuid`.
        options: String,
        /// The image is a snapshot.
        read_only: bool,
    },
    /// The kernel cannot mount it: a snapshot that is read through [`Dir`].
    Tree(Arc<dyn Dir>),
}
