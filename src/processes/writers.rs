//! Who else has files of a volume open for writing.

use std::path::PathBuf;

use super::files::{How, visit_writable};
use super::proc_dir::{ProcDir, Stat, is_gone};
use super::reach::{Candidate, Doubt, Survey, open};
use super::{BootTicks, Census, Member, ProcessId, Result, Tree};

/// A process that can change a volume while others stand frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writer {
    /// Which of the volumes: its index.
    pub candidate: usize,
    /// The process.
    pub process: ProcessId,
    /// The name of the process, for messages.
    pub command: String,
    /// A file that it has open; in the words of its own mount namespace.
    pub path: PathBuf,
    /// In what way.
    pub how: How,
}

/// What a search for writers saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriterScan {
    /// One entry for each process and volume.
    pub writers: Vec<Writer>,
    /// Processes whose files fsnap may not look at, such as those of other users, or of a supervisor that the system
    /// protects from root: there may be writers among them.
    pub unseen: Vec<Member>,
}

/// Finds the processes outside `except` that have files of the volumes open for writing, or mapped so.
///
/// fsnap itself is left out, and so are the processes in `ignore`, such as the engine that called it.
///
/// Processes may stand frozen meanwhile. So kernel threads cost nothing, and any other process one look at each descriptor's mode,
/// and one question about its mappings.
pub fn writers(volumes: &[Candidate], except: &Tree, ignore: &[i32]) -> Result<WriterScan> {
    search(volumes, ignore, |process, _| except.contains(process))
}

/// Finds who was such a process at a moment when those in `except` stood, though all run again by now.
///
/// What they have forked since is left out as well: it was not there, and who forked it stood. It is known by its parents, so one
/// whose parent has ended is not, and counts.
pub fn writers_at(moment: BootTicks, volumes: &[Candidate], except: &Tree, ignore: &[i32]) -> Result<WriterScan> {
    search(volumes, ignore, |mut process, census| {
        while !except.contains(process) {
            let Some(stat) = census.processes.get(&process.pid) else { return false };
            let Some(parent) = census.processes.get(&stat.parent) else { return false };
            if BootTicks(process.start_time) < moment {
                return false;
            }
            process = ProcessId { pid: stat.parent, start_time: parent.start_time };
        }
        true
    })
}

fn search(volumes: &[Candidate], ignore: &[i32], is_known: impl Fn(ProcessId, &Census) -> bool) -> Result<WriterScan> {
    let mut survey = Survey::new(volumes, Doubt::Counts)?;
    let mut scan = WriterScan::default();
    let own = std::process::id().cast_signed();
    let census = Census::take()?;
    for (&pid, stat) in &census.processes {
        let process = ProcessId { pid, start_time: stat.start_time };
        if stat.kernel_thread || pid == own || ignore.contains(&pid) || is_known(process, &census) {
            continue;
        }
        match examine(process, stat, &mut survey, &mut scan.writers) {
            Err(error) if !is_gone(&error) => {
                // One that has ended and was not waited for cannot be read, and has no files.
                scan.unseen.extend(Member::look_up(pid).filter(|member| member.id.is_alive()));
            }
            _ => {}
        }
    }
    Ok(scan)
}

fn examine(process: ProcessId, stat: &Stat, survey: &mut Survey<'_>, found: &mut Vec<Writer>) -> std::io::Result<()> {
    let dir = ProcDir::of(process.pid)?.living(stat.state)?;
    let view = survey.views.of(&dir)?;
    let first = found.len();
    visit_writable(&dir, &survey.lens(&view), &mut |file| {
        for candidate in survey.owners(&file) {
            if !found[first..].iter().any(|writer| writer.candidate == candidate) {
                let (path, how) = (file.path.clone(), file.how.clone());
                found.push(Writer { candidate, process, command: stat.command.clone(), path, how });
            }
        }
        true
    })?;
    // Only of a writer does it matter that the pid still is that process's.
    if found.len() > first && open(process).is_err() {
        found.truncate(first);
    }
    Ok(())
}
