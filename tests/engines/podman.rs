//! Podman, as Debian has it: its own commands save a container with the files of the same instant, and restore it beside the first.
//!
//! Everything that podman keeps lies in the site: it is told so by the two files that it reads its settings from.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Case;
use crate::containers::{counts_on, lay_over, number, of_one_instant, populate};
use crate::runs::branch_path;
use crate::sandbox::apart;
use crate::site::{Site, Volume, run, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("a_container_of_podman_gets_a_twin", || apart(a_container_of_podman_gets_a_twin)),
    ("a_container_of_podman_whose_hook_is_killed", || apart(a_container_of_podman_whose_hook_is_killed)),
];

/// The machine's directories that fsnap writes to.
const LAID_OVER: [&str; 2] = ["/etc", "/usr/libexec"];

/// Counts in memory, in the root file system, in a bind mount and in a volume of podman's.
const COUNT: &str =
    "i=0; while :; do i=$((i+1)); for dir in / /data /vol; do echo $i >$dir/number; done; sleep 0.02; done";

/// Podman, and the containers of one site; they are removed when it is dropped.
struct Podman<'a> {
    site: &'a Site,
}

impl<'a> Podman<'a> {
    fn new(site: &'a Site) -> Self {
        for dir in LAID_OVER {
            lay_over(site, dir);
        }
        let dir = site.path("podman").display().to_string();
        let settings = format!(
            "[engine]\nruntime = 'runc'\ncgroup_manager = 'cgroupfs'\nevents_logger = 'none'\nlock_type = 'file'\n\
             static_dir = '{dir}/static'\ntmp_dir = '{dir}/tmp'\nvolume_path = '{dir}/volumes'\n\
             [engine.runtimes]\nrunc = ['{dir}/runc']\n"
        );
        let runc = format!("#!/bin/sh\nexec runc --root '{dir}/containers' \"$@\"\n");
        fs::create_dir(&dir).unwrap();
        fs::write(site.path("podman/runc"), runc).unwrap();
        fs::set_permissions(site.path("podman/runc"), fs::Permissions::from_mode(0o755)).unwrap();
        let storage = format!("[storage]\ndriver = 'vfs'\ngraphroot = '{dir}/storage'\nrunroot = '{dir}/run'\n");
        fs::write(site.path("containers.conf"), settings).unwrap();
        fs::write(site.path("storage.conf"), storage).unwrap();
        // Podman hands nothing of its environment on to the runtime but the search path: hooks find the state directory in fsnap's settings.
        fs::create_dir_all("/etc/fsnap").unwrap();
        fs::write(
            "/etc/fsnap/config.toml",
            format!("state = '{}'\n[hook]\ndeadline_seconds = 60\n", site.path("state").display()),
        )
        .unwrap();
        Self { site }
    }

    fn with_settings(&self, mut command: Command) -> Command {
        // The engine is the first `criu` of the search path.
        let criu = fsnap_oracle::criu::Criu::find().program().parent().unwrap().to_owned();
        let path = std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect::<Vec<_>>();
        command.env("PATH", std::env::join_paths([criu].into_iter().chain(path)).unwrap());
        command.env("CONTAINERS_CONF", self.site.path("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", self.site.path("storage.conf"));
        command
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.with_settings(self.site.command_of(Path::new("podman")));
        command.args(args);
        command
    }

    /// Runs podman, which must succeed, and returns its output.
    ///
    /// Into files: what it leaves running, such as the container's monitor, may keep them open.
    fn ok(&self, args: &[&str]) -> String {
        let (out, err) = (self.site.new_path("out"), self.site.new_path("err"));
        let mut command = self.command(args);
        command.stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(&err).unwrap());
        let status =
            command.status().unwrap_or_else(|error| panic!("podman: {error}: tests/support/setup.sh installs it"));
        assert!(status.success(), "{args:?}: {status}\n{}", fs::read_to_string(err).unwrap());
        fs::read_to_string(out).unwrap().trim_end().to_owned()
    }

    /// Makes a container that counts in these directories: its root file system, a bind mount, and a volume of podman's.
    fn create(&self, name: &str, dirs: [&Path; 3]) {
        let [root, data, volume] = dirs.map(|dir| dir.display().to_string());
        let device = format!("device={volume}");
        self.ok(&["volume", "create", "-o", "type=none", "-o", "o=bind", "-o", &device, &format!("of-{name}")]);
        let (data, volume) = (format!("{data}:/data"), format!("of-{name}:/vol"));
        let options = ["create", "--name", name, "--network", "host", "-v", &data, "-v", &volume, "--rootfs", &root];
        self.ok(&[&options[..], &["/bin/sh", "-c", COUNT]].concat());
    }

    /// Where podman keeps the images of a container's checkpoint.
    fn images(&self, name: &str) -> PathBuf {
        let id = self.ok(&["inspect", "--format", "{{.Id}}", name]);
        self.site.path("podman/storage/vfs-containers").join(id).join("userdata/checkpoint")
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let _ = self.command(&["rm", "--all", "--force", "--time", "0"]).output();
    }
}

fn a_container_of_podman_gets_a_twin() {
    let site = Site::new(&[Volume::Btrfs, Volume::Btrfs, Volume::Rsync]);
    let podman = Podman::new(&site);
    let mut install = podman.with_settings(site.command(["install-hooks", "podman"]));
    let told = said(&install.output().unwrap());
    assert!(told.contains("write /etc/criu/runc.conf"), "{told}");
    let own = [0, 1, 2].map(|index| site.volumes[index].as_path());
    populate(own[0]);
    podman.create("first", own);
    podman.ok(&["start", "first"]);
    counts_on(&own);
    podman.ok(&["container", "checkpoint", "-R", "first"]);
    counts_on(&own);
    // The root file system, the bind mount and the volume are of one instant.
    let checkpoint = site.json(["show", "--json", "@latest"]);
    let members = checkpoint["members"].as_array().unwrap();
    assert_eq!(members.iter().map(|member| &member["volume"]).collect::<Vec<_>>(), ["v0", "v1", "v2"], "{checkpoint}");
    assert!(members.iter().all(|member| member["consistency"] == "point-in-time"), "{checkpoint}");
    site.holds_nothing_but(1);
    site.ok(["branch", "@latest", "twin"]);
    let twin = [0, 1, 2].map(|index| branch_path(&site, "twin", index));
    let twin = twin.each_ref().map(PathBuf::as_path);
    let saved = of_one_instant(&twin);
    // A container that was never up has no configuration to restore into.
    podman.create("second", twin);
    podman.ok(&["init", "second"]);
    podman.ok(&["stop", "--time", "0", "second"]);
    run(Command::new("cp").arg("-a").args([podman.images("first"), podman.images("second")]));
    podman.ok(&["container", "restore", "second"]);
    for dir in twin {
        wait_until(&format!("a number above {saved} in {dir:?}"), || number(&dir.join("number")) > saved);
    }
    counts_on(&own);
    assert_eq!(podman.ok(&["ps", "--format", "{{.Names}}"]).lines().count(), 2);
    // What fsnap refuses fails podman's checkpoint, and the container runs on.
    let settings = fs::read_to_string("/etc/fsnap/config.toml").unwrap();
    fs::write("/etc/fsnap/config.toml", settings + "[audit]\npolicy = 'refuse'\n").unwrap();
    let refused = podman.command(&["container", "checkpoint", "-R", "first"]).output().unwrap();
    assert!(!refused.status.success(), "{}", said(&refused));
    counts_on(&own);
    site.holds_nothing_but(1);
}

/// At each of its places, before the freeze and in the frozen window: the container runs on, and there is no checkpoint.
fn a_container_of_podman_whose_hook_is_killed() {
    let site = Site::new(&[Volume::Btrfs, Volume::Btrfs, Volume::Rsync]);
    let podman = Podman::new(&site);
    let own = [0, 1, 2].map(|index| site.volumes[index].as_path());
    populate(own[0]);
    podman.create("first", own);
    podman.ok(&["start", "first"]);
    fs::create_dir("/etc/criu").unwrap();
    for (sealed, action) in ["pre-dump", "post-dump"].into_iter().enumerate() {
        let came_through = (1..20).find(|place| {
            let hook = site.hook_after(action, &format!("export FSNAP_FAILPOINT={place}=kill"));
            fs::write("/etc/criu/runc.conf", format!("action-script {}\n", hook.display())).unwrap();
            let saved = podman.command(&["container", "checkpoint", "-R", "first"]).output().unwrap();
            counts_on(&own);
            site.holds_nothing_but(sealed + usize::from(saved.status.success()));
            saved.status.success()
        });
        assert!(came_through.is_some_and(|place| place > 3), "{action}: {came_through:?}");
    }
}
