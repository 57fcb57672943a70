//! The help texts, as a newcomer reads them.

use insta::assert_snapshot;

use crate::site::Site;

/// The command's help, long and short.
pub(crate) fn help(command: &str) -> String {
    let site = Site::empty();
    assert_eq!(site.run(&format!("fsnap help {command}")), site.run(&format!("fsnap {command} --help")));
    let text = site.run(&format!("fsnap {command} --help"));
    // Which backends there are is a matter of what was compiled in.
    let masked = text.lines().map(|line| match line.split_once("[possible values: auto, ") {
        Some((before, _)) => format!("{before}[possible values: auto, …]\n"),
        None => format!("{}\n", line.trim_end()),
    });
    masked.collect()
}

#[test]
fn all() {
    assert_snapshot!(help(""), @"
    Snapshot the files of processes at their checkpoints, and branch from any of them

    A checkpoint engine such as CRIU freezes and saves processes; fsnap takes a snapshot of every volume
    that they can write to at the same instant. Each checkpoint can be browsed, compared, and made into
    a writable branch, onto which the processes can be restored.

    Begin with `fsnap init DIR`, then `fsnap checkpoint`, `fsnap log`, `fsnap branch @latest`.

    Usage: fsnap <COMMAND>

    Commands:
      init           Begin to track a directory as a volume
      volumes        List the volumes: name, path, backend, what the backend can do
      checkpoint     Take a snapshot of every volume at one instant, and print the new checkpoint's id
      audit          List what processes can write to that a checkpoint of them would not hold
      log            List the checkpoints, newest first
      show           Show one checkpoint: its volumes, their consistency, and what is not in it
      diff           List the files that differ between two checkpoints, or between a checkpoint and now
      branch         Make a writable branch from a checkpoint, and print where its files are
      branches       List the branches, the checkpoint each grew from, and where its files are
      restore        Restore a checkpoint's processes onto a new branch with the files of the same
                     instant
      run            Start a command so that it can be saved and copied live
      ps             List the runs: the process, checkpoint and branch of each, and since when it runs
      logs           Print what the processes of a run have written to standard output and standard
                     error
      stop           End runs: ask each command to (SIGTERM), and kill what is left after a while
      rm             Remove checkpoints, a branch, an ended run, or a volume from fsnap's care
      tag            Give a checkpoint a name
      mount          Show every checkpoint and branch as files
      overlay        Write to a directory copy-on-write
      umount         Unmount what fsnap serves
      verify         Read checkpoints again and name what is damaged
      pool           Make, list, enlarge and remove thin pools of device-mapper, for those who have none
      recover        Finish or undo what a killed fsnap or engine left half done
      doctor         Tell what this machine can do, and why not: every backend, every engine, fsnap's
                     own state
      install-hooks  Make CRIU call fsnap, whoever calls CRIU: a user, or a container runtime
      engine         Save a container from outside, or restore it as a second one on a branch
      hook           Be called by a checkpoint engine
      criu-args      Print what CRIU is to be told when it dumps a process: one argument a line
      completions    Print the completion script for a shell
      man            Print the manual page, or write the pages of all commands into a directory
      help           Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    CKPT is an id, a unique prefix of one (4 digits or more), a tag, @latest, or X~N, the N-th
    checkpoint before X.

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    ");
}

#[test]
fn init() {
    assert_snapshot!(help("init"), @"
    Begin to track a directory as a volume

    From then on, checkpoints take a snapshot of it. The directory itself is not changed. Its snapshots
    are kept in a store on the same file system where possible: on btrfs in the subvolume `.fsnap` at
    the root of the mount; else in a directory beside it. What the snapshots cannot keep is said.

    Usage: fsnap init [OPTIONS] <DIR>

    Arguments:
      <DIR>
              The directory; for btrfs, a subvolume

    Options:
          --name <NAME>
              The volume's name; the directory's, if not given

          --backend <BACKEND>
              What keeps the snapshots; auto is the first that can hold the directory

              [default: auto]
              [possible values: auto, …]

          --store <PLACE>
              Where the snapshots are kept, outside the directory

          --json
              Print the volume as JSON

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn volumes() {
    assert_snapshot!(help("volumes"), @"
    List the volumes: name, path, backend, what the backend can do

    Usage: fsnap volumes [OPTIONS]

    Options:
          --json  Print an array of JSON objects
      -h, --help  Print help
    ");
}

#[test]
fn checkpoint() {
    assert_snapshot!(help("checkpoint"), @"
    Take a snapshot of every volume at one instant, and print the new checkpoint's id

    With --pid or --cgroup, the processes are frozen meanwhile, and the volumes are those that they can
    write to; the snapshots are then one point in time. Without, every volume is taken as it is while
    its writers run, and the checkpoint records that weaker consistency.

    With the name of a run (`fsnap run`), its processes are saved as well, by CRIU, and go on.

    Usage: fsnap checkpoint [OPTIONS] [VOLUME|RUN]... [-- <ENGINE ARGS>...]

    Arguments:
      [VOLUME|RUN]...
              The volumes, by name or path; if none is given, all that the processes can write to, or
              all there are; or one run

      [ENGINE ARGS]...
              Further arguments for the engine's dump of a run, after --

    Options:
      -m, --message <MESSAGE>
              What to say of it

      -t, --tag <TAG>
              A name for it; may be given several times

          --pid <PID>
              Freeze this process and all its descendants

          --cgroup <DIR>
              Freeze all processes of this control group

          --freeze-writers
              Freeze others that have files of the volumes open for writing, too

          --deadline <SECONDS>
              Give up, and let the processes run, if they are not frozen after so many seconds, 10 if
              not given; or if those of a run stand for so many, by default as long as in a hook

          --branch <NAME>
              Take the volumes of this branch

          --outside <POLICY>
              What to do if the processes can write to anything else: refuse it, record it, or do not
              look [default: record]

          --ignore <PATTERN>
              What does not matter: a path with all below it, or a type of file system; * and ** are
              wildcards

          --json
              Print a JSON object

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn log() {
    assert_snapshot!(help("log"), @"
    List the checkpoints, newest first

    Usage: fsnap log [OPTIONS]

    Options:
          --graph
              Draw how checkpoints and branches grew from each other

      -n, --limit <COUNT>
              Show at most so many

          --all <VOLUME>
              List every past state of this volume that its file system still has, asked for or not

              `fsnap branch VOLUME@cp:N` grows a branch from one. NILFS2 keeps such states; what nobody
              needs, its cleaner takes.

          --json
              Print an array of JSON objects

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn show() {
    assert_snapshot!(help("show"), @"
    Show one checkpoint: its volumes, their consistency, and what is not in it

    Usage: fsnap show [OPTIONS] <CKPT>

    Arguments:
      <CKPT>  The checkpoint: an id, a prefix of one, a tag, @latest, or X~N

    Options:
          --processes  Show its processes instead, as they stood: their descriptors, and the files that
                       they had mapped
          --json       Print a JSON object
      -h, --help       Print help
    ");
}

#[test]
fn diff() {
    assert_snapshot!(help("diff"), @"
    List the files that differ between two checkpoints, or between a checkpoint and now

    A was added, D was removed, M has another content, a has other attributes only.

    Usage: fsnap diff [OPTIONS] <A> [B]

    Arguments:
      <A>
              The older checkpoint: an id, a prefix of one, a tag, @latest, or X~N

      [B]
              The newer checkpoint; the files as they are now, if not given

    Options:
          --processes
              List what differs between the processes instead

              + was started, - has ended, o opened a file, c closed one, d has another working
              directory.

          --json
              Print an array of JSON objects

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn branch() {
    assert_snapshot!(help("branch"), @"
    Make a writable branch from a checkpoint, and print where its files are

    The branch starts equal to the checkpoint and is written independently of it, of the volume, and of
    other branches. It prints one directory per volume of the checkpoint. On a file system that keeps
    past states by itself, such as NILFS2, `VOLUME@TIME` and `VOLUME@cp:N` make a checkpoint of one that
    nobody asked for, and grow from that.

    With --run, a run that the checkpoint saved (`fsnap checkpoint RUN`) goes on from there on the
    branch, beside the original and other copies.

    Usage: fsnap branch [OPTIONS] <CKPT> [NAME] [-- <ENGINE ARGS>...]

    Arguments:
      <CKPT>
              The checkpoint to grow from: an id, a prefix of one, a tag, @latest, or X~N; or
              VOLUME@TIME, or VOLUME@cp:N

      [NAME]
              The branch's name; one is made up, if not given

      [ENGINE ARGS]...
              Further arguments for the engine's restore, after --

    Options:
          --run
              Restore the run that was saved onto it, as a run of the branch's name; prints the name

          --count <N>
              So many branches and runs, named NAME-1 and so on

              [default: 1]

          --tty
              Give the copy this terminal, and stay until it ends, with its exit code

          --json
              Print a JSON object; with --run, an array of them

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn branches() {
    assert_snapshot!(help("branches"), @"
    List the branches, the checkpoint each grew from, and where its files are

    Usage: fsnap branches [OPTIONS]

    Options:
          --json  Print an array of JSON objects
      -h, --help  Print help
    ");
}

#[test]
fn restore() {
    assert_snapshot!(help("restore"), @"
    Restore a checkpoint's processes onto a new branch with the files of the same instant

    The branch is mounted over the volume's path in a mount namespace of its own, and the engine's
    restore runs in it. The processes get their old pids in a pid namespace of their own, so that one
    checkpoint can be restored many times side by side. It returns when they run; end them by killing
    the namespace's first process, whose pid is printed.

    Usage: fsnap restore [OPTIONS] <CKPT> [-- <ENGINE ARGS>...]

    Arguments:
      <CKPT>
              The checkpoint: an id, a prefix of one, a tag, @latest, or X~N

      [ENGINE ARGS]...
              Further arguments for the engine's restore, after --

    Options:
          --branch <NAME>
              The name of the new branch; one is made up, if not given

          --host-pids
              Take back the pids on this machine, instead of a pid namespace

          --wait
              Wait until the restored processes have ended

          --json
              Print a JSON object

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn rm() {
    assert_snapshot!(help("rm"), @"
    Remove checkpoints, a branch, an ended run, or a volume from fsnap's care

    A checkpoint is kept while branches that grew from it exist. A removed branch's files are deleted. A
    removed volume's own files are not touched, and its checkpoints stay.

    Usage: fsnap rm <CKPT|--branch <NAME>|--volume <NAME>|--run <NAME>>

    Arguments:
      [CKPT]...
              The checkpoints to remove; none goes if one is still needed

    Options:
          --branch <NAME>
              Remove this branch and its files

          --volume <NAME>
              Forget this volume; its files and checkpoints stay

          --run <NAME>
              Remove what is left of this run: its record and its log; its branch stays

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn tag() {
    assert_snapshot!(help("tag"), @"
    Give a checkpoint a name

    Usage: fsnap tag [OPTIONS] <CKPT> [NAME]

    Arguments:
      <CKPT>  The checkpoint: an id, a prefix of one, a tag, @latest, or X~N; with --delete, the tag
      [NAME]  The tag

    Options:
          --force   Move the tag here if another checkpoint has it
          --delete  Remove the tag
      -h, --help    Print help
    ");
}

#[test]
fn verify() {
    assert_snapshot!(help("verify"), @"
    Read checkpoints again and name what is damaged

    Without arguments, the catalog and every checkpoint; it then also names the snapshots and clones in
    the stores that are not recorded, which are no damage, and never touched. Exits with 1 if anything
    is damaged.

    Usage: fsnap verify [OPTIONS] [CKPT]...

    Arguments:
      [CKPT]...
              The checkpoints to verify; all, if none is given

    Options:
          --json
              Print a JSON object

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn recover() {
    assert_snapshot!(help("recover"), @"
    Finish or undo what a killed fsnap or engine left half done

    Every command does the same when it starts; this one says what it did. It also removes process
    images that no checkpoint needs, and names the snapshots and clones in the stores that fsnap did not
    record; they are never touched. Exits with 1 if something had to be left half done.

    Usage: fsnap recover [OPTIONS]

    Options:
          --json
              Print an array of JSON objects

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[cfg(feature = "dm-thin")]
#[test]
fn pool() {
    assert_snapshot!(help("pool"), @"
    Make, list, enlarge and remove thin pools of device-mapper, for those who have none

    A pool holds volumes, file systems on thin devices, and all snapshots and branches of them, which
    share every block that does not differ. Pools that LVM or Stratis manage are listed, and never
    changed.

    Usage: fsnap pool <COMMAND>

    Commands:
      create         Make a pool on a block device, or in sparse files in a directory
      list           List the pools of this machine: how full each is, and the volumes that fsnap made
                     in it
      grow           Enlarge a pool that fsnap made, while it is in use
      add-volume     Make a volume in a pool that fsnap made, with a file system on it, and print its
                     device, which is to be mounted
      remove-volume  Remove a volume that fsnap made, and all its files; its snapshots stay
      start          Bring up the pools that fsnap made, and their volumes, as after a start of the
                     machine
      stop           Take a pool down until it is needed again; refused while anything in it is in use
      remove         Remove a pool that fsnap made, and what it stands on; refused while anything is in
                     it
      help           Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[cfg(feature = "dm-thin")]
#[test]
fn pool_create() {
    assert_snapshot!(help("pool create"), @"
    Make a pool on a block device, or in sparse files in a directory

    Usage: fsnap pool create [OPTIONS] <DIR|DEVICE>

    Arguments:
      <DIR|DEVICE>  An empty block device, or a directory for the files

    Options:
          --name <NAME>  What device-mapper is to call it [default: fsnap]
          --size <SIZE>  The room for data in it, such as 20G; all of a device, if not given
      -h, --help         Print help
    ");
}

#[cfg(feature = "dm-thin")]
#[test]
fn pool_grow() {
    assert_snapshot!(help("pool grow"), @"
    Enlarge a pool that fsnap made, while it is in use

    A pool of files takes `--size`; one on a block device takes up what was added to the device. The
    volumes in the pool stay as large as they are.

    Usage: fsnap pool grow [OPTIONS] <POOL>

    Arguments:
      <POOL>
              The pool

    Options:
          --size <SIZE>
              The room for data that it is to have, such as 200G; without it, all of what it stands on

          --metadata-size <SIZE>
              The room for metadata that a pool of files is to have, such as 1G, where the data need no
              more than before

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[cfg(feature = "dm-thin")]
#[test]
fn pool_start() {
    assert_snapshot!(help("pool start"), @"
    Bring up the pools that fsnap made, and their volumes, as after a start of the machine

    Every command that needs a pool does so by itself; this one is for whatever mounts the volumes.

    Usage: fsnap pool start [POOL]...

    Arguments:
      [POOL]...
              Only these

    Options:
      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[cfg(feature = "dm-thin")]
#[test]
fn pool_remove() {
    assert_snapshot!(help("pool remove"), @"
    Remove a pool that fsnap made, and what it stands on; refused while anything is in it

    Usage: fsnap pool remove [OPTIONS] <POOL>

    Arguments:
      <POOL>  The pool

    Options:
          --with-volumes  Remove the volumes in it too, and all their files
      -h, --help          Print help
    ");
}

#[test]
fn doctor() {
    assert_snapshot!(help("doctor"), @"
    Tell what this machine can do, and why not: every backend, every engine, fsnap's own state

    Each line begins with `ok` or `no`, says what was examined, and then what was found: how it can be
    used, or why not. Nothing is changed, but that half-done work is recovered, as by every command.

    Usage: fsnap doctor [OPTIONS] [DIR]

    Arguments:
      [DIR]
              The directory that the backends are asked about

              [default: .]

    Options:
          --json
              Print an array of JSON objects

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn hook() {
    assert_snapshot!(help("hook"), @"
    Be called by a checkpoint engine

    For CRIU, make a link to fsnap named `fsnap-criu-hook`, and give its path as --action-script, for
    dump and for restore.

    Usage: fsnap hook <COMMAND>

    Commands:
      criu     CRIU's action script, which is told everything by the environment (CRTOOLS_*)
      generic  Any engine's hook: called at each step of a dump or a restore, with the tree's root and
               the directory of images
      help     Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn completions() {
    assert_snapshot!(help("completions"), @"
    Print the completion script for a shell

    Usage: fsnap completions <SHELL>

    Arguments:
      <SHELL>  The shell [possible values: bash, elvish, fish, powershell, zsh]

    Options:
      -h, --help  Print help
    ");
}

#[test]
fn man() {
    assert_snapshot!(help("man"), @"
    Print the manual page, or write the pages of all commands into a directory

    Usage: fsnap man [DIR]

    Arguments:
      [DIR]  Write one page per command here

    Options:
      -h, --help  Print help
    ");
}

#[test]
fn hook_criu() {
    assert_snapshot!(help("hook criu"), @"
    CRIU's action script, which is told everything by the environment (CRTOOLS_*)

    FSNAP_VOLUMES, names separated by commas, sets the volumes of the checkpoint; else they are found
    from the processes. FSNAP_OUTSIDE=refuse makes the dump fail if they can write to anything else.
    FSNAP_MESSAGE is what to say of the checkpoint. An action that needs nothing done succeeds.

    Usage: fsnap hook criu

    Options:
      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn mount() {
    assert_snapshot!(help("mount"), @"
    Show every checkpoint and branch as files

    DIR then has, read-only, ids/ID/VOLUME for each checkpoint's files, and links to these: latest,
    tags/TAG and snapshots/TIME. In branches/NAME/VOLUME are the files of a branch, to be written;
    `mkdir DIR/branches/NAME@CKPT` makes one. The file README in it tells more. New checkpoints show up
    by themselves. `fsnap umount DIR` ends it.

    A snapshot is made ready when somebody first looks at its files, and let go when nobody did for a
    while.

    With --native, who looks into a snapshot works on its own file system: as fast, and with birth
    times. It is a mount, and a device of its own: `find -xdev` and `tar --one-file-system` stop there.
    One that nobody uses is taken off after a minute or two.

    Usage: fsnap mount [OPTIONS] <DIR>

    Arguments:
      <DIR>
              Where to mount

    Options:
          --foreground
              Serve in this process, until it is unmounted or terminated, and say what cannot be read
              and why

          --allow-other
              Let other users see it; the permissions of the files hold

          --suid
              Let set-id bits have an effect, but for snapshots that are attached; for root

          --dev
              Let device nodes be opened, but for snapshots that are attached; for root

          --native
              Attach snapshots of btrfs, dm-thin and NILFS2 instead of reading them through FUSE; for
              root

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn overlay() {
    assert_snapshot!(help("overlay"), @"
    Write to a directory copy-on-write

    DIR then shows LOWER, and takes writes; LOWER itself is never changed. STORE keeps everything that
    was written, and must be a directory of its own: mounting with the same LOWER and STORE again shows
    the same files. `fsnap umount DIR` ends it.

    Mounted by root, every user sees it, and the permissions of its files hold.

    Usage: fsnap overlay [OPTIONS] <LOWER> <STORE> <DIR>

    Arguments:
      <LOWER>
              The directory to begin with

      <STORE>
              The directory that keeps the changes; made if it does not exist

      <DIR>
              Where to mount

    Options:
          --foreground
              Serve in this process, until it is unmounted or terminated

          --allow-other
              Let other users see it, although it is not root who mounts

          --suid
              Let set-id bits have an effect

          --dev
              Let device nodes be opened

      -h, --help
              Print help (see a summary with '-h')
    ");
}

#[test]
fn umount() {
    assert_snapshot!(help("umount"), @"
    Unmount what fsnap serves

    Refused while processes use it. What a killed server has left is taken off as well.

    Usage: fsnap umount <DIR>

    Arguments:
      <DIR>
              Where it is mounted

    Options:
      -h, --help
              Print help (see a summary with '-h')
    ");
}
