//! Stopping by signal.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use super::{Deadline, Error, FreezeRecord, Result};
use crate::processes::{Member, ProcessId, Tree};

/// A process that a tracer holds stands if it has not run for so long: until the signal reaches it, it stops at each system call as well.
const QUIET: Duration = Duration::from_millis(50);

/// A process that this freeze stopped.
#[derive(Debug)]
pub(super) struct Stopped {
    member: Member,
    process: OwnedFd,
}

/// A process that stands, whoever stopped it, and how often it had run by then.
#[derive(Debug)]
pub(super) struct Standing {
    member: Member,
    runs: u64,
}

/// Stops every process of the tree that does not stand already, until a look finds no new one; returns all of them.
///
/// `tell` hears of each before it is signalled. What was stopped is in `stopped`, also on failure.
pub(super) fn stop_all(
    tree: &mut Tree,
    stopped: &mut Vec<Stopped>,
    deadline: Deadline,
    tell: &mut dyn FnMut(FreezeRecord) -> Result<()>,
) -> Result<Vec<Standing>> {
    let mut settled: BTreeSet<ProcessId> = BTreeSet::new();
    loop {
        tree.rescan_once()?;
        let members: BTreeSet<i32> = tree.members().map(|member| member.id.pid).collect();
        let standing: BTreeSet<i32> = settled.iter().map(|id| id.pid).collect();
        let unsettled = tree.members().filter(|member| !settled.contains(&member.id));
        // Parents first, since a parent inside vfork(2) stops only when its child has gone on.
        let ready: Vec<Member> = unsettled
            .filter(|member| !members.contains(&member.parent) || standing.contains(&member.parent))
            .cloned()
            .collect();
        if ready.is_empty() {
            return Ok(tree.members().filter_map(Standing::of).collect());
        }
        let first = stopped.len();
        let mut record = FreezeRecord::new();
        for member in ready {
            settled.insert(member.id);
            let Ok(states) = member.id.thread_states() else { continue };
            if states.all_stopped() {
                record.already_stopped.insert(member.id);
            } else if let Some(process) = open(&member)? {
                record.processes.insert(member.id);
                stopped.push(Stopped { member, process });
            }
        }
        tell(record)?;
        stopped[first..].iter().try_for_each(|process| process.signal(Signal::STOP))?;
        stopped[first..].iter().try_for_each(|process| process.wait_standing(deadline))?;
    }
}

/// Sets all of them running again, and returns the first failure when all were tried.
pub(super) fn resume_all(stopped: &[Stopped]) -> Result<()> {
    // Children first: a parent that runs may at once wait for them, or signal them.
    stopped.iter().rev().map(|process| process.signal(Signal::CONT)).fold(Ok(()), Result::and)
}

/// Opens the process, unless it has ended.
fn open(member: &Member) -> Result<Option<OwnedFd>> {
    match member.id.open() {
        Ok(process) => Ok(Some(process)),
        Err(_) if !member.id.is_alive() => Ok(None),
        Err(source) => Err(signal_error(member, source)),
    }
}

fn signal_error(member: &Member, source: io::Error) -> Error {
    Error::Signal { process: member.id, command: member.command.clone(), source }
}

impl Stopped {
    fn signal(&self, signal: Signal) -> Result<()> {
        match pidfd_send_signal(&self.process, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(signal_error(&self.member, error.into())),
        }
    }

    /// Waits until every thread stands, or the process has ended.
    ///
    /// Only a parent or a tracer is told when a process stops, so its state is read again and again: after 20 µs first,
    /// since most stop at once, and after longer and longer pauses then. The end of the process cuts a pause short.
    fn wait_standing(&self, deadline: Deadline) -> Result<()> {
        let (mut pause, mut quiet) = (Duration::from_micros(20), Quiet::default());
        loop {
            let Ok(states) = self.member.id.thread_states() else { return Ok(()) };
            let running = states.running();
            if running.is_none() && (!states.any_traced() || quiet.is_long(self.member.id)) {
                return Ok(());
            }
            let state = running.unwrap_or('t');
            if Instant::now() >= deadline.at {
                let Member { id, command, .. } = self.member.clone();
                return Err(Error::Deadline { process: id, command, state, within: deadline.within });
            }
            pause_or_end(&self.process, pause.min(deadline.left()));
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }
}

impl Standing {
    /// `None` if it has ended.
    fn of(member: &Member) -> Option<Self> {
        Some(Self { member: member.clone(), runs: member.id.runs().ok()? })
    }

    /// Checks that no thread runs, or has run: who can signal a process can also stop it again.
    pub(super) fn check(&self) -> Result<()> {
        let Ok(states) = self.member.id.thread_states() else { return Ok(()) };
        if states.all_ended() || states.running().is_none() && self.member.id.runs().is_ok_and(|runs| runs == self.runs)
        {
            return Ok(());
        }
        Err(Error::Resumed { process: self.member.id, command: self.member.command.clone() })
    }
}

/// Since when a process has not run.
#[derive(Debug, Default)]
struct Quiet(Option<(u64, Instant)>);

impl Quiet {
    fn is_long(&mut self, process: ProcessId) -> bool {
        let runs = process.runs().unwrap_or_default();
        match self.0 {
            Some((before, since)) if before == runs => since.elapsed() >= QUIET,
            _ => {
                self.0 = Some((runs, Instant::now()));
                false
            }
        }
    }
}

fn pause_or_end(process: &OwnedFd, pause: Duration) {
    let timeout = Timespec { tv_sec: pause.as_secs().cast_signed(), tv_nsec: pause.subsec_nanos().into() };
    // A signal that cuts it short only makes the next look come sooner.
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout));
}
