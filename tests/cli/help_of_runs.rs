//! The help texts of the commands for runs.

use insta::assert_snapshot;

use crate::help::help;

#[test]
fn run() {
    assert_snapshot!(help("run"), @"
    Start a command so that it can be saved and copied live

    It gets namespaces of its own (pids, mounts, IPC), in which everything is read-only but its volumes,
    so that a checkpoint holds all that it can change. Each copy has its own /tmp, /var/tmp and /dev/shm
    in memory. It goes on in the background, and what it says goes to a log (`fsnap logs`), unless it
    has a terminal. Prints the run's name.

    Then `fsnap checkpoint NAME` saves it, files and processes at one instant, and `fsnap branch CKPT
    --run` starts a copy.

    Usage: fsnap run [OPTIONS] -- <COMMAND>...

    Arguments:
      <COMMAND>...
              The command and its arguments

    Options:
          --name <NAME>
              The run's name; one is made up from the command, if not given

          --volume <VOLUME>
              A volume that it writes to, by name or path; may be given several times

          --rw <DIR>
              A directory that it writes to and that is in no checkpoint; all copies share it

          --ro <DIR>
              A directory that it sees read-only, also in a volume or below /tmp

          --tmp <DIR>
              A directory that it sees empty, in memory, each copy its own

          --tty
              Give it this terminal, and stay until it ends

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn ps() {
    assert_snapshot!(help("ps"), @"
    List the runs: the process, checkpoint and branch of each, and since when it runs

    Usage: fsnap ps [OPTIONS]

    Options:
      -a, --all   Those that have ended as well, as long as their logs are kept
          --json  Print an array of JSON objects
      -h, --help  Print help
    ");
}

#[test]
fn logs() {
    assert_snapshot!(help("logs"), @"
    Print what the processes of a run have written to standard output and standard error

    Usage: fsnap logs [OPTIONS] <RUN>

    Arguments:
      <RUN>  The run

    Options:
      -f, --follow  Go on until it ends
      -h, --help    Print help
    ");
}

#[test]
fn stop() {
    assert_snapshot!(help("stop"), @"
    End runs: ask each command to (SIGTERM), and kill what is left after a while

    What they wrote stays: their branches, their logs.

    Usage: fsnap stop [OPTIONS] <RUN>...

    Arguments:
      <RUN>...
              The runs

    Options:
      -t, --time <SECONDS>
              How long to wait before the rest is killed; 0 kills at once

              [default: 10]

      -h, --help
              Print help (see a summary with '-h')
    ");
}
