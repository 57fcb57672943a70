//! The proof: whatever was dumped at whatever moment agrees with itself when it is restored onto the branch of its checkpoint.
//!
//! A process changes files in all ways that there are while checkpoint after checkpoint is taken of it. Each is restored onto a
//! branch, in a pid namespace of its own, and must then find memory and files in agreement, go on from there, and find them
//! so again. The original must never notice.
//!
//! One thread dumps while another one restores what was dumped before: so hooks, restores, branches and removals of different checkpoints
//! run side by side all the time. `FSNAP_ORACLE_CHECKPOINTS` sets how many there are of each kind, and `FSNAP_ORACLE_PACE` the
//! longest pause of a writer in microseconds: a machine whose processor is played by a program has its hands full otherwise.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use fsnap_oracle::{Kind, Verdict};
use serde_json::Value;

use crate::Case;
use crate::oracle::{Oracle, ask};
use crate::site::{Site, Volume, end, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("btrfs_at_any_moment", || at_any_moment(&[Volume::Btrfs, Volume::Btrfs])),
    ("rsync_at_any_moment", || at_any_moment(&[Volume::Rsync, Volume::Rsync])),
    ("both_in_one_checkpoint_at_any_moment", || at_any_moment(&[Volume::Btrfs, Volume::Rsync])),
    ("a_branch_of_a_mount_at_any_moment", a_branch_at_any_moment),
];

/// A case's name, the volumes that it needs, and what it does with them.
pub(crate) type CaseOn = (&'static str, &'static [Volume], fn(&[Volume]));

/// Cases on kinds of volumes that the kernels of most hosts do not have.
pub(crate) const ON_OTHER_KERNELS: &[CaseOn] = &[
    ("dm_thin_at_any_moment", &[Volume::DmThin, Volume::DmThin], at_any_moment),
    ("nilfs2_at_any_moment", &[Volume::Nilfs2, Volume::Nilfs2], at_any_moment),
    ("all_in_one_checkpoint_at_any_moment", ALL, at_any_moment),
    ("a_member_of_any_kind_that_fails_takes_the_others_with_it", ALL, a_member_that_fails),
];

const ALL: &[Volume] = &[Volume::Btrfs, Volume::DmThin, Volume::Nilfs2, Volume::Rsync];

/// So many restored processes are alive at a time.
const ALIVE: usize = 3;

fn setting(name: &str, usual: u32) -> u32 {
    let named = std::env::var(name).ok();
    named.map_or(usual, |number| number.parse().unwrap_or_else(|error| panic!("{name}: {error}")))
}

fn at_any_moment(volumes: &[Volume]) {
    any_moment_of(&Site::new(volumes), volumes, setting("FSNAP_ORACLE_CHECKPOINTS", 50));
}

/// The processes write through `fsnap mount`, and each copy of them has a branch there.
fn a_branch_at_any_moment() {
    let volumes = [Volume::Btrfs, Volume::Rsync];
    let mut site = Site::new(&volumes);
    let mount = site.go_to_branch("live");
    any_moment_of(&site, &volumes, setting("FSNAP_ORACLE_CHECKPOINTS", 50).div_ceil(10));

    // A copy needs a mount that shows its branch.
    let dirs: Vec<PathBuf> = site.volumes.iter().map(|volume| volume.join("more")).collect();
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let oracle = Oracle::start(site.new_path("reports"), &dirs, &[Kind::Append], 1000);
    let (id, _) = site.checkpoint(oracle.pid);
    drop(oracle);
    // What a process had open there is closed a moment after it has ended.
    let umount = || site.command([OsStr::new("umount"), mount.as_ref()]).output().unwrap().status.success();
    wait_until("the mount is in nobody's use", umount);
    let output = site.command(["restore", &id, "--branch", "unseen"]).output().unwrap();
    let said = said(&output);
    assert!(output.status.code() == Some(1) && said.contains("`fsnap mount DIR` shows it"), "{said}");
    let branches = site.json(["branches", "--json"]);
    assert_eq!(branches.as_array().unwrap().len(), 1, "{branches}");
}

fn any_moment_of(site: &Site, volumes: &[Volume], count: u32) {
    let others = site.ids().len();
    move_inode_numbers_apart(site);
    // On a machine that does other work too, a hook of this crowd may wait long for its turn.
    site.configure("[hook]\ndeadline_seconds = 60\n");
    // NILFS2 cannot tell holes from data: all 4 GiB of a sparse file would be read for each verdict, and copied to each branch.
    let sparse = !volumes.contains(&Volume::Nilfs2);
    let kinds: Vec<_> = Kind::ALL.into_iter().filter(|kind| sparse || *kind != Kind::Sparse).collect();
    let oracle = site.oracle(&kinds, setting("FSNAP_ORACLE_PACE", 8000));
    let dumped = std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(ALIVE);
        let reports = oracle.reports.as_path();
        let restorer = scope.spawn(move || restore_each(site, reports, receiver));
        for number in 0..count as usize {
            std::thread::sleep(any_moment());
            let before = oracle.ask();
            assert!(before.ok, "the original noticed before dump {number}: {before}");
            std::thread::sleep(any_moment());
            // What has no name is saved by CRIU itself, or left to fsnap.
            let dump = if number % 2 == 0 { Site::checkpoint } else { Site::checkpoint_as_told };
            let (id, images) = dump(site, oracle.pid);
            if sender.send(Dumped { number, id, images, before }).is_err() {
                // The other thread has failed, and says why.
                break;
            }
        }
        drop(sender);
        restorer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    assert_eq!(dumped, count as usize);
    becomes_sure(site, &oracle);
    oracle.goes_on();
    site.holds_nothing_but(others);
}

/// Makes sure that a checkpoint can be a point in time, which says that nobody was seen who could write.
///
/// No process of this site can be taken for a writer any more. One that another site restores on the same file system can, while
/// it begins; so there are some attempts.
fn becomes_sure(site: &Site, oracle: &Oracle) {
    let mut attempts = (0..20).map(|_| {
        let (id, images) = site.checkpoint(oracle.pid);
        let members = site.json(["show", &id, "--json"])["members"].take();
        site.ok(["rm", &id]);
        fs::remove_dir_all(images).unwrap();
        members
    });
    let sure =
        |members: &Value| members.as_array().unwrap().iter().all(|member| member["consistency"] == "point-in-time");
    assert!(
        attempts.any(|members| sure(&members)),
        "no checkpoint of a tree that nobody else writes to is a point in time"
    );
}

/// Each member in turn cannot be captured: something else stands at its path while the processes stand.
fn a_member_that_fails(volumes: &[Volume]) {
    let site = Site::new(volumes);
    let oracle = site.small_oracle();
    for (volume, path) in volumes.iter().zip(&site.volumes) {
        let path = path.display();
        let cover = (format!("mount -t tmpfs cover '{path}'"), format!("umount '{path}'"));
        let script = site.hook_between("post-dump", &cover.0, &cover.1);
        let log = site.failing_dump(oracle.pid, &site.images(), &script);
        assert!(log.contains("fsnap: error: "), "{volume:?}: {log}");
        oracle.goes_on();
        site.holds_nothing_but(0);
    }
    let (id, _) = site.checkpoint(oracle.pid);
    let members = &site.json(["show", &id, "--json"])["members"];
    let backends: BTreeSet<_> = members.as_array().unwrap().iter().map(|member| member["backend"].as_str()).collect();
    assert_eq!(backends, volumes.iter().map(|volume| Some(volume.backend())).collect());
    site.holds_nothing_but(1);
    oracle.goes_on();
}

/// Sees to it that no two volumes have files with the same inode number.
///
/// CRIU takes two unlinked files for one if they have, on one btrfs, in whatever subvolumes, and cannot restore them then.
fn move_inode_numbers_apart(site: &Site) {
    for (index, volume) in site.volumes.iter().enumerate() {
        for _ in 0..100 * index {
            fs::write(volume.join("number"), "").unwrap();
            fs::remove_file(volume.join("number")).unwrap();
        }
    }
}

/// A pause that nobody can predict, of less than a few steps of a writer.
fn any_moment() -> Duration {
    Duration::from_micros(RandomState::new().hash_one(0) % 10_000)
}

/// A checkpoint that waits to be restored.
struct Dumped {
    number: usize,
    id: String,
    images: PathBuf,
    /// What the original said shortly before.
    before: Verdict,
}

/// A process that was restored from one.
struct Restored {
    dumped: Dumped,
    first: Verdict,
    init: i32,
    pid: i32,
}

/// Restores each, asks it at once and again when others have been restored, and removes it; returns how many there were.
fn restore_each(site: &Site, reports: &Path, dumps: mpsc::Receiver<Dumped>) -> usize {
    let mut alive = VecDeque::new();
    let mut count = 0;
    for dumped in dumps {
        let restored = restore(site, reports, dumped);
        count += 1;
        alive.push_back(restored);
        if alive.len() == ALIVE {
            alive.pop_front().into_iter().for_each(|oldest| retire(site, reports, oldest));
        }
    }
    alive.into_iter().for_each(|last| retire(site, reports, last));
    count
}

fn restore(site: &Site, reports: &Path, dumped: Dumped) -> Restored {
    let (id, number) = (&dumped.id, dumped.number);
    let branch = site.json(["restore", id, "--branch", &format!("b{number}"), "--json"]);
    let pid = |name: &str| i32::try_from(branch[name].as_i64().unwrap()).unwrap();
    let (init, pid) = (pid("init"), pid("pid"));
    let verdict = ask(pid, reports, &format!("restored-{number}"));
    assert!(verdict.ok, "checkpoint {number}: {verdict}");
    // Its memory is that of the dump: it was asked as often as the original was, and has made its steps.
    let generation = |verdict: &Verdict| verdict.asked.as_ref().unwrap().generation;
    assert_eq!(generation(&verdict), generation(&dumped.before) + 1, "checkpoint {number}");
    assert!(verdict.steps() >= dumped.before.steps(), "checkpoint {number}: {verdict}");
    // Another restore that is under way holds files of the same file system behind mounts that are attached nowhere yet. It
    // may be taken for a writer, since nothing may be claimed that was not seen; then it is named.
    let members = &site.json(["show", id, "--json"])["members"];
    for member in members.as_array().unwrap().iter().filter(|member| member["consistency"] != "point-in-time") {
        assert!(!member["writers"].as_array().unwrap().is_empty(), "checkpoint {number}: {member}");
    }
    Restored { first: verdict, init, pid, dumped }
}

fn retire(site: &Site, reports: &Path, restored: Restored) {
    let Dumped { number, id, images, .. } = restored.dumped;
    let last = ask(restored.pid, reports, &format!("restored-{number}-later"));
    assert!(last.ok, "checkpoint {number}, later: {last}");
    assert!(last.steps() > restored.first.steps(), "checkpoint {number} does not go on: {last}");
    end(restored.init);
    site.ok(["rm", "--branch", &format!("b{number}")]);
    site.ok(["rm", &id]);
    fs::remove_dir_all(images).unwrap();
}
