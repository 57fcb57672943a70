//! What a kernel says on its console, and which of it no test may pass over.

/// What the kernel says before it stops for good. User-mode Linux then does not end, and takes a whole processor.
pub(crate) const PANIC: &str = "Kernel panic";

/// What begins a message that means that the kernel is at fault, or about to lose data, or that the machine cannot run the program.
const COMPLAINTS: &[&str] = &[
    "vm-tests: ",
    "WARNING:",
    "BUG:",
    "kernel BUG at",
    "Oops",
    "general protection fault",
    PANIC,
    "INFO: task",
    "soft lockup",
    "hard LOCKUP",
    "rcu_sched self-detected stall",
    "rcu_preempt self-detected stall",
    "possible circular locking",
    "Out of memory: Killed process",
    "segfault at",
];

/// The lines of a kernel's log that it may not hold.
pub(crate) fn complaints(log: &str) -> Vec<&str> {
    log.lines().filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint))).collect()
}

/// The last lines of a log.
pub(crate) fn tail(log: &str, lines: usize) -> String {
    let all: Vec<&str> = log.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_log_has_no_complaints() {
        let log = "Linux version 6.1\nBTRFS info (device loop0): using crc32c\nBuffer I/O error on dev dm-0\n";
        assert_eq!(complaints(log), Vec::<&str>::new());
    }

    #[test]
    fn each_fault_of_a_kernel_is_a_complaint() {
        for line in [
            "[    3.2] WARNING: CPU: 0 PID: 1 at fs/btrfs/inode.c:1 f+0x1/0x2",
            "BUG: kernel NULL pointer dereference, address: 0",
            "Oops: 0000 [#1]",
            "Kernel panic - not syncing: Attempted to kill init!",
            "<3>vm-tests: cannot run /bin/no-such",
            "INFO: task dmsetup:12 blocked for more than 120 seconds.",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
        ] {
            assert_eq!(complaints(&format!("fine\n{line}\nfine\n")), [line]);
        }
    }

    #[test]
    fn the_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\n", 2), "a");
    }
}
