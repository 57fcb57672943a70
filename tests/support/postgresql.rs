//! A server of PostgreSQL, as Debian installs it, with a client that writes to it all the time: for tests and benchmarks.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A server whose files are in one directory, and all that it takes to start it.
#[derive(Debug)]
pub(crate) struct Postgresql {
    bin: PathBuf,
    /// The command that starts the server and the client.
    pub(crate) command: Vec<String>,
}

impl Postgresql {
    /// Makes an empty database in `volume`, and in `programs` what is needed to start it.
    pub(crate) fn new(volume: &Path, programs: &Path) -> Result<Self> {
        let bin = programs_of_debian()?;
        for dir in ["data", "socket"] {
            fs::create_dir(volume.join(dir))?;
            run(Command::new("chown").arg("postgres:").arg(volume.join(dir)))?;
        }
        fs::create_dir(programs)?;
        let mut command = as_postgres(programs)?;
        let mut initdb = Command::new(&command[0]);
        initdb.args(&command[1..]).arg(bin.join("initdb")).args(["--no-sync", "--no-locale", "-A", "trust", "-D"]);
        run(initdb.arg(volume.join("data")).current_dir("/"))?;
        let settings = "listen_addresses=''\nshared_buffers=16MB\nmax_connections=20\n";
        let settings = format!("{settings}unix_socket_directories='/tmp,{}'\n", volume.join("socket").display());
        fs::write(volume.join("data/postgresql.auto.conf"), settings)?;
        let script = format!(
            "cd {0}; PATH={1}:$PATH; postgres -D data & until pg_isready -qh /tmp; do sleep 0.05; done\n\
             psql -qh /tmp -c 'create table entry (id bigserial primary key, at timestamptz default clock_timestamp())'\n\
             echo 'insert into entry default values \\watch 0.002' | psql -qh /tmp >/dev/null",
            volume.display(),
            bin.display(),
        );
        command.extend(["sh".into(), "-c".into(), script]);
        Ok(Self { bin, command })
    }

    /// Asks the server whose files are there; `None` if it does not answer.
    pub(crate) fn ask(&self, files: &Path, sql: &str) -> Result<Option<String>> {
        let mut psql = Command::new(self.bin.join("psql"));
        psql.args(["-U", "postgres", "-qAt", "-h"]).arg(files.join("socket")).args(["-c", sql]);
        let output = psql.stdin(Stdio::null()).output()?;
        Ok(if output.status.success() { Some(String::from_utf8(output.stdout)?.trim_end().to_owned()) } else { None })
    }

    /// The longest time that the client waited between two rows after `id`, in milliseconds.
    pub(crate) fn longest_pause(&self, files: &Path, id: &str) -> Result<f64> {
        let gaps = format!("select at - lag(at) over (order by id) as gap from entry where id >= {id}");
        let longest = format!("select extract(epoch from max(gap)) * 1000 from ({gaps}) as gaps");
        Ok(self.ask(files, &longest)?.ok_or("the server does not answer")?.parse()?)
    }
}

/// The directory of the programs.
fn programs_of_debian() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql");
    let versions = versions.map_err(|error| format!("PostgreSQL: {error}: tests/support/setup.sh installs it"))?;
    let mut versions: Vec<_> = versions.flatten().map(|entry| entry.path().join("bin")).collect();
    versions.sort();
    versions.pop().ok_or_else(|| "there is no version of PostgreSQL".into())
}

/// What makes the programs of PostgreSQL run, which refuse to be root.
///
/// They are the user `postgres`. To save another user's processes, CRIU needs `CAP_SYS_RESOURCE` (prlimit(2)); where a sandbox withholds it
/// from root, they are root, and a library in the directory `programs` tells them that they are not.
fn as_postgres(programs: &Path) -> Result<Vec<String>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let caps = status.lines().find_map(|line| line.strip_prefix("CapEff:")).ok_or("no CapEff")?.trim();
    if u64::from_str_radix(caps, 16)? & (1 << 24) != 0 {
        return Ok(["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"].map(str::to_owned).to_vec());
    }
    let id = Command::new("id").args(["-u", "postgres"]).output()?;
    let id = String::from_utf8(id.stdout)?;
    let (source, library) = (programs.join("postgres.c"), programs.join("postgres.so"));
    let functions = ["getuid", "geteuid"].map(|name| format!("unsigned {name}(void) {{ return {}; }}\n", id.trim()));
    fs::write(&source, functions.concat())?;
    run(Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]))?;
    Ok(vec!["env".into(), format!("LD_PRELOAD={}", library.display())])
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}

/// Saves the processes of a run as a checkpoint of it does, without fsnap: by its first process and its own root.
pub(crate) fn save_by_criu_alone(criu: &Path, (init, root): (i64, i64), images: &Path) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{root}/status"))?;
    let inner =
        status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last()).ok_or("no NSpid")?;
    let script = r#"exec 7<"$1"; exec nsenter -t "$2" -m -p "$3" dump -R --file-locks --link-remap --ghost-limit 1073741824 \
        -o dump.log -D /proc/self/fd/7 -t "$4""#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(images).arg(init.to_string()).arg(criu).arg(inner);
    run(&mut command)
}
