//! A catalog with volumes on a btrfs file system, or on file systems of their own, and a server that shows its past.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::site::{fsnap, is_mounted, kill, take_off};
use crate::volumes::{Ground, Volume};
pub(crate) use crate::waiting::wait_until as until;

/// A catalog, volumes, and a place to mount at.
pub(crate) struct Past {
    base: tempfile::TempDir,
    /// What volumes lie on that are file systems of their own.
    ground: Mutex<Ground>,
    server: Arc<Mutex<Option<Child>>>,
}

impl Past {
    /// Makes the file system. No volume is registered yet.
    pub(crate) fn new() -> Self {
        let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let ground = Mutex::new(Ground::new(base.path()));
        let past = Self { base, ground, server: Arc::default() };
        for name in ["disk", "state", "mnt"] {
            fs::create_dir(past.path(name)).unwrap();
        }
        fs::File::create(past.path("image")).unwrap().set_len(1 << 30).unwrap();
        run(Command::new("mkfs.btrfs").arg("-q").arg(past.path("image")));
        run(Command::new("mount").args(["-o", "loop"]).args([past.path("image"), past.path("disk")]));
        // The catalog is no part of what is tested, and ten thousand commits to it are to take no time.
        rustix::mount::mount("state", past.path("state"), "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        past
    }

    /// Registers an empty volume, kept by this backend.
    pub(crate) fn volume(&self, name: &str, backend: &str) -> PathBuf {
        let own = [Volume::DmThin, Volume::Nilfs2].into_iter().find(|volume| volume.backend() == backend);
        if let Some(volume) = own {
            let dir = self.ground().make(volume, name);
            self.fsnap([OsStr::new("init"), dir.as_ref()]);
            return dir;
        }
        let dir = self.path("disk").join(name);
        run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(&dir));
        let place = self.path("disk").join(format!("{backend}-store"));
        self.fsnap(
            ["init", "--backend", backend, "--store"].map(OsStr::new).into_iter().chain([place.as_ref(), dir.as_ref()]),
        );
        dir
    }

    pub(crate) fn ground(&self) -> MutexGuard<'_, Ground> {
        self.ground.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    /// Where the catalog is.
    pub(crate) fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// A path below the mount.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.path("mnt").join(path)
    }

    /// Runs a command of fsnap that must succeed, and returns its output.
    pub(crate) fn fsnap<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        run(self.command().args(arguments)).trim_end().to_owned()
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = fsnap();
        command.env("FSNAP_STATE", self.state());
        command
    }

    /// Takes a checkpoint, and returns its id.
    pub(crate) fn checkpoint(&self) -> String {
        self.fsnap(["checkpoint"])
    }

    pub(crate) fn mount(&self) {
        self.mount_by(&[], "");
    }

    pub(crate) fn mount_for_others(&self) {
        self.mount_by(&["--allow-other"], "");
    }

    /// Mounts, by a server that does something at a place in the program.
    pub(crate) fn mount_armed(&self, failpoint: &str) {
        self.mount_by(&[], failpoint);
    }

    pub(crate) fn mount_with(&self, options: &[&str]) {
        self.mount_by(options, "");
    }

    pub(crate) fn mount_by(&self, options: &[&str], failpoint: &str) {
        let mut command = self.command();
        command.env("FSNAP_FAILPOINT", failpoint);
        command.args(["mount", "--foreground"]).args(options).arg(self.path("mnt"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        until("it is mounted", || {
            assert_eq!(self.ended(), None, "the server ended before it had mounted");
            rustix::fs::statfs(self.path("mnt")).is_ok() && is_mounted(&self.path("mnt"))
        });
    }

    /// From here on the server may have no more than so many descriptors besides those that it has.
    pub(crate) fn allow_descriptors(&self, more: u64) {
        use rustix::process::{Pid, Resource, Rlimit, prlimit};
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = server.as_ref().unwrap().id().cast_signed();
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
        let limit = Rlimit { current: Some(open + more), maximum: Some(open + more) };
        prlimit(Pid::from_raw(pid), Resource::Nofile, limit).unwrap();
    }

    /// Returns what the server has said.
    pub(crate) fn unmount(&self) -> String {
        // A program that another case starts has our descriptors for a moment, between its fork and its exec.
        until("it is unmounted", || {
            self.command().arg("umount").arg(self.path("mnt")).output().unwrap().status.success()
        });
        until("the server ends", || self.ended().is_some());
        assert_eq!(self.ended(), Some(true), "the server failed");
        assert!(!is_mounted(&self.path("mnt")));
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut said = String::new();
        server.and_then(|server| server.stderr).unwrap().read_to_string(&mut said).unwrap();
        said
    }

    /// SIGKILL; what is mounted stays, and answers nothing any more.
    pub(crate) fn kill(&self) {
        kill(&self.server);
    }

    fn ended(&self) -> Option<bool> {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.as_mut().and_then(|child| child.try_wait().unwrap()).map(|status| status.success())
    }
}

impl Drop for Past {
    fn drop(&mut self) {
        self.kill();
        ["mnt", "state", "disk"].iter().for_each(|name| take_off(&self.path(name)));
        self.ground().clear();
    }
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The names in a directory, sorted.
pub(crate) fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
