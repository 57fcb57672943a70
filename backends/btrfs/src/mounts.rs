//! Who has an image mounted, in any mount namespace: btrfs itself lets a mounted subvolume be destroyed.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use fsnap_backend::mounts::{self, Place};

use crate::sys;

/// Whether the file system that `file` lies on is mounted so that contents are written with checksums.
pub(crate) fn with_checksums(file: impl AsFd) -> bool {
    let without = |option: &[u8]| matches!(option, b"nodatasum" | b"nodatacow");
    match sys::mount_options(&file) {
        Ok(options) => !options.split(|&byte| byte == b',').any(without),
        // The kernel is older, or shows that mount in its table only.
        Err(_) => matches!(mounts::of_file(file), Ok(Some(mount)) if !mount.options().any(without)),
    }
}

/// Says where the directory `path`, counted from the top of the file system of `file`, or something in it is mounted.
///
/// Looks into the mount namespaces of all processes that `/proc` shows.
pub(crate) fn user_of(file: impl AsFd, path: PathBuf) -> Option<String> {
    let image = Place { device: mounts::of_file(file).ok()??.root.device, path };
    let mut seen = BTreeSet::new();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // A process that ended meanwhile, or one of another user, has nothing to show; one with a root of its own shows
        // only what lies below that.
        let link = |name: &str| fs::read_link(process.path().join(name));
        let (Ok(namespace), Ok(root)) = (link("ns/mnt"), link("root")) else { continue };
        if seen.contains(&(namespace.clone(), root.clone())) {
            continue;
        }
        let Ok(table) = fs::File::open(process.path().join("mountinfo")).and_then(mounts::read) else { continue };
        seen.insert((namespace, root));
        if let Some(mount) = table.into_iter().find(|mount| mount.root.is_beneath(&image)) {
            let point = mount.point.to_string_lossy().escape_debug().to_string();
            return Some(format!("mounted at {point} for process {}: unmount it first", Path::new(&name).display()));
        }
    }
    None
}
