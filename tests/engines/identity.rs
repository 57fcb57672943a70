//! A restore by CRIU itself: its hook refuses files that are not those of the checkpoint, and names both.

use std::fs;
use std::path::{Path, PathBuf};

use fsnap_oracle::criu::{CriuError, Restored};

use crate::Case;
use crate::oracle::{Oracle, ask};
use crate::site::{Site, Volume, create_subvolume, said};

pub(crate) const CASES: &[Case] = &[
    ("its_own_branch_is_accepted", its_own_branch_is_accepted),
    ("other_files_are_refused_and_both_are_named", other_files_are_refused_and_both_are_named),
    ("another_file_system_is_refused_and_named", another_file_system_is_refused_and_named),
    ("images_that_no_catalog_recorded_are_refused", images_that_no_catalog_recorded_are_refused),
    ("a_record_of_a_stranger_decides_nothing", a_record_of_a_stranger_decides_nothing),
];

/// Two volumes, two checkpoints of a process, and a branch of each: `b0` and `b1`.
struct Two {
    site: Site,
    oracle: Oracle,
    checkpoints: Vec<(String, PathBuf)>,
    /// The directories of each branch, one per volume.
    branches: Vec<Vec<PathBuf>>,
}

impl Two {
    fn new() -> Self {
        let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
        let oracle = site.small_oracle();
        let checkpoints: Vec<_> = (0..2)
            .map(|_| {
                oracle.goes_on();
                site.checkpoint(oracle.pid)
            })
            .collect();
        let grow = |(number, (id, _)): (usize, &(String, PathBuf))| {
            let branch = site.json(["branch", id, &format!("b{number}"), "--json"]);
            let members = branch["members"].as_array().unwrap();
            members.iter().map(|member| PathBuf::from(member["path"].as_str().unwrap())).collect()
        };
        let branches = checkpoints.iter().enumerate().map(grow).collect();
        Self { site, oracle, checkpoints, branches }
    }

    /// Lets CRIU restore the first checkpoint where these directories are seen at the volumes' paths.
    fn restore(&self, dirs: [&Path; 2]) -> Result<Restored, CriuError> {
        let binds: Vec<_> = dirs.map(Path::to_owned).into_iter().zip(self.site.volumes.clone()).collect();
        let args = ["--action-script".into(), self.site.hook().into_os_string()];
        self.site.criu().restore(self.oracle.pid, &self.checkpoints[0].1, &binds, args)
    }

    fn refused(&self, dirs: [&Path; 2], parts: &[&str]) {
        match self.restore(dirs) {
            Err(CriuError::Failed { log, .. }) => {
                for part in parts {
                    assert!(log.contains(part), "{part:?} is not in:\n{log}");
                }
            }
            other => panic!("{dirs:?} was not refused: {other:?}"),
        }
    }
}

fn its_own_branch_is_accepted() {
    let two = Two::new();
    let [first, second] = &two.branches[0][..] else { panic!("two volumes") };
    let restored = two.restore([first, second]).unwrap();
    let verdict = ask(restored.pid(), &two.oracle.reports, "restored");
    assert!(verdict.ok, "{verdict}");
    two.oracle.goes_on();
}

fn other_files_are_refused_and_both_are_named() {
    let two = Two::new();
    let [first, second] = &two.branches[0][..] else { panic!("two volumes") };
    let [newer_first, newer_second] = &two.branches[1][..] else { panic!("two volumes") };
    let newer = two.checkpoints[1].0.get(..12).unwrap();
    let of_newer = format!("the branch b1 of checkpoint {newer}");
    let v = [0, 1].map(|index| two.site.volumes[index].to_str().unwrap());
    // Of another checkpoint, wholly or in part.
    two.refused([newer_first, newer_second], &[v[0], "expected volume v0", &of_newer]);
    two.refused([newer_first, second], &[v[0], "expected volume v0", &of_newer]);
    two.refused([first, newer_second], &[v[1], "expected volume v1", &of_newer]);
    // Of another volume.
    let subvolume = two.site.path("mnt/other");
    create_subvolume(&subvolume);
    two.refused([&subvolume, second], &[v[0], "expected volume v0", "found"]);
    two.refused([second, first], &[v[0], "expected volume v0", "found"]);
    // No volume at all.
    let plain = two.site.path("plain");
    fs::create_dir(&plain).unwrap();
    two.refused([&plain, second], &[v[0], "expected volume v0", "found"]);
    two.refused([first, &plain], &[v[1], "expected volume v1", "found"]);
    // The hint leads to what works.
    two.refused([newer_first, second], &[&format!("`fsnap restore {}`", &two.checkpoints[0].0[..12])]);
    two.oracle.goes_on();
}

fn another_file_system_is_refused_and_named() {
    let two = Two::new();
    let script = r#"mount -t tmpfs elsewhere "$1" && mkdir "$2" && exec "$3""#;
    let mut command = two.site.command_of(Path::new("unshare"));
    command.args(["--mount", "sh", "-c", script, "sh"]);
    command.args([&two.site.path("mnt"), &two.site.volumes[0], &two.site.hook()]);
    command.env("CRTOOLS_SCRIPT_ACTION", "pre-restore").env("CRTOOLS_IMAGE_DIR", &two.checkpoints[0].1);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    for part in ["expected volume v0", "found tmpfs of elsewhere"] {
        assert!(String::from_utf8_lossy(&output.stderr).contains(part), "{}", said(&output));
    }
}

fn images_that_no_catalog_recorded_are_refused() {
    let two = Two::new();
    let (id, images) = &two.checkpoints[0];
    let another = Site::new(&[Volume::Btrfs]);
    let call = |site: &Site| {
        let mut command = site.command_of(&site.hook());
        command.env("CRTOOLS_SCRIPT_ACTION", "pre-restore").env("CRTOOLS_IMAGE_DIR", images);
        command.output().unwrap()
    };
    // The volume itself is accepted where it was recorded.
    let output = call(&two.site);
    assert!(output.status.success(), "{}", said(&output));
    let output = call(&another);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(id), "{}", said(&output));
    let output = another.command(["restore", id]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    // Nor are those of a checkpoint that was removed.
    two.site.ok(["rm", "--branch", "b0"]);
    two.site.ok(["rm", id]);
    let output = call(&two.site);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(id), "{}", said(&output));
}

fn a_record_of_a_stranger_decides_nothing() {
    let two = Two::new();
    let record = two.checkpoints[0].1.join("fsnap.json");
    let text = fs::read_to_string(&record).unwrap();
    let call = || {
        let mut command = two.site.command_of(&two.site.hook());
        command.env("CRTOOLS_SCRIPT_ACTION", "pre-restore").env("CRTOOLS_IMAGE_DIR", &two.checkpoints[0].1);
        command.output().unwrap()
    };
    let id = &two.checkpoints[0].0;
    for forged in [
        text.replace(id, "../../../../etc/passwd"),
        text.replace(id, &id[..4]),
        text.replace(id, "@latest"),
        text.replace(id, ""),
        text.replace(id, &"0".repeat(32)),
        text.replace("\"version\": 1", "\"version\": 2"),
        text[..text.len() / 2].to_owned(),
        String::new(),
    ] {
        assert_ne!(forged, text);
        fs::write(&record, &forged).unwrap();
        let output = call();
        assert_eq!(output.status.code(), Some(1), "{forged}: {}", said(&output));
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("fsnap: error: "), "{}", said(&output));
    }
    // What it says of the members is for people: the catalog decides which files are right.
    fs::write(&record, text.replace(two.site.volumes[0].to_str().unwrap(), "/etc")).unwrap();
    assert!(call().status.success());
    assert_eq!(two.site.ids().len(), 2);
}
