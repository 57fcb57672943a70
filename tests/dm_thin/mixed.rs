//! One checkpoint of volumes of several kinds, of which one cannot be written any more.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use libtest_mimic::Failed;
use rustix::mount::MountFlags;

use crate::kernel::{Case, Done, ensure, is, output};
use crate::site::Site;
use crate::standing::{Base, fails_in_the_window, on_base};

pub(crate) const CASES: &[Case] = &[("one_failing_device_undoes_all", one_failing_device_undoes_all)];

/// The volumes by name, one on dm-thin, one on NILFS2 and one that is copied, each on a device of its own that can fail.
struct Mixed {
    // Dropped first: then the devices are in use no more.
    site: Site,
    pool: Base,
    log: (Base, PathBuf),
    copied: (Base, PathBuf),
}

const VOLUMES: [&str; 3] = ["db", "log", "copied/dir"];

impl Mixed {
    fn new() -> Result<Self, Failed> {
        let (pool, site) = on_base()?;
        let mixed = Self { pool, log: Base::of(&site, "log")?, copied: Base::of(&site, "copied")?, site };
        output(Command::new("mkfs.nilfs2").args(["-q", "-B", "256"]).arg(&mixed.log.1))?;
        output(Command::new("mkfs.ext4").arg("-q").arg(&mixed.copied.1))?;
        for (name, device, file_system) in [("log", &mixed.log.1, "nilfs2"), ("copied", &mixed.copied.1, "ext4")] {
            fs::create_dir(mixed.site.dir.join(name))?;
            rustix::mount::mount(device, mixed.site.dir.join(name), file_system, MountFlags::NOATIME, None)?;
        }
        fs::create_dir(mixed.site.dir.join("copied/dir"))?;
        for volume in &VOLUMES[1..] {
            mixed.site.fsnap(&["init", &mixed.site.path(volume)])?;
        }
        Ok(mixed)
    }

    /// Writes the same text to every volume.
    fn write(&self, text: &str) -> Done {
        VOLUMES.iter().try_for_each(|volume| Ok(fs::write(self.site.dir.join(volume).join("file"), text)?))
    }

    /// How many snapshots there are of each volume.
    fn snapshots(&self) -> Result<[usize; 3], Failed> {
        let marked = output(Command::new("lscp").arg("-s").arg(&self.log.1))?.lines().skip(1).count();
        let thin = fs::read_dir(self.site.store().join("images"))?.count();
        let copies = fs::read_dir(self.site.dir.join("copied/.fsnap/snapshots"))?.count();
        Ok([thin, marked, copies])
    }

    /// Mounts anew what the kernel has made read-only because of an error.
    fn mount_again(&self) -> Done {
        self.site.unmount("db")?;
        self.site.mount("db", "ext4")?;
        self.site.unmount("copied")?;
        let dir = self.site.dir.join("copied");
        Ok(rustix::mount::mount(&self.copied.1, dir, "ext4", MountFlags::NOATIME, None)?)
    }
}

fn one_failing_device_undoes_all() -> Done {
    let mixed = Mixed::new()?;
    let site = &mixed.site;
    for (round, (name, base)) in
        [("db", &mixed.pool), ("log", &mixed.log.0), ("dir", &mixed.copied.0)].into_iter().enumerate()
    {
        let good = format!("good {round}");
        mixed.write(&good)?;
        site.fsnap(&["checkpoint", "--tag", &good.replace(' ', "-")])?;
        // A pool whose metadata could not be written has to be checked first.
        let failing = if name == "db" { base.with(None, Some("error")) } else { base.unwritable() };
        let before = mixed.snapshots()?;
        ensure(before == [round + 1; 3], &format!("{name}: {before:?}"))?;
        let said = fails_in_the_window(site, || {
            mixed.write("in no snapshot")?;
            base.switch(&failing)
        })?;
        ensure(said.contains(&format!("no snapshot of {name}: cannot ")), &said)?;
        ensure(said.contains("Input/output error"), &said)?;
        ensure(!site.devices()?.1, &format!("{name}: a volume stands: {said}"))?;
        // The others can be written at once.
        for (volume, other) in VOLUMES.iter().zip(["db", "log", "dir"]).filter(|(_, other)| *other != name) {
            let path = site.dir.join(volume).join("file");
            fs::write(&path, "goes on")?;
            File::open(&path).and_then(|file| file.sync_all()).map_err(|error| format!("{other}: {error}"))?;
        }
        base.switch(&base.plain())?;
        mixed.mount_again()?;
        let said = site.fsnap(&["recover"])?;
        ensure(!said.contains("postponed"), &said)?;
        let after = mixed.snapshots()?;
        ensure(after == before, &format!("{name}: {before:?} became {after:?}"))?;
        let log = site.fsnap(&["log"])?;
        ensure(!log.contains("meanwhile") && log.lines().count() == round + 2, &log)?;
        // What there was before is whole.
        site.fsnap(&["verify"])?;
        let branch = site.fsnap(&["branch", &good.replace(' ', "-"), &format!("{name}-was")])?;
        ensure(branch.lines().count() == VOLUMES.len(), &branch)?;
        branch.lines().try_for_each(|dir| is(&PathBuf::from(dir).join("file"), &good))?;
        site.fsnap(&["rm", "--branch", &format!("{name}-was")])?;
    }
    Ok(())
}
