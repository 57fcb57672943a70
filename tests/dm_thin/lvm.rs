//! A thin pool of LVM's, made by its own tools, is left as it is, and those tools go on with it.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags};

use crate::site::{Site, ensure, is, output};
use crate::{Case, Done};

pub(crate) const CASES: &[Case] = &[("lvm_keeps_its_pools", lvm_keeps_its_pools)];

/// A group of LVM on a sparse file, with a thin pool `pool` and a mounted volume `db` in it; gone when dropped.
struct Group<'a> {
    name: String,
    device: String,
    site: &'a Site,
}

impl<'a> Group<'a> {
    fn new(site: &'a Site) -> Result<Self, libtest_mimic::Failed> {
        let image = site.dir.join("image");
        File::create(&image)?.set_len(640 << 20)?;
        let device = output(Command::new("losetup").args(["--find", "--show"]).arg(&image))?.trim().to_owned();
        // Device-mapper doubles what joins the parts of a name.
        let group = Self { name: site.pool.replace('-', "_"), device, site };
        group.lvm("vgcreate", &[&group.name, &group.device])?;
        group.lvm("lvcreate", &["--type", "thin-pool", "--size", "300M", "--name", "pool", &group.name])?;
        group.lvm("lvcreate", &["--virtualsize", "200M", "--thinpool", "pool", "--name", "db", &group.name])?;
        let node = site.node(&format!("{}-db", group.name))?;
        output(Command::new("mkfs.ext4").arg("-q").arg(&node))?;
        fs::create_dir(site.db())?;
        rustix::mount::mount(node, site.db(), "ext4", MountFlags::empty(), None)?;
        Ok(group)
    }

    /// Calls a program of LVM's as on a machine without udev and daemons, as a virtual machine for tests is.
    fn lvm(&self, program: &str, arguments: &[&str]) -> Result<String, libtest_mimic::Failed> {
        let config = "activation { udev_sync=0 udev_rules=0 monitoring=0 } backup { backup=0 archive=0 } \
                      devices { obtain_device_list_from_udev=0 external_device_info_source=none use_devicesfile=0 }";
        output(Command::new(program).args(["--yes", "--config", config]).args(arguments))
    }

    /// What the kernel says of the pool: the transaction that its tools count first.
    fn status(&self) -> Result<String, libtest_mimic::Failed> {
        rustix::fs::sync();
        output(Command::new("dmsetup").args(["status", &format!("{}-pool-tpool", self.name)]))
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.site.db(), UnmountFlags::DETACH);
        let _ = self.lvm("vgremove", &["--force", &self.name]);
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

fn lvm_keeps_its_pools() -> Done {
    let site = Site::without_pool()?;
    let group = Group::new(&site)?;
    fs::write(site.db().join("file"), "first")?;
    let before = group.status()?;
    let said = site.fails(&["init", &site.path("db"), "--backend", "dm-thin"])?;
    ensure(said.contains("it belongs to LVM") && said.contains("`lvcreate --snapshot`"), &said)?;
    let pool = format!("{}-pool-tpool", group.name);
    let said = site.fails(&["pool", "add-volume", &pool, "other", "--size", "16M"])?;
    ensure(said.contains(&pool), &said)?;
    let doctor = site.fsnap(&["doctor", &site.path("db")])?;
    ensure(doctor.contains("it belongs to LVM"), &doctor)?;

    // It is a directory as any other.
    let said = site.fsnap(&["init", &site.path("db")])?;
    ensure(said.contains("rsync snapshots"), &said)?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    fs::write(site.db().join("file"), "second")?;
    let files = site.fsnap(&["branch", "one", "try"])?;
    is(&Path::new(files.trim()).join("file"), "first")?;

    let counted = |status: &str| status.split(' ').nth(3).map(str::to_owned);
    let after = group.status()?;
    ensure(counted(&before) == counted(&after), &format!("the pool was changed: {before}{after}"))?;
    group.lvm("lvcreate", &["--snapshot", "--name", "later", &format!("{}/db", group.name)])?;
    let listed = group.lvm("lvs", &["--noheadings", "--options", "lv_name", &group.name])?;
    ensure(listed.split_whitespace().eq(["db", "later", "pool"]), &listed)
}
