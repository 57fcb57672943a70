//! Real programs, saved while they work and copied live: PostgreSQL, and Python with SQLite.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Case;
use crate::runs::{Running, branch_path};
use crate::site::{Site, Volume, run, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("postgresql_is_copied_live", postgresql_is_copied_live),
    ("sqlite_and_an_unlinked_file_are_copied_live", sqlite_and_an_unlinked_file_are_copied_live),
];

/// The directory of PostgreSQL's programs, as Debian installs them.
fn postgresql() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL: tests/support/setup.sh installs it");
    let mut versions: Vec<_> = versions.map(|entry| entry.unwrap().path().join("bin")).collect();
    versions.sort();
    versions.pop().expect("a version of PostgreSQL")
}

/// A server, in a volume, that a client writes to all the time.
struct Server<'a> {
    site: &'a Site,
    bin: PathBuf,
}

impl<'a> Server<'a> {
    fn start(site: &'a Site) -> Self {
        let bin = postgresql();
        let volume = &site.volumes[0];
        for dir in ["data", "socket"] {
            fs::create_dir(volume.join(dir)).unwrap();
            run(Command::new("chown").arg("postgres:").arg(volume.join(dir)));
        }
        let programs = site.path("programs");
        fs::create_dir(&programs).unwrap();
        let user = as_postgres(&programs);
        let mut initdb = Command::new(&user[0]);
        initdb.args(&user[1..]).arg(bin.join("initdb")).args(["--no-sync", "--no-locale", "-A", "trust", "-D"]);
        run(initdb.arg(volume.join("data")).current_dir("/"));
        let settings = "listen_addresses=''\nshared_buffers=16MB\nmax_connections=20\n";
        let settings = format!("{settings}unix_socket_directories='/tmp,{}'\n", volume.join("socket").display());
        fs::write(volume.join("data/postgresql.auto.conf"), settings).unwrap();
        let script = format!(
            "cd {0}; PATH={1}:$PATH; postgres -D data & until pg_isready -qh /tmp; do sleep 0.05; done\n\
             psql -qh /tmp -c 'create table entry (id bigserial primary key, at timestamptz default clock_timestamp())'\n\
             echo 'insert into entry default values \\watch 0.002' | psql -qh /tmp >/dev/null",
            volume.display(),
            bin.display(),
        );
        let (programs, user) = (programs.display().to_string(), user.iter().map(String::as_str).collect::<Vec<_>>());
        let begin = ["run", "--name", "server", "--volume", "v0", "--ro", &programs, "--"];
        site.ok([&begin[..], &user, &["sh", "-c", &script]].concat());
        let server = Self { site, bin };
        wait_until("the first rows", || server.ask(volume, "select count(*) from entry").is_some_and(|n| n.len() > 2));
        server
    }

    /// Asks the server whose files are there.
    fn ask(&self, files: &Path, sql: &str) -> Option<String> {
        let mut psql = Command::new(self.bin.join("psql"));
        psql.args(["-U", "postgres", "-qAt", "-h"]).arg(files.join("socket")).args(["-c", sql]);
        let output = psql.stdin(Stdio::null()).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim_end().to_owned())
    }

    fn must(&self, files: &Path, sql: &str) -> String {
        self.ask(files, sql).unwrap_or_else(|| panic!("no answer to {sql:?} from {files:?}"))
    }

    /// The longest time that the client waited between two rows after `id`, in milliseconds.
    fn longest_pause(&self, id: &str) -> f64 {
        let gaps = format!("select at - lag(at) over (order by id) as gap from entry where id >= {id}");
        let longest = format!("select extract(epoch from max(gap)) * 1000 from ({gaps}) as gaps");
        self.must(&self.site.volumes[0], &longest).parse().unwrap()
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

/// What makes the programs of PostgreSQL run, which refuse to be root.
///
/// They are the user `postgres`. To save another user's processes, CRIU needs `CAP_SYS_RESOURCE` (prlimit(2)); where a sandbox withholds it
/// from root, they are root, and a library in the directory `programs` tells them that they are not.
fn as_postgres(programs: &Path) -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let caps = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    if u64::from_str_radix(caps, 16).unwrap() & (1 << 24) != 0 {
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"].map(str::to_owned).to_vec();
    }
    let id = Command::new("id").args(["-u", "postgres"]).output().unwrap();
    let id = String::from_utf8(id.stdout).unwrap();
    let (source, library) = (programs.join("postgres.c"), programs.join("postgres.so"));
    let functions = ["getuid", "geteuid"].map(|name| format!("unsigned {name}(void) {{ return {}; }}\n", id.trim()));
    fs::write(&source, functions.concat()).unwrap();
    run(Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]));
    vec!["env".into(), format!("LD_PRELOAD={}", library.display())]
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
    let (pid, init) = (runs[0]["pid"].to_string(), runs[0]["init"].to_string());
    let images = site.images();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let inner = status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last()).unwrap();
    let script = r#"exec 7<"$1"; exec nsenter -t "$2" -m -p "$3" dump -R --file-locks --link-remap --ghost-limit 1073741824 \
        -o dump.log -D /proc/self/fd/7 -t "$4""#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(&images).arg(&init);
    command.arg(fsnap_oracle::criu::Criu::find().program()).arg(inner);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
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
