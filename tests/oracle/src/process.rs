//! The process itself: its threads, and the signals it answers.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};

use crate::content::mix;
use crate::kind::Writer;
use crate::{Asked, Fault, Kind, Verdict, WriterVerdict};

/// What a run of the oracle does.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Names the run; decides all bytes and choices.
    pub run: u64,
    /// The directories to write in, one per volume.
    pub dirs: Vec<PathBuf>,
    /// How to write.
    pub kinds: Vec<Kind>,
    /// Where verdicts are written, and `request` is read.
    pub reports: PathBuf,
    /// The longest pause of a writer at one point of a step; zero for full speed.
    pub pace: Duration,
}

/// The file in each volume that tells [`examine`](crate::examine()) what the others are.
pub(crate) const MANIFEST: &str = "oracle.json";

/// The content of [`MANIFEST`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) run: String,
    pub(crate) volumes: usize,
    pub(crate) kinds: Vec<Kind>,
}

/// How often a writer compares all of its files unasked, in steps.
///
/// So that a process that stood frozen notices by itself when its files did not stay what they were.
const SELF_CHECK: u64 = 128;

struct Oracle {
    plan: Plan,
    /// Held shared during a step, and exclusively during a verdict, which so finds every writer between two steps.
    ///
    /// Lock order: `gate`, then one of `writers`.
    gate: RwLock<()>,
    writers: Vec<Mutex<Seat>>,
    stop: AtomicBool,
    longest_pause_ms: AtomicU64,
}

/// One writer's place in the process.
struct Seat {
    name: String,
    writer: Box<dyn Writer>,
    /// What made it stop.
    fault: Option<Fault>,
}

/// Writes until `SIGTERM`, and gives a verdict at each `SIGUSR1`; calls `ready` when all writers run.
///
/// Must be called by a thread whose process has no others yet, because it chooses which thread receives signals.
/// Returns the last verdict.
pub fn run(plan: Plan, ready: impl FnOnce() -> io::Result<()>) -> io::Result<Verdict> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGUSR1);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;

    let oracle = Oracle::new(plan)?;
    thread::scope(|scope| {
        for (index, seat) in oracle.writers.iter().enumerate() {
            let oracle = &oracle;
            scope.spawn(move || oracle.write(seat, index));
        }
        let ended = ready().and_then(|()| oracle.answer(&signals));
        oracle.stop.store(true, Ordering::Relaxed);
        ended
    })
}

impl Oracle {
    fn new(plan: Plan) -> io::Result<Self> {
        let mut writers = Vec::new();
        for (index, dir) in plan.dirs.iter().enumerate() {
            std::fs::create_dir_all(dir)?;
            let manifest =
                Manifest { run: format!("{:016x}", plan.run), volumes: plan.dirs.len(), kinds: plan.kinds.clone() };
            write_whole(&dir.join(MANIFEST), &serde_json::to_vec(&manifest)?)?;
            for &kind in plan.kinds.iter().filter(|&&kind| kind != Kind::Volumes) {
                writers.push((kind, index));
            }
        }
        if plan.kinds.contains(&Kind::Volumes) {
            writers.push((Kind::Volumes, 0));
        }
        let seat = |(kind, index): (Kind, usize)| {
            let writer = kind.create(plan.run, index, &plan.dirs).map_err(io::Error::other)?;
            Ok(Mutex::new(Seat { name: kind.writer_name(index), writer, fault: None }))
        };
        let writers = writers.into_iter().map(seat).collect::<io::Result<_>>()?;
        let (stop, longest_pause_ms) = (AtomicBool::new(false), AtomicU64::new(0));
        Ok(Self { plan, gate: RwLock::new(()), writers, stop, longest_pause_ms })
    }

    /// The life of one writer's thread.
    fn write(&self, seat: &Mutex<Seat>, index: usize) {
        let mut pauses = Pauses { state: mix(self.plan.run ^ index as u64), pace: self.plan.pace };
        let mut last = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            pauses.pause();
            let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            let mut seat = lock(seat);
            if seat.fault.is_some() {
                return;
            }
            let mut result = seat.writer.step(&mut || pauses.pause());
            if seat.writer.done().is_multiple_of(SELF_CHECK) {
                result = result.and_then(|()| seat.writer.check());
            }
            if let Err(fault) = result {
                seat.fault = Some(fault);
                return;
            }
            let pause = u64::try_from(last.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.longest_pause_ms.fetch_max(pause, Ordering::Relaxed);
            last = Instant::now();
        }
    }

    fn answer(&self, signals: &SigSet) -> io::Result<Verdict> {
        let mut generation = 0;
        loop {
            let signal = signals.wait()?;
            generation += 1;
            let tag = self.tag(generation);
            let verdict = self.verdict(generation, &tag);
            if signal == Signal::SIGTERM {
                return Ok(verdict);
            }
            // Nobody to tell: whoever asked is waiting for the report and finds that there is none.
            let _ = write_whole(&self.plan.reports.join(format!("{tag}.json")), verdict.to_line().as_bytes());
        }
    }

    /// What the asker wrote, if it can be a file's name.
    fn tag(&self, generation: u64) -> String {
        let text = std::fs::read_to_string(self.plan.reports.join(crate::ask::REQUEST)).unwrap_or_default();
        if crate::ask::is_tag(&text) { text } else { format!("untagged-{generation}") }
    }

    fn verdict(&self, generation: u64, tag: &str) -> Verdict {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let judge = |seat: &Mutex<Seat>| {
            let mut seat = lock(seat);
            // Kept, so that the writer stops and no later step writes over the evidence.
            seat.fault = seat.fault.take().or_else(|| seat.writer.check().err());
            WriterVerdict { name: seat.name.clone(), done: seat.writer.done(), fault: seat.fault.clone() }
        };
        let writers = self.writers.iter().map(judge).collect();
        let asked = Asked {
            pid: std::process::id(),
            tag: tag.to_owned(),
            generation,
            longest_pause_ms: self.longest_pause_ms.load(Ordering::Relaxed),
        };
        Verdict::new(self.plan.run, Some(asked), writers)
    }
}

fn lock(seat: &Mutex<Seat>) -> MutexGuard<'_, Seat> {
    seat.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pauses of random length, so that a freeze meets a writer at every point of a step.
struct Pauses {
    state: u64,
    pace: Duration,
}

impl Pauses {
    fn pause(&mut self) {
        let pace = u64::try_from(self.pace.as_micros()).unwrap_or(u64::MAX);
        if pace > 0 {
            self.state = mix(self.state);
            thread::sleep(Duration::from_micros(self.state % pace));
        }
    }
}

/// Writes `path` so that it is seen whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path)
}
