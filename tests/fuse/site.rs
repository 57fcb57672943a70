//! A lower directory, a store, and a server that shows both as one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fsnap::stores::layers;

use crate::tree::{self, Tree};
use crate::waiting::wait_until;

/// How long a case may use one mount, on the slowest machine. A request that hangs is answered when the server is killed then.
const LONGEST: Duration = Duration::from_secs(600);

/// One tree of `fsnap overlay`.
pub(crate) struct Site {
    base: tempfile::TempDir,
    server: Arc<Mutex<Option<Child>>>,
    before: Tree,
    watchdog: Option<Sender<()>>,
}

impl Site {
    /// Makes a lower directory with `fill`, and mounts.
    pub(crate) fn new(fill: impl FnOnce(&Path)) -> Self {
        Self::with_store(fill, |_| {})
    }

    /// As [`new`](Self::new), with a store on a file system that has only so many bytes.
    pub(crate) fn on_small_store(bytes: u32, fill: impl FnOnce(&Path)) -> Self {
        Self::with_store(fill, |store| {
            fs::create_dir(store).unwrap();
            let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
            rustix::mount::mount("small", store, "tmpfs", rustix::mount::MountFlags::empty(), &*size).unwrap();
        })
    }

    /// As [`new`](Self::new), with a store on a btrfs that keeps no access control lists.
    pub(crate) fn on_store_without_acls(fill: impl FnOnce(&Path)) -> Self {
        Self::with_store(fill, |store| {
            fs::create_dir(store).unwrap();
            let image = store.with_file_name("image");
            fs::File::create(&image).unwrap().set_len(128 << 20).unwrap();
            let mut mkfs = Command::new("mkfs.btrfs");
            let mut mount = Command::new("mount");
            for command in [mkfs.arg("-q").arg(&image), mount.args(["-o", "loop,noacl"]).args([&image, store])] {
                assert!(command.output().unwrap().status.success(), "{command:?}");
            }
        })
    }

    fn with_store(fill: impl FnOnce(&Path), make_store: impl FnOnce(&Path)) -> Self {
        let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for name in ["lower", "mnt"] {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        fill(&base.path().join("lower"));
        let before = tree::with_times(&base.path().join("lower"));
        let mut site = Self { base, server: Arc::default(), before, watchdog: None };
        let (alive, watched) = channel();
        let server = site.server.clone();
        std::thread::spawn(move || {
            if watched.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
                kill(&server);
            }
        });
        site.watchdog = Some(alive);
        make_store(&site.store());
        site.mount();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    pub(crate) fn lower(&self) -> PathBuf {
        self.path("lower")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// Where it is mounted.
    pub(crate) fn dir(&self) -> PathBuf {
        self.path("mnt")
    }

    /// A path below the mount.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.dir().join(path)
    }

    pub(crate) fn mount(&self) {
        let mut command = fsnap();
        command.args(["overlay", "--foreground", "--suid", "--dev"]).args([self.lower(), self.store(), self.dir()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        wait_until("it is mounted", || {
            assert_eq!(self.ended(), None, "the server ended before it had mounted");
            // A mount that a killed server left answers this with an error, and so it is not taken for the new one.
            rustix::fs::statfs(self.dir()).is_ok() && is_mounted(&self.dir())
        });
    }

    pub(crate) fn unmount(&self) {
        // The kernel lets go of a file a little after the process that had it.
        wait_until("it is unmounted", || fsnap().arg("umount").arg(self.dir()).status().unwrap().success());
        self.ends();
    }

    /// Waits for the end of the server, whose mount was taken off.
    pub(crate) fn ends(&self) {
        wait_until("the server ends", || self.ended().is_some());
        assert_eq!(self.ended(), Some(true), "the server failed");
        assert!(!is_mounted(&self.dir()));
    }

    pub(crate) fn remount(&self) {
        self.unmount();
        self.mount();
    }

    /// Notes that an image of that name needs what will be sealed for it.
    pub(crate) fn hold(&self, image: &str) {
        let holds = self.store().join("holds");
        fs::create_dir_all(&holds).unwrap();
        fs::write(holds.join(image), "").unwrap();
    }

    /// Seals what is there now for an image of that name.
    pub(crate) fn seal(&self, image: &str) {
        self.hold(image);
        rustix::fs::setxattr(self.dir(), layers::SEAL, image.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
    }

    /// The number of the layer that is written.
    pub(crate) fn live(&self) -> u64 {
        fs::read_to_string(self.store().join("live")).map_or(0, |text| text.trim().parse().unwrap())
    }

    /// The image needs nothing any more; what can be merged is.
    pub(crate) fn release(&self, image: &str) {
        fs::remove_file(self.store().join("holds").join(image)).unwrap();
        rustix::fs::setxattr(self.dir(), layers::MERGE, b"", rustix::fs::XattrFlags::empty()).unwrap();
    }

    /// SIGKILL; what is mounted stays, and answers nothing any more.
    pub(crate) fn kill(&self) {
        kill(&self.server);
    }

    /// A second server on the same store.
    pub(crate) fn second_server(&self) -> Output {
        let other = self.path("other");
        fs::create_dir(&other).unwrap();
        fsnap().arg("overlay").args([self.lower(), self.store(), other]).output().unwrap()
    }

    /// Unmounts, and looks whether anything of the lower has changed.
    pub(crate) fn end(self) {
        self.unmount();
        tree::assert_equal(&self.before, &tree::with_times(&self.lower()), "the lower has changed");
    }

    fn ended(&self) -> Option<bool> {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.as_mut().and_then(|child| child.try_wait().unwrap()).map(|status| status.success())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.watchdog = None;
        self.kill();
        [self.dir(), self.store()].iter().for_each(|dir| take_off(dir));
    }
}

pub(crate) fn fsnap() -> Command {
    Command::new(env!("CARGO_BIN_EXE_fsnap"))
}

pub(crate) fn kill(server: &Mutex<Option<Child>>) {
    if let Some(child) = server.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Whether one of fsnap's trees is mounted there, as the kernel's table says: looking at a dead one would fail.
pub(crate) fn is_mounted(dir: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = format!(" {} ", dir.to_str().unwrap());
    table.lines().any(|line| line.contains(&point) && line.contains(" - fuse.fsnap "))
}

/// Takes off all that is mounted at a directory, whoever uses it: nothing stays of a case, also when it fails.
pub(crate) fn take_off(dir: &Path) {
    while rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH).is_ok() {}
}
