//! A branch of a branch of a branch: what is asked of one level is asked of the next one below, and never twice.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs;
use std::sync::Arc;

use fsnap_backend::{Dir, beneath};
use rustix::fs::XattrFlags;

use super::node::{Ino, ROOT};
use super::{Below, Caller, Overlay};

thread_local! {
    /// How often a layer was asked for a name, or for the attributes of a file.
    pub(super) static LOOKS: Cell<usize> = const { Cell::new(0) };
    /// How many names layers have given.
    pub(super) static NAMES: Cell<usize> = const { Cell::new(0) };
}

const BY: Caller = Caller { uid: 0, gid: 0 };

/// Branches of each other's checkpoints.
struct Chain {
    base: tempfile::TempDir,
    top: Option<Arc<dyn Dir>>,
    levels: usize,
}

impl Chain {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        for dir in ["changed", "still"] {
            fs::create_dir_all(base.path().join("lower").join(dir)).unwrap();
            fs::write(base.path().join("lower").join(dir).join("file"), "of the lower").unwrap();
        }
        Self { base, top: None, levels: 0 }
    }

    fn below(&self) -> Below {
        match &self.top {
            Some(top) => Below::Tree(top.clone()),
            None => Below::Dir(beneath::open_root(&self.base.path().join("lower")).unwrap()),
        }
    }

    fn open(&self) -> Overlay {
        Overlay::open_at_once(self.below(), &self.base.path().join(format!("store-{}", self.levels))).unwrap()
    }

    /// Adds levels, each with `files` more in the directory that all of them change.
    fn grow(&mut self, levels: usize, files: usize) {
        for _ in 0..levels {
            let branch = self.open();
            let changed = branch.look_up(ROOT, OsStr::new("changed")).unwrap().ino;
            for file in 0..files {
                create(&branch, changed, &format!("{file} of {}", self.levels));
            }
            branch.seal("image", || ((), Vec::new())).unwrap();
            drop(branch);
            let store = self.base.path().join(format!("store-{}", self.levels));
            self.top = Some(Overlay::sealed(self.below(), &store, 0).unwrap());
            self.levels += 1;
        }
    }

    /// The same with nothing known of it.
    fn reopen(&mut self) {
        self.top = None;
        for level in 0..self.levels {
            let store = self.base.path().join(format!("store-{level}"));
            self.top = Some(Overlay::sealed(self.below(), &store, 0).unwrap());
        }
    }

    fn top(&self) -> &dyn Dir {
        self.top.as_deref().unwrap()
    }
}

fn create(branch: &Overlay, dir: Ino, name: &str) {
    let (attr, _) = branch.create(dir, OsStr::new(name), 0o644, 0, BY).unwrap();
    branch.close_file(attr.ino);
}

/// How many looks and names that takes.
fn cost(act: impl FnOnce()) -> (usize, usize) {
    LOOKS.set(0);
    NAMES.set(0);
    act();
    (LOOKS.get(), NAMES.get())
}

#[test]
fn a_first_look_goes_down_once() {
    const LEVELS: usize = 24;
    let mut chain = Chain::new();
    chain.grow(LEVELS, 1);
    let open = |chain: &Chain, dir: &str| Arc::<dyn Dir>::from(chain.top().open_dir(OsStr::new(dir)).unwrap());
    type Asked<'a> = &'a dyn Fn(&Chain);
    let asked: [(&str, Asked<'_>); 5] = [
        ("to open a directory that all have changed", &|chain| {
            assert_eq!(open(chain, "changed").meta().unwrap().nlink, 1)
        }),
        ("to open one that none has", &|chain| assert_eq!(open(chain, "still").meta().unwrap().nlink, 1)),
        ("to find a file", &|chain| {
            assert!(open(chain, "changed").entry(OsStr::new("file")).unwrap().is_some());
        }),
        ("to read one", &|chain| {
            let mut read = [0; 20];
            let length = open(chain, "still").open_file(OsStr::new("file")).unwrap().read_at(&mut read, 0).unwrap();
            assert_eq!(&read[..length], b"of the lower");
        }),
        ("to read no attributes", &|chain| {
            assert_eq!(open(chain, "still").xattrs(OsStr::new("file")).unwrap(), []);
        }),
    ];
    for (what, ask) in asked {
        chain.reopen();
        let (looks, _) = cost(|| ask(&chain));
        assert!((LEVELS - 1..=4 * LEVELS).contains(&looks), "{what}: {looks}");
    }
}

/// Each level asked for the names of attributes, and then for each value: of two attributes 3ⁿ times.
#[test]
fn attributes_are_read_once_at_each_level() {
    const LEVELS: usize = 7;
    let mut chain = Chain::new();
    let branch = chain.open();
    let still = branch.look_up(ROOT, OsStr::new("still")).unwrap().ino;
    let file = branch.look_up(still, OsStr::new("file")).unwrap().ino;
    let own = [("user.a", b"one"), ("user.b", b"two")];
    for ino in [still, file] {
        for (name, value) in own {
            branch.set_xattr(ino, OsStr::new(name), value, 0).unwrap();
        }
    }
    drop(branch);
    chain.grow(LEVELS, 1);
    let expected = own.map(|(name, value)| (name.into(), value.to_vec()));
    let (looks, _) = cost(|| {
        let dir = chain.top().open_dir(OsStr::new("still")).unwrap();
        assert_eq!(dir.own_xattrs().unwrap(), expected);
        assert_eq!(dir.xattrs(OsStr::new("file")).unwrap(), expected);
    });
    assert!(looks <= 5 * LEVELS, "{looks}");
    // A copy-up takes them along.
    let branch = chain.open();
    let still = branch.look_up(ROOT, OsStr::new("still")).unwrap().ino;
    create(&branch, still, "new");
    for (name, value) in own {
        assert_eq!(branch.xattr(still, OsStr::new(name)).unwrap(), value);
    }
}

#[test]
fn a_list_takes_each_name_once() {
    const LEVELS: usize = 20;
    const FILES: usize = 5;
    let mut chain = Chain::new();
    chain.grow(LEVELS, FILES);
    let branch = chain.open();
    let changed = branch.look_up(ROOT, OsStr::new("changed")).unwrap().ino;
    // Those of the lowest level are hidden.
    for file in 0..FILES {
        branch.unlink(changed, OsStr::new(&format!("{file} of 0"))).unwrap();
    }
    let (looks, names) = cost(|| {
        assert_eq!(branch.list(changed).unwrap().len(), (LEVELS - 1) * FILES + 1);
    });
    assert_eq!(names, LEVELS * FILES + 1 + FILES);
    assert!(looks <= 4 * LEVELS, "{looks}");
}

/// Without optimizations, a hundred levels are more than fit on the stack of a thread.
#[test]
fn a_chain_of_hundreds_is_read_and_let_go() {
    const LEVELS: usize = 200;
    let mut chain = Chain::new();
    rustix::fs::setxattr(chain.base.path().join("lower/still"), "user.a", b"one", XattrFlags::empty()).unwrap();
    chain.grow(LEVELS, 1);
    chain.reopen();
    // A thread as those that serve.
    let ask = move || {
        let changed = chain.top().open_dir(OsStr::new("changed")).unwrap();
        assert_eq!(changed.entries().unwrap().len(), LEVELS + 1);
        let still = chain.top().open_dir(OsStr::new("still")).unwrap();
        assert_eq!(still.own_xattrs().unwrap(), [("user.a".into(), b"one".to_vec())]);
        let mut read = [0; 20];
        let length = still.open_file(OsStr::new("file")).unwrap().read_at(&mut read, 0).unwrap();
        assert_eq!(&read[..length], b"of the lower");
        let branch = chain.open();
        let still = branch.look_up(ROOT, OsStr::new("still")).unwrap().ino;
        create(&branch, still, "new");
        assert_eq!(branch.list(still).unwrap().len(), 2);
        drop((branch, chain));
    };
    std::thread::Builder::new().stack_size(2 << 20).spawn(ask).unwrap().join().unwrap();
}
