//! The one question of `/proc` that no crate wraps.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::general as raw;

mod call {
    // `PROCMAP_QUERY` of <linux/fs.h>, since Linux 6.11.
    nix::ioctl_readwrite!(procmap_query, b'f', 17, super::raw::procmap_query);
}

/// Whether a process has a shared mapping of a file that may be written, asked of its open `/proc/PID/maps`; `None` if this kernel
/// cannot tell ([proc_pid_maps(5)]).
///
/// The kernel searches its own tree, where reading `maps` would have it print every mapping.
///
/// [proc_pid_maps(5)]: https://man7.org/linux/man-pages/man5/proc_pid_maps.5.html
pub(crate) fn maps_files_for_writing(maps: impl AsFd) -> Option<bool> {
    use raw::procmap_query_flags as flag;
    let wanted = flag::PROCMAP_QUERY_VMA_WRITABLE as u64
        | flag::PROCMAP_QUERY_VMA_SHARED as u64
        | flag::PROCMAP_QUERY_FILE_BACKED_VMA as u64
        | flag::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64;
    // SAFETY: the structure is plain integers, for which all zeroes is a value.
    let mut query: raw::procmap_query = unsafe { std::mem::zeroed() };
    query.size = size_of::<raw::procmap_query>() as u64;
    query.query_flags = wanted;
    // SAFETY: the descriptor is open for the call, and the structure says its own size; no buffer is passed in it.
    match unsafe { call::procmap_query(maps.as_fd().as_raw_fd(), &raw mut query) } {
        Ok(_) => Some(true),
        // There is none, or the process has ended.
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ESRCH) => Some(false),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// In a process of its own: the catalogs of other tests are shared mappings, too.
    #[test]
    fn a_shared_mapping_is_found_and_nothing_else() {
        const ALONE: &str = "--exact";
        if std::env::args().all(|arg| arg != ALONE) {
            let name = concat!(module_path!(), "::a_shared_mapping_is_found_and_nothing_else");
            let (_, name) = name.split_once("::").unwrap();
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            let ran = alone.args([name, ALONE, "--nocapture"]).output().unwrap();
            let said = String::from_utf8_lossy(&ran.stdout);
            assert!(
                ran.status.success() && said.contains("1 passed"),
                "{said}{}",
                String::from_utf8_lossy(&ran.stderr)
            );
            return;
        }
        let maps = File::open("/proc/self/maps").unwrap();
        let before = maps_files_for_writing(&maps);
        if before.is_none() {
            // Linux before 6.11: `maps` is read there, which is tested beside its parser.
            return;
        }
        assert_eq!(before, Some(false));
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        for (flags, found) in [(rustix::mm::MapFlags::PRIVATE, false), (rustix::mm::MapFlags::SHARED, true)] {
            // SAFETY: a fresh mapping of a file of one page that nobody else uses, unmapped once, below.
            let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4096, protection, flags, &file, 0) }.unwrap();
            assert_eq!(maps_files_for_writing(&maps), Some(found));
            // SAFETY: the mapping made above; nothing refers to it.
            unsafe { rustix::mm::munmap(at, 4096) }.unwrap();
        }
    }
}
