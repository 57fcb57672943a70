//! The help texts of the commands for runs and containers.

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

    With --tty, the exit code is the command's once that runs, or 128 and the number of the signal that
    killed it; what fsnap itself could not do is told by a line `fsnap: error:`.

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
              Give it this terminal, and stay until it ends, with its exit code

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

#[test]
fn install_hooks() {
    assert_snapshot!(help("install-hooks"), @"
    Make CRIU call fsnap, whoever calls CRIU: a user, or a container runtime

    Adds marked lines to a file of CRIU's configuration in /etc/criu, after making sure that the
    installed versions can do it, and a link to this fsnap in /usr/libexec/fsnap. From then on each
    checkpoint of a container holds its volumes: those that are registered (`fsnap init`) and that its
    processes can write to, its root file system and its bind mounts among them. Prints what it changes.

    Usage: fsnap install-hooks [OPTIONS] <CALLER>

    Arguments:
      <CALLER>
              Who calls CRIU

              Possible values:
              - criu:   All that read CRIU's default.conf
              - runc:   The container runtime runc
              - crun:   The container runtime crun
              - podman: Podman: the runtime that it uses

    Options:
      -n, --dry-run
              Print what would be changed, and change nothing

          --uninstall
              Take the lines out again, and the link when nobody needs it any more

          --root <DIR>
              Change the files below this directory, as for a package

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn engine() {
    assert_snapshot!(help("engine"), @"
    Save a container from outside, or restore it as a second one on a branch

    Usage: fsnap engine <COMMAND>

    Commands:
      runc  The container runtime runc
      crun  The container runtime crun
      help  Print this message or the help of the given subcommand(s)

    Options:
      -h, --help  Print help
    ");
}

#[test]
fn engine_runc_checkpoint() {
    assert_snapshot!(help("engine runc checkpoint"), @"
    Save a container, its processes and its volumes, at one instant, and let it run on

    For a CRIU that container runtimes may not give hooks (`fsnap install-hooks` tells). fsnap freezes
    the container's control group, has the runtime save the processes, takes the snapshots, and thaws
    it: it is frozen for all of that. A hook that is installed keeps still. Prints the new checkpoint's
    id.

    Usage: fsnap engine runc checkpoint [OPTIONS] --image-path <DIR> <CONTAINER> [-- <RUNTIME ARGS>...]

    Arguments:
      <CONTAINER>
              The container

      [RUNTIME ARGS]...
              Further arguments for the runtime's checkpoint, after --

    Options:
          --image-path <DIR>
              Where the process image goes: a directory that is empty or missing, outside of every
              volume

      -m, --message <MESSAGE>
              What to say of it

          --root <DIR>
              Where the runtime keeps the state of its containers

          --deadline <SECONDS>
              Give up, and let the container run, if it is not frozen after so many seconds

              [default: 10]

          --json
              Print a JSON object

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn criu_args() {
    assert_snapshot!(help("criu-args"), @"
    Print what CRIU is to be told when it dumps a process: one argument a line

    Files that are open or mapped and have no name any more are in no snapshot. Those of the volumes are
    kept with the checkpoint, whatever their size, and `fsnap restore` gives them back: CRIU is told to
    leave them out. Others it saves itself, and has to be told to whatever their size.

    Ask right before the dump: criu dump -t PID --action-script HOOK $(fsnap criu-args PID). HOOK is a
    link to fsnap named `fsnap-criu-hook`.

    Usage: fsnap criu-args <PID>

    Arguments:
      <PID>
              The process, with all its descendants

    Options:
      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn engine_runc_restore() {
    assert_snapshot!(help("engine runc restore"), @"
    Restore a container's checkpoint as a second container, on a new branch, beside the first

    The branch gets the container's name. The new container's configuration is the first one's, with the
    branch's directories where the first one's lie in a volume; it is in `bundles` of the state
    directory, beside a log of what the container says to a pipe.

    Usage: fsnap engine runc restore [OPTIONS] --name <NAME> <CKPT> [-- <RUNTIME ARGS>...]

    Arguments:
      <CKPT>
              The checkpoint: an id, a prefix of one, a tag, @latest, or X~N

      [RUNTIME ARGS]...
              Further arguments for the runtime's restore, after --

    Options:
          --name <NAME>
              The name of the new container, and of its branch

          --bundle <DIR>
              The first container's bundle; needed where the checkpoint was not taken by `fsnap engine`,
              which keeps its configuration

          --root <DIR>
              Where the runtime keeps the state of its containers

          --json
              Print a JSON object

      -h, --help
              Print help (see a summary with '-h')
    ");
}
