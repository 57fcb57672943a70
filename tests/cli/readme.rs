//! The README is true: its tour is run as it is written, and shows what is written there.
//!
//! It runs in namespaces of its own, in which `/srv` is a fresh btrfs, and what else it writes to lies in the test's directory;
//! every process ends with them. Ids, times and pids differ from run to run, and are compared by their places.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use crate::redact::Redactor;
use crate::site::Site;

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// The fenced blocks of that language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(found) = line.strip_prefix("```") else { continue };
        let block = lines.by_ref().take_while(|line| *line != "```").map(|line| format!("{line}\n")).collect();
        if found == language {
            blocks.push(block);
        }
    }
    blocks
}

/// Replaces what differs from run to run.
fn normal(redactor: &Redactor, shown: &str) -> String {
    let redacted = redactor.redact(shown);
    let lines = redacted.lines().map(|line| match line.split_once(": process ") {
        Some((before, pids)) if pids.split(", under ").all(|pid| pid.parse::<u32>().is_ok()) => {
            format!("{before}: process PID, under PID\n")
        }
        _ => format!("{line}\n"),
    });
    lines.collect()
}

#[test]
fn the_tour_shows_what_is_written() {
    let tour = blocks(&readme(), "console").concat();
    let commands: Vec<&str> = tour.lines().filter_map(|line| line.strip_prefix("$ ")).collect();
    assert!(commands.len() > 20, "the tour was not found: {commands:?}");

    let mut site = Site::empty();
    site.mount("fs", 256 << 20, &["mkfs.btrfs", "-q"]);
    let criu = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/criu");
    assert!(criu.join("criu").is_file(), "no CRIU in {}: run tests/support/setup.sh", criu.display());
    let mut script = String::from(
        r#"
        mount --make-rprivate /
        mount --bind fs /srv; cd /
        mount -t tmpfs none /mnt
        for dir in /var/tmp /usr/local/bin; do mkdir -p "$T/in$dir" && mount --bind "$T/in$dir" "$dir"; done
        # What the dumped process inherits must be known in this mount namespace.
        for fd in /proc/$$/fd/*; do fd=${fd##*/}; case $fd in 0 | 1 | 2 | 255) ;; *) eval "exec $fd>&-" ;; esac; done
        exec </dev/null
        show() { printf '$ %s\n' "$1"; eval "$1"; local status=$?; [ $status = 0 ] || echo "[exit $status]"; }
        "#,
    );
    for command in &commands {
        script.push_str(&format!("show '{}'\n", command.replace('\'', r"'\''")));
    }
    fs::write(site.path("script"), script).unwrap();
    let line = "exec unshare --mount --pid --fork --kill-child --mount-proc bash $T/script 2>&1";
    let mut command = site.shell().command(line);
    let path = format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", criu.display());
    let fsnap = Path::new(env!("CARGO_BIN_EXE_fsnap")).parent().unwrap();
    command.env("PATH", format!("{}:{path}", fsnap.display())).stdin(Stdio::null());
    let output = command.output().unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();

    let (written, shown) = (normal(&Redactor::default(), &tour), normal(&Redactor::default(), &shown));
    assert!(written == shown, "the README shows:\n{written}\nbut it is:\n{shown}");
}

#[test]
fn the_settings_are_settings() {
    let site = Site::plain();
    let settings = blocks(&readme(), "toml");
    assert_eq!(settings.len(), 1);
    fs::write(site.path("config.toml"), &settings[0]).unwrap();
    site.run("fsnap init db && fsnap doctor");
    // What is no setting is refused, so that the above says something.
    fs::write(site.path("config.toml"), settings[0].replace("deadline_seconds", "dead_line_seconds")).unwrap();
    assert!(site.fail("fsnap doctor").contains("dead_line_seconds"));
}

#[test]
fn every_command_that_is_named_exists() {
    let site = Site::empty();
    let text = readme();
    // The last section tells of what is to come.
    let (now, _) = text.split_once("## Where it stands").unwrap();
    let mut seen = 0;
    for (at, _) in now.match_indices("fsnap ") {
        let word: String = now[at + 6..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
        let is_command =
            now[..at].ends_with(['`', '\n', '$', ' ']) && (now[..at].ends_with('`') || now[..at].ends_with("$ "));
        if is_command && !word.is_empty() {
            site.run(&format!("fsnap {word} --help"));
            seen += 1;
        }
    }
    assert!(seen > 10, "{seen}");
}
