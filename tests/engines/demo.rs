//! The demonstration, interrupted: nothing of it is left.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::Case;
use crate::containers::lay_over;
use crate::sandbox::{self, apart};
use crate::site::{Site, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("interrupted_it_leaves_nothing", || apart(interrupted_it_leaves_nothing)),
    ("failing_it_leaves_nothing", failing_it_leaves_nothing),
];

fn start(temp: &Path, path: &str) -> Child {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    for program in ["fsnap", "fsnap-oracle"] {
        let program = top.join("target/debug").join(program);
        assert!(program.exists(), "{program:?} does not exist: `cargo build --workspace` makes it");
    }
    // A shell cannot handle signals that it finds ignored, as they are for what runs in the background of another shell.
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP,INT,TERM").arg(top.join("tests/demo/demo.sh"));
    command.env("TMPDIR", temp).env("PATH", path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Checks that no file, process or loop device of it is there.
fn nothing_is_left(temp: &Path) {
    let files: Vec<_> = fs::read_dir(temp).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.is_empty(), "files are left: {files:?}");
    let name = temp.to_str().unwrap();
    for entry in fs::read_dir("/proc").unwrap() {
        let dir = entry.unwrap().path();
        let line = String::from_utf8_lossy(&fs::read(dir.join("cmdline")).unwrap_or_default()).into_owned();
        assert!(!line.contains(name), "a process is left: {line}");
        let mounts = fs::read_to_string(dir.join("mountinfo")).unwrap_or_default();
        assert!(!mounts.contains(name), "{dir:?} still sees a mount: {mounts}");
    }
    // The kernel takes a device apart when the last mount of it has gone, a moment later.
    wait_until("the end of the loop devices", || {
        let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
        devices
            .into_iter()
            .all(|device| !fs::read_to_string(device.join("loop/backing_file")).is_ok_and(|file| file.contains(name)))
    });
}

fn interrupted_it_leaves_nothing() {
    // What an administrator has set, it does not go by: this would refuse each of its checkpoints.
    let site = Site::new(&[]);
    lay_over(&site, "/etc");
    fs::create_dir_all("/etc/fsnap").unwrap();
    fs::write("/etc/fsnap/config.toml", "[audit]\npolicy = 'refuse'\n").unwrap();
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    // At these of the commands that it shows, and before the first one.
    for (number, moment) in [0, 1, 4, 6, 8, 13, 17, 26].into_iter().enumerate() {
        let temp = sandbox::scratch().join(format!("demo-{moment}"));
        fs::create_dir(&temp).unwrap();
        let mut demo = start(&temp, &std::env::var("PATH").unwrap());
        let mut output = BufReader::new(demo.stdout.take().unwrap());
        let (mut line, mut told) = (String::new(), String::new());
        let mut commands = 0;
        while commands < moment {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "it ended before command {moment}:\n{told}");
            commands += usize::from(line.starts_with("$ "));
            told.push_str(&line);
        }
        if moment == 0 {
            wait_until("its directory", || fs::read_dir(&temp).unwrap().next().is_some());
        }
        let signal = signals[number % signals.len()];
        nix::sys::signal::kill(Pid::from_raw(demo.id().cast_signed()), signal).unwrap();
        let status = demo.wait().unwrap();
        assert_eq!(status.code(), Some(128 + signal as i32), "{signal} at command {moment}: {line}");
        nothing_is_left(&temp);
    }
}

fn failing_it_leaves_nothing() {
    let temp = sandbox::scratch().join("demo-failing");
    let bin = sandbox::scratch().join("demo-bin");
    fs::create_dir(&temp).unwrap();
    fs::create_dir(&bin).unwrap();
    // In the middle of the first part, where processes run and a disk is mounted.
    fs::write(bin.join("cmp"), "#!/bin/sh\nexit 0\n").unwrap();
    fs::set_permissions(bin.join("cmp"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let output = start(&temp, &path).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("demo: ended with status 1; what it made is removed"), "{said}");
    nothing_is_left(&temp);
}
