//! The process that stands by for the frozen window, and what the hooks say to it.
//!
//! The pre-dump hook leaves it behind as a child. It holds the intent's lock and has the stores open, has read the settings and set up what
//! takes time. So the post-dump hook has little left to do while processes are frozen: it calls, waits, and lets the note appear. The note is the
//! last thing that the *hook* does: a hook that is killed before that has failed, and then the attendant takes back what it took. When the hook
//! has ended well, the attendant lets go of all that it holds and [searches](super::search) for other writers.
//!
//! It ends with the engine, and undoes nothing then: what an engine left is recovery's. Nothing depends on it. Where nobody stands by, the
//! post-dump hook does all by itself, with the same code.
//!
//! Architecture Invariant: it holds nothing of the engine's but the image directory, and is neither in its session nor in its way.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fsnap::catalog::{Attending, HiddenNote, PendingCheckpoint, SearchFile};
use fsnap::checkpoint::{CheckpointId, EngineImages};
use fsnap::coordinator::{Begun, Window, WriterSearch};
use fsnap::engine::Images;
use fsnap::volume::StoreRecord;
use fsnap::{Error, catalog, failpoint, stores};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::super::process::deadline::Deadline;
use super::super::process::sys;
use super::super::{Context, Failure, environment};
use super::search;

/// No engine needs longer between its two calls; and if one does, its hook does without.
const LONGEST: Duration = Duration::from_secs(3600);

/// Whoever calls says at once what it wants.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Most have answered by then. Whether an attendant was stopped is looked at then, and again and again,
const FIRST_LOOK: Duration = Duration::from_millis(20);
/// with so much time between at last.
const LAST_LOOK: Duration = Duration::from_millis(200);

/// More than any of the two says.
const LINE_LIMIT: u64 = 1 << 20;

/// What a hook wants: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Call {
    /// The processes are frozen: take the snapshots.
    Take {
        /// The engine's images.
        images: EngineImages,
        /// The device and the inode of their directory.
        place: (u64, u64),
        /// The root of the process tree.
        tree: i32,
        /// Who is no writer: the engine.
        ignore: Vec<i32>,
        /// Where a test lets it die.
        armed: Option<String>,
    },
    /// Let go: somebody else works on the intent from now on.
    Leave {
        /// The engine's images.
        images: EngineImages,
    },
}

/// What the attendant says to that: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    /// All was taken, and the note has this number.
    Taken(CheckpointId, i64),
    /// Nothing was, or it was taken back; with what there is to say.
    Failed(String),
}

/// Has the snapshots taken by the process that stands by for the engine's images; `None` if there is none that can.
///
/// What counts is only the note, which is the caller's to let appear.
pub(crate) fn take(
    state: &Path,
    images: &EngineImages,
    dir: &Images,
    tree: i32,
    ignore: &[i32],
) -> Result<Option<(CheckpointId, HiddenNote)>, Failure> {
    for mut attendant in catalog::attendants(state, images) {
        let cannot = |source| Error::Io { action: "examine", object: "the image directory".into(), source };
        let (place, armed) = (place_of(dir).map_err(cannot)?, environment::armed());
        let call = Call::Take { images: images.clone(), place, tree, ignore: ignore.to_vec(), armed };
        match say(&mut attendant, &call).and_then(|()| hear_from_running(&attendant, LONGEST)) {
            Ok(Answer::Taken(id, number)) => {
                // It learns of the end of this process by the end of this connection.
                std::mem::forget(attendant);
                return Ok(Some((id, HiddenNote::of(state, number))));
            }
            Ok(Answer::Failed(text)) => return Err(Failure::Told(text)),
            // It stands by for others; or it has ended, or was stopped and is ended, whatever it had begun: what was taken in part is taken again.
            Err(_) => {}
        }
    }
    Ok(None)
}

/// Sends away the process that stands by for the engine's images, if there is one, so that its intent's lock is free.
pub(crate) fn dismiss(state: &Path, images: &EngineImages) {
    for mut attendant in catalog::attendants(state, images) {
        // Its end, or that of the connection, is the answer.
        let call = Call::Leave { images: images.clone() };
        let _ = say(&mut attendant, &call).and_then(|()| hear_from_running::<Answer>(&attendant, AT_ONCE));
    }
}

/// Leaves a process behind that stands by for what was begun, and does not end with this one.
///
/// Must be called while the process has one thread.
pub(crate) fn leave(begun: Begun, stores: &[StoreRecord], images: &Images, context: &Context) -> fsnap::Result<()> {
    let cannot = |source| Error::Io { action: "start", object: "the process that stands by".into(), source };
    let Some(calls) = begun.attend()? else { return Ok(()) };
    let answer = begun.begin_search()?;
    let (options, limit) = (context.config.stores(), context.config.hook.deadline());
    let mut mine = Some((begun, answer));
    let work = || {
        let Some((begun, answer)) = mine.take() else { return };
        Attendant { stores, options, images, calls: &calls, limit }.run(begun, answer);
    };
    sys::in_child(work).map_err(cannot)?;
    // The lock belongs to both, and is not to be released by this one.
    std::mem::forget(mine);
    Ok(())
}

/// What the process knows.
struct Attendant<'a> {
    stores: &'a [StoreRecord],
    options: stores::Options,
    images: &'a Images,
    calls: &'a Attending,
    limit: Duration,
}

impl Attendant<'_> {
    fn run(self, begun: Begun, answer: SearchFile) {
        let kept = [begun.as_fd(), answer.as_fd(), self.calls.as_fd(), self.images.as_fd()];
        if sys::detach(&kept).and_then(|()| self.calls.take_over()).is_err() {
            return;
        }
        let Some(engine) = begun.pending().owner.and_then(|owner| owner.open().ok()) else { return };
        let Ok(window) = Window::open(begun, self.stores, &self.options) else { return };
        let Ok(reader) = TreeReader::start(window.pending().clone()) else { return };
        self.images.prepare();
        let _ = window.prepare();
        failpoint::hit("attendant:ready");
        let Some((caller, tree, ignore)) = self.wait(&engine, window.pending()) else { return };
        drop(engine);
        self.serve(caller, window, answer, || reader.read(tree, ignore));
    }

    /// Waits for the hook of the frozen window; `None` if it will not come.
    fn wait(&self, engine: &impl AsFd, pending: &PendingCheckpoint) -> Option<(UnixStream, i32, Vec<i32>)> {
        let mine = pending.engine.as_ref();
        let limit = Timespec { tv_sec: LONGEST.as_secs().cast_signed(), tv_nsec: 0 };
        loop {
            let mut events = [PollFd::new(self.calls, PollFlags::IN), PollFd::new(engine, PollFlags::IN)];
            poll(&mut events, Some(&limit)).ok()?;
            if events[0].revents().is_empty() {
                return None;
            }
            let Some(caller) = self.calls.accept().ok()? else { continue };
            caller.set_read_timeout(Some(AT_ONCE)).ok()?;
            match hear(&caller).ok()? {
                Call::Take { images, place, tree, ignore, armed } if mine == Some(&images) => {
                    // The engine may have made another directory under that name, or means another tree: the hook, which has the lock then, says so.
                    let is_other = pending.tree.is_some_and(|begun| begun.pid != tree);
                    if is_other || place != place_of(self.images).ok()? {
                        return None;
                    }
                    if let Some(spec) = armed {
                        failpoint::arm(&spec);
                    }
                    caller.set_read_timeout(None).ok()?;
                    return Some((caller, tree, ignore));
                }
                Call::Leave { images } if mine == Some(&images) => return None,
                // It looks for another one.
                Call::Take { .. } | Call::Leave { .. } => {}
            }
        }
    }

    /// Takes everything for the hook, and searches for writers when it has ended well.
    fn serve(self, mut hook: UnixStream, mut window: Window, answer: SearchFile, read_tree: impl FnOnce() -> Reading) {
        let late = Error::Deadline { what: "taking the snapshots".to_owned(), seconds: self.limit.as_secs_f64() };
        let Ok(deadline) = Deadline::set(self.limit, &late.into()) else { return };
        let tree = read_tree();
        let taken = super::take_all(&mut window, self.images);
        let mut search = tree.end();
        let taken = taken.and_then(|()| search::objection(&search, &window.pending().audit).map_or(Ok(()), Err));
        let taken = taken.and_then(|()| search::keep(&search, &mut window, self.images));
        let told = match taken.and_then(|()| window.write_note()) {
            Ok(note) => say(&mut hook, &Answer::Taken(window.pending().id, note.number())),
            Err(error) => {
                let failure = Failure::from(super::take_back(window, self.images, error));
                let _ = say(&mut hook, &Answer::Failed(failure.to_text()));
                return;
            }
        };
        failpoint::hit("attendant:told");
        // The hook's end wakes this process up, and must not have to wait for it.
        sys::give_way();
        search::learn(&mut search);
        let ended = told.and_then(|()| sys::wait_for_end(&mut hook));
        if window.note().symlink_metadata().is_err() {
            let error = Error::Io { action: "hear from", object: "the hook".into(), source: hung_up(ended) };
            let _ = super::take_back(window, self.images, error);
            return;
        }
        drop(deadline);
        if sys::end_after(self.limit).is_err() {
            return;
        }
        let members = window.pending().members.len();
        // The lock, the stores and the image directory are not to be kept busy by the search.
        drop((hook, window));
        if sys::keep_only(&[answer.as_fd()]).is_ok() {
            search::finish(search, members, answer);
        }
    }
}

fn hung_up(ended: io::Result<usize>) -> io::Error {
    ended.err().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
}

/// A thread that reads who belongs to the tree while the snapshots are taken; started ahead, with all that does not depend on the tree.
struct TreeReader {
    thread: Pid,
    ask: mpsc::Sender<(i32, Vec<i32>)>,
    tell: mpsc::Receiver<fsnap::Result<WriterSearch>>,
}

/// A tree that is being read.
struct Reading(mpsc::Receiver<fsnap::Result<WriterSearch>>);

impl TreeReader {
    fn start(pending: PendingCheckpoint) -> io::Result<Self> {
        let (ask, asked) = mpsc::channel();
        let (told, tell) = mpsc::channel();
        let (begun, begins) = mpsc::channel();
        std::thread::Builder::new().spawn(move || {
            let outlook = WriterSearch::outlook(&pending);
            let _ = begun.send(rustix::thread::gettid());
            if let Ok((tree, ignore)) = asked.recv() {
                let _ = told.send(search::among_frozen(outlook, tree, ignore));
            }
        })?;
        let thread = begins.recv().map_err(io::Error::other)?;
        Ok(Self { thread, ask, tell })
    }

    fn read(self, tree: i32, ignore: Vec<i32>) -> Reading {
        self.keep_off_this_processor();
        let _ = self.ask.send((tree, ignore));
        Reading(self.tell)
    }

    /// Processors that share no cache are not thought of when a thread is woken: it would begin where this one works, and the snapshot, whose
    /// caller sleeps and wakes several times, would wait for it. Where there is one processor only, or this is not allowed, nothing changes.
    fn keep_off_this_processor(&self) {
        let Ok(mut others) = rustix::thread::sched_getaffinity(Some(self.thread)) else { return };
        others.unset(rustix::thread::sched_getcpu());
        let _ = rustix::thread::sched_setaffinity(Some(self.thread), &others);
    }
}

impl Reading {
    /// Waits for its end.
    fn end(self) -> fsnap::Result<WriterSearch> {
        let lost =
            |_| Error::Io { action: "read", object: "the process tree".into(), source: io::ErrorKind::Other.into() };
        self.0.recv().map_err(lost)?
    }
}

/// Which directory it is, whatever its name.
fn place_of(images: &Images) -> io::Result<(u64, u64)> {
    let found = rustix::fs::fstat(images)?;
    Ok((found.st_dev, found.st_ino))
}

fn say(to: &mut UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Hears what an attendant says in that time, which is ended if it was stopped: all that stands would stand until the deadline.
fn hear_from_running<T: for<'a> Deserialize<'a>>(attendant: &UnixStream, within: Duration) -> io::Result<T> {
    let (mut pause, begun) = (FIRST_LOOK, Instant::now());
    loop {
        let mut events = [PollFd::new(attendant, PollFlags::IN)];
        if poll(&mut events, Some(&Timespec { tv_sec: 0, tv_nsec: pause.subsec_nanos().into() }))? > 0 {
            return hear(attendant);
        }
        if begun.elapsed() > within {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // If its state cannot be told, it is waited for.
        let _ = catalog::end_if_stopped(attendant);
        pause = (pause * 2).min(LAST_LOOK);
    }
}

fn hear<T: for<'a> Deserialize<'a>>(from: &UnixStream) -> io::Result<T> {
    let mut line = Vec::new();
    BufReader::new(from.take(LINE_LIMIT)).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}
