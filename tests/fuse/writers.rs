//! Who writes, and in which way.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FileType, OFlags, RawDir, XattrFlags};
use rustix::process::{Gid, Uid};

use crate::Case;
use crate::site::Site;
use crate::sys::Mapping;

pub(crate) const CASES: &[Case] = &[
    ("what_somebody_else_writes_loses_its_set_id_bits", what_somebody_else_writes_loses_its_set_id_bits),
    ("who_sets_the_list_of_a_group_s_file_is_in_the_group", who_sets_the_list_of_a_group_s_file_is_in_the_group),
    ("names_of_trusted_attributes_are_for_the_superuser", names_of_trusted_attributes_are_for_the_superuser),
    (
        "a_file_that_was_opened_to_append_can_be_written_elsewhere",
        a_file_that_was_opened_to_append_can_be_written_elsewhere,
    ),
    ("who_lists_while_names_go_is_told_all_others", who_lists_while_names_go_is_told_all_others),
];

/// A way to write to a file.
type Write<'a> = &'a (dyn Fn(&File) + Sync);

/// A user without any rights.
const STRANGER: u32 = 12_345;

/// What `work` returns, done by a user without any rights.
fn as_somebody_else<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    as_member_of(&[], work)
}

/// The same, by one who is in these groups besides the superuser's.
fn as_member_of<T: Send>(groups: &[Gid], work: impl FnOnce() -> T + Send) -> T {
    let stranger = Uid::from_raw(STRANGER);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            rustix::thread::set_thread_groups(groups).unwrap();
            rustix::thread::set_thread_res_uid(stranger, stranger, stranger).unwrap();
            work()
        });
        worker.join().unwrap()
    })
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn what_somebody_else_writes_loses_its_set_id_bits() {
    let site = Site::new(|lower| fs::write(lower.join("below"), vec![b'b'; 200_000]).unwrap());
    fs::write(site.at("made"), "made here").unwrap();
    for name in ["below", "made"] {
        let path = site.at(name);
        let from = File::open(&path).unwrap();
        let ways: [(&str, Write); 4] = [
            ("write", &|to| assert_eq!(to.write_at(b"x", 1).unwrap(), 1)),
            ("ftruncate", &|to| to.set_len(100).unwrap()),
            ("fallocate", &|to| rustix::fs::fallocate(to, rustix::fs::FallocateFlags::empty(), 0, 9).unwrap()),
            ("copy_file_range", &|to| {
                assert_eq!(rustix::fs::copy_file_range(&from, Some(&mut 0), to, Some(&mut 50), 5).unwrap(), 5);
            }),
        ];
        // The kernel goes other ways where there are capabilities.
        for ((way, write), capable) in ways.iter().flat_map(|way| [(way, false), (way, true)]) {
            // The bits are set when the file is open already, and perhaps written past the server.
            let to = File::options().write(true).open(&path).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(0o6777)).unwrap();
            if capable {
                rustix::fs::setxattr(&path, "security.capability", CAPABILITY, XattrFlags::empty()).unwrap();
            }
            as_somebody_else(|| write(&to));
            assert_eq!(mode(&path), 0o777, "{name}: {way}");
            let left = rustix::fs::getxattr(&path, "security.capability", &mut [0; 64]);
            assert_eq!(left, Err(rustix::io::Errno::NODATA), "{name}: {way}");
        }
        // A change of owner that changes nothing takes them off whoever makes it, as on any file system.
        fs::set_permissions(&path, PermissionsExt::from_mode(0o6777)).unwrap();
        std::os::unix::fs::chown(&path, None, None).unwrap();
        assert_eq!(mode(&path), 0o777, "{name}");
    }
    site.end();
}

/// As on any file system, which looks at the groups of whoever sets it; the superuser may do what he likes.
fn who_sets_the_list_of_a_group_s_file_is_in_the_group() {
    const GROUP: u32 = 4_242;
    let site = Site::new(|lower| fs::write(lower.join("below"), "").unwrap());
    fs::create_dir(site.at("dir")).unwrap();
    for name in ["below", "dir"] {
        let path = site.at(name);
        let set = || {
            let acl = fsnap_conformance::samples::acl(77);
            rustix::fs::setxattr(&path, "system.posix_acl_access", &acl, XattrFlags::empty()).unwrap();
        };
        let is_left = |set: &dyn Fn()| {
            fs::set_permissions(&path, PermissionsExt::from_mode(0o2755)).unwrap();
            set();
            mode(&path) & 0o2000 != 0
        };
        for (group, left) in [(0, true), (GROUP, false)] {
            std::os::unix::fs::chown(&path, Some(STRANGER), Some(group)).unwrap();
            assert_eq!(is_left(&|| as_somebody_else(set)), left, "{name}: {group}");
        }
        assert!(is_left(&|| as_member_of(&[Gid::from_raw(7), Gid::from_raw(GROUP)], set)), "{name}");
        assert!(is_left(&set), "{name}");
    }
    site.end();
}

/// `cap_net_raw+ep`, as the kernel stores it.
pub(crate) const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn names_of_trusted_attributes_are_for_the_superuser() {
    let site = Site::new(|lower| {
        fs::write(lower.join("file"), "").unwrap();
        for name in ["trusted.one", "user.two"] {
            rustix::fs::setxattr(lower.join("file"), name, b"value", XattrFlags::empty()).unwrap();
        }
    });
    let file = File::options().write(true).open(site.at("file")).unwrap();
    let names = || {
        let mut list = [0; 256];
        let length = rustix::fs::flistxattr(&file, &mut list).unwrap();
        String::from_utf8(list[..length].to_vec()).unwrap()
    };
    assert!(names().contains("trusted.one\0") && names().contains("user.two\0"));
    assert_eq!(as_somebody_else(names), "user.two\0");
    drop(file);
    site.end();
}

fn a_file_that_was_opened_to_append_can_be_written_elsewhere() {
    let site = Site::new(|lower| fs::write(lower.join("below"), "0123456789").unwrap());
    for name in ["below", "made"] {
        let mut file = File::options().append(true).create(true).open(site.at(name)).unwrap();
        file.write_all(b"end").unwrap();
        rustix::fs::fcntl_setfl(&file, OFlags::empty()).unwrap();
        file.write_all_at(b"new", 0).unwrap();
        rustix::fs::fcntl_setfl(&file, OFlags::APPEND).unwrap();
        file.write_all(b"END").unwrap();
    }
    assert_eq!(fs::read_to_string(site.at("below")).unwrap(), "new3456789endEND");
    assert_eq!(fs::read_to_string(site.at("made")).unwrap(), "newEND");
    append_beside_who_passes(&site.at("passed"));
    site.end();
}

/// Whatever is done to a file that the kernel passes through for somebody else, it is as on a plain directory; mappings are all of one file.
fn append_beside_who_passes(path: &Path) {
    let open = |append| File::options().read(true).append(append).write(true).open(path).unwrap();
    fs::write(path, "0123456789").unwrap();
    let passing = open(false);
    let mut appending = open(true);
    let mappings = [Mapping::new(&passing).unwrap(), Mapping::new(&appending).unwrap()];
    appending.write_all(b"end").unwrap();
    rustix::fs::fcntl_setfl(&appending, OFlags::empty()).unwrap();
    appending.write_all_at(b"new", 0).unwrap();
    passing.write_all_at(b"past", 4).unwrap();
    assert_eq!(mappings.each_ref().map(|mapping| [mapping.load(0), mapping.load(4)]), [*b"np"; 2]);
    mappings[1].store(9, b'm');
    rustix::fs::fcntl_setfl(&appending, OFlags::APPEND).unwrap();
    appending.write_all(b"END").unwrap();
    let mut read = [0; 16];
    for file in [&passing, &appending] {
        file.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(&read, b"new3past8mendEND");
        assert_eq!(file.metadata().unwrap().len(), 16);
    }
}

/// The kernel keeps one list of a directory. When somebody else had it renewed, whoever was in the middle of the old one went on in the new one.
fn who_lists_while_names_go_is_told_all_others() {
    let site = Site::new(|_| {});
    // Those that are gone come from the kernel's list, or from us.
    list_while_names_go(&site, &site.at("listed"), true);
    list_while_names_go(&site, &site.at("unlisted"), false);
    site.end();
}

fn list_while_names_go(site: &Site, dir: &Path, listed: bool) {
    const NAMES: usize = 1000;
    fs::create_dir(dir).unwrap();
    for number in 0..NAMES {
        File::create(dir.join(format!("name {number}"))).unwrap();
    }
    let list = || fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    if listed {
        // Now the kernel has it.
        assert_eq!(list().len(), NAMES);
    }
    let open = File::open(dir).unwrap();
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let mut reader = RawDir::new(&open, &mut buffer);
    let mut numbers = BTreeMap::new();
    for number in 0..NAMES {
        let name = format!("name {number}");
        numbers.insert(name.clone(), fs::metadata(dir.join(name)).unwrap().ino());
    }
    let mut next = || {
        loop {
            let entry = reader.next()?.unwrap();
            let name = entry.file_name().to_str().unwrap().to_owned();
            if name != "." && name != ".." {
                assert_eq!((entry.ino(), entry.file_type()), (numbers[&name], FileType::RegularFile), "{name}");
                return Some(name);
            }
        }
    };
    let mut told: Vec<String> = (0..NAMES / 5).map(|_| next().unwrap()).collect();
    // Of those that were told, and of those that come yet.
    let untold = numbers.keys().filter(|name| !told.contains(name)).take(NAMES / 10);
    let gone: Vec<&String> = told[..NAMES / 10].iter().chain(untold).collect();
    for (at, name) in gone.iter().enumerate() {
        match at % 2 {
            0 => fs::remove_file(dir.join(name)).unwrap(),
            _ => fs::rename(dir.join(name), site.at(&format!("{name} {listed}"))).unwrap(),
        }
    }
    let left = NAMES - gone.len();
    assert_eq!(list().len(), left);
    told.extend(std::iter::from_fn(&mut next));
    assert_eq!(told.len(), NAMES);
    told.sort();
    told.dedup();
    assert_eq!(told.len(), NAMES);
    // Whoever comes meanwhile, and afterwards, is told what there is.
    File::create(dir.join("new")).unwrap();
    assert_eq!(list().len(), left + 1);
    drop(open);
    for _ in 0..2 {
        assert_eq!(list().len(), left + 1);
    }
}
