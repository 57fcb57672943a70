//! A place of its own for each case: volumes, a state directory, the hook; and fsnap and CRIU at work in it.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::panic::{catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use fsnap::catalog::{Access, Catalog};
use fsnap::stores;
use fsnap_oracle::Kind;
use fsnap_oracle::criu::{Criu, CriuError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::Value;

use crate::oracle::Oracle;
use crate::sandbox;
use crate::volumes::Ground;
pub(crate) use crate::volumes::Volume;
pub(crate) use crate::waiting::wait_until;

/// Longer than anything takes that works, on a machine that is busy with other things.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Volumes, a state directory and a hook; everything is unmounted and removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Site {
    dir: PathBuf,
    pub(crate) volumes: Vec<PathBuf>,
    ground: Ground,
    made: AtomicU32,
    attended: bool,
}

thread_local! {
    /// Whether hooks may leave a process that stands by for the next, in the sites that are made from now on.
    static ATTENDED: Cell<bool> = const { Cell::new(true) };
}

/// Runs a case in which nobody stands by for the frozen window.
pub(crate) fn unattended(case: fn()) {
    ATTENDED.set(false);
    let ended = catch_unwind(case);
    ATTENDED.set(true);
    ended.unwrap_or_else(|panic| resume_unwind(panic));
}

impl Site {
    /// Volumes with the names `v0`, `v1`…, all registered.
    pub(crate) fn new(volumes: &[Volume]) -> Self {
        static SITES: AtomicU32 = AtomicU32::new(0);
        let dir = sandbox::scratch().join(format!("site-{}", SITES.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&dir).unwrap();
        let ground = Ground::new(&dir);
        let mut site = Self { dir, volumes: Vec::new(), ground, made: AtomicU32::new(0), attended: ATTENDED.get() };
        site.configure("");
        symlink(env!("CARGO_BIN_EXE_fsnap"), site.hook()).unwrap();
        for (index, volume) in volumes.iter().enumerate() {
            let path = site.ground.make(*volume, &format!("v{index}"));
            site.ok([OsStr::new("init"), "--backend".as_ref(), volume.backend().as_ref(), path.as_ref()]);
            site.volumes.push(path);
        }
        site
    }

    /// The same, where nobody stands by for the frozen window.
    pub(crate) fn without_attendant(volumes: &[Volume]) -> Self {
        let mut site = Self::new(volumes);
        site.attended = false;
        site.configure("");
        site
    }

    /// Mounts the catalog, and makes a branch of all volumes there; from now on, they are what is worked on. Tells where the mount is.
    pub(crate) fn go_to_branch(&mut self, name: &str) -> PathBuf {
        let mount = self.new_path("mount");
        fs::create_dir(&mount).unwrap();
        let base = self.ok(["checkpoint"]);
        self.ok([OsStr::new("mount"), mount.as_ref()]);
        fs::create_dir(mount.join(format!("branches/{name}@{base}"))).unwrap();
        for volume in &mut self.volumes {
            *volume = mount.join("branches").join(name).join(volume.file_name().unwrap());
        }
        mount
    }

    /// The processes of fsnap that work for this site.
    pub(crate) fn fsnaps(&self) -> Vec<i32> {
        let state = format!("FSNAP_STATE={}", self.path("state").display());
        let is_ours = |pid: i32| {
            let exe = fs::read_link(format!("/proc/{pid}/exe"));
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            exe.is_ok_and(|exe| exe.ends_with("fsnap"))
                && environment.split(|byte| *byte == 0).any(|one| one == state.as_bytes())
        };
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
        pids.filter(|&pid| is_ours(pid)).collect()
    }

    /// Mounts a small file system in memory, of so many KiB.
    pub(crate) fn mount_small(&mut self, at: &Path, kib: u32) {
        self.ground.mount_small(at, kib);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A path at which nothing is.
    pub(crate) fn new_path(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}-{}", self.made.fetch_add(1, Ordering::Relaxed)))
    }

    /// fsnap under the name that makes it CRIU's action script.
    pub(crate) fn hook(&self) -> PathBuf {
        self.path("fsnap-criu-hook")
    }

    /// An action script that notes every call in the file `calls`, runs the lines of shell for one action, and then is fsnap.
    pub(crate) fn hook_after(&self, action: &str, lines: &str) -> PathBuf {
        let hook = format!("exec '{}'", self.hook().display());
        self.script(action, &format!("{lines}\n{hook}"), &hook)
    }

    /// One that runs other lines when fsnap has ended, before CRIU hears of it.
    pub(crate) fn hook_between(&self, action: &str, before: &str, after: &str) -> PathBuf {
        let hook = format!("'{}'", self.hook().display());
        self.script(action, &format!("{before}\n{hook}\nstatus=$?\n{after}\nexit $status"), &format!("exec {hook}"))
    }

    fn script(&self, action: &str, then: &str, otherwise: &str) -> PathBuf {
        let calls = self.path("calls").display().to_string();
        let script = format!(
            "#!/bin/sh\necho \"$CRTOOLS_SCRIPT_ACTION\" >>'{calls}'\n\
             if [ \"$CRTOOLS_SCRIPT_ACTION\" = {action} ]; then\n{then}\nelse\n{otherwise}\nfi\n"
        );
        let path = self.new_path("script");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// The actions for which such scripts were called.
    pub(crate) fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    /// Settings, which every command and hook reads.
    pub(crate) fn configure(&self, text: &str) {
        let text = match self.attended {
            true => text.to_owned(),
            false if text.contains("[hook]\n") => text.replace("[hook]\n", "[hook]\nattendant = false\n"),
            false => format!("[hook]\nattendant = false\n{text}"),
        };
        fs::write(self.path("config.toml"), text).unwrap();
    }

    fn environment(&self) -> [(&'static str, OsString); 3] {
        [
            ("FSNAP_STATE", self.path("state").into()),
            ("FSNAP_CONFIG", self.path("config.toml").into()),
            ("FSNAP_CRIU", Criu::find().program().into()),
        ]
    }

    /// A command of fsnap.
    pub(crate) fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.command_of(Path::new(env!("CARGO_BIN_EXE_fsnap")));
        command.args(args);
        command
    }

    /// A command with the environment of this site.
    pub(crate) fn command_of(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.envs(self.environment()).stdin(Stdio::null());
        command
    }

    /// Runs fsnap, which must succeed, and returns its output without the last newline.
    pub(crate) fn ok<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> String {
        let mut command = self.command(args);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Runs fsnap, which must succeed, and reads its JSON.
    pub(crate) fn json<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// The ids of all checkpoints, newest first.
    pub(crate) fn ids(&self) -> Vec<String> {
        let log = self.json(["log", "--json"]);
        log.as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap().to_owned()).collect()
    }

    /// An oracle that writes to every volume.
    pub(crate) fn oracle(&self, kinds: &[Kind], pace: u32) -> Oracle {
        Oracle::start(self.new_path("reports"), &self.volumes, kinds, pace)
    }

    /// An oracle that costs little, for cases that are about something else.
    pub(crate) fn small_oracle(&self) -> Oracle {
        self.oracle(&[Kind::Append, Kind::Overwrite, Kind::Rename, Kind::Volumes], 1000)
    }

    /// A program that is CRIU, with further lines of shell before and after a restore.
    pub(crate) fn engine(&self, before: &str, after: &str) -> PathBuf {
        let (engine, criu) = (self.new_path("engine"), Criu::find());
        let criu = criu.program().display();
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = restore ] || exec '{criu}' \"$@\"\n{before}\n'{criu}' \"$@\" || exit 1\n{after}\n"
        );
        fs::write(&engine, script).unwrap();
        fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).unwrap();
        engine
    }

    /// CRIU, with the environment of this site.
    pub(crate) fn criu(&self) -> Criu {
        self.environment().into_iter().fold(Criu::find(), |criu, (name, value)| criu.env(name, value))
    }

    /// A new directory for images.
    pub(crate) fn images(&self) -> PathBuf {
        let dir = self.new_path("images");
        fs::create_dir(&dir).unwrap();
        dir
    }

    /// Dumps the process, which runs on, with that action script.
    pub(crate) fn dump(&self, pid: i32, images: &Path, script: &Path) -> Result<(), CriuError> {
        self.criu().dump(pid, images, ["--action-script".as_ref(), script.as_os_str()])
    }

    /// Dumps the process, and returns the new checkpoint's id and the image directory.
    pub(crate) fn checkpoint(&self, pid: i32) -> (String, PathBuf) {
        let images = self.images();
        self.dump(pid, &images, &self.hook()).unwrap_or_else(|error| panic!("{error}"));
        (id_in(&images), images)
    }

    /// The same, where CRIU is told what `fsnap criu-args` says.
    pub(crate) fn checkpoint_as_told(&self, pid: i32) -> (String, PathBuf) {
        let images = self.images();
        let told = self.ok(["criu-args", &pid.to_string()]);
        let hook = self.hook();
        let args = ["--action-script".as_ref(), hook.as_os_str()].into_iter().chain(told.lines().map(OsStr::new));
        self.criu().dump(pid, &images, args).unwrap_or_else(|error| panic!("{error}"));
        (id_in(&images), images)
    }

    /// Dumps the process, which must fail; the images' directory, and what fsnap and CRIU said.
    pub(crate) fn failing_dump(&self, pid: i32, images: &Path, script: &Path) -> String {
        let dumped = self.dump(pid, images, script);
        let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
        match dumped {
            Err(CriuError::Failed { .. }) => log,
            other => panic!("the dump did not fail: {other:?}\n{log}"),
        }
    }

    /// Runs the next command, and makes sure that there are so many checkpoints and nothing else: no intent, and no image
    /// that belongs to none of them.
    pub(crate) fn holds_nothing_but(&self, checkpoints: usize) {
        assert_eq!(self.ids().len(), checkpoints, "checkpoints");
        let catalog = Catalog::open(&self.path("state"), Access::Read, LONG).unwrap();
        assert_eq!(catalog.intents().unwrap(), [], "half-done work");
        let files = fs::read_dir(self.path("state/intents")).into_iter().flatten();
        assert_eq!(files.map(|file| file.unwrap().file_name()).collect::<Vec<_>>(), [""; 0], "files of intents");
        for store in catalog.stores().unwrap() {
            let images = stores::open(&store, &Default::default()).unwrap().list().unwrap();
            let found: BTreeSet<_> = images.into_iter().map(|image| image.at).collect();
            assert_eq!(found, catalog.held(&store.identity).unwrap(), "images of the store at {}", store.place);
        }
        assert_eq!(self.rooms(), self.checkpoints_with_rooms(&catalog), "what is kept of files without names");
        self.ok(["verify"]);
    }
}

impl Site {
    /// The directories of what is kept of files without names.
    fn rooms(&self) -> BTreeSet<PathBuf> {
        let catalog = Catalog::open(&self.path("state"), Access::Read, LONG).unwrap();
        let stores = catalog.stores().unwrap();
        let stores = stores.iter().map(|store| stores::open(store, &Default::default()).unwrap());
        let places = stores.filter_map(|store| store.beside()).chain([self.path("state/unlinked")]);
        let entries = places.filter_map(|place| fs::read_dir(place).ok()).flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn checkpoints_with_rooms(&self, catalog: &Catalog) -> BTreeSet<PathBuf> {
        let mut rooms = BTreeSet::new();
        for checkpoint in catalog.checkpoints().unwrap() {
            for kept in checkpoint.kept.iter().filter(|kept| kept.lost.is_none()) {
                let store = kept.store.as_ref().and_then(|store| catalog.store(store).unwrap());
                let base = store.map(|store| stores::open(&store, &Default::default()).unwrap().beside().unwrap());
                let room = base.unwrap_or_else(|| self.path("state/unlinked")).join(checkpoint.id.to_string());
                assert!(room.join(kept.name()).is_file(), "{room:?} lacks {kept:?}");
                rooms.insert(room);
            }
        }
        rooms
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.ground.clear();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The id in the record that the hook left beside the images.
pub(crate) fn id_in(images: &Path) -> String {
    let record: Value = serde_json::from_slice(&fs::read(images.join("fsnap.json")).unwrap()).unwrap();
    record["checkpoint"].as_str().unwrap().to_owned()
}

/// Makes a subvolume.
pub(crate) fn create_subvolume(path: &Path) {
    run(Command::new("btrfs").args(["subvolume", "create"]).arg(path));
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", said(&output));
}

/// How a command ended and what it wrote, for messages.
pub(crate) fn said(output: &Output) -> String {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{}\n{stdout}{stderr}", output.status)
}

/// Kills a process that need not be a child of this one, and waits until it has ended.
pub(crate) fn end(pid: i32) {
    let pid = Pid::from_raw(pid).unwrap();
    let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
    let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
    let timeout = Timespec { tv_sec: LONG.as_secs().cast_signed(), tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)).unwrap();
    assert_eq!(ended, 1, "process {pid:?} did not end");
}
