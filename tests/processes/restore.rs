//! A real CRIU: dumped once, restored many times, each time onto files of its own.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fsnap::engine::criu::{self, Criu, Diagnosis, Version};
use fsnap::engine::{Ended, Error, Images, MountPlan, PidSpace, Restore, Restored};
use fsnap::mount::Restrictions;
use fsnap_backend::MountSpec;

use crate::live::{Case, Live, helper_command, signal, stage, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("restores_run_side_by_side_on_files_of_their_own", restores_run_side_by_side_on_files_of_their_own),
    ("the_end_of_the_restored_is_told", the_end_of_the_restored_is_told),
    ("a_restore_on_the_hosts_pids_keeps_them", a_restore_on_the_hosts_pids_keeps_them),
    ("images_inside_the_volume_are_found", images_inside_the_volume_are_found),
    ("an_engine_that_would_be_hidden_is_named", an_engine_that_would_be_hidden_is_named),
    ("a_failed_restore_leaves_nothing_and_shows_the_log", a_failed_restore_leaves_nothing_and_shows_the_log),
    ("a_link_in_place_of_the_volume_is_refused", a_link_in_place_of_the_volume_is_refused),
    ("images_that_are_not_complete_are_refused", images_that_are_not_complete_are_refused),
    ("the_hook_understands_its_environment", the_hook_understands_its_environment),
    ("the_program_is_found_and_diagnosed", the_program_is_found_and_diagnosed),
];

fn program() -> PathBuf {
    let named = std::env::var_os("FSNAP_CRIU").map(PathBuf::from);
    // Where `make setup` leaves one that works with this kernel.
    let program = named.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/target/criu/criu").into());
    assert!(program.exists(), "{program:?} does not exist: `make setup` prepares it, or name one by FSNAP_CRIU");
    program
}

fn engine() -> Criu {
    Criu::find(Some(&program()), &[]).unwrap()
}

/// A program that counted in memory and in `data/file`, and was dumped into `images`.
struct Dumped {
    temp: tempfile::TempDir,
    pid: i32,
}

impl Dumped {
    fn new(images: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let data = temp.path().join("data");
        fs::create_dir(&data).unwrap();
        fs::create_dir_all(temp.path().join(images)).unwrap();
        let live = Live::start(&["count", data.join("file").to_str().unwrap()]);
        let pid = live.pid();
        wait_until("a few steps", || number(&data) > 5);
        dump(pid, &temp.path().join(images), &[]);
        Self { temp, pid }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// Copies the files as they were at the dump.
    fn branch(&self, name: &str) -> PathBuf {
        let branch = self.path(name);
        assert!(Command::new("cp").arg("-a").arg(self.path("data")).arg(&branch).status().unwrap().success());
        branch
    }

    fn restore(&self, images: &str, branch: &Path) -> Result<Restored, Error> {
        self.restore_with(images, branch, PidSpace::New, &engine(), &[])
    }

    fn restore_with(
        &self,
        images: &str,
        branch: &Path,
        pids: PidSpace,
        criu: &Criu,
        args: &[OsString],
    ) -> Result<Restored, Error> {
        let plan = MountPlan {
            spec: MountSpec::Bind { dir: branch.into(), read_only: false },
            at: self.path("data"),
            restrictions: Restrictions::default(),
        };
        let images = Images::open(&self.path(images)).unwrap();
        let (log, place) = (branch.with_extension("log"), branch.with_extension("place"));
        fs::create_dir_all(&place).unwrap();
        Restore {
            returned: &[],
            criu,
            images: &images,
            mounts: &[plan],
            args,
            pids,
            log: &log,
            stage: &stage(),
            place: &place,
            confinement: None,
            terminal: None,
        }
        .run()
    }
}

fn dump(pid: i32, images: &Path, args: &[&str]) {
    let mut command = Command::new(program());
    command.args(["dump", "-v2", "-o", "dump.log", "-t", &pid.to_string(), "-D"]).arg(images).args(args);
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{}", fs::read_to_string(images.join("dump.log")).unwrap_or_default());
}

fn number(dir: &Path) -> u64 {
    let text = fs::read_to_string(dir.join("file")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn restores_run_side_by_side_on_files_of_their_own() {
    let dumped = Dumped::new("images");
    let before = number(&dumped.path("data"));
    let branches = ["one", "two", "three"].map(|name| dumped.branch(name));
    let restored: Vec<Restored> = branches.iter().map(|branch| dumped.restore("images", branch).unwrap()).collect();
    let mut restored = restored.into_iter();
    for branch in &branches {
        let first = number(branch);
        assert!(first >= before, "{branch:?} went back from {before} to {first}");
        wait_until("more steps", || number(branch) > first + 10);
    }
    // The one who was killed stops; the others do not notice.
    let one = restored.next().unwrap();
    let root = one.root.unwrap();
    assert_ne!(root.pid, dumped.pid, "seen from outside it has another pid");
    one.kill().unwrap();
    assert!(!root.is_alive());
    let stopped = number(&branches[0]);
    let others = [number(&branches[1]), number(&branches[2])];
    wait_until("more steps", || number(&branches[1]) > others[0] + 10 && number(&branches[2]) > others[1] + 10);
    assert_eq!(number(&branches[0]), stopped);
    assert_eq!(number(&dumped.path("data")), before, "the volume itself is as it was");
    restored.for_each(|restored| restored.kill().unwrap());
}

fn the_end_of_the_restored_is_told() {
    let dumped = Dumped::new("images");
    let restored = dumped.restore("images", &dumped.branch("one")).unwrap();
    let (init, root) = (restored.init, restored.root.unwrap());
    signal(root, "TERM");
    assert_eq!(restored.wait(), Ended::Killed(15));
    assert!(!init.is_alive() && !root.is_alive());
}

fn a_restore_on_the_hosts_pids_keeps_them() {
    let dumped = Dumped::new("images");
    let branch = dumped.branch("one");
    let restored = dumped.restore_with("images", &branch, PidSpace::Host, &engine(), &[]).unwrap();
    let root = restored.root.unwrap();
    assert_eq!(root.pid, dumped.pid);
    let first = number(&branch);
    wait_until("more steps", || number(&branch) > first + 10);
    restored.kill().unwrap();
    assert!(!root.is_alive());
}

fn images_inside_the_volume_are_found() {
    let dumped = Dumped::new("data/images");
    let branch = dumped.path("one");
    fs::create_dir(&branch).unwrap();
    fs::copy(dumped.path("data/file"), branch.join("file")).unwrap();
    let restored = dumped.restore("data/images", &branch).unwrap();
    let first = number(&branch);
    wait_until("more steps", || number(&branch) > first + 10);
    restored.kill().unwrap();
}

fn an_engine_that_would_be_hidden_is_named() {
    let dumped = Dumped::new("images");
    let wrapper = dumped.path("data/criu");
    fs::write(&wrapper, format!("#!/bin/sh\nexec '{}' \"$@\"\n", program().display())).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let criu = Criu::find(Some(&wrapper), &[]).unwrap();
    let branch = dumped.branch("one");
    match dumped.restore_with("images", &branch, PidSpace::New, &criu, &[]) {
        Err(Error::Hidden { hidden, by }) => assert_eq!((hidden, by), (wrapper, dumped.path("data"))),
        other => panic!("{other:?}"),
    }
}

fn a_failed_restore_leaves_nothing_and_shows_the_log() {
    let dumped = Dumped::new("images");
    let branch = dumped.branch("one");
    let core = dumped.path(&format!("images/core-{}.img", dumped.pid));
    fs::rename(&core, core.with_extension("hidden")).unwrap();
    let error = dumped.restore("images", &branch).unwrap_err();
    let Error::EngineFailed { tail, log, .. } = &error else { panic!("{error:?}") };
    assert!(tail.contains("Restoring FAILED"), "{tail}");
    assert!(log.exists() && error.to_string().contains(tail.as_str()));
    // Once more, with what was missing: nothing of the first attempt stands in the way.
    fs::rename(core.with_extension("hidden"), &core).unwrap();
    dumped.restore("images", &branch).unwrap().kill().unwrap();
    let stopped = number(&branch);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(number(&branch), stopped);
}

fn a_link_in_place_of_the_volume_is_refused() {
    let dumped = Dumped::new("images");
    let branch = dumped.branch("one");
    fs::rename(dumped.path("data"), dumped.path("moved")).unwrap();
    symlink("moved", dumped.path("data")).unwrap();
    let error = dumped.restore("images", &branch).unwrap_err().to_string();
    assert!(error.contains("it is a symbolic link"), "{error}");
}

fn images_that_are_not_complete_are_refused() {
    let dumped = Dumped::new("images");
    let branch = dumped.branch("one");
    let images = Images::open(&dumped.path("images")).unwrap();
    criu::complete(&images).unwrap();
    assert_eq!(criu::root_pid(&images).unwrap(), Some(dumped.pid));
    let inventory = dumped.path("images/inventory.img");
    let whole = fs::read(&inventory).unwrap();
    for end in 0..whole.len() {
        fs::write(&inventory, &whole[..end]).unwrap();
        assert!(matches!(criu::complete(&images), Err(Error::Incomplete { .. })), "{end} bytes");
    }
    fs::write(&inventory, fs::read(dumped.path("images/pstree.img")).unwrap()).unwrap();
    assert!(matches!(criu::complete(&images), Err(Error::Incomplete { .. })));
    fs::remove_file(&inventory).unwrap();
    assert!(matches!(dumped.restore("images", &branch), Err(Error::Incomplete { .. })));
    symlink("pstree.img", &inventory).unwrap();
    assert!(matches!(criu::complete(&images), Err(Error::ImageFile { .. })));
    fs::write(dumped.path("images/pstree.img"), b"short").unwrap();
    assert_eq!(criu::root_pid(&images).unwrap(), None);
}

fn the_hook_understands_its_environment() {
    let temp = tempfile::tempdir().unwrap();
    let (images, said) = (temp.path().join("im ages"), temp.path().join("said"));
    fs::create_dir(&images).unwrap();
    let script = temp.path().join("script");
    let helper = helper_command(&["hook", said.to_str().unwrap()]);
    let words: Vec<String> = std::iter::once(helper.get_program())
        .chain(helper.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    fs::write(&script, format!("#!/bin/sh\nexec {}\n", words.join(" "))).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let live = Live::start(&["count", temp.path().join("file").to_str().unwrap()]);
    dump(live.pid(), &images, &["-R", "--action-script", script.to_str().unwrap()]);
    let said = fs::read_to_string(said).unwrap();
    let expected =
        |phase: &str, complete: bool| format!("{phase} {:?} {} alive complete={complete}\n", images, live.pid());
    assert_eq!(said, expected("Starting", false) + &expected("Frozen", true));
}

fn the_program_is_found_and_diagnosed() {
    let criu = engine();
    assert!(criu.version().unwrap() >= Version { major: 3, minor: 17, patch: 0 });
    assert_eq!(criu.diagnose().unwrap(), Diagnosis::Works);
    let absent = PathBuf::from("/fsnap-no-such-file");
    assert!(matches!(Criu::find(Some(&absent), &[program()]), Err(Error::NoCriu { .. })));
    assert_eq!(Criu::find(None, &[absent, program()]).unwrap(), criu);
    let temp = tempfile::tempdir().unwrap();
    let old = temp.path().join("criu");
    let write = |text: &str| {
        fs::write(&old, text).unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).unwrap();
        Criu::find(Some(&old), &[]).unwrap()
    };
    let failing = write("#!/bin/sh\necho Version: 9.1\necho 'Error: no\x1b[2J'; test $1 = --version\n");
    assert_eq!(failing.version().unwrap(), Version { major: 9, minor: 1, patch: 0 });
    let said = "Version: 9.1\nError: no\u{fffd}[2J".to_owned();
    assert_eq!(failing.diagnose().unwrap(), Diagnosis::Fails { said });
}
