//! Containers: what is installed by `fsnap install-hooks` is called by the real runc, and a second container stands beside the first.
//!
//! What is changed in /etc and /usr/libexec is laid over the machine's own, and seen by the case only.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libtest_mimic::Completion;
use serde_json::{Value, json};

use crate::killed::{killed_at_each_place, told_by_the_next};
use crate::runs::branch_path;
use crate::sandbox::apart;
use crate::site::{Site, Volume, run, said, wait_until};

/// A case that needs a runtime, and says if it is missing.
type Needy = (&'static str, fn() -> Completion);

pub(crate) const CASES: &[Needy] = &[
    ("a_container_of_runc_gets_a_twin", || apart(a_container_of_runc_gets_a_twin)),
    ("a_container_whose_criu_has_no_hook", || apart(a_container_whose_criu_has_no_hook)),
    ("a_crun_that_cannot_save_is_told", a_crun_that_cannot_save_is_told),
    ("who_restores_a_container_is_killed", who_restores_a_container_is_killed),
    ("who_saves_a_container_is_killed", who_saves_a_container_is_killed),
];

/// Makes changes to `dir` visible to this case only, which must run [`apart`].
pub(crate) fn lay_over(site: &Site, dir: &str) {
    let name = dir.replace('/', "-");
    let (upper, work) = (site.path(&format!("upper{name}")), site.path(&format!("work{name}")));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let options = format!("lowerdir={dir},upperdir={},workdir={}", upper.display(), work.display());
    run(Command::new("mount").args(["-t", "overlay", "fsnap-test", "-o", &options, dir]));
}

/// Containers of one site; they are deleted when it is dropped.
struct Runc<'a> {
    site: &'a Site,
    names: Vec<String>,
}

impl Drop for Runc<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = self.command().args(["delete", "--force", name]).output();
        }
    }
}

impl Runc<'_> {
    fn command(&self) -> Command {
        let mut command = self.site.command_of(Path::new("runc"));
        command.arg("--root").arg(self.site.path("runc"));
        command.arg("--criu").arg(fsnap_oracle::criu::Criu::find().program());
        command.stdout(Stdio::null());
        command
    }

    /// The first process of a container.
    fn pid(&self, name: &str) -> Value {
        let output = self.command().args(["state", name]).stdout(Stdio::piped()).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["pid"].clone()
    }

    /// The containers that there are.
    fn list(&self) -> Vec<String> {
        let output = self.command().args(["list", "--quiet"]).stdout(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// Starts a container that counts in these directories, and tells its name.
    fn start(&mut self, root: &Path, data: &Path) -> String {
        populate(root);
        let name = self.name("first");
        let bundle = self.bundle("first", root, data);
        self.ok(&["run", "--detach", "--bundle", bundle.to_str().unwrap(), &name]);
        counts_on(&[root, data]);
        name
    }

    /// A name that no other container of this machine has.
    fn name(&mut self, name: &str) -> String {
        // Control groups are named like their containers, and no namespace keeps those of other cases and programs away.
        let site = self.site.path("").display().to_string().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let name = format!("fsnap-test{site}-{}-{name}", self.names.len());
        self.names.push(name.clone());
        name
    }

    fn ok(&self, args: &[&str]) {
        // A container inherits these files, and may have none from outside.
        let status = self.command().args(args).stderr(Stdio::null()).status().unwrap();
        let logs = ["dump.log", "restore.log"].map(|log| fs::read_to_string(self.site.path("work").join(log)));
        let errors: Vec<_> = logs.iter().flatten().flat_map(|log| log.lines()).filter(|l| l.contains("rror")).collect();
        assert!(status.success(), "runc {args:?}: {status}\n{}", errors.join("\n"));
    }

    /// Makes the bundle of a container whose root file system and data are in these directories.
    fn bundle(&self, name: &str, root: &Path, data: &Path) -> PathBuf {
        let bundle = self.site.path(name);
        fs::create_dir(&bundle).unwrap();
        run(Command::new("runc").arg("spec").current_dir(&bundle));
        let path = bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let script = "i=0; while :; do i=$((i+1)); echo $i >/number; echo $i >/data/number; sleep 0.02; done";
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["/bin/sh", "-c", script]);
        config["root"] = json!({ "path": root, "readonly": false });
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/data", "type": "bind", "source": data, "options": ["bind", "rw"] }));
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        bundle
    }
}

/// Makes a root file system that counts.
pub(crate) fn populate(root: &Path) {
    for dir in ["bin", "proc", "dev", "sys", "data", "etc", "run", "tmp", "vol"] {
        fs::create_dir(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for program in ["sh", "sleep"] {
        symlink("busybox", root.join("bin").join(program)).unwrap();
    }
}

pub(crate) fn number(file: &Path) -> u64 {
    fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Waits until a container has counted on in each of its directories.
pub(crate) fn counts_on(dirs: &[&Path]) {
    for dir in dirs {
        let before = number(&dir.join("number"));
        wait_until(&format!("the next number in {dir:?}"), || number(&dir.join("number")) > before);
    }
}

/// The numbers in directories that a container writes in this order, which must be of one instant; the smallest.
pub(crate) fn of_one_instant(dirs: &[&Path]) -> u64 {
    let numbers: Vec<u64> = dirs.iter().map(|dir| number(&dir.join("number"))).collect();
    let (first, last) = (numbers[0], numbers[numbers.len() - 1]);
    assert!(numbers.is_sorted_by(|a, b| a >= b) && first <= last + 1, "{numbers:?}");
    last
}

fn a_container_of_runc_gets_a_twin() -> Completion {
    let site = Site::new(&[Volume::Btrfs, Volume::Btrfs]);
    for dir in ["/etc", "/usr/libexec"] {
        lay_over(&site, dir);
    }
    let mut runc = Runc { site: &site, names: Vec::new() };
    let told = site.ok(["install-hooks", "runc"]);
    assert!(told.contains("write /etc/criu/runc.conf"), "{told}");
    let (root, data) = (site.volumes[0].clone(), site.volumes[1].clone());
    populate(&root);
    let [first, second, third] = ["first", "second", "third-of-hooks"].map(|name| runc.name(name));
    let bundle = runc.bundle("first", &root, &data);
    runc.ok(&["run", "--detach", "--bundle", bundle.to_str().unwrap(), &first]);
    counts_on(&[&root, &data]);
    let (images, work) = (site.images(), site.path("work"));
    let (images, work) = (images.to_str().unwrap(), work.to_str().unwrap());
    let places = ["--image-path", images, "--work-path", work];
    runc.ok(&[&["checkpoint", "--leave-running"], &places[..], &[&first]].concat());
    counts_on(&[&root, &data]);
    // The root file system and the bind mount are of one instant.
    let checkpoint = site.json(["show", "--json", "@latest"]);
    let members = checkpoint["members"].as_array().unwrap();
    assert_eq!(members.iter().map(|member| &member["volume"]).collect::<Vec<_>>(), ["v0", "v1"], "{checkpoint}");
    assert!(members.iter().all(|member| member["consistency"] == "point-in-time"), "{checkpoint}");
    site.ok(["branch", "@latest", "twin"]);
    let (twin_root, twin_data) = (branch_path(&site, "twin", 0), branch_path(&site, "twin", 1));
    of_one_instant(&[&twin_root, &twin_data]);
    let bundle = runc.bundle("second", &twin_root, &twin_data);
    runc.ok(&[&["restore", "--detach", "--bundle", bundle.to_str().unwrap()], &places[..], &[&second]].concat());
    counts_on(&[&twin_root, &twin_data]);
    counts_on(&[&root, &data]);
    // The same in one step.
    let (state, bundle) = (site.path("runc").display().to_string(), site.path("first").display().to_string());
    site.ok(["engine", "runc", "restore", "@latest", "--root", &state, "--bundle", &bundle, "--name", &third]);
    counts_on(&[&branch_path(&site, &third, 0), &branch_path(&site, &third, 1)]);
    counts_on(&[&root, &data]);
    // A hook that fails fails the checkpoint, and the container runs on.
    let mut command = runc.command();
    let again = site.images();
    command
        .args(["checkpoint", "--leave-running", "--image-path"])
        .arg(&again)
        .arg("--work-path")
        .arg(work)
        .arg(&first);
    let failed = command.env("FSNAP_FAILPOINT", "hook:frozen=kill").output().unwrap();
    assert!(!failed.status.success(), "{}", said(&failed));
    counts_on(&[&root, &data]);
    site.ok(["install-hooks", "runc", "--uninstall"]);
    assert!(!Path::new("/etc/criu/runc.conf").exists());
    Completion::Completed
}

fn a_container_whose_criu_has_no_hook() -> Completion {
    let site = Site::new(&[Volume::Btrfs, Volume::Btrfs]);
    for dir in ["/etc", "/usr/libexec"] {
        lay_over(&site, dir);
    }
    let mut runc = Runc { site: &site, names: Vec::new() };
    let (root, data) = (site.volumes[0].clone(), site.volumes[1].clone());
    populate(&root);
    let [first, second, third] = ["outer", "twin", "third"].map(|name| runc.name(name));
    let bundle = runc.bundle("first", &root, &data);
    runc.ok(&["run", "--detach", "--bundle", bundle.to_str().unwrap(), &first]);
    counts_on(&[&root, &data]);
    let (images, state) = (site.new_path("outer").display().to_string(), site.path("runc").display().to_string());
    let begin = ["engine", "runc", "checkpoint", "--root", &state, "--image-path", &images];
    let id = site.ok([&begin[..], &["-m", "from outside", &first]].concat());
    counts_on(&[&root, &data]);
    site.holds_nothing_but(1);
    let checkpoint = site.json(["show", "--json", &id]);
    let classes = checkpoint["members"].as_array().unwrap().iter().map(|member| member["consistency"].clone());
    assert_eq!(classes.collect::<Vec<_>>(), ["point-in-time"; 2], "{checkpoint}");
    assert_eq!(checkpoint["message"], "from outside");
    // A second container stands beside the first, on its own branch, and a third beside both.
    fs::remove_dir_all(bundle).unwrap();
    let restore = ["engine", "runc", "restore", "--root", &state, &id, "--name"];
    let mut twins = Vec::new();
    for name in [&second, &third] {
        let told = site.json([&restore[..], &[name, "--json"]].concat());
        assert_eq!((&told["name"], &told["container"]), (&name.as_str().into(), &name.as_str().into()), "{told}");
        assert_eq!(runc.pid(name), told["pid"], "{told}");
        let [twin_root, twin_data] = [0, 1].map(|index| branch_path(&site, name, index));
        counts_on(&[&twin_root, &twin_data]);
        twins.push((twin_root, twin_data));
    }
    for (root, data) in twins.iter().chain([&(root.clone(), data.clone())]) {
        counts_on(&[root, data]);
    }
    // With hooks as well, one of both takes the snapshots.
    site.ok(["install-hooks", "runc"]);
    let images = site.new_path("hooked").display().to_string();
    let hooked = site.ok(["engine", "runc", "checkpoint", "--root", &state, "--image-path", &images, &second]);
    site.holds_nothing_but(2);
    assert_eq!(site.json(["show", "--json", &hooked])["branch"], second.as_str());
    // What runc cannot do undoes everything, and nothing stays frozen.
    let fails = |args: &[&[&str]], says: &str| {
        let failed = site.command(args.concat()).output().unwrap();
        assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
        assert!(said(&failed).contains(says), "{}", said(&failed));
    };
    let other = site.new_path("other").display().to_string();
    let again = ["engine", "runc", "checkpoint", "--root", &state, "--image-path", &other];
    fails(&[&again, &["no-such-container"]], "does not exist");
    fails(&[&again, &[&first, "--", "--no-such-option"]], "runc could not save the container");
    fails(&[&restore, &[&second]], "exists already");
    fails(&[&restore, &["fourth", "--", "--no-such-option"]], "runc could not restore the container");
    fails(&[&restore, &["fourth", "--bundle", "/nowhere"]], "/nowhere");
    counts_on(&[&root, &data]);
    site.holds_nothing_but(2);
    assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 2);
    assert_eq!(fs::read_dir(site.path("state/bundles")).unwrap().count(), 2);
    Completion::Completed
}

fn a_crun_that_cannot_save_is_told() -> Completion {
    let version = Command::new("crun").arg("--version").output();
    match version {
        Ok(version) if !String::from_utf8_lossy(&version.stdout).contains("+CRIU") => {}
        Ok(_) => return Completion::ignored_with("this crun was built with CRIU"),
        Err(error) => panic!("crun: {error}: tests/support/setup.sh installs it"),
    }
    let site = Site::new(&[]);
    let root = site.path("root");
    let refused = site.command(["install-hooks", "crun", "--root"]).arg(&root).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("this crun was built without CRIU"), "{}", said(&refused));
    assert!(!root.exists());
    let images = site.path("images");
    let refused = site.command(["engine", "crun", "checkpoint", "any", "--image-path"]).arg(&images).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("this crun was built without CRIU"), "{}", said(&refused));
    assert!(!images.exists());
    Completion::Completed
}

/// Of a second container of which nobody was told, nothing is left after the next command.
fn who_restores_a_container_is_killed() -> Completion {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let mut runc = Runc { site: &site, names: Vec::new() };
    let (root, data) = (&site.volumes[0], &site.volumes[1]);
    let first = runc.start(root, data);
    let twin = runc.name("twin");
    let (images, state) = (site.new_path("outer").display().to_string(), site.path("runc").display().to_string());
    let id = site.ok(["engine", "runc", "checkpoint", "--root", &state, "--image-path", &images, &first]);
    let restore =
        |name: &str| site.command(["engine", "runc", "restore", "--root", &state, &id, "--json", "--name", name]);
    let undone =
        |name: &str| format!("fsnap: recovered: the restore onto branch {name} was not finished; it is undone\n");
    let nothing_is_left = || {
        assert_eq!(site.ok(["branches", "--json"]), "[]");
        assert_eq!(runc.list(), [first.as_str()]);
        for dir in ["state/bundles", "state/restores"] {
            let names = fs::read_dir(site.path(dir)).into_iter().flatten().map(|entry| entry.unwrap().file_name());
            assert_eq!(names.collect::<Vec<_>>(), [""; 0], "{dir}");
        }
        site.holds_nothing_but(1);
        counts_on(&[root, data]);
    };
    let mut places = 0;
    loop {
        places += 1;
        let output = restore(&twin).env("FSNAP_FAILPOINT", format!("{places}=kill")).output().unwrap();
        if output.status.success() {
            break;
        }
        assert_eq!(output.status.signal(), Some(9), "{}", said(&output));
        nothing_is_left();
    }
    assert!(places > 5, "there were only {} places", places - 1);
    // One that was told of is nobody's to undo.
    assert_eq!(site.ok(["recover"]), "nothing is half done");
    counts_on(&[&branch_path(&site, &twin, 0), &branch_path(&site, &twin, 1)]);
    runc.ok(&["delete", "--force", &twin]);
    site.ok(["rm", "--branch", &twin]);
    // The name is that of a container which is somebody else's.
    let killed = restore(&first).env("FSNAP_FAILPOINT", "container:bundled=kill").output().unwrap();
    assert_eq!(killed.status.signal(), Some(9), "{}", said(&killed));
    assert_eq!(told_by_the_next(&site), undone(&first));
    nothing_is_left();
    // The runtime works on when its caller is gone, and is undone when it has ended.
    let (here, go) = (site.path("here"), site.path("go"));
    let engine = stuck(&site, &here, &go);
    let mut restoring = restore(&twin).env("FSNAP_CRIU", &engine).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the engine", || here.exists());
    assert_eq!(site.ok(["recover"]), "nothing is half done");
    restoring.kill().unwrap();
    restoring.wait().unwrap();
    assert_eq!(told_by_the_next(&site), "");
    assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 1);
    let refused = restore(&twin).output().unwrap();
    assert!(said(&refused).contains("a restore onto the branch"), "{}", said(&refused));
    fs::write(&go, "").unwrap();
    wait_until("the second container", || runc.list().contains(&twin));
    let mut told = String::new();
    wait_until("the end of the runtime", || {
        told = told_by_the_next(&site);
        !told.is_empty()
    });
    assert_eq!(told, undone(&twin));
    nothing_is_left();
    Completion::Completed
}

/// CRIU that is `here`, and waits until it may `go` on.
fn stuck(site: &Site, here: &Path, go: &Path) -> PathBuf {
    let criu = fsnap_oracle::criu::Criu::find();
    let (here, go, criu) = (here.display(), go.display(), criu.program().display());
    let wait = format!("{{ : >'{here}'; until [ -e '{go}' ]; do sleep 0.01; done; }}");
    program(site, &format!("#!/bin/sh\n[ \"$1\" = swrk ] && {wait}\nexec '{criu}' \"$@\"\n"))
}

/// CRIU that is `here` when it comes to that action, and waits until it may `go` on.
fn stuck_at(site: &Site, action: &str, here: &Path, go: &Path) -> PathBuf {
    let criu = fsnap_oracle::criu::Criu::find();
    let (here, go, criu) = (here.display(), go.display(), criu.program().display());
    let script = format!(
        "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = {action} ] || exit 0\n: >'{here}'; until [ -e '{go}' ]; do sleep 0.01; done\n"
    );
    let script = program(site, &script);
    let settings = site.new_path("criu.conf");
    fs::write(&settings, format!("action-script {}\n", script.display())).unwrap();
    program(site, &format!("#!/bin/sh\nCRIU_CONFIG_FILE='{}' exec '{criu}' \"$@\"\n", settings.display()))
}

fn program(site: &Site, script: &str) -> PathBuf {
    let path = site.new_path("program");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Also while its engine is at work.
fn who_saves_a_container_is_killed() -> Completion {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let mut runc = Runc { site: &site, names: Vec::new() };
    let (root, data) = (&site.volumes[0], &site.volumes[1]);
    let first = runc.start(root, data);
    let state = site.path("runc").display().to_string();
    let save = |images: &Path| {
        let mut command = site.command(["engine", "runc", "checkpoint", "--root", &state, &first, "--image-path"]);
        command.arg(images);
        command
    };
    let mut sealed = killed_at_each_place(&site, 8, || save(&site.new_path("outer")), || counts_on(&[root, data]));
    // The runtime works on when its caller is gone.
    for action in ["pre-dump", "post-dump"] {
        let (here, go) = (site.new_path("here"), site.new_path("go"));
        let engine = stuck_at(&site, action, &here, &go);
        let mut saving =
            save(&site.new_path("outer")).env("FSNAP_CRIU", &engine).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the engine", || here.exists());
        saving.kill().unwrap();
        saving.wait().unwrap();
        if action == "pre-dump" {
            counts_on(&[root, data]);
        }
        site.holds_nothing_but(sealed);
        // Who comes next waits for it.
        let mut next = save(&site.new_path("outer")).stdout(Stdio::null()).spawn().unwrap();
        fs::write(&go, "").unwrap();
        assert!(next.wait().unwrap().success(), "after {action}");
        sealed += 1;
        counts_on(&[root, data]);
        site.holds_nothing_but(sealed);
    }
    Completion::Completed
}
