//! What is left of set-id bits when a file is written, by whom and in which way: as on a plain directory.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, XattrFlags};
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Case;
use crate::site::Site;
use crate::sys::Mapping;

pub(crate) const CASES: &[Case] = &[
    ("they_go_as_on_a_plain_directory", they_go_as_on_a_plain_directory),
    ("they_are_no_stranger_s_to_take", they_are_no_stranger_s_to_take),
];

/// The file's own.
const OWNER: u32 = 12_345;
const GROUP: u32 = 4_242;
/// Neither of them.
const OTHER: u32 = 23_456;

/// Everybody may write, and the bits are those of a program, of a file of its group's alone, and of one for mandatory locks.
const MODES: [u32; 6] = [0o2777, 0o6777, 0o2666, 0o6666, 0o2766, 0o4777];

/// Who writes: user, group, and groups besides; without, the superuser. With the capability that keeps the bits or not.
type Who = (&'static str, Option<(u32, u32, &'static [u32])>, bool);

const WRITERS: &[Who] = &[
    ("root", None, true),
    ("root without CAP_FSETID", None, false),
    ("owner in the group", Some((OWNER, GROUP, &[])), false),
    ("owner in another group", Some((OWNER, OTHER, &[])), false),
    ("member", Some((OTHER, OTHER, &[7, GROUP])), false),
    ("member by the first group", Some((OTHER, GROUP, &[7])), false),
    ("outsider", Some((OTHER, OTHER, &[7])), false),
    ("outsider with CAP_FSETID", Some((OTHER, OTHER, &[7])), true),
];

/// A way to write to a file that is open, or by its path.
type Way = (&'static str, fn(&File, &Path) -> std::io::Result<()>);

const WAYS: &[Way] = &[
    ("write", |to, _| to.write_all_at(b"x", 1)),
    ("truncate", |_, path| Ok(nix::unistd::truncate(path, 50)?)),
    ("ftruncate", |to, _| to.set_len(100)),
    ("open to truncate", |_, path| File::options().write(true).truncate(true).open(path).map(drop)),
    ("fallocate", |to, _| Ok(rustix::fs::fallocate(to, FallocateFlags::empty(), 0, 9)?)),
    ("punch a hole", |to, _| {
        Ok(rustix::fs::fallocate(to, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 9)?)
    }),
    ("copy_file_range", |to, path| {
        let from = File::open(path.with_file_name("from"))?;
        Ok(rustix::fs::copy_file_range(&from, Some(&mut 0), to, Some(&mut 50), 5).map(drop)?)
    }),
    ("a shared mapping", |_, path| {
        let mapping = Mapping::new(&File::options().read(true).write(true).open(path)?)?;
        mapping.store(0, b'm');
        Ok(())
    }),
    ("chown to nobody else", |_, path| std::os::unix::fs::chown(path, None, None)),
    ("chgrp", |_, path| std::os::unix::fs::chown(path, None, Some(7))),
];

/// What `work` returns, done by somebody.
fn done_by<T: Send>(&(_, who, keeps): &Who, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut kept = rustix::thread::capabilities(None).unwrap();
            if let Some((user, group, groups)) = who {
                let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
                let groups: Vec<_> = groups.iter().map(|&group| Gid::from_raw(group)).collect();
                rustix::thread::set_keep_capabilities(true).unwrap();
                rustix::thread::set_thread_groups(&groups).unwrap();
                rustix::thread::set_thread_res_gid(group, group, group).unwrap();
                rustix::thread::set_thread_res_uid(user, user, user).unwrap();
                kept = CapabilitySets { effective: CapabilitySet::FSETID, permitted: CapabilitySet::FSETID, ..kept };
            }
            if !keeps {
                kept.effective -= CapabilitySet::FSETID;
            }
            rustix::thread::set_capabilities(None, kept).unwrap();
            work()
        });
        worker.join().unwrap()
    })
}

/// What is left of the bits, and of a capability.
fn left(dir: &Path, name: &str, mode: u32, capable: bool, writer: &Who, write: Way) -> String {
    let path = dir.join(name);
    fs::write(&path, vec![b'b'; 100]).unwrap();
    std::os::unix::fs::chown(&path, Some(OWNER), Some(GROUP)).unwrap();
    let to = File::options().write(true).open(&path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    if capable {
        rustix::fs::setxattr(&path, "security.capability", crate::writers::CAPABILITY, XattrFlags::empty()).unwrap();
    }
    let answer = done_by(writer, || write.1(&to, &path)).map_err(|error| error.kind());
    let left = rustix::fs::getxattr(&path, "security.capability", &mut [0; 64]).is_ok();
    format!("{answer:?} {:o} {left}", fs::metadata(&path).unwrap().permissions().mode())
}

/// Where the kernel does not say enough, or takes a capability off by itself.
fn cannot_be_told(way: &str, &(_, who, keeps): &Who, capable: bool) -> bool {
    match way {
        // What the kernel writes back later is written by the server, and takes the capability off below.
        "a shared mapping" => capable,
        // As long as the file is open, it may be a write.
        "chown to nobody else" => who.is_some_and(|(user, ..)| user != OWNER),
        // The capability goes at a write by anybody. For the kernel's request that is the same as to call `chown`, and who calls that loses the bits.
        "write" | "fallocate" | "punch a hole" | "copy_file_range" => capable && keeps && who.is_none(),
        _ => false,
    }
}

fn they_go_as_on_a_plain_directory() {
    let site = Site::new(|lower| fs::write(lower.join("below"), vec![b'b'; 100]).unwrap());
    let plain = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for dir in [plain.path(), &site.dir()] {
        fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
        fs::write(dir.join("from"), vec![b'f'; 100]).unwrap();
    }
    let mut others = Vec::new();
    for (&way, writer) in WAYS.iter().flat_map(|way| WRITERS.iter().map(move |writer| (way, writer))) {
        for (mode, capable) in MODES.iter().flat_map(|&mode| [(mode, false), (mode, true)]) {
            for name in ["below", "made"] {
                let [right, here] = [plain.path(), &site.dir()].map(|dir| left(dir, name, mode, capable, writer, way));
                if right != here && !cannot_be_told(way.0, writer, capable) {
                    others.push(format!("{name} {mode:o} {capable} {} by {}: {right}, here {here}", way.0, writer.0));
                }
            }
        }
    }
    assert!(others.is_empty(), "{} differ:\n{}", others.len(), others.join("\n"));
    site.end();
}

/// The kernel lets anybody ask for them to be taken off, in a call that changes nothing else.
fn they_are_no_stranger_s_to_take() {
    let files = MODES.map(|mode| (format!("{mode:o}"), mode));
    let fill = |dir: &Path| {
        fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
        for (name, mode) in &files {
            fs::write(dir.join(name), "").unwrap();
            std::os::unix::fs::chown(dir.join(name), Some(OWNER), Some(GROUP)).unwrap();
            fs::set_permissions(dir.join(name), PermissionsExt::from_mode(*mode)).unwrap();
        }
    };
    let site = Site::new(fill);
    let plain = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fill(plain.path());
    let strangers = WRITERS.iter().filter(|(_, who, _)| who.is_some_and(|(user, ..)| user != OWNER));
    for (stranger, (name, mode)) in strangers.flat_map(|stranger| files.iter().map(move |file| (stranger, file))) {
        let [right, here] = [plain.path(), &site.dir()].map(|dir| {
            let path = dir.join(name);
            let answer = done_by(stranger, || std::os::unix::fs::chown(&path, None, None));
            (answer.map_err(|error| error.kind()), fs::metadata(&path).unwrap().permissions().mode() & 0o7777)
        });
        assert_eq!(right, here, "{name}: {}", stranger.0);
        assert_eq!(here.1, *mode, "{name}: {}", stranger.0);
    }
    // Somebody reads it, so that it may be passed through.
    let open = fs::File::open(site.at(&files[1].0)).unwrap();
    let outsider = &WRITERS[6];
    let _ = done_by(outsider, || std::os::unix::fs::chown(site.at(&files[1].0), None, None));
    assert_eq!(open.metadata().unwrap().permissions().mode() & 0o7777, files[1].1);
    drop(open);
    site.end();
}
