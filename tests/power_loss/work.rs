//! What is done while the log is kept: steps that change all volumes, checkpoints, branches, removals.
//!
//! Every other checkpoint is taken by the hook, called as CRIU calls it. Such a one is promised when the next command has sealed it.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use fsnap_conformance::Listing;

use crate::disk::{Places, Standing, mark, ok};

/// How many steps there are.
pub(crate) const STEPS: u32 = 12;
/// So many checkpoints are kept: older ones are removed.
const KEPT: u32 = 2;

/// What the volumes held at each step, by the path of the volume.
pub(crate) type Record = BTreeMap<u32, Vec<Listing>>;

/// The volumes, in the order of the record.
pub(crate) fn volumes(places: &Places) -> [&Path; 4] {
    [&places.thin, &places.dir, &places.subvolume, &places.nilfs2]
}

/// Changes the files of all volumes, each time in other places.
pub(crate) fn step(places: &Places, number: u32) {
    for volume in volumes(places) {
        let at = |name: &str| volume.join(name);
        let mut log = OpenOptions::new().append(true).create(true).open(at("log")).unwrap();
        writeln!(log, "step {number}").unwrap();
        let table = OpenOptions::new().write(true).create(true).truncate(false).open(at("table")).unwrap();
        table.set_len(1 << 20).unwrap();
        for slot in 0..8u64 {
            let place = (u64::from(number) * 7919 + slot * 104_729) % 250 * 4096;
            table.write_all_at(&[number as u8 + 1; 4096], place).unwrap();
        }
        fs::write(at("new"), vec![number as u8; 30_000]).unwrap();
        fs::rename(at("new"), at("state")).unwrap();
        fs::create_dir_all(at(&format!("dir-{}", number % 3))).unwrap();
        fs::write(at(&format!("dir-{}/file-{number}", number % 3)), format!("{number}")).unwrap();
        if number >= 4 {
            fs::remove_file(at(&format!("dir-{}/file-{}", (number - 4) % 3, number - 4))).unwrap();
        }
    }
}

/// What the volumes hold.
pub(crate) fn look(places: &Places) -> Vec<Listing> {
    volumes(places).into_iter().map(|volume| Listing::of(volume).unwrap()).collect()
}

/// All steps; every promise is marked in the log.
pub(crate) fn all(standing: &Standing) -> Record {
    let places = &standing.places;
    let mut record = Record::new();
    mark("begin");
    for number in 0..STEPS {
        step(places, number);
        record.insert(number, look(places));
        let tag = tag(number);
        if number % 2 == 0 {
            ok(&mut places.fsnap(&["checkpoint", "--tag", &tag]));
        } else {
            let id = by_hook(places, number);
            ok(&mut places.fsnap(&["tag", &id, &tag]));
        }
        mark(&taken(number));
        if number % 4 == 1 {
            ok(&mut places.fsnap(&["branch", &tag, "try"]));
            ok(&mut places.fsnap(&["rm", "--branch", "try"]));
        }
        if number % 4 == 3 {
            let alone = alone(number);
            ok(&mut places.fsnap(&["checkpoint", "subvolume", "--tag", &alone]));
            ok(&mut places.fsnap(&["branch", &alone, &alone]));
            mark(&branched(number));
        }
        if let Some(old) = number.checked_sub(KEPT) {
            mark(&leaving(old));
            ok(&mut places.fsnap(&["rm", &self::tag(old)]));
            mark(&gone(old));
        }
    }
    record
}

/// Takes a checkpoint as CRIU has it taken, and returns its id; the next command seals it.
fn by_hook(places: &Places, number: u32) -> String {
    let images = images(places, number);
    fs::create_dir(&images).unwrap();
    let mut tree = Command::new("sleep").arg("1000").spawn().unwrap();
    let hook = |action: &str| {
        let mut command = places.fsnap(&["hook", "criu"]);
        command.env("CRTOOLS_SCRIPT_ACTION", action).env("CRTOOLS_IMAGE_DIR", &images);
        ok(command.env("CRTOOLS_INIT_PID", tree.id().to_string()).env("FSNAP_VOLUMES", VOLUMES))
    };
    let planned = hook("pre-dump");
    // CRIU's last image, with one empty entry: the number that such a file begins with, and the entry's length. CRIU syncs
    // nothing.
    let inventory = [&0x5831_3116_u32.to_le_bytes()[..], &2_u32.to_le_bytes(), &[8, 1]].concat();
    fs::write(images.join("inventory.img"), inventory).unwrap();
    let taken = hook("post-dump");
    assert_eq!(planned, taken);
    tree.kill().unwrap();
    tree.wait().unwrap();
    taken.trim().to_owned()
}

/// The names of the volumes, for the hook.
const VOLUMES: &str = "thin,dir,subvolume,nilfs2";

/// The directory of the engine's images of that step.
pub(crate) fn images(places: &Places, number: u32) -> PathBuf {
    places.system.join(format!("images-{number}"))
}

/// The tag of a step's checkpoint.
pub(crate) fn tag(number: u32) -> String {
    format!("step-{number}")
}

/// The mark that says that the checkpoint of that step was promised.
pub(crate) fn taken(number: u32) -> String {
    format!("taken-{number}")
}

/// The tag of a checkpoint of the btrfs volume, and the branch that is kept of it.
pub(crate) fn alone(number: u32) -> String {
    format!("alone-{number}")
}

/// The mark that says that this branch was promised.
pub(crate) fn branched(number: u32) -> String {
    format!("branched-{number}")
}

/// The mark that says that it may be gone.
pub(crate) fn leaving(number: u32) -> String {
    format!("leaving-{number}")
}

/// The mark that says that it must be gone.
pub(crate) fn gone(number: u32) -> String {
    format!("gone-{number}")
}
