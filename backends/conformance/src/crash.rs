//! Kills a call before each change that it makes, and looks at what is left.
//!
//! The call runs in a child process, which is this test program started again. The child opens the store, asks to be
//! traced, and stops; from there the parent lets it run from system call to system call, and kills it before the N-th
//! that changes anything outside the process. Then N+1, until the call comes through. Calls that only read are not
//! counted: to be killed before one of them is the same as to be killed before the next change.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use fsnap_backend::{ErrorKind, ImageKind, ImageState, Locator, Snapshot, Source};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::failure::{During, Failure, Verdict, ensure, refused};
use crate::{Listing, LiveVolume, Site, Suite, samples, sys};

/// The argument by which a child knows what it is.
const CHILD: &str = "--fsnap-conformance-child";

/// Where a child leaves the text of an error, beside the store.
const ERROR_FILE: &str = "error-of-the-child";

/// After so many seconds a child is taken to hang.
const DEADLINE: u32 = 60;

/// A call to be cut short.
#[derive(Debug, Clone, Copy)]
enum Call<'a> {
    Prime(&'a LiveVolume, &'a Locator),
    Snapshot(&'a LiveVolume, &'a Locator),
    Settle(&'a Locator),
    Clone(&'a Snapshot, &'a Locator),
    Delete(&'a Locator),
}

impl Call<'_> {
    /// The words in which the child is told.
    fn words(&self) -> [OsString; 3] {
        let locator = |at: &Locator| OsString::from(at.as_str());
        match self {
            Self::Prime(live, at) => ["prime".into(), live.dir.clone().into(), locator(at)],
            Self::Snapshot(live, at) => ["snapshot".into(), live.dir.clone().into(), locator(at)],
            Self::Settle(at) => ["settle".into(), OsString::new(), locator(at)],
            Self::Clone(snapshot, at) => ["clone".into(), locator(&snapshot.at), locator(at)],
            Self::Delete(at) => ["delete".into(), OsString::new(), locator(at)],
        }
    }
}

/// Runs the call that the arguments name, if this process is a child; `None` if it is not.
pub(crate) fn serve_child(suites: &[Suite]) -> Option<ExitCode> {
    let arguments: Vec<OsString> = env::args_os().collect();
    let [_, child, suite, place, call, what, at] = arguments.try_into().ok()?;
    if child != CHILD {
        return None;
    }
    let done = suites.iter().find(|known| *known.name() == *suite).map_or_else(
        || Err(Failure::new("no such suite")),
        |suite| carry_out(suite, Path::new(&place), call.to_str(), &what, at.to_str()),
    );
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = fs::write(Path::new(&place).with_file_name(ERROR_FILE), failure.to_string());
            ExitCode::FAILURE
        }
    })
}

fn carry_out(suite: &Suite, place: &Path, call: Option<&str>, what: &OsString, at: Option<&str>) -> Verdict {
    let locator = |text: Option<&str>| text.unwrap_or_default().parse::<Locator>();
    let at = locator(at)?;
    let store = suite.fixture().open_store(place)?;
    match call {
        Some("prime") => {
            let volume = store.adopt(Path::new(what))?;
            begin()?;
            store.prime(&volume, &at)?;
        }
        Some("snapshot") => {
            let volume = store.adopt(Path::new(what))?;
            begin()?;
            store.snapshot(&volume, &at)?;
        }
        Some("settle") => {
            begin()?;
            store.settle(&at)?;
        }
        Some("clone") => {
            let snapshot = store.settle(&locator(what.to_str())?)?;
            begin()?;
            store.clone_snapshot(&snapshot, &at)?;
        }
        Some("delete") => {
            begin()?;
            store.delete(&at)?;
        }
        _ => return Err(Failure::new("no such call")),
    }
    Ok(())
}

/// Asks the parent to trace this process, and stops until it does.
fn begin() -> nix::Result<()> {
    // A call that hangs ends the child by SIGALRM, and fails the case instead of keeping it for ever.
    nix::unistd::alarm::set(DEADLINE);
    ptrace::traceme()?;
    raise(Signal::SIGSTOP)
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It was killed before the change that was asked for.
    Killed,
    /// It came through, after so many changes.
    Through(u32),
}

/// Runs `call` in a child and kills it before its change number `last`, counted from 1.
fn run(site: &Site<'_>, call: Call<'_>, last: u32) -> Verdict<End> {
    let mut command = Command::new(env::current_exe()?);
    command.arg(CHILD).arg(site.suite).arg(&site.place).args(call.words());
    // A process group of its own, by which the threads of this child are told from those of other children.
    let child = command.process_group(0).spawn().during("start a child")?;
    let tracee = Tracee { leader: Pid::from_raw(child.id() as i32) };
    let end = tracee.run(last);
    drop(tracee);
    end.map_err(|failure| match fs::read_to_string(site.place.with_file_name(ERROR_FILE)) {
        Ok(text) => failure.during(text),
        Err(_) => failure,
    })
}

/// A child and its threads; killed and reaped when dropped.
struct Tracee {
    leader: Pid,
}

impl Tracee {
    fn wait(&self) -> nix::Result<WaitStatus> {
        loop {
            match waitpid(Pid::from_raw(-self.leader.as_raw()), Some(WaitPidFlag::__WALL)) {
                Err(Errno::EINTR) => {}
                status => return status,
            }
        }
    }

    fn run(&self, last: u32) -> Verdict<End> {
        match self.wait()? {
            WaitStatus::Stopped(_, Signal::SIGSTOP) => {}
            status => return Err(Failure::new(format!("the child ended before the call: {status:?}"))),
        }
        // Not those that are forked: a process that a backend leaves to stand by is no part of what is killed.
        let threads = ptrace::Options::PTRACE_O_TRACECLONE | ptrace::Options::PTRACE_O_TRACEVFORK;
        let options = threads | ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(self.leader, options)?;
        ptrace::syscall(self.leader, None)?;
        let mut changes = 0;
        loop {
            let (thread, signal) = match self.wait()? {
                WaitStatus::Exited(pid, 0) if pid == self.leader => return Ok(End::Through(changes)),
                WaitStatus::Exited(pid, code) if pid == self.leader => {
                    return Err(Failure::new(format!("the call failed in the child, which ended with {code}")));
                }
                WaitStatus::Signaled(pid, signal, _) if pid == self.leader => {
                    return Err(Failure::new(format!("the call died of {signal} in the child")));
                }
                WaitStatus::PtraceSyscall(thread) => {
                    if let Some(entry) = sys::entry(thread)?
                        && is_change(thread, &entry)
                    {
                        changes += 1;
                        if changes == last {
                            return Ok(End::Killed);
                        }
                    }
                    (thread, None)
                }
                // A new thread begins with a stop of its own; a signal is passed on.
                WaitStatus::Stopped(thread, Signal::SIGSTOP) => (thread, None),
                WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
                WaitStatus::PtraceEvent(thread, _, _) => (thread, None),
                _ => continue,
            };
            match ptrace::syscall(thread, signal) {
                // It is gone already, by exit_group(2) of another thread.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let _ = kill(self.leader, Signal::SIGKILL);
        // Until ECHILD: every thread of the child is reaped, and its locks are gone.
        while self.wait().is_ok() {}
    }
}

/// Whether a system call may change anything that outlives the process.
fn is_change(thread: Pid, entry: &sys::Entry) -> bool {
    let creates = |flags: u64| flags & (libc::O_CREAT | libc::O_TRUNC) as u64 != 0;
    match entry.number {
        libc::SYS_openat => creates(entry.arguments[2]),
        // The flags are the first word of the structure that the third argument points to.
        libc::SYS_openat2 => {
            ptrace::read(thread, entry.arguments[2] as ptrace::AddressType).map_or(true, |flags| creates(flags as u64))
        }
        number => !ONLY_READS.contains(&number),
    }
}

/// Calls that change nothing but the process itself, or only when data reaches the disk.
const ONLY_READS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_futex,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_prlimit64,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sync,
    libc::SYS_syncfs,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// The changes before which a call is killed that makes `total` of them: all, or so many, evenly spread.
fn points(total: u32, at_most: u32) -> impl Iterator<Item = u32> {
    let count = total.min(at_most);
    (0..count).map(move |index| 1 + (u64::from(index) * u64::from(total) / u64::from(count)) as u32)
}

/// Takes snapshots of `live`, each killed before another of its changes, and lets `check` look at each.
pub(crate) fn cut_short<'a>(
    site: &mut Site<'a>,
    live: &LiveVolume,
    check: impl Fn(&mut Site<'a>, &Locator) -> Verdict,
) -> Verdict {
    each_kill(site, |site, last| {
        let at = site.reserve(Source::Volume(&live.volume))?;
        let end = run(site, Call::Snapshot(live, &at), last)?;
        site.reopen()?;
        if end == End::Killed {
            check(site, &at)?
        } else {
            site.store.delete(&at)?
        }
        Ok(end)
    })
}

/// Calls `kill_at` with every change before which a call can be killed; the first run comes through and counts them.
fn each_kill<'a>(site: &mut Site<'a>, mut kill_at: impl FnMut(&mut Site<'a>, u32) -> Verdict<End>) -> Verdict {
    let End::Through(total) = kill_at(site, u32::MAX)? else {
        return Err(Failure::new("the call was killed though nobody asked for it"));
    };
    for last in points(total, site.fixture.kills()) {
        kill_at(site, last).during(format_args!("killed before change {last} of {total}"))?;
    }
    Ok(())
}

/// A volume with an earlier snapshot of it, which no kill may touch.
struct Scene {
    live: LiveVolume,
    earlier: Snapshot,
    earlier_listing: Listing,
}

impl Scene {
    fn new(site: &mut Site<'_>) -> Verdict<Self> {
        let mut live = site.volume("volume")?;
        live.apply(&samples::small())?;
        let (earlier, earlier_listing) = (site.snapshot(&live)?, live.listing());
        live.apply(&samples::small_changed())?;
        Ok(Self { live, earlier, earlier_listing })
    }

    /// Requires that nothing is listed but the earlier snapshot, that it is intact, and so is the volume.
    fn expect_only_earlier(&self, site: &Site<'_>) -> Verdict {
        site.expect_images([(&self.earlier.at, ImageKind::Snapshot)])?;
        self.expect_intact(site)
    }

    fn expect_intact(&self, site: &Site<'_>) -> Verdict {
        site.expect(&self.earlier.at, &self.earlier_listing, "the earlier snapshot")?;
        let damage = site.store.verify(&self.earlier)?;
        ensure!(damage.is_empty(), "the earlier snapshot is damaged: {damage:?}");
        site.expect_live(&self.live, "the volume")
    }
}

/// Requires that the image at `at` is whole, partial or not there, and that `settle` says the same of a snapshot.
fn settle_agrees(site: &Site<'_>, at: &Locator, expected: &Listing) -> Verdict<Option<ImageState>> {
    let state = site.state(at)?;
    match state {
        Some(ImageState::Whole) => {
            let snapshot = site.store.settle(at).during("settle of a whole image")?;
            site.expect(at, expected, "the snapshot that is listed as whole")?;
            let damage = site.store.verify(&snapshot)?;
            ensure!(damage.is_empty(), "the snapshot that is listed as whole is damaged: {damage:?}");
        }
        _ => refused("settle of what is not whole", ErrorKind::NotFound, site.store.settle(at))?,
    }
    Ok(state)
}

pub(crate) fn killed_prime(site: &mut Site<'_>) -> Verdict {
    let scene = Scene::new(site)?;
    each_kill(site, |site, last| {
        let at = site.reserve(Source::Volume(&scene.live.volume))?;
        let end = run(site, Call::Prime(&scene.live, &at), last)?;
        site.reopen()?;
        ensure!(site.state(&at)? != Some(ImageState::Whole), "prime made a whole image");
        scene.expect_intact(site)?;
        if last % 2 == 0 {
            site.snapshot_at(&scene.live.volume, &at)?;
            site.expect(&at, &scene.live.listing(), "the snapshot after the kill")?;
        }
        site.store.delete(&at)?;
        scene.expect_only_earlier(site)?;
        Ok(end)
    })
}

pub(crate) fn killed_snapshot(site: &mut Site<'_>) -> Verdict {
    let scene = Scene::new(site)?;
    let expected = scene.live.listing();
    each_kill(site, |site, last| {
        let at = site.reserve(Source::Volume(&scene.live.volume))?;
        let end = run(site, Call::Snapshot(&scene.live, &at), last)?;
        site.reopen()?;
        let state = settle_agrees(site, &at, &expected)?;
        ensure!(end == End::Killed || state == Some(ImageState::Whole), "snapshot succeeded, and left {state:?}");
        scene.expect_intact(site)?;
        if last % 2 == 0 {
            // A repeated call finishes it.
            let snapshot = site.snapshot_at(&scene.live.volume, &at)?;
            site.expect(&at, &expected, "the snapshot that a repeated call finished")?;
            let damage = site.store.verify(&snapshot)?;
            ensure!(damage.is_empty(), "the snapshot that a repeated call finished is damaged: {damage:?}");
            let images = [(&scene.earlier.at, ImageKind::Snapshot), (&at, ImageKind::Snapshot)];
            site.expect_images(images)?;
        }
        site.store.delete(&at).during("delete what is left")?;
        scene.expect_only_earlier(site)?;
        Ok(end)
    })
}

pub(crate) fn killed_settle(site: &mut Site<'_>) -> Verdict {
    let scene = Scene::new(site)?;
    let expected = scene.live.listing();
    each_kill(site, |site, last| {
        let at = site.reserve(Source::Volume(&scene.live.volume))?;
        let taken = site.store.snapshot(&scene.live.volume, &at).during("snapshot")?;
        let end = run(site, Call::Settle(&at), last)?;
        site.reopen()?;
        let settled = site.store.settle(&at).during("settle after the kill")?;
        ensure!(settled == taken, "snapshot returned {taken:?}, settle after the kill {settled:?}");
        site.expect(&at, &expected, "the snapshot after the kill")?;
        scene.expect_intact(site)?;
        site.store.delete(&at)?;
        scene.expect_only_earlier(site)?;
        Ok(end)
    })
}

pub(crate) fn killed_clone(site: &mut Site<'_>) -> Verdict {
    let scene = Scene::new(site)?;
    each_kill(site, |site, last| {
        let at = site.reserve(Source::Snapshot(&scene.earlier))?;
        let end = run(site, Call::Clone(&scene.earlier, &at), last)?;
        site.reopen()?;
        let mut state = site.state(&at)?;
        ensure!(end == End::Killed || state == Some(ImageState::Whole), "clone succeeded, and left {state:?}");
        scene.expect_intact(site)?;
        if state != Some(ImageState::Whole) {
            refused("activate of what is not whole", ErrorKind::NotFound, site.store.activate(&at))?;
            if last % 2 == 0 {
                site.store.clone_snapshot(&scene.earlier, &at).during("clone_snapshot, repeated")?;
                state = site.state(&at)?;
                ensure!(state == Some(ImageState::Whole), "clone_snapshot, repeated, left {state:?}");
            }
        }
        if state == Some(ImageState::Whole) {
            site.expect(&at, &scene.earlier_listing, "the clone")?;
        }
        site.store.delete(&at).during("delete what is left")?;
        scene.expect_only_earlier(site)?;
        Ok(end)
    })
}

pub(crate) fn killed_delete(site: &mut Site<'_>) -> Verdict {
    let scene = Scene::new(site)?;
    let expected = scene.live.listing();
    each_kill(site, |site, last| {
        let at = site.snapshot(&scene.live)?.at;
        let end = run(site, Call::Delete(&at), last)?;
        site.reopen()?;
        let state = settle_agrees(site, &at, &expected)?;
        ensure!(end == End::Killed || state.is_none(), "delete succeeded, and left {state:?}");
        scene.expect_intact(site)?;
        site.store.delete(&at).during("delete, repeated")?;
        scene.expect_only_earlier(site)?;
        Ok(end)
    })
}

/// What killed calls left is gone when it was deleted: the store does not grow with every kill.
pub(crate) fn kills_leave_nothing(site: &mut Site<'_>) -> Verdict {
    let scene = Scene::new(site)?;
    let entries = |site: &Site<'_>| entries_below(&site.place).during("count the files of the store");
    // Once through, so that what a store makes once is there.
    let mut sizes = Vec::new();
    each_kill(site, |site, last| {
        let at = site.reserve(Source::Volume(&scene.live.volume))?;
        let end = run(site, Call::Snapshot(&scene.live, &at), last)?;
        site.reopen()?;
        site.store.delete(&at).during("delete what is left")?;
        sizes.push(entries(site)?);
        Ok(end)
    })?;
    let (first, last, kills) = (sizes[0], sizes[sizes.len() - 1], sizes.len() - 1);
    ensure!(
        last <= first + kills / 2,
        "after {kills} killed snapshots that were deleted, the store has {last} files instead of {first}"
    );
    scene.expect_only_earlier(site)
}

/// How many files and directories there are below `dir`.
fn entries_below(dir: &Path) -> io::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        count += 1;
        if entry.file_type()?.is_dir() {
            count += entries_below(&entry.path())?;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::points;

    #[test]
    fn every_change_is_a_point_if_there_are_few() {
        assert_eq!(points(3, 10).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(points(9, 3).collect::<Vec<_>>(), [1, 4, 7]);
        assert_eq!(points(0, 3).collect::<Vec<_>>(), []);
    }
}
