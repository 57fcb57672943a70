//! Real programs, saved while they work and copied live: PostgreSQL, and Python with SQLite.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Case;
use crate::postgresql::{Postgresql, save_by_criu_alone};
use crate::runs::{Running, branch_path};
use crate::site::{Site, Volume, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("postgresql_is_copied_live", postgresql_is_copied_live),
    ("sqlite_and_an_unlinked_file_are_copied_live", sqlite_and_an_unlinked_file_are_copied_live),
];

/// A server, in a volume, that a client writes to all the time.
struct Server<'a> {
    site: &'a Site,
    postgresql: Postgresql,
}

impl<'a> Server<'a> {
    fn start(site: &'a Site) -> Self {
        let (volume, programs) = (&site.volumes[0], site.path("programs"));
        let postgresql = Postgresql::new(volume, &programs).unwrap();
        let programs = programs.display().to_string();
        let command = postgresql.command.iter().map(String::as_str).collect::<Vec<_>>();
        let begin = ["run", "--name", "server", "--volume", "v0", "--ro", &programs, "--"];
        site.ok([&begin[..], &command].concat());
        let server = Self { site, postgresql };
        wait_until("the first rows", || server.ask(volume, "select count(*) from entry").is_some_and(|n| n.len() > 2));
        server
    }

    /// Asks the server whose files are there.
    fn ask(&self, files: &Path, sql: &str) -> Option<String> {
        self.postgresql.ask(files, sql).unwrap()
    }

    fn must(&self, files: &Path, sql: &str) -> String {
        self.ask(files, sql).unwrap_or_else(|| panic!("no answer to {sql:?} from {files:?}"))
    }

    fn longest_pause(&self, id: &str) -> f64 {
        self.postgresql.longest_pause(&self.site.volumes[0], id).unwrap()
    }

    /// What is in the rows up to `id`.
    fn digest(&self, files: &Path, id: &str) -> String {
        self.must(
            files,
            &format!("select md5(string_agg(id || ' ' || at, ',' order by id)) from entry where id <= {id}"),
        )
    }

    fn last_id(&self, files: &Path) -> String {
        self.must(files, "select max(id) from entry")
    }
}

fn postgresql_is_copied_live() {
    let site = Site::new(&[Volume::Btrfs]);
    let running = Running(&site);
    let server = Server::start(&site);
    let original = site.volumes[0].clone();
    pauses(&site, &server);
    let id = site.ok(["checkpoint", "server"]);
    let after = server.must(&original, "select clock_timestamp()");
    // It goes on, and its files are changed in a way that a copy must not see.
    server.must(&original, "create table mark as select 'original' as name");
    let made = site.ok(["branch", &id, "copy", "--run", "--count", "3"]);
    let copies: Vec<(&str, PathBuf)> = made.lines().map(|name| (name, branch_path(&site, name, 0))).collect();
    assert_eq!(copies.len(), 3);
    let mut instants = Vec::new();
    for (name, files) in &copies {
        wait_until(&format!("an answer of {name}"), || server.ask(files, "select 1").is_some());
        // What it had at the instant of the checkpoint, row for row.
        let instant = server.must(files, &format!("select max(id) from entry where at < '{after}'"));
        assert_eq!(server.digest(files, &instant), server.digest(&original, &instant), "{name}");
        instants.push(instant);
        // Its client goes on as well.
        let before = server.last_id(files);
        wait_until(&format!("the next row of {name}"), || server.last_id(files) != before);
        server.must(files, &format!("create table mark as select '{name}' as name"));
    }
    assert!(instants.iter().all(|instant| *instant == instants[0]), "{instants:?}");
    for (name, files) in copies.iter().map(|(name, files)| (*name, files)).chain([("original", &original)]) {
        assert_eq!(server.must(files, "select name from mark"), name);
    }
    for (name, files) in &copies {
        // None had to be recovered: it never ended.
        let log = running.said(name);
        for word in ["PANIC", "FATAL", "ERROR", "recovery", "interrupted"] {
            assert!(!log.contains(word), "{name}: {log}");
        }
        server.must(files, "checkpoint");
        // Every row can be found by its index, and every page be read.
        assert_eq!(
            server.must(files, "set enable_seqscan = off; select count(*) = max(id) from entry where id > 0"),
            server.must(files, "select count(*) = max(id) from entry"),
        );
    }
    site.ok(["stop", "--time", "1", "server", "copy-1", "copy-2", "copy-3"]);
}

/// How often the client is stopped, for a median.
const ROUNDS: usize = 5;

/// Prints how long the client waits while the server is saved, with and without fsnap.
fn pauses(site: &Site, server: &Server<'_>) {
    let files = &site.volumes[0];
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let from = server.last_id(files);
        let id = site.ok(["checkpoint", "server"]);
        wait_until("the next row", || server.last_id(files) != from);
        with.push(server.longest_pause(&from));
        site.ok(["rm", &id]);
        let from = server.last_id(files);
        by_criu_alone(site);
        wait_until("the next row", || server.last_id(files) != from);
        without.push(server.longest_pause(&from));
    }
    for times in [&mut with, &mut without] {
        times.sort_by(f64::total_cmp);
    }
    let (with, without) = (with[ROUNDS / 2], without[ROUNDS / 2]);
    let _ = writeln!(
        std::io::stdout(),
        "the longest pause of a client of PostgreSQL: {with:.1} ms with fsnap, {without:.1} ms by CRIU alone; \
         fsnap's share is {:.0} % (goal: 15 %)",
        (with - without).max(0.0) / with * 100.0
    );
}

/// Saves the server as a checkpoint does, without fsnap.
fn by_criu_alone(site: &Site) {
    let runs = site.json(["ps", "--json"]);
    let pid = |of: &str| runs[0][of].as_i64().unwrap();
    let images = site.images();
    save_by_criu_alone(fsnap_oracle::criu::Criu::find().program(), (pid("init"), pid("pid")), &images).unwrap();
    fs::remove_dir_all(images).unwrap();
}

/// Counts in memory, in a database and in a file without a name, and says the number while all agree.
const COUNT: &str = r#"
import sqlite3, sys, tempfile, time
db = sqlite3.connect("count.db", isolation_level=None)
db.execute("pragma journal_mode=wal")
db.execute("create table if not exists entry (number integer primary key, text)")
unlinked = tempfile.TemporaryFile(dir=".")
number = 0
while True:
    number += 1
    unlinked.seek(0)
    unlinked.write(b"%d\n" % number)
    unlinked.flush()
    db.execute("insert into entry values (?, ?)", (number, "x" * 100))
    unlinked.seek(0)
    [(count,)] = db.execute("select count(*) from entry")
    agree = int(unlinked.readline()) == number == count
    print(number if agree else "they differ: %d of %d" % (count, number), flush=True)
    time.sleep(0.005)
"#;

fn sqlite_and_an_unlinked_file_are_copied_live() {
    for volume in [Volume::Btrfs, Volume::Rsync] {
        let site = Site::new(&[volume]);
        let running = Running(&site);
        let mut command =
            site.command(["run", "--name", "count", "--volume", "v0", "--", "/usr/bin/python3", "-c", COUNT]);
        let output = command.current_dir(&site.volumes[0]).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        running.says("count", "5");
        let id = site.ok(["checkpoint", "count"]);
        running.counts_on("count");
        let made = site.ok(["branch", &id, "copy", "--run", "--count", "2"]);
        let names: Vec<&str> = made.lines().chain(["count"]).collect();
        for name in &names {
            running.counts_on(name);
        }
        site.ok([&["stop", "-t", "1"][..], &names[..]].concat());
        for name in names {
            let log = running.said(name);
            assert!(!log.contains("differ") && !log.contains("Error"), "{name}: {log}");
            let dir = if name == "count" { site.volumes[0].clone() } else { branch_path(&site, name, 0) };
            let mut sqlite = Command::new("sqlite3");
            sqlite.arg(dir.join("count.db")).arg("pragma integrity_check; select count(*) = max(number) from entry");
            let output = sqlite.stdin(Stdio::null()).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "ok\n1\n", "{name}: {}", said(&output));
        }
    }
}
