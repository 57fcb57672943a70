//! A place of its own for each test: a directory or a btrfs file system, a state directory, a shell.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::redact::Redactor;
use crate::volumes::{Ground, Volume};

/// The user that a test means by "without privileges".
pub(crate) const NOBODY: u32 = 65_534;

/// A directory with everything that one test touches; unmounted and gone when dropped.
#[derive(Debug)]
pub(crate) struct Site {
    temp: tempfile::TempDir,
    bin: PathBuf,
    mounts: Vec<PathBuf>,
    /// What a volume-to-be lies on that is a file system of its own.
    ground: Option<Ground>,
    /// Where the volume-to-be lies.
    top: &'static str,
    user: Option<u32>,
    redactor: Redactor,
    environment: Vec<(String, String)>,
}

impl Site {
    /// A plain directory, with the volume-to-be `db` in it.
    pub(crate) fn plain() -> Self {
        let site = Self::empty();
        site.populate();
        site
    }

    /// A btrfs file system, with the subvolume `db` in it.
    pub(crate) fn btrfs() -> Self {
        let mut site = Self::empty();
        site.top = "fs";
        site.mount("fs", 256 << 20, &["mkfs.btrfs", "-q"]);
        site.in_dir("fs").run("btrfs -q subvolume create db");
        let top = site.path("fs");
        site.populate_at(&top.join("db"));
        site.environment.push(("TOP".into(), top.display().to_string()));
        site
    }

    /// A file system of its own, as the volume-to-be `db`, for a backend of which a kernel may know nothing.
    pub(crate) fn on(volume: Volume) -> Self {
        let mut site = Self::empty();
        let mut ground = Ground::new(site.temp.path());
        let db = ground.make(volume, "db");
        site.top = if volume == Volume::DmThin { "thin" } else { "log" };
        site.ground = Some(ground);
        site.populate_at(&db);
        site.mounts.push(db);
        site
    }

    /// One of each kind that the kernel knows: what is said of all must be the same.
    pub(crate) fn each() -> Vec<Self> {
        let others = [Volume::DmThin, Volume::Nilfs2].into_iter().filter(|volume| volume.why_not().is_none());
        [Self::plain(), Self::btrfs()].into_iter().chain(others.map(Self::on)).collect()
    }

    /// As [`Self::plain`], with a copy of a catalog in which one checkpoint is recorded.
    pub(crate) fn with_kept_catalog() -> Self {
        let site = Self::plain();
        site.run("fsnap init db && fsnap checkpoint -t kept && cp state/catalog.db good && echo changed >db/a");
        site
    }

    /// Puts that catalog back, and makes sure that all is there.
    pub(crate) fn expect_kept(&self) {
        self.run("rm -rf state/catalog.db state/catalog.db-* && cp good state/catalog.db");
        self.expect_order(&["kept"]);
        assert_eq!(self.run("fsnap diff kept"), "M db/a");
    }

    /// Makes sure that these are the checkpoints, by tag or message, newest first, that nothing is half done or damaged, and
    /// that the store holds their snapshots and nothing else.
    pub(crate) fn expect_order(&self, checkpoints: &[&str]) {
        let shell = self.top();
        assert_eq!(shell.run("fsnap recover"), "nothing is half done");
        let log: serde_json::Value = serde_json::from_str(&shell.run("fsnap log --json")).expect("it prints JSON");
        let names = log.as_array().expect("an array").iter();
        let names = names.map(|one| one["tags"][0].as_str().or(one["message"].as_str()).unwrap_or_default());
        assert_eq!(names.collect::<Vec<_>>(), checkpoints);
        let plural = if checkpoints.len() == 1 { "" } else { "s" };
        let verified = format!("verified the catalog and {} checkpoint{plural}: 0 damaged", checkpoints.len());
        assert_eq!(shell.run("fsnap verify"), verified);
        assert_eq!(self.stored(), checkpoints.len());
    }

    /// How many images the volume's own store has.
    pub(crate) fn stored(&self) -> usize {
        // In the store of a pool, that is where its volumes are recorded.
        let of_pool = self.top == "thin";
        self.images(self.store()).iter().filter(|name| !(of_pool && name.starts_with("volumes/"))).count()
    }

    /// Where that store is.
    pub(crate) fn store(&self) -> PathBuf {
        let top = self.path(self.top);
        match &self.ground {
            None => top.join(".fsnap"),
            Some(ground) => ground.pool_store().map_or_else(|| top.join(".fsnap-nilfs2"), Path::to_owned),
        }
    }

    /// As [`Self::plain`], and whatever runs there runs as a user without privileges.
    pub(crate) fn unprivileged() -> Self {
        let mut site = Self::plain();
        site.user = Some(NOBODY);
        // A copy: the user may not enter the directories that the repository lies in.
        let (from, bin) = (site.bin.join("fsnap"), site.path("bin"));
        fs::create_dir(&bin).expect("make a directory");
        fs::copy(from, bin.join("fsnap")).expect("copy the program");
        fs::set_permissions(&bin, fs::Permissions::from_mode(0o755)).expect("set the mode");
        site.bin = bin;
        let status = Command::new("chown").arg("-R").arg(NOBODY.to_string()).arg(site.temp.path()).status();
        assert!(status.expect("run chown").success());
        site
    }

    /// A directory with nothing in it.
    pub(crate) fn empty() -> Self {
        let temp = tempfile::tempdir().expect("make a directory");
        let mut redactor = Redactor::default();
        redactor.name(temp.path(), "$T");
        let bin = Path::new(env!("CARGO_BIN_EXE_fsnap")).parent().expect("a program lies in a directory").to_owned();
        let (mounts, environment) = (Vec::new(), Vec::new());
        Self { temp, bin, mounts, ground: None, top: ".", user: None, redactor, environment }
    }

    fn populate(&self) {
        self.populate_at(&self.path("db"));
    }

    fn populate_at(&self, dir: &Path) {
        fs::create_dir_all(dir.join("sub")).expect("make a directory");
        fs::write(dir.join("a"), "one\n").expect("write");
        fs::write(dir.join("sub/b"), "two\n").expect("write");
    }

    /// Makes a file system of so many bytes and mounts it at `name`.
    pub(crate) fn mount(&mut self, name: &str, bytes: u64, mkfs: &[&str]) {
        let (image, dir) = (self.path(&format!("{name}.image")), self.path(name));
        fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("make a sparse file");
        fs::create_dir(&dir).expect("make a mount point");
        let made = Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image).output().expect("run mkfs");
        assert!(made.status.success(), "{made:?}");
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&dir).output().expect("run mount");
        assert!(mounted.status.success(), "{mounted:?}");
        self.mounts.push(dir);
    }

    /// A path in the site.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// Sets a variable for every command that follows.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.into(), value.into()));
    }

    /// A shell in another directory of the site.
    pub(crate) fn in_dir(&self, dir: &str) -> Shell<'_> {
        Shell { site: self, dir: self.path(dir) }
    }

    /// A shell in the directory where the volume-to-be lies.
    pub(crate) fn top(&self) -> Shell<'_> {
        self.in_dir(self.top)
    }

    /// The shell in the site's own directory.
    pub(crate) fn shell(&self) -> Shell<'_> {
        Shell { site: self, dir: self.temp.path().to_owned() }
    }

    /// Runs every line in a shell of its own and returns what was seen: see [`Shell::session`].
    pub(crate) fn session(&self, lines: &str) -> String {
        self.shell().session(lines)
    }

    /// Runs a line that must succeed, and returns its standard output without the last line end.
    pub(crate) fn run(&self, line: &str) -> String {
        self.shell().run(line)
    }

    /// Runs a line that must fail by exit code 1, and returns its standard error.
    pub(crate) fn fail(&self, line: &str) -> String {
        self.shell().fail(line)
    }

    /// The images in a store: what `fsnap` keeps there, by name.
    pub(crate) fn images(&self, store: impl AsRef<Path>) -> Vec<String> {
        let mut names = Vec::new();
        for part in ["", "snapshots", "volumes", "partials", "doomed", "begun", "images", "leaving"] {
            let Ok(entries) = fs::read_dir(self.path("").join(&store).join(part)) else { continue };
            for entry in entries {
                let name = entry.expect("list").file_name().into_string().expect("a store's names are plain");
                if !part.is_empty() || name.starts_with("s-") || name.starts_with("v-") {
                    names.push(format!("{part}/{name}").trim_start_matches('/').to_owned());
                }
            }
        }
        names.sort();
        names
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for dir in self.mounts.iter().rev() {
            let unmount = || Command::new("umount").arg(dir).output().expect("run umount");
            let mut unmounted = unmount();
            // A process that stands by for a hook lets go a little after its engine has ended.
            for _ in 0..100 {
                if unmounted.status.success() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(50));
                unmounted = unmount();
            }
            if !unmounted.status.success() {
                // Also when a test fails: nothing of it stays mounted.
                let _ = Command::new("umount").arg("--lazy").arg(dir).status();
                assert!(std::thread::panicking(), "{} is in use after the test: {unmounted:?}", dir.display());
            }
        }
        if let Some(ground) = &mut self.ground {
            ground.clear();
        }
    }
}

/// A place where commands run.
#[derive(Debug)]
pub(crate) struct Shell<'a> {
    site: &'a Site,
    dir: PathBuf,
}

impl Shell<'_> {
    /// A command with the environment of the test and nothing else.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", line]).current_dir(&self.dir).env_clear().stdin(Stdio::null());
        command.env("PATH", format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", self.site.bin.display()));
        command.env("HOME", self.site.temp.path()).env("FSNAP_STATE", self.site.path("state"));
        command.env("FSNAP_CONFIG", self.site.path("config.toml"));
        command.env("NO_COLOR", "1").env("TZ", "UTC").env("LC_ALL", "C").env("COLUMNS", "100");
        command.env("T", self.site.temp.path());
        command.envs(self.site.environment.iter().map(|(name, value)| (name, value)));
        if let Some(user) = self.site.user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Runs a line.
    pub(crate) fn output(&self, line: &str) -> Output {
        self.command(line).output().expect("run a shell")
    }

    /// Runs a line that must succeed, and returns its standard output without the last line end.
    pub(crate) fn run(&self, line: &str) -> String {
        let output = self.output(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).expect("the output is UTF-8").trim_end().to_owned()
    }

    /// Runs a line that must fail by exit code 1, and returns its standard error.
    pub(crate) fn fail(&self, line: &str) -> String {
        let output = self.output(line);
        assert_eq!(output.status.code(), Some(1), "{line}: {output:?}");
        String::from_utf8(output.stderr).expect("the output is UTF-8").trim_end().to_owned()
    }

    /// Runs every line in a shell of its own, and returns what a user would have seen: each line after a `$`, standard
    /// output as it is, standard error after a `!`, and the exit code unless it is 0; ids, times and paths redacted.
    pub(crate) fn session(&self, lines: &str) -> String {
        let mut seen = String::new();
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            writeln!(seen, "$ {line}").unwrap();
            seen.push_str(&self.site.redactor.redact(&transcript(&self.output(line))));
        }
        seen
    }
}

fn transcript(output: &Output) -> String {
    let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => panic!("not UTF-8: {:?}", String::from_utf8_lossy(bytes)),
    };
    let mut seen = text(&output.stdout);
    if !seen.is_empty() && !seen.ends_with('\n') {
        seen.push_str("%\n");
    }
    for line in text(&output.stderr).lines() {
        seen.push_str(format!("! {line}").trim_end());
        seen.push('\n');
    }
    match output.status.code() {
        Some(0) => {}
        Some(code) => writeln!(seen, "[exit {code}]").unwrap(),
        None => writeln!(seen, "[{}]", output.status).unwrap(),
    }
    seen
}
