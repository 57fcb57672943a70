//! What a process may do with a directory.

use std::io;
use std::path::PathBuf;

use fsnap_backend::FileMeta;

use super::proc_dir::{ProcDir, parse};

/// The identity under which the kernel checks a process's accesses to files ([credentials(7)]).
///
/// [credentials(7)]: https://man7.org/linux/man-pages/man7/credentials.7.html
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Credentials {
    uid: u32,
    groups: Vec<u32>,
    /// It may search any directory whose owner its user namespace knows.
    overrides: bool,
    /// The user namespace, if it is not fsnap's: the ranges of the uids and gids that it knows.
    mapped: Option<(Vec<Range>, Vec<Range>)>,
}

/// First id, as seen by fsnap, and how many.
type Range = (u64, u64);

impl Credentials {
    /// Reads those of a process.
    pub(crate) fn of(process: &ProcDir, own_user_namespace: &PathBuf) -> io::Result<Self> {
        let status = process.read_record("status")?;
        let mut found = Self::parse(&status).ok_or_else(not_a_status)?;
        if process.link("ns/user")? != *own_user_namespace {
            found.mapped = Some((ranges(&process.read("uid_map")?), ranges(&process.read("gid_map")?)));
        }
        Ok(found)
    }

    fn parse(status: &[u8]) -> Option<Self> {
        const CAP_DAC_OVERRIDE: u64 = 1 << 1;
        const CAP_DAC_READ_SEARCH: u64 = 1 << 2;
        let Status { uid, groups, effective } = Status::parse(status)?;
        let overrides = effective & (CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH) != 0;
        Some(Self { uid, groups, overrides, mapped: None })
    }

    /// Whether the process may look up names in every directory.
    pub(crate) fn searches_all(&self) -> bool {
        self.overrides && self.mapped.is_none()
    }

    /// Whether the process may look up names in a directory with these attributes.
    ///
    /// With an access control list (`acl`), the mode's group bits are the most that any named user or group has, and
    /// the answer is then "perhaps": a volume too many is better than one too few.
    pub(crate) fn may_search(&self, dir: &FileMeta, acl: bool) -> bool {
        let in_group = self.groups.contains(&dir.gid);
        let bits = if dir.uid == self.uid {
            dir.mode & 0o100
        } else if acl {
            dir.mode & 0o011
        } else if in_group {
            dir.mode & 0o010
        } else {
            dir.mode & 0o001
        };
        bits != 0 || self.overrides && self.knows(dir)
    }

    /// A capability counts for files whose owner and group the process's user namespace has a number for.
    fn knows(&self, dir: &FileMeta) -> bool {
        let within = |ranges: &[Range], id: u32| {
            let id = u64::from(id);
            ranges.iter().any(|&(first, count)| id >= first && id - first < count)
        };
        self.mapped.as_ref().is_none_or(|(uids, gids)| within(uids, dir.uid) && within(gids, dir.gid))
    }
}

/// What `/proc/PID/status` says of the kernel's checks of accesses to files.
struct Status {
    uid: u32,
    /// Its own among them.
    groups: Vec<u32>,
    /// Capabilities, within its user namespace.
    effective: u64,
}

impl Status {
    fn parse(status: &[u8]) -> Option<Self> {
        let field = |name: &[u8]| status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(name));
        let numbers =
            |line: &[u8]| -> Vec<u32> { line.split(u8::is_ascii_whitespace).filter_map(parse::<u32>).collect() };
        // Real, effective, saved, and last the one for files.
        let uid = *numbers(field(b"Uid:")?).get(3)?;
        let mut groups = numbers(field(b"Groups:")?);
        groups.push(*numbers(field(b"Gid:")?).get(3)?);
        let effective = std::str::from_utf8(field(b"CapEff:")?.trim_ascii()).ok()?;
        let effective = u64::from_str_radix(effective, 16).ok()?;
        Some(Self { uid, groups, effective })
    }
}

/// Who changes a file, as far as the kernel looks at that when it decides which set-id bits are left.
#[cfg(feature = "fuse")]
pub(crate) struct Author {
    uid: u32,
    groups: Vec<u32>,
    /// Capabilities in the first user namespace: no others count here.
    effective: u64,
}

#[cfg(feature = "fuse")]
impl Author {
    /// The thread of that number, and what is known of it besides. Of a thread that cannot be looked at (it is of another pid namespace, or
    /// of another user's while fsnap is not the superuser's) nothing else is taken into account.
    pub(crate) fn of(thread: i32, uid: u32, gid: u32) -> Self {
        /// As `PROC_USER_INIT_INO` of the kernel's `proc_ns.h` has it.
        const FIRST: &str = "user:[4026531837]";
        let all_if_root = if uid == 0 { u64::MAX } else { 0 };
        let read = |proc: &ProcDir| Status::parse(&proc.read_record("status").ok()?);
        let Some((proc, status)) = ProcDir::of(thread).ok().and_then(|proc| read(&proc).map(|status| (proc, status)))
        else {
            return Self { uid, groups: vec![gid], effective: all_if_root };
        };
        let effective = match proc.link("ns/user") {
            Ok(link) if link.as_os_str() == FIRST => status.effective,
            Ok(_) => 0,
            Err(_) => all_if_root,
        };
        Self { uid, groups: status.groups, effective }
    }

    /// Whether his writes leave all set-id bits as they are.
    pub(crate) fn keeps_set_ids(&self) -> bool {
        const CAP_FSETID: u64 = 1 << 4;
        self.effective & CAP_FSETID != 0
    }

    /// Whether a file of this group that the group may not execute keeps its set-group-ID bit.
    pub(crate) fn is_of(&self, group: u32) -> bool {
        self.groups.contains(&group) || self.keeps_set_ids()
    }

    /// Whether he may give away a file of this owner's, or change its mode.
    pub(crate) fn owns(&self, owner: u32) -> bool {
        const CAP_FOWNER: u64 = 1 << 3;
        self.uid == owner || self.effective & CAP_FOWNER != 0
    }
}

fn not_a_status() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a file like /proc/PID/status")
}

/// The second and third column of `uid_map`: the ids outside, as seen by the reader.
fn ranges(map: &[u8]) -> Vec<Range> {
    let line = |line: &[u8]| {
        let mut numbers = line.split(u8::is_ascii_whitespace).filter_map(parse::<u64>);
        Some((numbers.nth(1)?, numbers.next()?))
    };
    map.split(|&byte| byte == b'\n').filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsnap_backend::{FileKind, Timestamp};

    fn dir(uid: u32, gid: u32, mode: u32) -> FileMeta {
        let time = Timestamp::default();
        FileMeta {
            kind: FileKind::Dir,
            ino: 1,
            nlink: 1,
            mode,
            uid,
            gid,
            rdev: 0,
            size: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: None,
        }
    }

    fn who(uid: u32, groups: &[u32], overrides: bool) -> Credentials {
        Credentials { uid, groups: groups.to_vec(), overrides, mapped: None }
    }

    #[cfg(feature = "fuse")]
    #[test]
    fn who_cannot_be_looked_at_is_who_he_says() {
        // No thread has this number.
        let of = |uid| Author::of(-1, uid, 8);
        assert!(of(0).keeps_set_ids() && of(0).is_of(9) && of(0).owns(7));
        assert!(!of(7).keeps_set_ids() && of(7).is_of(8) && !of(7).is_of(9) && of(7).owns(7) && !of(7).owns(6));
        // This one may say what he likes.
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let gid = rustix::process::getgid().as_raw();
        assert!(Author::of(own, 7, gid + 1).is_of(gid));
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        assert!(who(7, &[8], false).may_search(&dir(7, 0, 0o700), false));
        assert!(!who(7, &[8], false).may_search(&dir(7, 8, 0o077), false), "an owner has the owner's bits only");
        assert!(who(7, &[1, 8], false).may_search(&dir(0, 8, 0o710), false));
        assert!(!who(7, &[8], false).may_search(&dir(0, 8, 0o701), false), "a member has the group's bits only");
        assert!(who(7, &[], false).may_search(&dir(0, 0, 0o701), false));
        assert!(!who(7, &[], false).may_search(&dir(0, 0, 0o700), false));
    }

    #[test]
    fn a_list_may_permit_what_the_mode_does_not_say() {
        assert!(who(7, &[], false).may_search(&dir(0, 0, 0o710), true));
        assert!(!who(7, &[], false).may_search(&dir(0, 0, 0o700), true), "the mask permits nothing");
    }

    #[test]
    fn a_capability_ends_at_its_user_namespace() {
        let mut root = who(0, &[0], true);
        assert!(root.may_search(&dir(7, 7, 0o700), false));
        root.mapped = Some((vec![(100_000, 65_536)], vec![(100_000, 65_536)]));
        assert!(!root.may_search(&dir(7, 7, 0o700), false));
        assert!(root.may_search(&dir(100_007, 165_535, 0o700), false));
        assert!(!root.may_search(&dir(100_007, 165_536, 0o700), false));
    }

    #[test]
    fn the_identity_for_files_is_read() {
        let status = b"Name:\ta\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nCapEff:\t0000000000000002\n";
        assert_eq!(Credentials::parse(status), Some(who(4, &[9, 10, 8], true)));
        assert_eq!(Credentials::parse(b"Name:\ta\n"), None);
    }
}
