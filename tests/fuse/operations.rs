//! Random changes of a tree, and what they answer: the same ones are made to a mounted tree and to a plain directory.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRng, TestRunner};
use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

/// Few paths, so that operations meet.
pub(crate) const PATHS: &[&str] =
    &["a", "b", "big", "d", "d/a", "d/b", "d/e", "d/e/a", "d/e/b", "e", "e/a", "e/d", "e/d/a", "l", "new"];

/// One change of the tree.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    Create(usize),
    Write(usize, u32, u16, u8),
    Append(usize, u8),
    Truncate(usize, u32),
    Punch(usize, u32, u32),
    MakeDir(usize),
    RemoveDir(usize),
    Unlink(usize),
    Rename(usize, usize),
    RenameNew(usize, usize),
    Exchange(usize, usize),
    Link(usize, usize),
    Symlink(usize),
    Node(usize),
    Chmod(usize, u16),
    Chown(usize, u8),
    SetXattr(usize, u8),
    RemoveXattr(usize),
    Copy(usize, usize),
}

/// Any change.
pub(crate) fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let path = || 0..PATHS.len();
    let offset = || 0..300_000_u32;
    prop_oneof![
        2 => path().prop_map(Create),
        4 => (path(), offset(), 1..9000_u16, any::<u8>()).prop_map(|(p, o, l, b)| Write(p, o, l, b)),
        // The large file, which is in the upper by parts only.
        2 => (offset(), 1..9000_u16, any::<u8>()).prop_map(|(o, l, b)| Write(2, o, l, b)),
        1 => (path(), any::<u8>()).prop_map(|(p, b)| Append(p, b)),
        2 => (path(), offset()).prop_map(|(p, s)| Truncate(p, s)),
        1 => offset().prop_map(|s| Truncate(2, s)),
        1 => (offset(), 1..60_000_u32).prop_map(|(o, l)| Punch(2, o, l)),
        2 => path().prop_map(MakeDir),
        2 => path().prop_map(RemoveDir),
        3 => path().prop_map(Unlink),
        6 => (path(), path()).prop_map(|(p, q)| Rename(p, q)),
        1 => (path(), path()).prop_map(|(p, q)| RenameNew(p, q)),
        3 => (path(), path()).prop_map(|(p, q)| Exchange(p, q)),
        3 => (path(), path()).prop_map(|(p, q)| Link(p, q)),
        1 => path().prop_map(Symlink),
        1 => path().prop_map(Node),
        1 => (path(), 0..0o7777_u16).prop_map(|(p, m)| Chmod(p, m)),
        1 => (path(), any::<u8>()).prop_map(|(p, u)| Chown(p, u)),
        1 => (path(), any::<u8>()).prop_map(|(p, v)| SetXattr(p, v)),
        1 => path().prop_map(RemoveXattr),
        1 => (path(), path()).prop_map(|(p, q)| Copy(p, q)),
    ]
}

pub(crate) fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap()
}

/// Opens a file, and never waits for anybody.
pub(crate) fn open(path: &Path, flags: OFlags) -> Result<fs::File, Errno> {
    rustix::fs::open(path, flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::from(0o644))
        .map(Into::into)
}

impl Operation {
    /// Makes the change below `root`.
    pub(crate) fn apply(&self, root: &Path) -> Result<(), Errno> {
        use Operation::*;
        let at = |path: usize| root.join(PATHS[path]);
        let rename = |from: usize, to: usize, flags| rustix::fs::renameat_with(CWD, at(from), CWD, at(to), flags);
        match *self {
            Create(p) => open(&at(p), OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL).map(drop),
            Write(p, offset, length, byte) => {
                let file = open(&at(p), OFlags::WRONLY)?;
                file.write_all_at(&vec![byte; length.into()], offset.into()).map_err(errno)
            }
            Append(p, byte) => {
                let file = open(&at(p), OFlags::WRONLY | OFlags::APPEND)?;
                rustix::io::write(&file, &[byte; 100]).map(drop)
            }
            Truncate(p, size) => open(&at(p), OFlags::WRONLY)?.set_len(size.into()).map_err(errno),
            Punch(p, offset, length) => {
                let file = open(&at(p), OFlags::RDWR)?;
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, flags, offset.into(), length.into())
            }
            MakeDir(p) => fs::create_dir(at(p)).map_err(errno),
            RemoveDir(p) => fs::remove_dir(at(p)).map_err(errno),
            Unlink(p) => fs::remove_file(at(p)).map_err(errno),
            Rename(p, q) => rename(p, q, RenameFlags::empty()),
            RenameNew(p, q) => rename(p, q, RenameFlags::NOREPLACE),
            Exchange(p, q) => rename(p, q, RenameFlags::EXCHANGE),
            Link(p, q) => rustix::fs::linkat(CWD, at(p), CWD, at(q), rustix::fs::AtFlags::empty()),
            Symlink(p) => std::os::unix::fs::symlink("to nowhere", at(p)).map_err(errno),
            Node(p) => {
                let kind = if p % 2 == 0 { rustix::fs::FileType::Fifo } else { rustix::fs::FileType::CharacterDevice };
                rustix::fs::mknodat(CWD, at(p), kind, Mode::from(0o600), 0)
            }
            Chmod(p, mode) => {
                if fs::symlink_metadata(at(p)).map_err(errno)?.is_symlink() {
                    return Ok(());
                }
                fs::set_permissions(at(p), PermissionsExt::from_mode(mode.into())).map_err(errno)
            }
            Chown(p, user) => std::os::unix::fs::lchown(at(p), Some(user.into()), Some(7)).map_err(errno),
            SetXattr(p, value) => {
                let value = vec![value; usize::from(value) + 1];
                rustix::fs::lsetxattr(at(p), "trusted.overlay.opaque", &value, XattrFlags::empty())
            }
            RemoveXattr(p) => rustix::fs::lremovexattr(at(p), "user.first"),
            Copy(p, q) => {
                let (from, to) = (open(&at(p), OFlags::RDONLY)?, open(&at(q), OFlags::RDWR)?);
                let (mut at, mut target) = (5000, 70_000);
                // How much is copied at once is for the file system to say.
                while rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut target), 60_000)? != 0 {
                    if at > 60_000 {
                        break;
                    }
                }
                Ok(())
            }
        }
    }
}

/// What a tree begins with.
pub(crate) fn fill(root: &Path) {
    for dir in ["d", "d/e", "e"] {
        fs::create_dir(root.join(dir)).unwrap();
    }
    for (name, content) in [("a", "first"), ("d/a", "second"), ("d/b", "third"), ("d/e/a", "fourth"), ("e/a", "")] {
        fs::write(root.join(name), content).unwrap();
    }
    let big: Vec<u8> = (0..200_000_u32).map(|at| (at / 7) as u8).collect();
    fs::write(root.join("big"), big).unwrap();
    fs::hard_link(root.join("a"), root.join("b")).unwrap();
    fs::hard_link(root.join("a"), root.join("d/e/b")).unwrap();
    std::os::unix::fs::symlink("a", root.join("l")).unwrap();
    rustix::fs::setxattr(root.join("a"), "user.first", b"of a", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(root.join("d"), "user.first", b"of d", XattrFlags::empty()).unwrap();
}

/// Runs random histories, the same at each run, and panics with the shortest one that fails.
///
/// `PROPTEST_CASES` has more of them, `FSNAP_TEST_SEED` others.
pub(crate) fn run<S: std::fmt::Debug + Clone + 'static>(
    histories: u32,
    step: impl Strategy<Value = S>,
    history: impl Fn(&[S]),
) {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(histories);
    let config = Config { cases, max_shrink_iters: 300, failure_persistence: None, ..Config::default() };
    let seed = std::env::var("FSNAP_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let rng = TestRng::from_seed(proptest::test_runner::RngAlgorithm::ChaCha, &[seed; 32]);
    let ended = TestRunner::new_with_rng(config, rng).run(&proptest::collection::vec(step, 1..30), |steps| {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| history(&steps)));
        done.map_err(|panic| TestCaseError::fail(panic.downcast_ref::<String>().cloned().unwrap_or_default()))
    });
    match ended {
        Ok(()) => {}
        Err(TestError::Fail(why, steps)) => panic!("{steps:#?}\n{why}"),
        Err(error) => panic!("{error}"),
    }
}
