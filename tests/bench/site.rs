//! A loop-mounted btrfs with a volume, a process that writes to it, and the programs that are compared.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::measure::{Failure, run};

/// The files in the volume: enough that their number would show if it mattered.
const FILES: usize = 20_000;

const BARE_HOOK: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/btrfs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void) {
#ifdef VOLUME
    const char *action = getenv("CRTOOLS_SCRIPT_ACTION");
    int volume = open(VOLUME, O_RDONLY | O_DIRECTORY);
    if (!strcmp(action, "pre-dump"))
        return syncfs(volume) != 0;
    if (!strcmp(action, "post-dump")) {
        struct btrfs_ioctl_vol_args_v2 call = { .fd = volume, .flags = BTRFS_SUBVOL_RDONLY, .name = "raw" };
        return ioctl(open(SNAPSHOTS, O_RDONLY | O_DIRECTORY), BTRFS_IOC_SNAP_CREATE_V2, &call) != 0;
    }
#endif
    return 0;
}
"#;

pub struct Site {
    temp: tempfile::TempDir,
    writer: Child,
    pub criu: Option<PathBuf>,
}

impl Site {
    pub fn new() -> Result<Self, Failure> {
        let temp = tempfile::tempdir()?;
        let writer = Command::new("true").spawn()?;
        let mut site = Self { temp, writer, criu: std::env::var_os("FSNAP_CRIU").map(PathBuf::from) };
        let image = site.path("image");
        File::create(&image)?.set_len(48 << 30)?;
        fs::create_dir(site.path("mnt"))?;
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image).stderr(Stdio::null()))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(site.path("mnt")))?;
        run(Command::new("btrfs").args(["subvolume", "create"]).arg(site.volume()))?;
        for number in 0..FILES {
            let dir = site.volume().join(format!("{:02x}", number % 256));
            if number < 256 {
                fs::create_dir(&dir)?;
            }
            fs::write(dir.join(number.to_string()), format!("{number}\n"))?;
        }
        site.compile_bare_hooks()?;
        fs::write(site.path("btrfs-hook"), site.bash_hook())?;
        run(Command::new("chmod").arg("+x").arg(site.path("btrfs-hook")))?;
        // Installed, as a copy: what the linker has just written through a mapping lies in the page cache by single pages, and each
        // start of it takes a third longer than of what was copied or read from the disk.
        fs::copy(env!("CARGO_BIN_EXE_fsnap"), site.path("fsnap"))?;
        symlink(site.path("fsnap"), site.path("fsnap-criu-hook"))?;
        run(site.fsnap().args(["init", "--name", "data"]).arg(site.volume()))?;
        site.writer = Command::new("setsid")
            .args(["sh", "-c", "exec 3>>held; exec sleep infinity"])
            .current_dir(site.volume())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        // What the compiler and this site have left to be written would disturb what is measured.
        rustix::fs::sync();
        Ok(site)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    pub fn volume(&self) -> PathBuf {
        self.path("mnt/data")
    }

    /// The process whose files are snapshotted.
    pub fn writer(&self) -> u32 {
        self.writer.id()
    }

    pub fn fsnap(&self) -> Command {
        let mut command = Command::new(self.path("fsnap"));
        command.env("FSNAP_STATE", self.path("state"));
        command
    }

    /// Leaves so much data unwritten in the page cache.
    pub fn dirty(&self, mebibytes: usize) -> Result<(), Failure> {
        let mut file = File::create(self.volume().join("dirty"))?;
        let block = vec![0x5a; 1 << 20];
        (0..mebibytes).try_for_each(|_| file.write_all(&block))?;
        Ok(())
    }

    /// The cheapest action scripts that there can be: one that does nothing, and one that does nothing but to flush before the freeze and to
    /// make the snapshot `raw` in it, by one system call each.
    fn compile_bare_hooks(&self) -> Result<(), Failure> {
        let source = self.path("bare.c");
        fs::write(&source, BARE_HOOK)?;
        let text = |name: &str, path: PathBuf| format!("-D{name}=\"{}\"", path.display());
        for (name, defines) in
            [("noop", vec![]), ("raw-hook", vec![text("VOLUME", self.volume()), text("SNAPSHOTS", self.path("mnt"))])]
        {
            let mut cc = Command::new("cc");
            cc.args(["-O2", "-static", "-o"]).arg(self.path(name)).args(defines).arg(&source);
            run(&mut cc)?;
        }
        Ok(())
    }

    /// What people write today.
    fn bash_hook(&self) -> String {
        let (volume, snapshots) = (self.volume(), self.path("mnt"));
        format!(
            "#!/bin/bash\nif [ \"$CRTOOLS_SCRIPT_ACTION\" = post-dump ]; then\n\
             btrfs subvolume snapshot -r {} {}/bash.$$ >/dev/null\nfi\n",
            volume.display(),
            snapshots.display()
        )
    }

    /// An empty image directory, complete as far as fsnap looks.
    pub fn images(&self, name: &str) -> Result<PathBuf, Failure> {
        let dir = self.path(name);
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir(&dir)?;
        let mut inventory = 0x5831_3116_u32.to_le_bytes().to_vec();
        inventory.extend([4, 0, 0, 0, 8, 2, 16, 1]);
        fs::write(dir.join("inventory.img"), inventory)?;
        Ok(dir)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.writer.kill();
        let _ = self.writer.wait();
        // The last process that was killed may not have let go yet.
        let unmount = || rustix::mount::unmount(self.path("mnt"), rustix::mount::UnmountFlags::empty());
        for _ in 0..100 {
            if unmount().is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!("still mounted, because somebody uses it: {}", self.path("mnt").display());
    }
}

/// Processes that write to the volume, and have so much memory as a small server.
#[derive(Debug)]
pub struct Memory(Child);

impl Memory {
    /// How much.
    pub const SIZE: &str = "64 MiB";

    /// Starts them, and waits until they have it.
    pub fn start(site: &Site) -> Result<Self, Failure> {
        // What has no end of a line yet, tail(1) keeps.
        let script = "exec 3>>server; { head -c 64M /dev/zero; echo >read; exec sleep infinity; } | tail";
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", script]).current_dir(site.volume());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        while !site.volume().join("read").exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(Self(child))
    }

    /// The root of their tree.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // They are the session that it leads.
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.0.id())]).status();
        let _ = self.0.wait();
    }
}
