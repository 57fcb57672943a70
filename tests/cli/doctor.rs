//! What `fsnap doctor` says is true: each statement is compared with what the test finds by itself, or with what the
//! command that relies on it then does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::site::{NOBODY, Shell, Site};

/// What was said: whether it works, and the rest of the line.
fn said(shell: &Shell<'_>, environment: &str, dir: &str, what: &str) -> (bool, String) {
    let text = shell.run(&format!("{environment} fsnap doctor --json {dir}"));
    let findings: Value = serde_json::from_str(&text).unwrap();
    let found: Vec<&Value> = findings.as_array().unwrap().iter().filter(|one| one["what"] == what).collect();
    assert_eq!(found.len(), 1, "{what}: {text}");
    let (works, why) = (found[0]["works"].as_bool().unwrap(), found[0]["why"].as_str().unwrap().to_owned());
    let line = format!("{} {what}: {why}", if works { "ok " } else { "no " });
    let lines = shell.run(&format!("{environment} fsnap doctor {dir}"));
    assert!(lines.lines().any(|one| one == line), "JSON and text differ: {line:?} is not in\n{lines}");
    (works, why)
}

const BACKENDS: [&str; 5] = ["btrfs", "dm-thin", "nilfs2", "layers", "rsync"];

/// `init` is asked what `doctor` was asked: what was praised is made at that place, what was not fails for that reason.
fn compare_with_init(site: &Site, dir: &str, within: &str, works: &[&str]) {
    let shell = site.in_dir(dir);
    for backend in BACKENDS {
        let (ok, why) = said(&shell, "", within, backend);
        assert_eq!(ok, works.contains(&backend), "{backend}: {why}");
        let name = within.rsplit('/').next().unwrap();
        let line = format!("fsnap init --backend {backend} {within}");
        if ok {
            let place = why.rsplit_once(" would be in ").unwrap().1;
            let told = shell.run(&line);
            assert!(told.contains(&format!(": {backend} snapshots in {place}")), "{told:?} is not what {why:?} says");
            assert!(Path::new(place).is_dir(), "{place}");
            let (ok, why) = said(&shell, "", within, "directory");
            assert!(ok && why.ends_with(&format!("is the volume {name}")), "{why}");
            shell.run(&format!("fsnap rm --volume {name}"));
        } else {
            let told = shell.fail(&line);
            assert!(told.starts_with(&format!("fsnap: error: {why}")), "{told:?} is not what {why:?} says");
        }
    }
}

#[test]
fn backends_are_what_init_finds() {
    compare_with_init(&Site::plain(), ".", "db", &["rsync"]);
    let site = Site::btrfs();
    compare_with_init(&site, "fs", "db", &["btrfs", "rsync"]);
    fs::create_dir(site.path("fs/plain")).unwrap();
    compare_with_init(&site, "fs", "plain", &["rsync"]);
    let site = Site::unprivileged();
    compare_with_init(&site, ".", "db", &["rsync"]);
    let (_, why) = said(&site.shell(), "", "db", "btrfs");
    assert!(why.contains("does not lie on btrfs"), "{why}");
    let mapper = Path::new("/dev/mapper/control").exists();
    let (_, why) = said(&site.shell(), "", "db", "dm-thin");
    assert_eq!(why.contains("no device-mapper"), !mapper, "{why}");
}

#[test]
fn a_user_without_privileges_is_told_where_the_store_will_be() {
    let site = Site::unprivileged();
    // The place beside the directory belongs to somebody else: only the state directory is left.
    fs::create_dir(site.path("foreign")).unwrap();
    fs::create_dir(site.path("foreign/theirs")).unwrap();
    let chowned = Command::new("chown").arg(NOBODY.to_string()).arg(site.path("foreign/theirs")).status().unwrap();
    assert!(chowned.success());
    compare_with_init(&site, ".", "foreign/theirs", &["rsync"]);
    let (ok, why) = said(&site.shell(), "FSNAP_STATE=$T/foreign/state", "foreign/theirs", "rsync");
    assert!(!ok && why.contains("cannot be written"), "{why}");
    let (ok, why) = said(&site.shell(), "FSNAP_STATE=$T/foreign/state", "db", "directory");
    assert!(!ok && why.contains("foreign cannot be written by this user"), "{why}");
    site.fail("FSNAP_STATE=$T/foreign/state fsnap init db");
}

#[test]
fn directories_are_what_init_takes() {
    let mut site = Site::plain();
    site.set("XDG_STATE_HOME", "/nonexistent");
    site.run("fsnap init db && mkdir free && ln -s free link && mkdir -p db/sub && echo x >file");
    site.run("mkdir outer web && fsnap init --store outer/store web");
    for (dir, reason) in [
        ("nothing", "cannot open the directory"),
        ("link", "it is a symbolic link"),
        ("file", "it is not a directory"),
        ("db/sub", "it lies inside the volume db"),
        (".", "fsnap's own state lies in it"),
        ("/", "it is the root of everything"),
        ("outer", "outer/store lies in it"),
    ] {
        let (ok, why) = said(&site.shell(), "", dir, "directory");
        assert!(!ok && why.contains(reason), "{dir}: {why}");
        assert!(site.fail(&format!("fsnap init {dir}")).contains(reason), "{dir}: {why}");
    }
    let (ok, why) = said(&site.shell(), "", "db", "directory");
    assert!(ok && why.ends_with("db is the volume db"), "{why}");
    let (ok, why) = said(&site.shell(), "", "free", "directory");
    assert!(ok, "{why}");
    site.run(&format!("cd / && {}", why.split('`').nth(1).unwrap()));
}

/// A CRIU of this machine that works here, as the tests of engines use it.
fn real_criu() -> PathBuf {
    let prepared = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/criu/criu");
    assert!(prepared.is_file(), "no CRIU at {}: run tests/support/setup.sh", prepared.display());
    prepared
}

/// What it says of itself: "Version: 4.1.1".
fn version_of(criu: &Path) -> String {
    let output = Command::new(criu).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let version = text.lines().find_map(|line| line.strip_prefix("Version: ")).unwrap().to_owned();
    if version.matches('.').count() == 1 { version + ".0" } else { version }
}

#[test]
fn criu_is_what_is_installed() {
    let mut site = Site::plain();
    let real = real_criu();
    // Administrators' directories are looked into whatever the search path is.
    let installed = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(|dir| Path::new(dir).join("criu"));
    let installed = installed.iter().find(|program| program.is_file());
    fs::create_dir(site.path("empty")).unwrap();
    let path = |dir: &str| format!("PATH=$T/{dir} {}", site.run("command -v env"));
    let fsnap = site.run("command -v fsnap");
    let ask = |environment: &str| {
        let text = site.run(&format!("{environment} {fsnap} doctor db"));
        text.lines().find(|line| line[4..].starts_with("criu: ")).unwrap().to_owned()
    };
    let line = ask(&path("empty"));
    match installed {
        Some(program) => assert!(line.contains(&format!("{} {}", program.display(), version_of(program))), "{line}"),
        None => assert!(
            line.starts_with("no  criu: CRIU was not found")
                && line.contains(": no directory of PATH has a program criu"),
            "{line}"
        ),
    }
    fs::create_dir(site.path("with")).unwrap();
    std::os::unix::fs::symlink(&real, site.path("with/criu")).unwrap();
    let works = |program: &Path| format!("ok  criu: {} {} works on this kernel", program.display(), version_of(&real));
    assert_eq!(ask(&path("with")), works(&site.path("with/criu")));
    assert_eq!(ask(&format!("FSNAP_CRIU={}", real.display())), works(&real));
    assert_eq!(ask("FSNAP_CRIU=with/criu"), works(&site.path("with/criu")), "a relative path is the shell's");
    let line = ask("FSNAP_CRIU=/nonexistent/criu");
    assert!(line.starts_with("no  criu: CRIU was not found: there is no program /nonexistent/criu; install"), "{line}");
    let line = ask("FSNAP_CRIU=$T/db/a");
    assert!(line.starts_with("no  criu: cannot run ") && line.ends_with("Permission denied (os error 13)"), "{line}");
    assert_eq!(ask("FSNAP_CRIU=/bin/true"), "no  criu: cannot run \"/bin/true\": it does not say its version");
    // One that answers, and is older than this kernel; and one that is not content.
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = kernel.split(['.', '-']).take(2).map(|number| number.parse().unwrap()).collect();
    let script = |version: &str| {
        format!("#!/bin/sh\n[ $1 = check ] && {{ echo no luck >&2; exit 1; }}\necho Version: {version}\n")
    };
    for (version, expected) in [("3.17.1", "is too old for this kernel: 4.1.0"), ("9.8", "9.8.0 says: no luck")] {
        fs::write(site.path("criu"), script(version)).unwrap();
        site.run("chmod +x criu");
        let expected = if numbers >= vec![6, 13] { expected } else { "says: no luck" };
        assert!(ask("FSNAP_CRIU=$T/criu").contains(expected), "{}", ask("FSNAP_CRIU=$T/criu"));
    }
    site.set("FSNAP_CRIU", "");
}

#[test]
fn the_freezer_freezes() {
    let site = Site::plain();
    let (ok, why) = said(&site.shell(), "", "db", "freezer");
    let unified = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let unified = unified.lines().find(|line| line.contains(" - cgroup2 ")).map(|line| line.split(' ').nth(4).unwrap());
    let Some(dir) = unified else {
        assert!(!ok && why.contains("no unified hierarchy"), "{why}");
        return;
    };
    assert!(why.starts_with(&format!("control groups below {} can be frozen", dir.trim_end_matches('/'))), "{why}");
    let group = Path::new(dir).join(format!("fsnap-doctor-{}", std::process::id()));
    fs::create_dir(&group).unwrap();
    let frozen = fs::write(group.join("cgroup.freeze"), "1");
    fs::remove_dir(&group).unwrap();
    assert!(ok && frozen.is_ok(), "{why}: {frozen:?}");
    let (ok, why) = said(&Site::unprivileged().shell(), "", "db", "freezer");
    assert!(!ok && why.contains("cannot be frozen by this user: Permission denied"), "{why}");
}

#[test]
fn runtimes_are_what_hooks_can_be_installed_for() {
    let site = Site::plain();
    let shell = site.shell();
    for runtime in ["runc", "crun"] {
        let (ok, why) = said(&shell, "", "db", runtime);
        let line = format!("fsnap install-hooks --dry-run --root $T/root {runtime}");
        if ok {
            assert!(shell.run(&line).contains(&format!("/etc/criu/{runtime}.conf")), "{why}");
        } else {
            assert!(shell.fail(&line).starts_with(&format!("fsnap: error: {why}")), "{why}");
        }
        let line = format!("PATH=/nonexistent {} doctor db", site.run("command -v fsnap"));
        let none = format!("no  {runtime}: no directory of PATH has a program {runtime}\n");
        assert!(site.run(&line).contains(&none), "{}", site.run(&line));
    }
    let works = ["runc", "crun"].map(|runtime| said(&shell, "", "db", runtime).0).contains(&true);
    let (ok, why) = said(&shell, "", "db", "podman");
    assert_eq!(ok, works && !shell.run("command -v podman || true").is_empty(), "{why}");
}

#[test]
#[cfg(feature = "fuse")]
fn fuse_is_what_overlay_needs() {
    let site = Site::plain();
    let device = fs::File::options().read(true).write(true).open("/dev/fuse");
    let (ok, why) = said(&site.shell(), "", "db", "fuse");
    assert_eq!(ok, device.is_ok(), "{why}");
    if ok {
        site.run("mkdir mnt && fsnap overlay db changes mnt && cat mnt/a && fsnap umount mnt");
    }
    let site = Site::unprivileged();
    let (ok, why) = said(&site.shell(), "", "db", "fuse");
    let mounts = "mkdir mnt && fsnap overlay db changes mnt && cat mnt/a && fsnap umount mnt";
    let mounted = site.shell().output(mounts);
    assert_eq!(ok, mounted.status.success(), "{why}: {mounted:?}");
    if why.starts_with("/dev/fuse cannot be opened") {
        return;
    }
    let line = format!("PATH=/nonexistent {} doctor db", site.run("command -v fsnap"));
    assert!(site.run(&line).contains("no  fuse: without root, fusermount3 is needed"), "{}", site.run(&line));
}

#[test]
fn the_catalog_is_what_can_be_used() {
    let mut site = Site::plain();
    let catalog = |site: &Site| said(&site.shell(), "", "db", "catalog");
    let file = site.path("state/catalog.db").display().to_string();
    let none = format!("there is none at {file} yet: `fsnap init DIR` makes it");
    assert_eq!(catalog(&site), (false, none));
    assert!(!site.path("state").exists(), "to be asked makes nothing");
    site.run("fsnap init db && fsnap checkpoint");
    assert_eq!(catalog(&site), (true, format!("{file}: 1 checkpoint, 0 pending changes")));
    site.run("fsnap checkpoint");
    assert_eq!(catalog(&site), (true, format!("{file}: 2 checkpoints, 0 pending changes")));

    site.mount("small", 32 << 20, &["mkfs.ext4", "-q"]);
    site.set("FSNAP_STATE", &site.path("small/state").display().to_string());
    site.run("fsnap init db --store small/store && fsnap checkpoint && mount -o remount,ro small");
    let (ok, why) = catalog(&site);
    assert!(!ok && why.contains("1 checkpoint, 0 pending") && why.contains("it can only be read"), "{why}");
    assert!(why.ends_with("Read-only file system (os error 30)"), "{why}");
    site.run("fsnap log");
    site.fail("fsnap checkpoint");
    site.run("mount -o remount,rw small && head -c 200 small/state/catalog.db >x && cp x small/state/catalog.db");
    let (ok, why) = catalog(&site);
    assert!(!ok && why.contains("catalog.db is damaged: it was truncated"), "{why}");
    site.fail("fsnap log");
}
