//! A pool of its own for each case.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use libtest_mimic::Failed;
use rustix::mount::{MountFlags, UnmountFlags};

use fsnap_dm_thin::STORES;

use crate::kernel::{self, Done, failure, output, unmount_below};
use crate::thin::{Device, devices, remove_devices};

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
        let thin = |device: &Device| ["s-", "v-", "volume-"].iter().any(|kind| device.what.starts_with(kind));
        let found: Vec<_> = devices(&self.store()).into_iter().filter(thin).collect();
        Ok((found.len(), found.iter().any(|device| device.suspended)))
    }

    /// Where the pool's store is.
    pub(crate) fn store(&self) -> PathBuf {
        Path::new(STORES).join(&self.pool)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        unmount_below(&self.dir);
        remove_devices(&self.store());
        let _ = fs::remove_dir_all(self.store());
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
