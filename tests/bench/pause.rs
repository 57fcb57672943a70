//! How long the clients of a real server wait while it is saved.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::dump::{frozen_time, goal};
use crate::measure::{Failure, head, in_turns, ms, row, run, times};
use crate::postgresql::{Postgresql, save_by_criu_alone};
use crate::site::Site;

const ROUNDS: usize = 15;

/// Longer than anything takes that works.
const LONG: Duration = Duration::from_secs(60);

/// The longest pause of a client of PostgreSQL under -R, with fsnap and by CRIU alone.
pub fn of_postgresql(site: &Site) -> Result<(), Failure> {
    let Some(criu) = &site.criu else {
        println!("\nthe pause of a client of PostgreSQL: left out, for FSNAP_CRIU names no CRIU that works here");
        return Ok(());
    };
    let server = Server::start(site)?;
    let mut frozen = [Vec::new(), Vec::new()];
    let [mut alone, mut with] = [Vec::new(), Vec::new()];
    let pauses =
        in_turns(ROUNDS, [&mut || server.pause(criu, false, &mut alone), &mut || server.pause(criu, true, &mut with)]);
    let [none, fsnap] = pauses?;
    for (times, of) in frozen.iter_mut().zip([alone, with]) {
        *times = of;
        times.sort();
    }
    let [frozen_none, frozen_fsnap] = frozen.map(|times: Vec<Duration>| times[times.len() / 2]);
    head(
        "PostgreSQL, which a client writes to all the time, saved as a run under -R",
        &["", "CRIU alone", "with fsnap", "fsnap's share", "goal"],
    );
    let share = |none, fsnap| 100.0 * (1.0 - times(none, fsnap));
    let (pause, stood) = (share(none, fsnap), share(frozen_none, frozen_fsnap));
    row(&["longest pause of the client".into(), ms(none), ms(fsnap), format!("{pause:.0} %"), goal(pause, 15.0, "%")]);
    let title = "frozen time by CRIU's own statistics";
    row(&[title.into(), ms(frozen_none), ms(frozen_fsnap), format!("{stood:.0} %"), goal(stood, 15.0, "%")]);
    Ok(())
}

/// The server and its client, as a run.
struct Server<'a> {
    site: &'a Site,
    postgresql: Postgresql,
}

impl<'a> Server<'a> {
    fn start(site: &'a Site) -> Result<Self, Failure> {
        let programs = site.path("programs");
        let postgresql = Postgresql::new(&site.volume(), &programs)?;
        let mut command = site.fsnap();
        command.args(["run", "--name", "server", "--volume", "data", "--ro"]).arg(&programs).arg("--");
        run(command.args(&postgresql.command))?;
        let server = Self { site, postgresql };
        server.wait("the first rows", |count| count > 100)?;
        Ok(server)
    }

    /// Waits until the number of the last row is as wanted; returns it.
    fn wait(&self, what: &str, wanted: impl Fn(u64) -> bool) -> Result<u64, Failure> {
        let end = Instant::now() + LONG;
        while Instant::now() < end {
            let said = self.postgresql.ask(&self.site.volume(), "select max(id) from entry")?;
            if let Some(id) = said.and_then(|id| id.parse().ok()).filter(|&id| wanted(id)) {
                return Ok(id);
            }
        }
        Err(format!("{what} did not come about").into())
    }

    /// The longest pause of the client while the server is saved once.
    fn pause(&self, criu: &Path, with_fsnap: bool, frozen: &mut Vec<Duration>) -> Result<Duration, Failure> {
        let from = self.wait("a row", |_| true)?;
        let images = if with_fsnap { self.checkpoint()? } else { self.save(criu)? };
        frozen.push(frozen_time(&images)?);
        self.wait("the next row", |id| id > from)?;
        let pause = self.postgresql.longest_pause(&self.site.volume(), &from.to_string())?;
        Ok(Duration::from_secs_f64(pause / 1e3))
    }

    /// By fsnap; returns where the images are.
    fn checkpoint(&self) -> Result<PathBuf, Failure> {
        let made = self.ask_fsnap(&["checkpoint", "server", "--json"])?;
        Ok(made["engine"]["images"].as_str().ok_or("the checkpoint has no images")?.into())
    }

    /// By CRIU alone; returns where the images are.
    fn save(&self, criu: &Path) -> Result<PathBuf, Failure> {
        let runs = self.ask_fsnap(&["ps", "--json"])?;
        let pid = |of: &str| runs[0][of].as_i64().ok_or("the server does not run");
        let images = self.site.path("alone");
        if images.exists() {
            fs::remove_dir_all(&images)?;
        }
        fs::create_dir(&images)?;
        save_by_criu_alone(criu, (pid("init")?, pid("pid")?), &images)?;
        Ok(images)
    }

    fn ask_fsnap(&self, args: &[&str]) -> Result<Value, Failure> {
        let output = self.site.fsnap().args(args).stderr(Stdio::inherit()).output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = run(self.site.fsnap().args(["stop", "--time", "1", "server"]));
    }
}
