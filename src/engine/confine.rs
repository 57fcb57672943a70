//! What the processes of a run can write to, carried out in their mount namespace.
//!
//! Everything is read-only, except what is mounted afterwards: volumes or branches, a scratch file system in memory on each of the
//! usual places, and what the user opened up. Nothing is moved: a path means the same inside and outside, which is what makes
//! one process image fit many copies.
//!
//! What lies in the scratch places belongs to the processes and not to the volumes: it is saved with the process image
//! ([`save_scratch`]), and is there again before the engine restores.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fsnap_backend::{MountSpec, beneath, mounts};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::stage::Failure;
use super::{Ended, sys};
use crate::checkpoint::PathText;
use crate::mount::{Prepared, Restrictions};
use crate::processes::{self, ProcessId};

/// Where programs expect to find a place for files that need not last.
pub const SCRATCH: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

/// The file system of such a place.
pub(crate) const SCRATCH_TYPE: &str = "tmpfs";

/// Where the kernel shows terminals.
const TERMINALS: &str = "/dev/pts";

/// The directory within a run's own that its processes see.
pub const OUTPUT: &str = "output";
/// The file in it with standard output and standard error of the processes.
pub const LOG: &str = "log";
/// Who waits for the processes, since which boot.
const INIT: &str = "init";
/// How the processes ended.
pub(super) const ENDED: &str = "ended";

/// What processes can write to, apart from their volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Directories of this machine, the same for all copies.
    #[serde(default)]
    pub writable: Vec<PathText>,
    /// Directories that are shown as they are, read-only, also in a scratch place or a volume.
    #[serde(default)]
    pub read_only: Vec<PathText>,
    /// Where each copy has a file system in memory of its own.
    #[serde(default)]
    pub scratch: Vec<PathText>,
    /// Where each copy finds its own log.
    pub output: PathText,
}

/// A [`Confinement`] that one run is put in.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cell {
    pub(super) confinement: Confinement,
    /// The directory of this run.
    pub(super) place: PathText,
}

/// What was prepared while everything could still be seen.
#[derive(Debug)]
pub(super) struct Opened {
    mounts: Vec<(PathBuf, Prepared)>,
    place: OwnedFd,
}

/// The process that waits for a run's processes; all of them end with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Init {
    /// Which process.
    pub id: ProcessId,
    /// The running kernel's boot: a start time says nothing after it.
    pub boot: String,
    /// The pid namespace in which that is its pid, if it was noted.
    #[serde(default)]
    pub space: Option<u64>,
}

/// Where a process is that waits for a run's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// It has this pid here.
    Here(ProcessId),
    /// It lives in a pid namespace that does not show from here.
    Elsewhere,
    /// It has ended.
    Nowhere,
}

impl Init {
    /// Reads who waits for the processes of the run with the directory `place`; `None` as long as there is nobody.
    pub fn read(place: &Path) -> Option<Self> {
        read(&place.join(INIT))
    }

    /// It, by its pid where it was noted.
    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Tells how the root of the run's tree ended, when the init is not there any more.
    ///
    /// The init notes it at once. Where it noted nothing it was killed before, and the kernel kills all that are in a pid namespace with its
    /// init. Of one that ended with the machine nobody knows.
    pub fn told_end(&self, place: &Path) -> Ended {
        match fs::read(place.join(ENDED)) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or(Ended::Unknown),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.is_of_this_boot() => Ended::BY_ITS_INIT,
            Err(_) => Ended::Unknown,
        }
    }

    /// Looks for it; `place` is the directory of the run, and tells of one that lives where it cannot be seen by a lock.
    pub fn find(&self, place: &Path) -> Whereabouts {
        if !self.is_of_this_boot() {
            return Whereabouts::Nowhere;
        }
        let is_own = self.space.is_none_or(|space| processes::pid_space("self").is_ok_and(|own| own == space));
        let found = match is_own {
            true => Some(self.id).filter(|id| id.is_alive()),
            false => self.space.and_then(|space| processes::init_seen_from_outside(self.id, space)),
        };
        match found {
            Some(id) => Whereabouts::Here(id),
            None if !is_own && is_locked(&place.join(INIT)) => Whereabouts::Elsewhere,
            None => Whereabouts::Nowhere,
        }
    }

    /// Whether it, which was [found](Self::find) here, is the init of a pid namespace, all of whose processes end with it.
    pub(crate) fn is_first_in_its_space(&self, found: ProcessId) -> bool {
        self.space != processes::pid_space(&found.pid.to_string()).ok()
    }

    fn is_of_this_boot(&self) -> bool {
        crate::boot_id().is_ok_and(|boot| boot == self.boot)
    }
}

/// Whether somebody holds a lock on the file or directory, in whichever namespace.
pub(crate) fn is_locked(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Notes in the directory `place` who waits for the processes, before there are any.
pub(super) fn note_init(place: &Path, id: ProcessId) -> io::Result<()> {
    let init = Init { id, boot: crate::boot_id()?, space: Some(processes::pid_space("self")?) };
    let (unfinished, path) = (place.join("init.new"), place.join(INIT));
    fs::write(&unfinished, serde_json::to_vec(&init)?)?;
    fs::rename(unfinished, path)
}

/// Tells all namespaces, for as long as what is returned is there, that the init noted in the directory `place` lives.
pub(super) fn show_life(place: &Path) -> io::Result<File> {
    let init = beneath::open_file(beneath::open_root(place)?, INIT.as_ref())?;
    // Who only asks lets go of it at once.
    init.lock()?;
    Ok(init)
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

impl Cell {
    /// Takes hold of everything that the processes shall see, before it is covered; `given` tells whether they have a terminal of this machine.
    pub(super) fn open(&self, given: bool) -> Result<Opened, Failure> {
        let bind = |dir: &Path, at: &Path, read_only| {
            let spec = MountSpec::Bind { dir: dir.into(), read_only };
            let prepared = Restrictions::of(dir).and_then(|restrictions| Prepared::new(&spec, restrictions));
            let prepared = prepared.map_err(Failure::in_step(format!("prepare what {at:?} shall show")))?;
            Ok((at.to_owned(), prepared))
        };
        let Confinement { writable, read_only, output, .. } = &self.confinement;
        let mut mounts = Vec::new();
        for (dirs, is_read_only) in [(writable, false), (read_only, true)] {
            for dir in dirs {
                mounts.push(bind(dir.as_path(), dir.as_path(), is_read_only)?);
            }
        }
        // Terminals are no files, and change hands: those of this machine can be given. The others that the processes make (tmux, script) are their own, with
        // numbers that each copy can have again.
        let terminals = Path::new(TERMINALS);
        if terminals.is_dir() {
            mounts.push(if given { bind(terminals, terminals, false)? } else { (terminals.into(), own_terminals()?) });
        }
        mounts.push(bind(&self.place.as_path().join(OUTPUT), output.as_path(), false)?);
        // The processes do not see it: it says who they are, and they are not asked.
        let (_, place) = bind(self.place.as_path(), self.place.as_path(), false)?;
        let what = format!("open the directory of the run {:?}", self.place.as_path());
        let place = place.open().map_err(Failure::in_step(what))?;
        Ok(Opened { mounts, place })
    }

    /// Takes everything away, and puts scratch places there; `saved` is what they held.
    ///
    /// A place that is going to be covered by one of `volumes` gets none.
    pub(super) fn close(&self, volumes: &[&Path], saved: Option<File>) -> Result<(), Failure> {
        sys::make_everything_read_only().map_err(Failure::step("make all mounts read-only"))?;
        let Confinement { writable, scratch, .. } = &self.confinement;
        let mut scratch: Vec<&Path> = scratch.iter().map(PathText::as_path).collect();
        scratch.sort_by_key(|at| at.components().count());
        for at in scratch {
            let covered = volumes.contains(&at) || writable.iter().any(|dir| dir.as_path() == at);
            // What is missing can be made within another scratch place only; a link leads to one of its own.
            let is_there =
                || make_mount_point(at).is_ok() && fs::symlink_metadata(at).is_ok_and(|found| found.is_dir());
            if covered || !is_there() {
                continue;
            }
            let spec = MountSpec::Mount {
                fstype: SCRATCH_TYPE.into(),
                source: "fsnap".into(),
                options: "mode=1777".into(),
                read_only: false,
            };
            let made = Prepared::new(&spec, Restrictions::default()).and_then(|mount| mount.attach(at));
            made.map_err(Failure::in_step(format!("make a scratch place at {at:?}")))?.keep();
        }
        match saved {
            Some(saved) => load_scratch(saved).map_err(Failure::step("bring back what was in the scratch places")),
            None => Ok(()),
        }
    }
}

/// A file system for terminals, of which none is open.
fn own_terminals() -> Result<Prepared, Failure> {
    let spec = MountSpec::Mount {
        fstype: "devpts".into(),
        source: "fsnap".into(),
        options: "mode=620,ptmxmode=666".into(),
        read_only: false,
    };
    let restrictions = Restrictions { nosuid: true, nodev: false, noexec: true };
    Prepared::new(&spec, restrictions).map_err(Failure::in_step("prepare terminals of the run's own"))
}

/// Puts what makes terminals in the place of the machine's, whose owner the engine cannot set: that lies on a mount that is read-only.
pub(super) fn make_own_terminals() -> Result<(), Failure> {
    let maker = Path::new("/dev/ptmx");
    // Elsewhere it is a link to this one, or programs know no other.
    if !fs::symlink_metadata(maker).is_ok_and(|found| found.file_type().is_char_device()) {
        return Ok(());
    }
    let made = rustix::mount::mount_bind(Path::new(TERMINALS).join("ptmx"), maker);
    made.map_err(Failure::in_step("make terminals of the run's own"))
}

impl Opened {
    /// What is to be mounted, and how the end of the processes is recorded.
    pub(super) fn into_parts(self) -> (Vec<(PathBuf, Prepared)>, OwnedFd) {
        (self.mounts, self.place)
    }
}

/// Takes the settings of the kernel away, which are no files: not before an engine that needs them has done its work.
pub(super) fn protect_settings() -> Result<(), Failure> {
    let at = Path::new("/proc/sys");
    let spec = MountSpec::Bind { dir: at.into(), read_only: true };
    let mounted = Prepared::new(&spec, Restrictions::default()).and_then(|mount| mount.attach(at));
    mounted.map_err(Failure::in_step("protect the settings of the kernel"))?.keep();
    Ok(())
}

/// Makes the directory `at`, if it is missing: in a scratch place, for elsewhere it is there or nothing can be made.
pub(super) fn make_mount_point(at: &Path) -> io::Result<()> {
    if fs::symlink_metadata(at).is_ok() { Ok(()) } else { fs::create_dir_all(at) }
}

/// The file with what was in the scratch places, in the image directory.
pub(super) const SAVED_SCRATCH: &str = "fsnap-scratch.tar";

/// Saves what lies in scratch places into the image directory `images`; called in their mount namespace, while their
/// processes are frozen.
///
/// Costs nothing where there is nothing. What cannot be in an archive, such as a socket, is made by the engine.
pub(super) fn save_scratch(places: &[PathBuf], images: &Path) -> io::Result<()> {
    let used = |place: &&PathBuf| fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_some());
    let used: Vec<&Path> = places.iter().filter(used).filter_map(|place| place.strip_prefix("/").ok()).collect();
    if used.is_empty() {
        return Ok(());
    }
    let file = File::create(images.join(SAVED_SCRATCH))?;
    // What is mounted there is made anew. Of its directory tar would save the owner, who may mean nothing in the namespace.
    let mounted = mounts::own()?.into_iter().map(|mount| mount.point);
    let mounted = mounted.filter(|point| !places.iter().any(|place| place.starts_with(point)));
    let mut work: Vec<OsString> =
        ["--create", "--one-file-system", "--sparse", "--anchored", "--no-wildcards"].map(Into::into).into();
    for point in mounted {
        let Some(point) =
            point.strip_prefix("/").ok().filter(|point| used.iter().any(|place| point.starts_with(place)))
        else {
            continue;
        };
        let mut exclude = OsString::from("--exclude=");
        exclude.push(point);
        work.push(exclude);
    }
    tar(&work, &used, |tar| tar.stdout(file))
}

/// What is saved in less time than a snapshot takes.
const LITTLE: u64 = 32 << 20;

/// Whether there is so little in scratch places that saving it takes no time to speak of. Of a file system without a limit it cannot be told.
pub(super) fn holds_little(places: &[PathBuf]) -> bool {
    let found = places.iter().filter_map(|place| rustix::fs::statvfs(place).ok());
    let held = found.map(|found| {
        let used = found.f_blocks.checked_sub(found.f_bfree).filter(|_| found.f_blocks > 0)?;
        used.checked_mul(found.f_frsize)
    });
    held.sum::<Option<u64>>().is_some_and(|held| held <= LITTLE)
}

fn load_scratch(saved: File) -> io::Result<()> {
    tar(&["--extract", "--preserve-permissions", "--same-owner"].map(Into::into), &[], |tar| tar.stdin(saved))
}

fn tar(work: &[OsString], places: &[&Path], connect: impl FnOnce(&mut Command) -> &mut Command) -> io::Result<()> {
    let mut command = Command::new("tar");
    command.args(work).args(["--numeric-owner", "--xattrs", "--warning=no-file-ignored", "--directory", "/"]);
    // Nobody's settings change what is saved.
    command
        .env_remove("TAR_OPTIONS")
        .arg("--")
        .args(places)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let output = connect(&mut command).spawn()?.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
