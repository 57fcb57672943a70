//! What must not depend on how large a tree is, nor on how many checkpoints there are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};

use crate::copies;
use crate::measure::{Failure, head, in_turns, ms, row, run, time, times};
use crate::tree::Tree;

const ROUNDS: usize = 9;
const MANY: usize = 10_000;

/// A catalog with one checkpoint of one volume, and where it is mounted.
struct Catalog {
    state: PathBuf,
    dir: PathBuf,
    branches: usize,
}

impl Catalog {
    fn new(base: &Path, volume: &Path) -> Result<Self, Failure> {
        let catalog = Self { state: base.join("state"), dir: base.join("mnt"), branches: 0 };
        fs::create_dir_all(&catalog.dir)?;
        run(catalog.fsnap().args(["init", "--name", "data"]).arg(volume))?;
        run(catalog.fsnap().arg("checkpoint"))?;
        Ok(catalog)
    }

    fn fsnap(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsnap"));
        command.env("FSNAP_STATE", &self.state);
        command
    }

    fn mount(&self) -> Result<(), Failure> {
        run(self.fsnap().arg("mount").arg(&self.dir))
    }

    fn unmount(&self) -> Result<(), Failure> {
        run(self.fsnap().arg("umount").arg(&self.dir))
    }

    /// How long `mkdir branches/NAME@latest` takes.
    fn branch(&mut self) -> Result<Duration, Failure> {
        self.branches += 1;
        let dir = self.dir.join(format!("branches/b{}@latest", self.branches));
        time(|| Ok(fs::create_dir(&dir)?))
    }

    fn mounted(&self) -> Result<Duration, Failure> {
        let taken = time(|| self.mount())?;
        self.unmount()?;
        Ok(taken)
    }
}

pub fn bench(tree: &Tree) -> Result<(), Failure> {
    // Catalogs lie in memory, so that no disk is measured.
    let catalogs = tree.beside("catalogs");
    fs::create_dir(&catalogs)?;
    rustix::mount::mount("catalogs", &catalogs, "tmpfs", MountFlags::empty(), None)?;
    let done = measure(tree, &catalogs);
    rustix::mount::unmount(&catalogs, UnmountFlags::DETACH)?;
    done
}

fn measure(tree: &Tree, catalogs: &Path) -> Result<(), Failure> {
    let volume = tree.beside("one");
    run(Command::new("btrfs").args(["subvolume", "create"]).arg(&volume))?;
    fs::write(volume.join("file"), "one\n")?;
    let mut one = Catalog::new(&catalogs.join("one"), &volume)?;
    let mut all = Catalog::new(&catalogs.join("all"), &tree.volume())?;
    one.mount()?;
    all.mount()?;
    let branches = in_turns(ROUNDS, [&mut || one.branch(), &mut || all.branch()]);
    one.unmount()?;
    all.unmount()?;
    let [one_file, all_files] = branches?;
    let met = |met: bool| if met { "met" } else { "missed" };
    let limit = Duration::from_millis(1);
    let goal = |taken| format!("<= {}: {}", ms(limit), met(taken <= limit));
    head("a branch, by mkdir on the mount", &["", "time", "goal"]);
    row(&["of one file".into(), ms(one_file), goal(one_file)]);
    row(&[format!("of {} files", tree.files()), ms(all_files), goal(all_files)]);

    let [few] = in_turns(ROUNDS, [&mut || one.mounted()])?;
    copies::record_copies(&one.state, MANY, |number, member| {
        member.snapshot.at = format!("s-{number:016x}").parse()?;
        Ok(())
    })?;
    let [many] = in_turns(ROUNDS, [&mut || one.mounted()])?;
    head("fsnap mount, by the number of checkpoints", &["", "time", "goal"]);
    row(&["few".into(), ms(few), String::new()]);
    let ratio = times(many, few);
    row(&[format!("{MANY}"), ms(many), format!("{ratio:.2} x, <= 1.5 x: {}", met(ratio <= 1.5))]);
    Ok(())
}
