//! One process's directory in `/proc`, and its files as bytes.
//!
//! Not by the `procfs` crate: it reads `maps` and `mountinfo` as UTF-8 and leaves their octal escapes as they are, so
//! that one mount point with a byte of its own in a hostile process's namespace would hide the whole table.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir};
use rustix::io::{Errno, retry_on_intr};

/// The directory of one process, pinned: once the process has ended, every call fails, whoever has its pid now.
#[derive(Debug)]
pub(crate) struct ProcDir {
    dir: OwnedFd,
}

impl ProcDir {
    /// Opens `/proc/PID`.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(CWD, format!("/proc/{pid}"), flags, Mode::empty())?;
        Ok(Self { dir })
    }

    /// The directory that shows what the process has in use; `state` is the letter of its first thread.
    ///
    /// The first thread may end long before the others, and shows nothing then: so it is that of one that lives.
    pub(crate) fn living(self, state: u8) -> io::Result<Self> {
        if !ended(state) {
            return Ok(self);
        }
        for thread in self.numbers("task")? {
            if self.thread_stat(thread).is_ok_and(|stat| !ended(stat.state)) {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                return Ok(Self {
                    dir: rustix::fs::openat(&self.dir, format!("task/{thread}"), flags, Mode::empty())?,
                });
            }
        }
        Err(Errno::SRCH.into())
    }

    /// Reads one of its files, such as `stat` or `task/7/children`, whole.
    pub(crate) fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        read_all(self.open(name)?)
    }

    /// Reads one of its files that the kernel makes at one stroke, such as `stat` and `status`: the last read is spared.
    pub(crate) fn read_record(&self, name: &str) -> io::Result<Vec<u8>> {
        read_record(self.open(name)?)
    }

    /// Opens one of its files for reading.
    pub(crate) fn open(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(rustix::fs::openat(&self.dir, name, flags, Mode::empty())?)
    }

    /// The text of one of its links, such as `cwd` or `fd/3`.
    pub(crate) fn link(&self, name: &str) -> io::Result<PathBuf> {
        link_in(&self.dir, name)
    }

    /// Opens one of its directories, such as `fd`.
    pub(crate) fn open_dir(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.dir, name, flags, Mode::empty())?)
    }

    /// The numbers that one of its directories lists: threads in `task`, descriptors in `fd`.
    pub(crate) fn numbers(&self, name: &str) -> io::Result<Vec<i32>> {
        numbers_in(self.open_dir(name)?)
    }

    /// What `stat` says of the process.
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        Stat::parse(&self.read_record("stat")?)
    }

    /// What `stat` says of one of its threads.
    pub(crate) fn thread_stat(&self, thread: i32) -> io::Result<Stat> {
        Stat::parse(&self.read_record(&format!("task/{thread}/stat"))?)
    }
}

impl AsFd for ProcDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// Reads a file of `/proc` whole.
pub(crate) fn read_all(file: OwnedFd) -> io::Result<Vec<u8>> {
    // Not by `read_to_end`, which first asks for a size and a position, and files of /proc have neither.
    let mut content = Vec::with_capacity(PAGE);
    while retry_on_intr(|| rustix::io::read(&file, spare_capacity(&mut content)))? > 0 {
        content.reserve(PAGE);
    }
    Ok(content)
}

/// Reads a file of `/proc` that is made at one stroke: what leaves room in the buffer was all.
///
/// Not for lists, such as `maps` and `children`, which come in pieces that fit.
fn read_record(file: OwnedFd) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(PAGE);
    loop {
        retry_on_intr(|| rustix::io::read(&file, spare_capacity(&mut content)))?;
        if content.len() < content.capacity() {
            return Ok(content);
        }
        content.reserve(PAGE);
    }
}

/// The text of a link.
pub(crate) fn link_in(dir: impl AsFd, name: &str) -> io::Result<PathBuf> {
    let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
    Ok(std::ffi::OsString::from_vec(target.into_bytes()).into())
}

/// Opens `/proc` for [`numbers_in`] and [`stat_in`].
pub(crate) fn open_proc() -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, "/proc", flags, Mode::empty())?)
}

/// The pids of all processes.
pub(crate) fn all_pids() -> io::Result<Vec<i32>> {
    numbers_in(open_proc()?)
}

/// Whether the process has no thread that could write to a file: it is one of the kernel's, or has ended.
///
/// Asks twice at most, and `stat` costs three times as much. A process without memory has no program; one whose first
/// thread alone has ended has none either, but more threads than that.
pub(crate) fn is_idle(proc: impl AsFd, pid: i32) -> bool {
    let program = rustix::fs::readlinkat(&proc, format!("{pid}/exe"), [0; 0]);
    program == Err(Errno::NOENT)
        && rustix::fs::statat(&proc, format!("{pid}/task"), AtFlags::empty()).is_ok_and(|task| task.st_nlink <= 3)
}

/// What `stat` says of the process that has this pid now, in three system calls.
pub(crate) fn stat_in(proc: impl AsFd, pid: i32) -> io::Result<Stat> {
    let file = rustix::fs::openat(proc, format!("{pid}/stat"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Stat::parse(&read_record(file)?)
}

/// The entries of an open directory that are numbers; it must not have been read before.
pub(crate) fn numbers_in(dir: impl AsFd) -> io::Result<Vec<i32>> {
    let mut buffer = [MaybeUninit::uninit(); 2 * PAGE];
    let mut entries = RawDir::new(dir.as_fd(), &mut buffer);
    let mut numbers = Vec::new();
    while let Some(entry) = entries.next() {
        if let Some(number) = parse(entry?.file_name().to_bytes()) {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// How much is read at once: files of `/proc` are made page by page.
const PAGE: usize = 4096;

/// Whether the letter of a state says that the thread has ended.
pub(crate) fn ended(state: u8) -> bool {
    b"ZXx".contains(&state)
}

/// Whether a scan may go on without the process: it has ended meanwhile.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH)
}

/// Turns "it is gone" into `None`.
pub(crate) fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if is_gone(&error) => Ok(None),
        other => other.map(Some),
    }
}

/// The fields of `/proc/PID/stat` that fsnap uses ([proc_pid_stat(5)]).
///
/// [proc_pid_stat(5)]: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) command: String,
    pub(crate) state: u8,
    pub(crate) parent: i32,
    pub(crate) kernel_thread: bool,
    /// How many threads the process has, those included that have ended and were not waited for.
    pub(crate) threads: usize,
    pub(crate) start_time: u64,
}

impl Stat {
    fn parse(line: &[u8]) -> io::Result<Self> {
        Self::fields(line).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a line of /proc/PID/stat"))
    }

    fn fields(line: &[u8]) -> Option<Self> {
        const PF_KTHREAD: u32 = 0x0020_0000;
        // The command stands in parentheses and may itself hold any, blanks and newlines too.
        let open = line.iter().position(|&byte| byte == b'(')?;
        let close = line.iter().rposition(|&byte| byte == b')')?;
        let command = printable(line.get(open + 1..close)?);
        let fields: Vec<&[u8]> = line.get(close + 2..)?.split(|&byte| byte == b' ').collect();
        Some(Self {
            command,
            state: *fields.first()?.first()?,
            parent: parse(fields.get(1)?)?,
            kernel_thread: parse::<u32>(fields.get(6)?)? & PF_KTHREAD != 0,
            threads: parse(fields.get(17)?)?,
            start_time: parse(fields.get(19)?)?,
        })
    }
}

/// Parses a number from bytes.
pub(crate) fn parse<T: std::str::FromStr>(bytes: &[u8]) -> Option<T> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// A name that a process chose for itself, as text that cannot speak to a terminal.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_cannot_forge_the_fields_behind_it() {
        let line = b"42 (a) R 1 (\x1b[2J) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 991 1000 10 0 0";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.state, stat.parent, stat.threads, stat.start_time), (b'S', 7, 1, 991));
        assert_eq!(stat.command, "a) R 1 (\u{fffd}[2J");
        assert!(!stat.kernel_thread);
    }

    #[test]
    fn a_torn_stat_line_is_an_error() {
        for line in ["", "42", "42 (a", "42 (a)", "42 (a) S", "42 (a) S 7 42 x"] {
            assert!(Stat::parse(line.as_bytes()).is_err(), "{line:?}");
        }
    }

    #[test]
    fn a_directory_of_a_process_that_ended_answers_no_more() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let dir = ProcDir::of(child.id().cast_signed()).unwrap();
        assert!(!dir.stat().unwrap().kernel_thread);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_gone(&dir.stat().unwrap_err()));
    }
}
