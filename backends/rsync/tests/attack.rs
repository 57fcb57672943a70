//! A hostile process exchanges a directory for a symbolic link while fsnap is at work below it.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::Place;
use fsnap_backend::{Backend, Dir, FileKind};
use rustix::fs::RenameFlags;

/// Does `work` while `dir/real` and `dir/link` change places all the time; returns how often they did.
fn exchanging(dir: &Path, work: impl FnOnce()) -> usize {
    /// Stops the attacker also when the work panics.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let dir = File::open(dir).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Where one of the two is not there (yet, or any more), there is nothing to exchange.
                if rustix::fs::renameat_with(&dir, "real", &dir, "link", RenameFlags::EXCHANGE).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let _stop = Stop(&stop);
        work();
    });
    count.into_inner()
}

/// A directory that is none of fsnap's business, with the same names as the one in the volume.
struct Outside {
    temp: tempfile::TempDir,
    before: Vec<(String, u32, i64, i64)>,
}

const FILES: usize = 40;

impl Outside {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        fill(temp.path(), "outside");
        let mut outside = Self { temp, before: Vec::new() };
        outside.before = outside.state();
        outside
    }

    /// Names, modes, and when anything about them changed.
    fn state(&self) -> Vec<(String, u32, i64, i64)> {
        let mut found = Vec::new();
        let mut waiting = vec![self.temp.path().to_owned()];
        while let Some(path) = waiting.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            found.push((path.display().to_string(), meta.mode(), meta.ctime(), meta.ctime_nsec()));
            if meta.is_dir() {
                waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        }
        found.sort();
        found
    }

    fn is_untouched(&self) {
        assert_eq!(self.state(), self.before);
    }
}

fn fill(dir: &Path, content: &str) {
    fs::create_dir_all(dir.join("below")).unwrap();
    for number in 0..FILES {
        fs::write(dir.join(number.to_string()), content).unwrap();
        fs::write(dir.join("below").join(number.to_string()), content).unwrap();
    }
    fs::set_permissions(dir.join("below"), fs::Permissions::from_mode(0o711)).unwrap();
}

/// Volume with a directory `real` and a symbolic link `link` to the outside.
fn attacked(outside: &Outside) -> Place {
    let place = Place::new();
    fill(&place.path("real"), "inside");
    symlink(outside.temp.path(), place.path("link")).unwrap();
    place
}

/// How many files a tree holds; each must be the volume's own.
fn count_inside(tree: &dyn Dir) -> usize {
    let of = |entry: fsnap_backend::Entry| match entry.meta.kind {
        FileKind::Dir => count_inside(&*tree.open_dir(&entry.name).unwrap()),
        FileKind::File => {
            assert_eq!(common::read(tree, entry.name.to_str().unwrap()), b"inside");
            1
        }
        _ => 0,
    };
    tree.entries().unwrap().into_iter().map(of).sum()
}

#[test]
fn nothing_outside_is_read_into_a_snapshot() {
    let outside = Outside::new();
    let place = attacked(&outside);
    let mut taken = Vec::new();
    let exchanges = exchanging(&place.dir, || {
        for round in 0..25 {
            // Something changes, so that both directories are looked at anew.
            place.write(format!("other/{}", round % 5), "inside");
            let (volume, at) = (place.volume(), place.reserve());
            let done = place.store.prime(&volume, &at).and_then(|()| place.store.snapshot(&volume, &at));
            match done.and_then(|_| place.store.settle(&at)) {
                Ok(snapshot) => taken.push(snapshot),
                // What moves under it may be refused; then nothing stays.
                Err(_) => place.store.delete(&at).unwrap(),
            }
        }
    });
    assert!(exchanges > 100, "{exchanges} exchanges");
    assert!(!taken.is_empty(), "every snapshot was refused");
    let counts: Vec<_> = taken.iter().map(|snapshot| count_inside(&*place.tree(snapshot))).collect();
    assert!(counts.iter().any(|&count| count > 2 * FILES), "nobody met the directory: {counts:?}");
    outside.is_untouched();
}

#[test]
fn nothing_outside_is_written_by_a_clone() {
    let outside = Outside::new();
    let place = attacked(&outside);
    let snapshot = place.take();
    let mut exchanges = 0;
    for _ in 0..25 {
        let at = place.store.reserve(fsnap_backend::Source::Snapshot(&snapshot), &Default::default()).unwrap();
        let volumes = place.store_dir().join("volumes");
        let (part, whole) = (volumes.join(format!("{at}.part")), volumes.join(at.as_str()));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(dir) = File::open(&part).or_else(|_| File::open(&whole)) else { continue };
                    let exchanged = rustix::fs::renameat_with(&dir, "real", &dir, "link", RenameFlags::EXCHANGE);
                    exchanges += usize::from(exchanged.is_ok());
                }
            });
            // It may fail: what it cannot reach any more is not restored.
            let cloned = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let _ = place.store.clone_snapshot(&snapshot, &at);
                let _ = place.store.delete(&at);
            }));
            stop.store(true, Ordering::Relaxed);
            cloned.unwrap();
        });
        place.store.delete(&at).unwrap();
        outside.is_untouched();
    }
    assert!(exchanges > 20, "{exchanges} exchanges");
    assert_eq!(place.files_in("volumes"), Vec::<std::path::PathBuf>::new());
    assert!(place.tree(&snapshot).entry(OsStr::new("real")).unwrap().is_some());
}
