//! Runs a program from system call to system call, and kills it before one, or lets one fail.
//!
//! Only calls that change something outside of the process are counted: being killed before any other is the same as
//! being killed before the next of these.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, killpg, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The first argument by which this test program knows that it is to become a traced program.
pub(crate) const HELPER: &str = "--become-traced";

/// Asks to be traced, and becomes the program that the arguments name.
pub(crate) fn become_traced(mut arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let Some(program) = arguments.next() else { return ExitCode::FAILURE };
    if ptrace::traceme().and_then(|()| raise(Signal::SIGSTOP)).is_err() {
        return ExitCode::FAILURE;
    }
    // It returns only if it fails; the parent sees that nothing of fsnap has run.
    let error = Command::new(program).args(arguments).exec();
    let _ = writeln!(std::io::stderr(), "{error}");
    ExitCode::FAILURE
}

/// What happens to the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is killed before this change, counted from 1.
    Kill(u32),
    /// This change fails, once.
    Fail(u32, Errno),
    /// This change fails, and so does every one after it.
    FailForGood(u32, Errno),
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The program was killed.
    Killed,
    /// It ended by itself.
    Exited {
        code: i32,
        /// The changes that it made, or tried to make.
        changes: u32,
        /// What it wrote on standard error.
        stderr: String,
    },
}

/// Runs the program; `command` names it and its arguments.
pub(crate) fn run(command: &Command, fault: Fault) -> End {
    let said = tempfile::NamedTempFile::new().expect("make a file");
    let mut tracee = Command::new(std::env::current_exe().expect("know this program"));
    tracee.arg(HELPER).arg(command.get_program()).args(command.get_args());
    tracee.current_dir(command.get_current_dir().expect("a session has a directory")).env_clear();
    tracee.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    tracee.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.reopen().expect("open a file"));
    #[expect(clippy::zombie_processes, reason = "`Tracee` waits for it, and for its threads")]
    // A process group of its own, by which its threads are told from those of other tests.
    let child = tracee.process_group(0).spawn().expect("start this program");
    let mut tracee = Tracee {
        leader: Pid::from_raw(child.id() as i32),
        changes: 0,
        skipped: BTreeSet::new(),
        inside: BTreeMap::new(),
        copies: BTreeSet::new(),
    };
    let code = tracee.run(fault);
    let changes = tracee.changes;
    drop(tracee);
    match code {
        None => End::Killed,
        Some(code) => End::Exited { code, changes, stderr: fs::read_to_string(said.path()).expect("read a file") },
    }
}

/// A traced program; killed and reaped when dropped.
struct Tracee {
    leader: Pid,
    changes: u32,
    /// Threads inside a call that is not made.
    skipped: BTreeSet<Pid>,
    /// Threads inside a call.
    inside: BTreeMap<Pid, ()>,
    /// Forked children that have not begun.
    copies: BTreeSet<Pid>,
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

    /// Returns the exit code; `None` if it was killed as it was to be.
    fn run(&mut self, fault: Fault) -> Option<i32> {
        let first = self.wait().expect("wait for the tracee");
        assert!(matches!(first, WaitStatus::Stopped(_, Signal::SIGSTOP)), "it ended too early: {first:?}");
        let options = Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(self.leader, options).expect("trace");
        ptrace::syscall(self.leader, None).expect("trace");
        let mut started = false;
        loop {
            let (thread, signal) = match self.wait().expect("wait for the tracee") {
                WaitStatus::Exited(pid, code) if pid == self.leader => return Some(code),
                WaitStatus::Signaled(pid, signal, _) if pid == self.leader => panic!("it died of {signal}"),
                WaitStatus::PtraceSyscall(thread) => {
                    // Before it is fsnap, it is this program.
                    if started && self.at_call(thread, fault) {
                        return None;
                    }
                    (thread, None)
                }
                WaitStatus::PtraceEvent(thread, _, event) => {
                    if event == libc::PTRACE_EVENT_FORK {
                        self.copies.extend(ptrace::getevent(thread).map(|child| Pid::from_raw(child as i32)));
                    } else if event == libc::PTRACE_EVENT_EXEC && !started {
                        started = true;
                        // The exit from execve(2) follows.
                        self.inside.insert(thread, ());
                    } else if event == libc::PTRACE_EVENT_EXEC && thread != self.leader {
                        // A program of its own: the guard, which has to do its work when fsnap is killed.
                        self.inside.remove(&thread);
                        ptrace::detach(thread, None).expect("let a child go");
                        continue;
                    }
                    (thread, None)
                }
                // A copy of it that goes on when fsnap has ended: the search for writers.
                WaitStatus::Stopped(thread, Signal::SIGSTOP) if self.copies.remove(&thread) => {
                    ptrace::detach(thread, None).expect("let a child go");
                    continue;
                }
                // A new thread begins with a stop of its own; a signal is passed on.
                WaitStatus::Stopped(thread, Signal::SIGSTOP) => (thread, None),
                WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
                _ => continue,
            };
            match ptrace::syscall(thread, signal) {
                // It is gone already, by exit_group(2) of another thread.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => panic!("cannot go on: {error}"),
            }
        }
    }

    /// A thread enters a system call, or leaves it; `true` if the program is to be killed now.
    fn at_call(&mut self, thread: Pid, fault: Fault) -> bool {
        if self.inside.remove(&thread).is_some() {
            if self.skipped.remove(&thread)
                && let Fault::Fail(_, errno) | Fault::FailForGood(_, errno) = fault
            {
                registers::answer(thread, errno);
            }
            return false;
        }
        self.inside.insert(thread, ());
        let Some(call) = registers::entered(thread) else { return false };
        let counts = match fault {
            Fault::Fail(..) | Fault::FailForGood(..) => may_fail(thread, &call),
            Fault::Kill(_) => is_change(thread, &call),
        };
        if !counts {
            return false;
        }
        self.changes += 1;
        match fault {
            Fault::Kill(number) if number == self.changes => return true,
            Fault::Fail(number, _) if number != self.changes => {}
            Fault::FailForGood(number, _) if number > self.changes => {}
            Fault::Fail(..) | Fault::FailForGood(..) => {
                registers::skip(thread);
                self.skipped.insert(thread);
            }
            Fault::Kill(_) => {}
        }
        false
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // With it a child that was about to become another program; that program itself has left the group, or does nothing yet.
        let _ = killpg(self.leader, Signal::SIGKILL);
        // Until ECHILD: every thread is reaped, and its locks are gone.
        while self.wait().is_ok() {}
    }
}

/// A system call that a thread is about to make.
pub(crate) struct Call {
    number: i64,
    arguments: [u64; 3],
}

fn creates(thread: Pid, call: &Call) -> bool {
    let creating = |flags: u64| flags & (libc::O_CREAT | libc::O_TRUNC) as u64 != 0;
    match call.number {
        libc::SYS_openat => creating(call.arguments[2]),
        // The flags are the first word of the structure that the third argument points to.
        libc::SYS_openat2 => {
            ptrace::read(thread, call.arguments[2] as ptrace::AddressType).map_or(true, |flags| creating(flags as u64))
        }
        _ => false,
    }
}

/// Whether the call may change anything that outlives the process.
fn is_change(thread: Pid, call: &Call) -> bool {
    creates(thread, call) || SIGNALS.contains(&call.number) || CHANGES.contains(&call.number) && !is_talk(call)
}

/// Whether the call is one that a disk may refuse: a change, or waiting for one.
fn may_fail(thread: Pid, call: &Call) -> bool {
    is_change(thread, call) && !SIGNALS.contains(&call.number) || SYNCS.contains(&call.number)
}

/// Output for the user, and questions about the terminal.
fn is_talk(call: &Call) -> bool {
    const TCGETS: u64 = 0x5401;
    match call.number {
        libc::SYS_write | libc::SYS_writev => call.arguments[0] <= 2,
        libc::SYS_ioctl => call.arguments[1] == TCGETS,
        _ => false,
    }
}

/// What stops processes, and sets them running.
const SIGNALS: &[libc::c_long] = &[libc::SYS_kill, libc::SYS_pidfd_send_signal];

const SYNCS: &[libc::c_long] = &[libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_syncfs, libc::SYS_sync_file_range];

const CHANGES: &[libc::c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_ftruncate,
    libc::SYS_ioctl,
    libc::SYS_lremovexattr,
    libc::SYS_lsetxattr,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_sendfile,
    libc::SYS_setxattr,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_umount2,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_write,
    libc::SYS_writev,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// Where a stopped thread keeps its system call.
#[cfg(target_arch = "x86_64")]
mod registers {
    use nix::errno::Errno;
    use nix::sys::ptrace;
    use nix::unistd::Pid;

    use super::Call;

    pub(super) fn entered(thread: Pid) -> Option<Call> {
        let registers = ptrace::getregs(thread).ok()?;
        let arguments = [registers.rdi, registers.rsi, registers.rdx];
        Some(Call { number: registers.orig_rax.cast_signed(), arguments })
    }

    /// Lets the kernel make no call.
    pub(super) fn skip(thread: Pid) {
        let mut registers = ptrace::getregs(thread).expect("read the registers");
        registers.orig_rax = u64::MAX;
        ptrace::setregs(thread, registers).expect("write the registers");
    }

    /// Gives the answer to a call that was not made.
    pub(super) fn answer(thread: Pid, errno: Errno) {
        let mut registers = ptrace::getregs(thread).expect("read the registers");
        registers.rax = (-i64::from(errno as i32)).cast_unsigned();
        ptrace::setregs(thread, registers).expect("write the registers");
    }
}
