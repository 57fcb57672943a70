//! Why CRIU could not dump processes, from its log, in words that its user can act on.
//!
//! A log has hundreds of lines, and the reason is in the first of those that begin with `Error`: what follows is the
//! undoing. A line that is not known is shown as it stands, without its time and its place in CRIU's source.

/// Whoever did that: another fsnap waits for its turn.
const STOPPED: &str =
    "somebody stopped a process by a signal meanwhile, or set it running: send it SIGCONT if it stands, and try again";

/// What a line of the log holds, and what it means. The first that fits counts.
const KNOWN: &[(&str, &str)] = &[
    (
        "External socket is used",
        "a process has a connection through a Unix socket to a process outside of the run, which would not be saved: close it, \
         or start its other end in the run as well",
    ),
    (
        "ext-unix-sk",
        "a process has a connection through a Unix socket to a process outside of the run, which would not be saved: close it, \
         or start its other end in the run as well",
    ),
    (
        "Connected TCP socket",
        "a process has an open TCP connection: close it, or add `-- --tcp-established` if its peer can wait",
    ),
    (
        "tty: ",
        "a process has a terminal that is not its run's own: start it with `fsnap run --tty`, or without a terminal",
    ),
    (
        "Can't lookup mount=",
        "a process has a file open that it inherited from outside of the run: start it without that file",
    ),
    ("Can't dump ghost file", "a process has a large file open whose name is gone: add `-- --ghost-limit SIZE`"),
    (
        "Use link-remap option",
        "a process has a file or directory open whose name is gone or covered: add `-- --link-remap`",
    ),
    ("file locks are hold", "a process holds file locks: add `-- --file-locks`"),
    (
        "Can't get 1:16 opt",
        "a process has a network socket, which a CRIU before 4.2 cannot save on a kernel from 6.16 on: install a newer CRIU",
    ),
    (
        "Can't get rlimit",
        "a process of another user cannot be asked for its limits without the right CAP_SYS_RESOURCE, which fsnap does not have here: \
         run all processes as one user",
    ),
    ("io_uring", "a process uses io_uring, which CRIU cannot save: turn it off in the program's settings"),
    ("was stopped by", STOPPED),
    ("task interruption", STOPPED),
    ("is traced by", "a process is being traced by a debugger: end that first"),
    ("Unable to seize", "CRIU may not stop a process: run as root, and end any debugger"),
    ("session leader", "a process belongs to a session whose leader is outside of the run: start it in the run"),
    ("Can't find path for", "a process watches a file that CRIU cannot find again: add `-- --force-irmap`"),
    (
        "Can't open mapped",
        "a process has mapped a file whose name is gone, and the kernel lets nobody but root look at that: start the run as root",
    ),
    ("CAP_SYS_ADMIN", "CRIU needs more rights than this user has: start the run as root"),
];

/// The first lines of a log that say what failed, translated where that is known; none if nothing did.
pub fn of(log: &str) -> Vec<String> {
    let mut reasons: Vec<String> = Vec::new();
    let errors = log.lines().filter_map(error).filter(|line| !is_noise(line));
    for line in errors {
        let known = KNOWN.iter().find(|(part, _)| line.contains(part));
        match known {
            // What comes after a known reason is its consequence.
            Some((_, meaning)) => return vec![(*meaning).to_owned(), format!("CRIU says: {line}")],
            None if reasons.len() < 3 => reasons.push(format!("CRIU says: {line}")),
            None => {}
        }
    }
    reasons
}

/// What follows `Error (criu/file.c:12): ` in a line that has it.
fn error(line: &str) -> Option<String> {
    // What fsnap itself says there, as the engine's action script.
    if let Some(said) = line.strip_prefix("fsnap: error: ") {
        return Some(crate::printable(said.trim().as_ref()));
    }
    let (_, rest) = line.split_once("Error (")?;
    let (_, said) = rest.split_once("): ")?;
    Some(crate::printable(said.trim().as_ref()))
}

/// Complaints that CRIU makes in every dump, or of its own end.
fn is_noise(line: &str) -> bool {
    [
        "rlimit: Can't setup RLIMIT_NOFILE",
        // What it asks of the kernel without being root, and can do without.
        "tun: Unable to create tun",
        "net: Unexpected error: -1(",
        "Dumping FAILED",
        "Unable to detach from",
        "exited, status=",
        "exited with -1",
    ]
    .iter()
    .any(|noise| line.contains(noise))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_is_told_in_plain_words() {
        let log = "(00.012) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                   (00.031) Warn  (compel/arch/x86/src/lib/infect.c:418): Will restore 50\n\
                   (00.050) Error (criu/sk-inet.c:190): inet: Connected TCP socket, consider using --tcp-established option.\n\
                   (00.051) Error (criu/cr-dump.c:1681): Dump files (pid: 50) failed with -1\n\
                   (00.060) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        let reasons = of(log);
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        assert!(reasons[0].starts_with("a process has an open TCP connection"), "{reasons:?}");
        assert!(reasons[1].starts_with("CRIU says: inet: Connected TCP socket"), "{reasons:?}");
    }

    #[test]
    fn what_new_kernels_missing_rights_and_others_do_is_told_in_plain_words() {
        for (line, told) in [
            (
                "(criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported",
                "a process has a network socket",
            ),
            ("(criu/cr-dump.c:380): Can't get rlimit 0: Operation not permitted", "a process of another user"),
            ("(compel/src/lib/infect.c:350): 301 was stopped by 19 unexpectedly", "somebody stopped a process"),
            (
                "(compel/src/lib/infect.c:1460): Unexpected 301 task interruption, aborting",
                "somebody stopped a process",
            ),
        ] {
            let reasons = of(&format!("(00.1) Error {line}\n(00.2) Error (criu/cr-dump.c:1681): Dump files failed\n"));
            assert!(reasons.len() == 2 && reasons[0].starts_with(told), "{reasons:?}");
        }
    }

    #[test]
    fn what_is_not_known_is_shown_as_it_stands() {
        let log =
            "(00.1) Error (criu/a.c:1): something\u{1b}[2J new\n(00.2) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(of(log), ["CRIU says: something\\u{1b}[2J new"]);
        assert_eq!(of("(00.1) all went well\n"), [""; 0]);
    }
}
