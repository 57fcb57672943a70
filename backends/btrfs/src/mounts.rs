//! Who has an image mounted, in any mount namespace: btrfs itself lets a mounted subvolume be destroyed.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, StatxFlags};

/// One line of `/proc/PID/mountinfo` ([proc_pid_mountinfo(5)]).
///
/// [proc_pid_mountinfo(5)]: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    id: u64,
    device: Vec<u8>,
    /// The mounted directory, below the file system's top.
    root: Vec<u8>,
    point: Vec<u8>,
    /// The options of the file system, not those of the mount point.
    options: Vec<u8>,
}

/// The mount through which `file` was opened, if it is one of this process's namespace.
fn mount_of(file: impl AsFd) -> Option<Mount> {
    let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    let id = found.stx_mnt_id;
    // A file of /proc has no size to go by, and is made anew for each of the many small reads that a guess would take.
    let mut text = Vec::with_capacity(64 << 10);
    fs::File::open("/proc/self/mountinfo").ok()?.read_to_end(&mut text).ok()?;
    parse(&text).find(|mount| mount.id == id)
}

/// Whether the file system that `file` lies on is mounted so that contents are written with checksums.
pub(crate) fn with_checksums(file: impl AsFd) -> bool {
    mount_of(file).is_some_and(|mount| {
        !mount.options.split(|&byte| byte == b',').any(|option| matches!(option, b"nodatasum" | b"nodatacow"))
    })
}

/// Says where the directory `path`, counted from the top of the file system of `file`, or something in it is mounted.
///
/// Looks into the mount namespaces of all processes that `/proc` shows.
pub(crate) fn user_of(file: impl AsFd, path: &[u8]) -> Option<String> {
    let device = mount_of(file)?.device;
    let mut seen = BTreeSet::new();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // A process that ended meanwhile, or one of another user, has nothing to show.
        let Ok(namespace) = fs::read_link(process.path().join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let Ok(text) = fs::read(process.path().join("mountinfo")) else { continue };
        if let Some(mount) = parse(&text).find(|mount| mount.device == device && within(&mount.root, path)) {
            let point = String::from_utf8_lossy(&mount.point).escape_debug().to_string();
            return Some(format!("mounted at {point} for process {}: unmount it first", Path::new(&name).display()));
        }
    }
    None
}

fn within(root: &[u8], path: &[u8]) -> bool {
    root.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

fn parse(text: &[u8]) -> impl Iterator<Item = Mount> {
    text.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let device = fields.nth(1)?.to_vec();
        let root = unescape(fields.next()?);
        let point = unescape(fields.next()?);
        // Optional fields end with a lone dash; then come type, source and options.
        fields.find(|&field| field == b"-")?;
        let options = fields.nth(2)?.to_vec();
        Some(Mount { id, device, root, point, options })
    })
}

/// Undoes the kernel's `\040` and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                out.push(code);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let text =
            b"36 35 0:44 /a\\040b /mnt\\134x rw,noatime shared:1 master:2 - btrfs /dev/sda rw,nodatasum\nnonsense\n";
        let expected = Mount {
            id: 36,
            device: b"0:44".to_vec(),
            root: b"/a b".to_vec(),
            point: b"/mnt\\x".to_vec(),
            options: b"rw,nodatasum".to_vec(),
        };
        assert_eq!(parse(text).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn only_whole_names_are_within() {
        assert!(within(b"/a/b", b"/a/b"));
        assert!(within(b"/a/b/c", b"/a/b"));
        assert!(!within(b"/a/bc", b"/a/b"));
        assert!(!within(b"/", b"/a/b"));
    }
}
