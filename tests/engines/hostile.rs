//! Others who can write where fsnap works as root: they get nothing written, read or restored that is not theirs.
//!
//! Each case tries an attack, and what is asserted holds however it meets fsnap: the attack may come too late.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::Case;
use crate::hook::{says, untouched};
use crate::site::{Site, Volume, create_subvolume, end, said};

pub(crate) const CASES: &[Case] = &[
    ("files_are_planted_while_the_hook_writes", files_are_planted_while_the_hook_writes),
    ("a_directory_of_images_is_swapped", a_directory_of_images_is_swapped),
    ("a_record_beside_other_images", a_record_beside_other_images),
    ("a_record_that_lies", a_record_that_lies),
    ("a_root_that_is_exchanged_all_the_time", a_root_that_is_exchanged_all_the_time),
];

/// Some user who is not root.
const STRANGER: u32 = 65534;

/// Whoever has it is killed when it is dropped.
struct Attacker(Child);

impl Drop for Attacker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Puts links, fifos and files of its own in the place of fsnap's, as fast as it can, until it is killed.
const PLANT: &str = r#"
import os, sys
images, target = sys.argv[1:]
os.chdir(images)
def away(name):
    try: os.unlink(name)
    except OSError: pass
plants = [
    lambda name: os.symlink(target + "/precious", name),
    lambda name: os.symlink(target + "/planted", name),
    lambda name: os.mkfifo(name),
    lambda name: os.link("own", name),
    lambda name: os.rename("own.new", name),
]
open("own", "w").write("{}")
print("ready", flush=True)
while True:
    for name in ["fsnap.json", ".fsnap.json.new", "fsnap_hook.json"]:
        for plant in plants:
            try:
                open("own.new", "w").write('{"version": 1}')
                away(name)
                plant(name)
            except OSError: pass
"#;

fn files_are_planted_while_the_hook_writes() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let target = site.path("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("precious"), "precious").unwrap();
    let mut taken = 0;
    for _ in 0..5 {
        let images = site.images();
        chown(&images, Some(STRANGER), Some(STRANGER)).unwrap();
        let mut attacker = Command::new("/usr/bin/python3");
        attacker.args(["-c", PLANT]).arg(&images).arg(&target).uid(STRANGER).gid(STRANGER);
        let mut attacker = Attacker(attacker.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
        std::io::Read::read_exact(attacker.0.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
        let dumped = site.dump(oracle.pid, &images, &site.hook()).is_ok();
        let (pid, tree) = (std::process::id().to_string(), oracle.pid.to_string());
        for step in ["starting", "frozen", "failed"] {
            let mut call = site.command(["hook", "generic", step, "--tree", &tree, "--engine", &pid, "--images"]);
            // What the answer is does not matter here, only that there is one.
            call.arg(&images).output().unwrap();
        }
        drop(attacker);
        taken += usize::from(dumped);
        oracle.goes_on();
        site.holds_nothing_but(taken);
        let names: Vec<_> = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["precious"]);
        assert_eq!(fs::read(target.join("precious")).unwrap(), b"precious");
        assert_eq!(fs::metadata(target.join("precious")).unwrap().uid(), 0);
    }
}

/// Between its two calls, CRIU's directory is another's: nothing is written into that, and there is no checkpoint.
fn a_directory_of_images_is_swapped() {
    for swap in ["mkdir '{}'", "ln -s '{away}' '{}'", "mkfifo '{}'"] {
        let site = Site::new(&[Volume::Btrfs]);
        let oracle = site.small_oracle();
        let images = site.images();
        let away = images.with_extension("away");
        let [shown, away_shown] = [&images, &away].map(|path| path.display().to_string());
        let lines = format!("mv '{shown}' '{away_shown}'\n{swap}").replace("{away}", &away_shown).replace("{}", &shown);
        let script = site.hook_after("post-dump", &lines);
        site.dump(oracle.pid, &images, &script).unwrap_err();
        let log = fs::read_to_string(away.join("dump.log")).unwrap();
        says(&log, &["fsnap: error: "]);
        assert!(!away.join("fsnap.json").exists(), "{swap}");
        if images.symlink_metadata().unwrap().is_dir() {
            assert_eq!(fs::read_dir(&images).unwrap().count(), 0, "{swap}");
        }
        untouched(&site, &oracle);
    }
}

/// The record is root's, and the images beside it are somebody else's, or may be: nothing is restored from them.
fn a_record_beside_other_images() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let (id, images) = site.checkpoint(oracle.pid);
    let refused = |part: &str| {
        let output = site.command(["restore", &id]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        says(&String::from_utf8_lossy(&output.stderr), &["are not restored: ", part]);
        assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 0);
    };
    chown(&images, Some(STRANGER), None).unwrap();
    refused("the directory belongs to user 65534");
    chown(&images, Some(0), None).unwrap();
    for mode in [0o1777, 0o775] {
        fs::set_permissions(&images, Permissions::from_mode(mode)).unwrap();
        refused("the directory can be written by other users");
    }
    fs::set_permissions(&images, Permissions::from_mode(0o755)).unwrap();
    let core = images.join("pstree.img");
    chown(&core, Some(STRANGER), None).unwrap();
    refused("pstree.img belongs to user 65534");
    chown(&core, Some(0), None).unwrap();
    fs::set_permissions(&core, Permissions::from_mode(0o666)).unwrap();
    refused("pstree.img can be written by other users");
    fs::set_permissions(&core, Permissions::from_mode(0o600)).unwrap();
    let restored = site.json(["restore", &id, "--branch", "b", "--json"]);
    end(i32::try_from(restored["init"].as_i64().unwrap()).unwrap());
}

/// What stands in the record is for people. Whatever it is, no restore gets further than the catalog allows, and none takes long.
fn a_record_that_lies() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let (id, images) = site.checkpoint(oracle.pid);
    let (other, _) = site.checkpoint(oracle.pid);
    let path = images.join("fsnap.json");
    let honest = fs::read_to_string(&path).unwrap();
    let refused = |lie: &str| {
        let output = site.command(["restore", &id]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{lie}: {}", said(&output));
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("fsnap: error: "), "{}", said(&output));
        let mut hook = site.command_of(&site.hook());
        let output =
            hook.env("CRTOOLS_SCRIPT_ACTION", "pre-restore").env("CRTOOLS_IMAGE_DIR", &images).output().unwrap();
        // The hook lets the files decide: those of the volumes are right for the other checkpoint, too.
        assert_eq!(output.status.code(), Some(i32::from(lie != other)), "{lie}: {}", said(&output));
    };
    let member = honest.split_once("\"members\": [").unwrap().1.rsplit_once(']').unwrap().0;
    let lies = [
        honest.replace(&id, &other),
        honest.replace(&id, &format!("../{id}")),
        honest.replace("\"version\": 1", "\"version\": 18446744073709551616"),
        honest.replace(member, &[member; 4000].join(",")),
        honest.replace("\"btrfs\"", "7"),
        format!("{honest}{honest}"),
        "[".repeat(1 << 19),
    ];
    for lie in &lies {
        assert_ne!(*lie, honest);
        fs::write(&path, lie).unwrap();
        refused(if lie.contains(&other) { &other } else { lie.get(..200).unwrap_or(lie) });
    }
    // A GiB of nothing, of which nothing is read.
    fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
    refused("a GiB");
    // Paths and identities of the members are looked at by nobody: a restore goes onto what the catalog has.
    let store = site.path("elsewhere").display().to_string();
    let lie = honest.replace(site.volumes[0].to_str().unwrap(), "/etc/../etc").replace("\"at\": \"", "\"at\": \"x");
    fs::write(&path, lie.replace("\"volume\": \"v1\"", &format!("\"volume\": {store:?}"))).unwrap();
    let restored = site.json(["restore", &id, "--branch", "b", "--json"]);
    end(i32::try_from(restored["init"].as_i64().unwrap()).unwrap());
    site.ok(["rm", "--branch", "b"]);
    oracle.goes_on();
    site.holds_nothing_but(2);
}

/// Whoever owns the directory above exchanges a volume with another tree while it is taken: a checkpoint has the volume's files, or there is none.
fn a_root_that_is_exchanged_all_the_time() {
    for kind in [Volume::Btrfs, Volume::Rsync] {
        let site = Site::new(&[kind]);
        let volume = site.volumes[0].clone();
        let decoy = volume.with_extension("decoy");
        match kind {
            Volume::Btrfs => create_subvolume(&decoy),
            _ => fs::create_dir(&decoy).unwrap(),
        }
        fs::write(volume.join("right"), "").unwrap();
        fs::write(decoy.join("wrong"), "").unwrap();
        symlink("/", decoy.join("link")).unwrap();
        let script = "exec 3>>log; echo ready; while sleep 0.01; do echo more >&3; done";
        let mut writer = Command::new("setsid");
        writer.args(["sh", "-c", script]).current_dir(&volume).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut writer = Attacker(writer.spawn().unwrap());
        std::io::Read::read_exact(writer.0.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
        let pid = writer.0.id().to_string();
        for round in 0..20 {
            let exchanger = Exchanger::start(&volume, &decoy);
            let taken = site.command(["checkpoint", "--pid", &pid, "v0"]).output().unwrap();
            exchanger.stop();
            assert!(matches!(taken.status.code(), Some(0 | 1)), "{}", said(&taken));
            site.holds_nothing_but(usize::from(taken.status.success()));
            if taken.status.success() {
                let id = String::from_utf8(taken.stdout).unwrap().trim().to_owned();
                has_the_right_files(&site, &id, &format!("look-{round}"));
            }
        }
        let id = site.ok(["checkpoint", "--pid", &pid, "v0"]);
        has_the_right_files(&site, &id, "last");
    }
}

/// The checkpoint has the volume's files; it is removed.
fn has_the_right_files(site: &Site, id: &str, branch: &str) {
    site.ok(["branch", id, branch]);
    let files = crate::runs::branch_path(site, branch, 0);
    assert!(files.join("right").exists() && !files.join("wrong").exists(), "{files:?}");
    site.ok(["rm", "--branch", branch]);
    site.ok(["rm", id]);
}

/// A thread that exchanges two paths; an even number of times, in the end.
struct Exchanger {
    goes_on: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Exchanger {
    fn start(one: &Path, other: &Path) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let goes_on = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let (asked, paths): (_, [PathBuf; 2]) = (goes_on.clone(), [one.into(), other.into()]);
        let thread = std::thread::spawn(move || {
            while asked.load(Relaxed) {
                for _ in 0..2 {
                    renameat_with(CWD, &paths[0], CWD, &paths[1], RenameFlags::EXCHANGE).unwrap();
                    std::thread::sleep(std::time::Duration::from_micros(500));
                }
            }
        });
        Self { goes_on, thread }
    }

    fn stop(self) {
        self.goes_on.store(false, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}
