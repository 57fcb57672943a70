//! Random histories, done to a mounted tree and to a plain directory with the same content.
//!
//! Every answer must be the same, and after every operation everything that users can see.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fsnap::stores::layers;
use fsnap_backend::beneath;
use proptest::prelude::*;

use crate::Case;
use crate::operations::{self, Operation, fill, operation};
use crate::site::Site;
use crate::tree;

pub(crate) const CASES: &[Case] = &[("histories", || operations::run(HISTORIES, step(), history))];

const HISTORIES: u32 = 48;

#[derive(Debug, Clone)]
enum Step {
    Change(Operation),
    Remount,
    /// Of the tree alone: whoever works on it sees nothing of it.
    Seal,
    /// The image of one of the states is deleted, and layers are merged.
    Release(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        40 => operation().prop_map(Step::Change),
        1 => Just(Step::Remount),
        3 => Just(Step::Seal),
        2 => any::<usize>().prop_map(Step::Release),
    ]
}

fn history(steps: &[Step]) {
    let site = Site::new(fill);
    let plain = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::set_permissions(plain.path(), fs::metadata(site.lower()).unwrap().permissions()).unwrap();
    fill(plain.path());
    let (plain, dir): (&Path, PathBuf) = (plain.path(), site.dir());
    let (mut sealed, mut seals) = (BTreeMap::new(), 0_u64);
    for step in steps {
        match step {
            Step::Change(operation) => assert_eq!(operation.apply(plain), operation.apply(&dir), "{operation:?}"),
            Step::Remount => remount(&site),
            Step::Seal => {
                let image = format!("test.{seals}");
                let number = site.live();
                sealed.insert(number, (image.clone(), tree::of(&dir)));
                site.seal(&image);
                seals += 1;
            }
            Step::Release(which) => {
                if let Some(&number) = sealed.keys().nth(which % sealed.len().max(1)) {
                    site.release(&sealed.remove(&number).unwrap().0);
                }
            }
        }
        tree::assert_equal(&tree::of(plain), &tree::of(&dir), &format!("{step:?}"));
    }
    remount(&site);
    tree::assert_equal(&tree::of(plain), &tree::of(&dir), "mounted again");
    // Every state that was sealed is as it was then, for whoever reads it without the server.
    for (&number, (_, then)) in &sealed {
        let lower = layers::Below::Dir(beneath::open_root(&site.lower()).unwrap());
        let state = layers::Overlay::sealed(lower, &site.store(), number).unwrap();
        tree::assert_equal(then, &tree::of_dir(state.as_ref()), &format!("sealed state {number}"));
    }
    site.end();
}

fn remount(site: &Site) {
    let before = tree::numbers(&site.dir());
    site.remount();
    assert_eq!(before, tree::numbers(&site.dir()), "the inode numbers have changed");
}
