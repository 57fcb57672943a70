//! What a checkpoint knows of its processes, and what of theirs it does not hold.

use std::process::{Child, Stdio};

use serde_json::Value;

use crate::site::{Shell, Site};

/// A shell that has files of the volume and others open, and waits for a line in `db/fifo` between its steps.
fn start(shell: &Shell<'_>) -> Child {
    let script = "cd db; exec 5>>a 6>gone 7>../log; echo unlinked >&6; rm gone; touch ready; \
                  read line <fifo; exec 5>&- 8<sub/b; cd sub; touch done; while :; do sleep 1000; done";
    shell.run("mkfifo db/fifo");
    let mut command = shell.command(&format!("exec setsid sh -c '{script}'"));
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    shell.run("until [ -e db/ready ]; do sleep 0.01; done; cp db/ready other 2>/dev/null || :");
    child
}

fn stop(shell: &Shell<'_>, mut child: Child) {
    // All of its session.
    shell.run(&format!("kill -KILL -{}", child.id()));
    child.wait().unwrap();
    // One that nobody waits for stays a zombie, which holds nothing.
    let line = format!("while ps -o stat= -s {} | grep -q '^[^Z]'; do sleep 0.01; done", child.id());
    assert!(shell.output(&format!("timeout 20 sh -c \"{line}\"")).status.success(), "a process does not end");
}

fn json(shell: &Shell<'_>, line: &str) -> Value {
    serde_json::from_str(&shell.run(line)).unwrap()
}

#[test]
fn the_processes_of_a_checkpoint_are_shown_and_compared() {
    for site in Site::each() {
        let shell = site.top();
        shell.run("fsnap init db");
        let child = start(&shell);
        let pid = child.id();
        shell.run(&format!("fsnap checkpoint --pid {pid} -t first db"));
        shell.run("echo go >db/fifo; until [ -e db/sub/done ]; do sleep 0.01; done");
        shell.run(&format!("fsnap checkpoint --pid {pid} -t second db"));

        let shown = shell.run("fsnap show first --processes");
        let has = |line: &str| assert!(shown.lines().any(|shown| shown.trim() == line), "{line:?} is not in:\n{shown}");
        let dir = shell.run("pwd");
        assert!(shown.starts_with(&format!("{pid} sh -c cd db; exec 5>>a")), "{shown}");
        has(&format!("cwd  {dir}/db in db"));
        has(&format!("5  w  {dir}/db/a in db"));
        has(&format!("6  w  {dir}/db/gone (unlinked) in db at 9"));
        has(&format!("7  w  {dir}/log"));
        let processes = json(&shell, "fsnap show first --processes --json");
        assert_eq!(processes[0]["pid"], pid);
        let six = processes[0]["files"].as_array().unwrap().iter().find(|file| file["fd"] == 6).unwrap();
        assert_eq!((&six["unlinked"], &six["volume"], &six["offset"]), (&true.into(), &"db".into(), &9.into()));

        let changes = shell.run("fsnap diff --processes first second");
        let lines: Vec<&str> = changes.lines().collect();
        let expected = [
            format!("d {pid} {dir}/db/sub in db"),
            format!("c {pid} 5 w  {dir}/db/a in db"),
            format!("o {pid} 8 r  {dir}/db/sub/b in db"),
        ];
        for line in &expected {
            assert!(lines.contains(&line.as_str()), "{line:?} is not in:\n{changes}");
        }
        assert_eq!(shell.run("fsnap diff --processes first first"), "");
        let changes = json(&shell, "fsnap diff --processes first second --json");
        assert_eq!(changes[0]["change"], "moved");
        // Whoever removes the checkpoint removes what is known of its processes.
        shell.run("fsnap rm first && fsnap verify");
        stop(&shell, child);
    }
}

#[test]
fn what_a_checkpoint_does_not_hold_is_named_with_it() {
    let mut site = Site::plain();
    site.set("FSNAP_OUTSIDE", "");
    let shell = site.top();
    shell.run("fsnap init db");
    let child = start(&shell);
    let pid = child.id();
    let dir = shell.run("pwd");
    let log = format!("  {pid} (sh) has descriptor 7 open for writing: {dir}/log (");
    let audit = shell.run(&format!("fsnap audit {pid} --volume db"));
    let taken = json(&shell, &format!("fsnap checkpoint --json --pid {pid} -t taken db"));
    let shown = shell.run("fsnap show taken");
    for (said, text) in [("audit", &audit), ("show", &shown)] {
        assert!(text.contains(&log), "{said}: {text}");
        // What has no name is kept: it lies outside no more than what has one.
        assert!(!text.contains("db/a ") && !text.contains("descriptor 6"), "{said}: {text}");
        assert!(text.contains("(sh) can write to the mount at / ("), "{said}: {text}");
    }
    assert_eq!(json(&shell, "fsnap show taken --json"), taken);
    let outside = taken["outside"].as_array().unwrap();
    let seven = outside.iter().find(|one| one["fd"] == 7).unwrap();
    assert_eq!((&seven["pid"], &seven["via"], &seven["unlinked"]), (&pid.into(), &"descriptor".into(), &false.into()));
    assert_eq!(seven["path"], format!("{dir}/log"));

    // What does not matter, by flag and by setting.
    let seen = shell.run(&format!("fsnap audit {pid} --volume db --ignore /"));
    assert!(seen.contains("more that the settings ignore") && !seen.contains("has descriptor"), "{seen}");
    std::fs::write(site.path("config.toml"), "[audit]\npolicy = 'refuse'\nignore = ['/**/log']\n").unwrap();
    let refused = shell.output(&format!("fsnap audit {pid} --volume db --json"));
    assert_eq!(refused.status.code(), Some(1));
    let refused: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(refused["refused"], true);
    assert!(!refused["outside"].to_string().contains("/log\""), "{refused}");

    // A refusal leaves nothing, and everything running; a flag goes over a setting.
    let said = shell.fail(&format!("fsnap checkpoint --pid {pid} db"));
    assert!(said.contains("the processes can write to what the checkpoint would not hold"), "{said}");
    assert!(!said.contains("db/gone"), "{said}");
    assert_eq!(shell.run("fsnap log --json | grep -c '\"id\"'"), "1");
    assert_eq!(shell.run("fsnap recover"), "nothing is half done");
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    assert!(state.contains(") S "), "it was left stopped: {state}");
    shell.run(&format!("fsnap checkpoint --pid {pid} --outside record db"));
    let silent = json(&shell, &format!("fsnap checkpoint --json --pid {pid} --outside ignore db"));
    assert_eq!(silent["outside"], Value::Array(Vec::new()));
    // Without a process there is nothing to look at.
    let alone = json(&shell, "fsnap checkpoint --json db");
    assert!(alone.get("outside").is_none());
    let said = shell.fail("fsnap show --processes @latest");
    assert!(said.contains("no processes are recorded with checkpoint"), "{said}");
    stop(&shell, child);
}

#[test]
fn patterns_and_policies_that_are_none_are_refused() {
    let site = Site::plain();
    site.run("fsnap init db");
    for (line, code) in [
        ("fsnap audit 1 --ignore a/b", 2),
        ("fsnap audit 1 --outside maybe", 2),
        ("fsnap audit", 2),
        ("fsnap audit 1 --cgroup /x", 2),
        ("fsnap audit 999999999", 1),
        (
            "CRTOOLS_SCRIPT_ACTION=pre-dump CRTOOLS_IMAGE_DIR=$T CRTOOLS_INIT_PID=$$ FSNAP_OUTSIDE=maybe fsnap hook criu",
            1,
        ),
    ] {
        let output = site.shell().output(line);
        assert_eq!(output.status.code(), Some(code), "{line}: {output:?}");
    }
    std::fs::write(site.path("config.toml"), "[audit]\nignore = ['../x']\n").unwrap();
    assert!(site.fail("fsnap log").contains("`..` stands for nothing here"));
}

/// A record that lies, in a catalog that somebody has written to, shows nothing of another place.
#[test]
fn a_record_that_leads_out_of_a_volume_is_damage() {
    let site = Site::plain();
    let shell = site.top();
    shell.run("fsnap init db");
    let child = start(&shell);
    shell.run(&format!("fsnap checkpoint --pid {} -t taken db", child.id()));
    stop(&shell, child);
    let db = rusqlite::Connection::open(site.path("state/catalog.db")).unwrap();
    let body: String = db.query_row("SELECT body FROM tree", [], |row| row.get(0)).unwrap();
    let forge = |body: &str| {
        let hash = blake3::hash(body.as_bytes());
        let digest = &hash.as_bytes()[..16];
        db.execute("UPDATE tree SET body = ?1, digest = ?2", rusqlite::params![body, digest]).unwrap();
    };
    for lie in [
        body.replace("\"path\":\"gone\"", "\"path\":\"../../etc/passwd\""),
        body.replace("\"version\":1", "\"version\":9"),
    ] {
        assert_ne!(lie, body);
        forge(&lie);
        let said = shell.fail("fsnap show --processes taken");
        assert!(said.contains("leads out of a volume"), "{said}");
    }
    for torn in (0..body.len()).step_by(body.len() / 50 + 1) {
        if body.is_char_boundary(torn) {
            forge(&body[..torn]);
            shell.fail("fsnap show --processes taken");
        }
    }
    db.execute("UPDATE tree SET body = ?1", [&body]).unwrap();
    let verified = shell.output("fsnap verify");
    assert_eq!(verified.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&verified.stdout).contains("the record of tree"), "{verified:?}");
    // A catalog of an earlier release has no such table, and gets it when there is something to keep in it.
    db.execute_batch("DROP TABLE tree").unwrap();
    drop(db);
    shell.fail("fsnap show --processes taken");
    let child = {
        shell.run("rm db/fifo db/ready");
        start(&shell)
    };
    shell.run(&format!(
        "fsnap checkpoint --pid {} -t again db && fsnap show --processes again && fsnap verify",
        child.id()
    ));
    stop(&shell, child);
}
