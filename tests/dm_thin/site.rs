//! A pool of its own for each case.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use libtest_mimic::Failed;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::kernel::{self, Done, failure, output, unmount_below};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A pool on sparse files, and an fsnap with a state of its own.
pub(crate) struct Site {
    pub(crate) dir: PathBuf,
    pub(crate) pool: String,
}

impl Site {
    pub(crate) fn new(size: &str) -> Result<Self, Failed> {
        let site = Self::without_pool()?;
        site.fsnap(&["pool", "create", &site.path("pool"), "--name", &site.pool, "--size", size])?;
        Ok(site)
    }

    /// A site that has a name for a pool, and none.
    pub(crate) fn without_pool() -> Result<Self, Failed> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Ok(Self { dir: tempfile::tempdir()?.keep(), pool: format!("site-{}-{number}", std::process::id()) })
    }

    /// A site with a registered volume `db`, and one file in it.
    pub(crate) fn with_volume(size: &str, file_system: &str) -> Result<Self, Failed> {
        let site = Self::new(size)?;
        site.add_volume("db", file_system)?;
        fs::write(site.db().join("file"), "first")?;
        site.fsnap(&["init", &site.path("db")])?;
        Ok(site)
    }

    /// Makes a volume and mounts it on the directory of its name.
    pub(crate) fn add_volume(&self, name: &str, file_system: &str) -> Done {
        let arguments = ["pool", "add-volume", &self.pool, name, "--size", "400M", "--file-system", file_system];
        self.fsnap(&arguments)?;
        fs::create_dir(self.dir.join(name))?;
        self.mount(name, file_system)
    }

    pub(crate) fn mount(&self, name: &str, file_system: &str) -> Done {
        let device = self.node(&format!("{}-volume-{name}", self.pool))?;
        Ok(rustix::mount::mount(device, self.dir.join(name), file_system, MountFlags::empty(), None)?)
    }

    pub(crate) fn node(&self, device: &str) -> Result<PathBuf, Failed> {
        let minor = output(Command::new("dmsetup").args(["info", "-c", "--noheadings", "-o", "minor", device]))?;
        Ok(format!("/dev/dm-{}", minor.trim()).into())
    }

    pub(crate) fn unmount(&self, name: &str) -> Done {
        Ok(rustix::mount::unmount(self.dir.join(name), UnmountFlags::empty())?)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    pub(crate) fn db(&self) -> PathBuf {
        self.dir.join("db")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        kernel::fsnap(&self.dir, arguments)
    }

    pub(crate) fn fsnap(&self, arguments: &[&str]) -> Result<String, Failed> {
        output(&mut self.command(arguments))
    }

    pub(crate) fn fails(&self, arguments: &[&str]) -> Result<String, Failed> {
        failure(&mut self.command(arguments))
    }

    /// What `fsnap pool list --json` says of the site's pool.
    pub(crate) fn listed(&self) -> Result<serde_json::Value, Failed> {
        let list: serde_json::Value = serde_json::from_str(&self.fsnap(&["pool", "list", "--json"])?)?;
        let found = list.as_array().into_iter().flatten().find(|pool| pool["name"] == self.pool.as_str());
        found.cloned().ok_or_else(|| format!("the pool is not listed: {list}").into())
    }

    /// How many thin devices the pool has in use, and whether one of them is suspended.
    pub(crate) fn devices(&self) -> Result<(usize, bool), Failed> {
        let columns = ["info", "-c", "--noheadings", "-o", "name,suspended"];
        let all = output(Command::new("dmsetup").args(columns))?;
        let of_site = |line: &&str| line.starts_with("fsnap-") || line.starts_with(&format!("{}-volume-", self.pool));
        let found: Vec<_> = all.lines().filter(of_site).collect();
        Ok((found.len(), found.iter().any(|line| line.ends_with("Suspended"))))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        unmount_below(&self.dir);
        let list = Command::new("dmsetup").args(["ls"]).output();
        let list = list.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let names: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
        let thin = names.iter().filter(|name| name.starts_with("fsnap-") || name.contains("-volume-"));
        let parts = [self.pool.clone(), format!("{}-data", self.pool), format!("{}-metadata", self.pool)];
        for name in thin.copied().chain(parts.iter().map(String::as_str)) {
            let _ = Command::new("dmsetup").args(["resume", name]).output();
            let _ = Command::new("dmsetup").args(["remove", "--force", "--retry", name]).output();
        }
        let _ = fs::remove_dir_all(Path::new("/var/lib/fsnap/dm-thin").join(&self.pool));
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A program of that name that prints `text` and notes that it was called; returns the directory that holds it.
pub(crate) fn pretend(site: &Site, name: &str, text: &str) -> Result<PathBuf, Failed> {
    let dir = site.dir.join("programs");
    fs::create_dir_all(&dir)?;
    let program = dir.join(name);
    fs::write(&program, format!("#!/bin/sh\n: >{}.called\n{text}\n", program.display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}
