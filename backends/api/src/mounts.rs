//! The mounts that a process sees: the kernel's table of them, `/proc/PID/mountinfo` ([proc_pid_mountinfo(5)]).
//!
//! A line stands for a mount, and blanks between its fields:
//!
//! ```text
//! 40 27 0:50 /@db /srv/db rw,relatime shared:7 - btrfs /dev/loop0 rw,subvol=/@db
//! id    device    point              (optional)  type             its own options
//!    parent  root         the mount's options          source
//! ```
//!
//! The table is bytes, not text: names may hold any but NUL, and one mount of a hostile process must not hide the others. Within
//! a field the kernel writes a blank, a tab, a newline and a backslash as a backslash and three octal digits.
//!
//! It is handed out page by page, and is not read at one instant: while others mount and unmount, a mount may be missed.
//!
//! [proc_pid_mountinfo(5)]: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::retry_on_intr;

/// The number of a device. A file system has one, whether it lies on a device or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Names the driver.
    pub major: u32,
    /// Names the device among those of the driver.
    pub minor: u32,
}

impl Device {
    /// Takes a number apart as it is in `st_rdev`.
    pub fn of(number: u64) -> Self {
        Self { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
    }

    /// Puts it together as it is in `st_rdev`.
    pub fn number(self) -> u64 {
        rustix::fs::makedev(self.major, self.minor)
    }

    fn parse(field: &[u8]) -> Option<Self> {
        let (major, minor) = std::str::from_utf8(field).ok()?.split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Where a file lies: in which file system, and at what path from that file system's own root.
///
/// It does not depend on who looks: bind mounts, mount namespaces and changed roots all show the same place under other
/// paths. `st_dev` would not do, since btrfs gives each subvolume one of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The number of the file system.
    pub device: Device,
    /// The path in it.
    pub path: PathBuf,
}

impl Place {
    /// Whether this is `other`, or lies below it.
    pub fn is_beneath(&self, other: &Self) -> bool {
        self.device == other.device && self.path.starts_with(&other.path)
    }
}

/// One mount, as a process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Names it among all mounts of this moment, those of other namespaces included: `stx_mnt_id`.
    pub id: u64,
    /// The mount that it is mounted on; its own id, or one that is not in the table, for a root.
    pub parent: u64,
    /// The place that it shows at its mount point.
    pub root: Place,
    /// Where it is mounted, from the root of the process whose table this is.
    pub point: PathBuf,
    /// Neither the mount nor the file system is read-only.
    pub writable: bool,
    /// The type of the file system, such as `ext4` or `fuse.sshfs`.
    pub fstype: Vec<u8>,
    /// What it is said to come from: a device, or whatever who mounted it has written.
    pub source: PathBuf,
    /// The options of the file system, as the kernel shows them.
    options: Vec<u8>,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
        let (id, parent) = (number()?, number()?);
        let device = Device::parse(fields.next()?)?;
        let root = Place { device, path: unescape(fields.next()?).into() };
        let point = unescape(fields.next()?).into();
        let mount_options = fields.next()?;
        // A lone dash ends the optional fields.
        fields.find(|&field| field == b"-")?;
        let fstype = unescape(fields.next()?).into_vec();
        let source = unescape(fields.next()?).into();
        let options = fields.next()?.to_vec();
        // Either list begins with it.
        let writable = [mount_options, &options].iter().all(|options| split(options).next() == Some(b"rw"));
        Some(Self { id, parent, root, point, writable, fstype, source, options })
    }

    /// The options of the file system, one by one, as the kernel shows them: [escaped](unescape), commas in a value, too.
    pub fn options(&self) -> impl Iterator<Item = &[u8]> {
        split(&self.options)
    }

    /// The place of what this mount shows at `path`, which is at or below the mount point.
    pub fn place(&self, path: &Path) -> Option<Place> {
        let below = path.strip_prefix(&self.point).ok()?;
        Some(Place { device: self.root.device, path: join(&self.root.path, below) })
    }
}

/// Joins without the trailing slash that joining an empty path would leave.
pub fn join(base: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() { base.into() } else { base.join(below) }
}

/// The mounts in the calling thread's table.
pub fn own() -> io::Result<Vec<Mount>> {
    read(own_table()?)
}

/// The mounts in an opened table, whosever it is.
pub fn read(table: impl AsFd) -> io::Result<Vec<Mount>> {
    Ok(parse(&content(table)?).collect())
}

/// Takes the content of a table apart. A line that stands for no mount is left out.
pub fn parse(table: &[u8]) -> impl Iterator<Item = Mount> {
    table.split(|&byte| byte == b'\n').filter_map(Mount::parse)
}

/// The mount through which `file` was opened; `None` if the calling thread's mount namespace does not have it.
pub fn of_file(file: impl AsFd) -> io::Result<Option<Mount>> {
    let id = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
    let find = || -> io::Result<Option<Mount>> { Ok(parse(&content(own_table()?)?).find(|mount| mount.id == id)) };
    match find()? {
        // One that was missed because others mount just now is there the next time.
        None => find(),
        found => Ok(found),
    }
}

/// The uppermost mount at `point`, an absolute path without links as the calling thread sees it.
pub fn at(point: &Path) -> io::Result<Option<Mount>> {
    Ok(parse(&content(own_table()?)?).filter(|mount| mount.point == point).last())
}

fn own_table() -> io::Result<File> {
    File::open("/proc/thread-self/mountinfo")
}

fn content(table: impl AsFd) -> io::Result<Vec<u8>> {
    // A file of /proc has no size to go by, and each read of it has its price, however small: so there is room for most
    // tables, and always for the page that the kernel gives at once.
    let mut content = Vec::with_capacity(64 << 10);
    while retry_on_intr(|| rustix::io::read(&table, spare_capacity(&mut content)))? > 0 {
        content.reserve(4096);
    }
    Ok(content)
}

fn split(options: &[u8]) -> impl Iterator<Item = &[u8]> {
    options.split(|&byte| byte == b',')
}

/// Undoes the escapes by which the kernel keeps blanks, newlines and the like out of its tables: `\040` and so on.
pub fn unescape(field: &[u8]) -> OsString {
    let octal = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?;
        u8::from_str_radix(digits, 8).ok()
    };
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match tail.get(..3).filter(|_| first == b'\\').and_then(octal) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    /// As the kernel writes it.
    fn escaped(name: &[u8]) -> Vec<u8> {
        let escape = |&byte: &u8| match byte {
            b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
            _ => vec![byte],
        };
        name.iter().flat_map(escape).collect()
    }

    fn line(fields: &[&[u8]]) -> Vec<u8> {
        [&fields.join(&b' ')[..], b"\n"].concat()
    }

    #[test]
    fn a_line_is_taken_apart() {
        let table = b"36 35 0:44 /@db /srv/db rw,noatime shared:1 master:2 - btrfs /dev/sda rw,nodatasum,subvol=/@db\n";
        let mount = parse(table).next().unwrap();
        assert_eq!((mount.id, mount.parent), (36, 35));
        assert_eq!(mount.root, Place { device: Device { major: 0, minor: 44 }, path: "/@db".into() });
        assert_eq!((&*mount.point, &*mount.source), (Path::new("/srv/db"), Path::new("/dev/sda")));
        assert_eq!(mount.fstype, b"btrfs");
        assert_eq!(mount.options().collect::<Vec<_>>(), [&b"rw"[..], b"nodatasum", b"subvol=/@db"]);
        assert!(mount.writable);
    }

    #[test]
    fn names_of_any_bytes_come_back() {
        let long = [b'\n'; 255];
        let names: [&[u8]; 8] =
            [b"a b", b"a\tb", b"a\nb - c 9 9 0:9 / / rw", b"\\", b"\\040", b"\xff\xfe", b"\"'#,=-", &long];
        for name in names {
            let (root, point) = ([b"/top/", name].concat(), [b"/point/", name].concat());
            let fields = [escaped(&root), escaped(&point), escaped(name), escaped(name)];
            let [root_field, point_field, fstype, source] = fields.each_ref().map(Vec::as_slice);
            let hostile = line(&[b"7 1 8:1", root_field, point_field, b"rw -", fstype, source, b"rw"]);
            let table = [&hostile[..], b"8 1 8:2 / /after ro - ext4 /dev/sdb ro\n"].concat();
            let found: Vec<Mount> = parse(&table).collect();
            assert_eq!(found.iter().map(|mount| mount.id).collect::<Vec<_>>(), [7, 8], "{}", name.escape_ascii());
            assert_eq!(found[0].root.path.as_os_str().as_bytes(), root);
            assert_eq!(found[0].point.as_os_str().as_bytes(), point);
            assert_eq!((&*found[0].fstype, found[0].source.as_os_str().as_bytes()), (name, name));
        }
    }

    #[test]
    fn what_is_no_escape_stays() {
        for plain in [&b"\\"[..], b"\\0", b"\\04", b"\\+40", b"\\-40", b"\\048", b"\\400", b"\\\xff40"] {
            assert_eq!(unescape(plain).as_bytes(), plain);
        }
        assert_eq!(unescape(b"\\134\\134040").as_bytes(), b"\\\\040");
    }

    #[test]
    fn what_stands_for_no_mount_is_left_out() {
        let whole = b"7 1 8:1 / /srv rw master:1 - ext4 /dev/sda rw";
        assert_eq!(parse(whole).count(), 1);
        // The last field may be cut short, or be empty: an option less.
        let no_mount = |length: usize| parse(&whole[..length]).count() == 0;
        assert!((0..whole.len() - b" rw".len()).all(no_mount));
        for torn in
            [&b"x 1 8:1 / /srv rw - ext4 a rw"[..], b"7 1 8 / /srv rw - ext4 a rw", b"7 1 8:1 / /srv - ext4 a rw"]
        {
            assert_eq!(parse(torn).count(), 0, "{}", torn.escape_ascii());
        }
    }

    #[test]
    fn writable_is_what_both_the_mount_and_the_file_system_allow() {
        let writable = |mount: &str, own: &str| {
            parse(format!("7 1 8:1 / /srv {mount} - ext4 a {own}").as_bytes()).next().unwrap().writable
        };
        assert!(writable("rw,nosuid", "rw,errors=remount-ro"));
        assert!(!writable("ro,nosuid", "rw"));
        assert!(!writable("rw", "ro"));
        assert!(!writable("rw", "ro,rw"));
    }

    #[test]
    fn one_place_is_seen_under_several_paths() {
        let table = b"40 27 0:50 /@db /srv/db rw - btrfs a rw\n\
            41 27 0:50 / /mnt/top rw - btrfs a rw\n\
            42 27 0:51 /@db /srv/other rw - btrfs b rw\n";
        let mounts: Vec<Mount> = parse(table).collect();
        let place = |at: usize, path: &str| mounts[at].place(Path::new(path)).unwrap();
        assert_eq!(place(0, "/srv/db/sub/f"), place(1, "/mnt/top/@db/sub/f"));
        assert!(place(0, "/srv/db/sub").is_beneath(&place(1, "/mnt/top/@db")));
        assert!(!place(1, "/mnt/top/@dbx").is_beneath(&place(0, "/srv/db")));
        assert!(!place(2, "/srv/other/f").is_beneath(&place(0, "/srv/db")));
        assert_eq!(mounts[0].place(Path::new("/srv")), None);
    }

    #[test]
    fn the_kernels_own_table_is_understood() {
        let lines = content(own_table().unwrap()).unwrap();
        assert!(
            lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).all(|line| Mount::parse(line).is_some())
        );
        let proc = of_file(File::open("/proc/self").unwrap()).unwrap().unwrap();
        assert_eq!(proc.fstype, b"proc");
    }
}
