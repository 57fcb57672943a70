//! Where two layers meet: the cases that trees of this kind have been wrong about.
//!
//! Each looks at once and after a remount.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};

use crate::Case;
use crate::site::Site;

pub(crate) const CASES: &[Case] = &[
    ("a_name_moved_over_a_whiteout_is_the_moved_file", a_name_moved_over_a_whiteout_is_the_moved_file),
    ("a_directory_made_again_is_empty", a_directory_made_again_is_empty),
    ("a_directory_of_the_lower_moves_with_its_files", a_directory_of_the_lower_moves_with_its_files),
    ("names_of_both_layers_are_exchanged", names_of_both_layers_are_exchanged),
    ("hard_links_of_the_lower_stay_one_file", hard_links_of_the_lower_stay_one_file),
    ("a_deleted_file_does_not_come_back", a_deleted_file_does_not_come_back),
    ("an_unlinked_file_lives_while_it_is_open", an_unlinked_file_lives_while_it_is_open),
    ("a_file_that_is_open_for_reading_shows_what_is_written", a_file_that_is_open_for_reading_shows_what_is_written),
    (
        "a_file_that_is_opened_while_it_changes_is_the_changed_one",
        a_file_that_is_opened_while_it_changes_is_the_changed_one,
    ),
    ("a_write_brings_up_no_more_than_its_blocks", a_write_brings_up_no_more_than_its_blocks),
    ("a_listing_goes_on_while_its_names_go", a_listing_goes_on_while_its_names_go),
    ("names_that_look_like_marks_are_files", names_that_look_like_marks_are_files),
    ("private_attributes_are_hidden", private_attributes_are_hidden),
    ("attributes_that_are_not_there_are_answered_for", attributes_that_are_not_there_are_answered_for),
];

/// Looks now, and once more after a remount; then ends.
fn twice(site: Site, look: impl Fn(&Path)) {
    look(&site.dir());
    site.remount();
    look(&site.dir());
    site.end();
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The files `f`, `g` and `d/in`, whose content is their name.
fn small(lower: &Path) {
    fs::create_dir(lower.join("d")).unwrap();
    for name in ["f", "g", "d/in"] {
        fs::write(lower.join(name), name).unwrap();
    }
}

fn a_name_moved_over_a_whiteout_is_the_moved_file() {
    let site = Site::new(small);
    fs::remove_file(site.at("f")).unwrap();
    fs::rename(site.at("g"), site.at("f")).unwrap();
    fs::remove_dir_all(site.at("d")).unwrap();
    fs::create_dir(site.at("new")).unwrap();
    fs::write(site.at("new/in"), "new").unwrap();
    fs::rename(site.at("new"), site.at("d")).unwrap();
    twice(site, |dir| {
        assert_eq!(names(dir), ["d", "f"]);
        assert_eq!(read(dir.join("f")), "g");
        assert_eq!(read(dir.join("d/in")), "new");
    });
}

fn a_directory_made_again_is_empty() {
    let site = Site::new(small);
    fs::remove_file(site.at("d/in")).unwrap();
    fs::remove_dir(site.at("d")).unwrap();
    fs::create_dir(site.at("d")).unwrap();
    twice(site, |dir| {
        assert!(names(dir.join("d")).is_empty());
        assert!(!dir.join("d/in").exists());
    });
}

fn a_directory_of_the_lower_moves_with_its_files() {
    let site = Site::new(small);
    let number = fs::metadata(site.at("d/in")).unwrap().ino();
    fs::rename(site.at("d"), site.at("e")).unwrap();
    fs::create_dir(site.at("d")).unwrap();
    fs::write(site.at("d/other"), "other").unwrap();
    twice(site, |dir| {
        assert_eq!(read(dir.join("e/in")), "d/in");
        assert_eq!(fs::metadata(dir.join("e/in")).unwrap().ino(), number);
        assert_eq!(names(dir.join("d")), ["other"]);
    });
}

fn names_of_both_layers_are_exchanged() {
    let site = Site::new(small);
    fs::write(site.at("h"), "h").unwrap();
    for (one, other) in [("f", "h"), ("g", "d")] {
        rustix::fs::renameat_with(CWD, site.at(one), CWD, site.at(other), RenameFlags::EXCHANGE).unwrap();
    }
    twice(site, |dir| {
        assert_eq!([read(dir.join("f")), read(dir.join("h")), read(dir.join("d"))], ["h", "f", "g"]);
        assert_eq!(read(dir.join("g/in")), "d/in");
    });
}

fn hard_links_of_the_lower_stay_one_file() {
    let site = Site::new(|lower| {
        small(lower);
        fs::hard_link(lower.join("f"), lower.join("d/f")).unwrap();
    });
    fs::hard_link(site.at("d/f"), site.at("third")).unwrap();
    fs::write(site.at("f"), "through one").unwrap();
    assert_eq!(read(site.at("d/f")), "through one");
    File::options().append(true).open(site.at("d/f")).unwrap().write_all(b" and another").unwrap();
    twice(site, |dir| {
        let files = ["f", "d/f", "third"].map(|name| dir.join(name));
        let metas = files.each_ref().map(|path| fs::metadata(path).unwrap());
        assert_eq!(files.map(read), ["through one and another"; 3]);
        assert!(metas.iter().all(|meta| meta.ino() == metas[0].ino() && meta.nlink() == 3));
    });
}

fn a_deleted_file_does_not_come_back() {
    let site = Site::new(small);
    fs::remove_file(site.at("f")).unwrap();
    fs::write(site.at("n"), "y").unwrap();
    fs::rename(site.at("n"), site.at("f")).unwrap();
    fs::remove_file(site.at("f")).unwrap();
    fs::rename(site.at("g"), site.at("n")).unwrap();
    fs::remove_file(site.at("n")).unwrap();
    twice(site, |dir| {
        assert_eq!(names(dir), ["d"]);
        for name in ["f", "g", "n"] {
            assert!(!dir.join(name).exists(), "{name}");
        }
    });
}

fn an_unlinked_file_lives_while_it_is_open() {
    let site = Site::new(small);
    let mut files = [site.at("f"), site.at("g")].map(|path| File::options().read(true).write(true).open(path).unwrap());
    let mut read_only = File::open(site.at("d/in")).unwrap();
    for name in ["f", "g", "d/in"] {
        fs::remove_file(site.at(name)).unwrap();
    }
    fs::write(site.at("f"), "another").unwrap();
    for file in &mut files {
        file.write_all(b"written after the end").unwrap();
        file.set_len(7).unwrap();
        file.rewind().unwrap();
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "written");
        let meta = file.metadata().unwrap();
        assert_eq!((meta.nlink(), meta.len()), (0, 7));
    }
    let mut content = String::new();
    read_only.read_to_string(&mut content).unwrap();
    assert_eq!((&*content, read_only.metadata().unwrap().nlink()), ("d/in", 0));
    drop((files, read_only));
    twice(site, |dir| {
        assert_eq!(names(dir), ["d", "f"]);
        assert_eq!(read(dir.join("f")), "another");
    });
}

fn a_file_that_is_open_for_reading_shows_what_is_written() {
    let site = Site::new(small);
    let reader = File::open(site.at("f")).unwrap();
    let mut buffer = [0; 1];
    reader.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"f");
    fs::write(site.at("f"), "changed").unwrap();
    let mut buffer = [0; 7];
    reader.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"changed");
    drop(reader);
    twice(site, |dir| assert_eq!(read(dir.join("f")), "changed"));
}

/// The kernel is given the content of a small file when it is opened: never one that is older than a change.
fn a_file_that_is_opened_while_it_changes_is_the_changed_one() {
    const FILES: usize = 400;
    let old = [b'o'; 6000];
    let site = Site::new(|lower| (0..FILES).for_each(|number| fs::write(lower.join(number.to_string()), old).unwrap()));
    let path = |dir: &Path, number: usize| dir.join(number.to_string());
    let dir = site.dir();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..FILES).for_each(|number| drop(fs::read(path(&dir, number)).unwrap())));
        }
        for number in 0..FILES {
            let path = path(&dir, number);
            match number % 4 {
                0 => nix::unistd::truncate(&path, 100).unwrap(),
                1 => nix::unistd::truncate(&path, 9000).unwrap(),
                2 => fs::write(path, [b'n'; 3000]).unwrap(),
                _ => File::options().write(true).open(path).unwrap().write_all_at(&[b'n'; 10], 4000).unwrap(),
            }
        }
    });
    twice(site, |dir| {
        for number in 0..FILES {
            let expected = match number % 4 {
                0 => old[..100].to_vec(),
                1 => [&old[..], &[0; 3000]].concat(),
                2 => vec![b'n'; 3000],
                _ => [&old[..4000], &[b'n'; 10], &old[4010..]].concat(),
            };
            assert_eq!(fs::metadata(path(dir, number)).unwrap().len(), expected.len() as u64, "{number}");
            assert!(fs::read(path(dir, number)).unwrap() == expected, "{number}");
        }
    });
}

fn a_write_brings_up_no_more_than_its_blocks() {
    const LENGTH: u64 = 64 << 20;
    let site = Site::new(|lower| {
        let mut file = File::create(lower.join("large")).unwrap();
        let block: Vec<u8> = (0..1 << 20).map(|at| (at % 251) as u8).collect();
        (0..LENGTH >> 20).for_each(|_| file.write_all(&block).unwrap());
    });
    let file = File::options().write(true).open(site.at("large")).unwrap();
    file.write_all_at(b"changed", LENGTH / 2 + 5).unwrap();
    file.sync_all().unwrap();
    let above = fs::metadata(site.store().join("upper/large")).unwrap();
    let shares = above.blocks() * 512 >= LENGTH;
    assert!(shares || above.blocks() * 512 <= 64 << 10, "{} blocks are taken", above.blocks());
    drop(file);
    twice(site, |dir| {
        let mut file = File::open(dir.join("large")).unwrap();
        assert_eq!(file.metadata().unwrap().len(), LENGTH);
        file.seek(SeekFrom::Start(LENGTH / 2)).unwrap();
        let mut around = [0; 20];
        file.read_exact(&mut around).unwrap();
        assert_eq!(&around[..5], [0, 1, 2, 3, 4]);
        assert_eq!(&around[5..12], b"changed");
        assert_eq!(&around[12..], [12, 13, 14, 15, 16, 17, 18, 19]);
    });
}

fn a_listing_goes_on_while_its_names_go() {
    const NAMES: usize = 3000;
    let site = Site::new(|lower| (0..NAMES).for_each(|n| fs::write(lower.join(format!("{n}")), "").unwrap()));
    let stays: Vec<String> = {
        let mut names: Vec<_> = (0..NAMES).step_by(3).map(|n| n.to_string()).collect();
        names.sort();
        names
    };
    let mut seen = Vec::new();
    let mut listing = rustix::fs::Dir::new(File::open(site.dir()).unwrap()).unwrap();
    let mut number = 0;
    for entry in listing.by_ref() {
        seen.push(entry.unwrap().file_name().to_str().unwrap().to_owned());
        if number % 3 != 0 && number < NAMES {
            fs::remove_file(site.at(&number.to_string())).unwrap();
        }
        number += 1;
    }
    (number..NAMES).filter(|n| n % 3 != 0).for_each(|n| fs::remove_file(site.at(&n.to_string())).unwrap());
    seen.sort();
    let every = seen.len();
    seen.dedup();
    assert_eq!(seen.len(), every, "a name was listed twice");
    assert!(stays.iter().all(|name| seen.binary_search(name).is_ok()), "a name that stays was not listed");
    // From the beginning, with the same descriptor, those that went are not there.
    listing.rewind();
    let mut again: Vec<_> = listing.map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned()).collect();
    again.retain(|name| name != "." && name != "..");
    again.sort();
    assert_eq!(again, stays);
    twice(site, |dir| assert_eq!(names(dir), stays));
}

fn names_that_look_like_marks_are_files() {
    let site = Site::new(small);
    for name in [".wh.f", ".wh..wh..opq", "upper"] {
        fs::write(site.at(name), "mine").unwrap();
    }
    let device = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(CWD, site.at("zero"), device, rustix::fs::Mode::from(0o600), 0).unwrap();
    twice(site, |dir| {
        assert_eq!(names(dir), [".wh..wh..opq", ".wh.f", "d", "f", "g", "upper", "zero"]);
        let meta = fs::symlink_metadata(dir.join("zero")).unwrap();
        assert_eq!((meta.mode(), meta.rdev()), (0o20600, 0));
    });
}

fn private_attributes_are_hidden() {
    let site = Site::new(small);
    fs::rename(site.at("d"), site.at("e")).unwrap();
    fs::write(site.at("f"), "changed").unwrap();
    twice(site, |dir| {
        for name in ["", "e", "f"] {
            let mut list = [0; 1000];
            assert_eq!(rustix::fs::listxattr(dir.join(name), &mut list), Ok(0), "{name}");
        }
        let set = rustix::fs::setxattr(dir.join("f"), "trusted.fsnap.origin", b"7", rustix::fs::XattrFlags::empty());
        assert_eq!(set, Err(rustix::io::Errno::PERM));
    });
}

/// Programs tell by the error what is not set from what cannot be, and take off access control lists that may not be there.
fn attributes_that_are_not_there_are_answered_for() {
    use rustix::fs::{getxattr, removexattr};
    use rustix::io::Errno;

    let site = Site::new(small);
    fs::write(site.at("g"), "in the upper").unwrap();
    twice(site, |dir| {
        for name in ["f", "g", "d"] {
            let path = dir.join(name);
            let absent = [
                ("user.none", Errno::NODATA),
                ("trusted.none", Errno::NODATA),
                ("security.none", Errno::NODATA),
                ("system.none", Errno::OPNOTSUPP),
                ("none.none", Errno::OPNOTSUPP),
                ("user", Errno::OPNOTSUPP),
            ];
            for (key, error) in absent {
                assert_eq!(getxattr(&path, key, &mut [0; 9]), Err(error), "{name}: {key}");
                assert_eq!(removexattr(&path, key), Err(error), "{name}: {key}");
            }
            assert_eq!(removexattr(&path, "system.posix_acl_access"), Ok(()), "{name}");
        }
    });
}
