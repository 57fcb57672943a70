//! `fsnap init` and `fsnap volumes`.

use insta::assert_snapshot;

use crate::site::Site;

#[test]
fn a_directory_becomes_a_volume() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db
         fsnap volumes
         fsnap volumes --json
         ls -A . db"
    ), @r#"
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap volumes
    NAME  PATH  BACKEND  CAPABILITIES
    db  $T/db  rsync  branches, xattrs, acls, owners, checksums
    $ fsnap volumes --json
    [
      {
        "backend": "rsync",
        "capabilities": {
          "acls": true,
          "clones": true,
          "constant_time_clones": false,
          "live": "fuzzy",
          "mountable": false,
          "ownership": true,
          "verifies_contents": true,
          "xattrs": true
        },
        "name": "db",
        "path": "$T/db",
        "store": "$T/.fsnap"
      }
    ]
    $ ls -A . db
    .:
    .fsnap
    db
    state

    db:
    a
    sub
    "#);
}

/// Nobody else may write to a store, whatever the umask is: the kernel makes a subvolume for all whom that does not keep out.
#[test]
fn a_store_is_closed_to_others() {
    let site = Site::btrfs();
    assert_snapshot!(site.in_dir("fs").session(
        "umask 0; fsnap init db
         stat -c '%A %n' .fsnap
         fsnap checkpoint >/dev/null
         umask 0; mkdir plain; fsnap init plain
         stat -c '%A %n' .fsnap-rsync"
    ), @"
    $ umask 0; fsnap init db
    volume db at $T/fs/db: btrfs snapshots in $T/fs/.fsnap
    $ stat -c '%A %n' .fsnap
    drwx------ .fsnap
    $ fsnap checkpoint >/dev/null
    $ umask 0; mkdir plain; fsnap init plain
    volume plain at $T/fs/plain: rsync snapshots in $T/fs/.fsnap-rsync
    ! fsnap: note: `fsnap doctor $T/fs/plain` tells why other backends cannot hold it
    $ stat -c '%A %n' .fsnap-rsync
    drwx------ .fsnap-rsync
    ");
}

#[test]
fn a_subvolume_becomes_a_volume() {
    let site = Site::btrfs();
    assert_snapshot!(site.in_dir("fs").session(
        "fsnap init db
         mkdir plain
         fsnap init plain
         fsnap init --backend btrfs --name other plain
         fsnap init --json --backend btrfs --name other .
         fsnap volumes
         ls -A . db"
    ), @"
    $ fsnap init db
    volume db at $T/fs/db: btrfs snapshots in $T/fs/.fsnap
    $ mkdir plain
    $ fsnap init plain
    volume plain at $T/fs/plain: rsync snapshots in $T/fs/.fsnap-rsync
    ! fsnap: note: `fsnap doctor $T/fs/plain` tells why other backends cannot hold it
    $ fsnap init --backend btrfs --name other plain
    ! fsnap: error: $T/fs/plain cannot be a volume: it is the volume plain at $T/fs/plain
    [exit 1]
    $ fsnap init --json --backend btrfs --name other .
    ! fsnap: error: $T/fs cannot be a volume: it contains the volume db at $T/fs/db
    [exit 1]
    $ fsnap volumes
    NAME  PATH  BACKEND  CAPABILITIES
    db  $T/fs/db  btrfs  instant branches, xattrs, acls, owners, checksums
    plain  $T/fs/plain  rsync  branches, xattrs, acls, owners, checksums
    $ ls -A . db
    .:
    .fsnap
    .fsnap-rsync
    db
    plain

    db:
    a
    sub
    ");
}

#[test]
fn json_says_what_was_made() {
    let site = Site::plain();
    assert_snapshot!(site.session("fsnap init --json --name data --store $T/elsewhere --backend rsync db"), @r#"
    $ fsnap init --json --name data --store $T/elsewhere --backend rsync db
    {
      "backend": "rsync",
      "name": "data",
      "path": "$T/db",
      "store": "$T/elsewhere"
    }
    "#);
}

#[test]
fn what_cannot_be_a_volume_is_refused_with_the_reason() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db/sub
         ln -s db link
         fsnap init nowhere
         fsnap init link
         fsnap init link/
         fsnap init link/.
         fsnap init db/a
         fsnap init db
         fsnap init db/sub
         fsnap init db
         fsnap init .
         fsnap init /
         fsnap init --backend zfs db
         fsnap init --name ../x db
         fsnap init --name sub state
         mkdir sub && fsnap init sub
         fsnap init
         fsnap volumes"
    ), @r#"
    $ fsnap init db/sub
    volume sub at $T/db/sub: rsync snapshots in $T/db/.fsnap
    ! fsnap: note: `fsnap doctor $T/db/sub` tells why other backends cannot hold it
    $ ln -s db link
    $ fsnap init nowhere
    ! fsnap: error: cannot open the directory nowhere: No such file or directory (os error 2)
    [exit 1]
    $ fsnap init link
    ! fsnap: error: link cannot be a volume: it is a symbolic link; name the directory that it leads to
    [exit 1]
    $ fsnap init link/
    ! fsnap: error: $T/db cannot be a volume: it contains the volume sub at $T/db/sub
    [exit 1]
    $ fsnap init link/.
    ! fsnap: error: $T/db cannot be a volume: it contains the volume sub at $T/db/sub
    [exit 1]
    $ fsnap init db/a
    ! fsnap: error: db/a cannot be a volume: it is not a directory
    [exit 1]
    $ fsnap init db
    ! fsnap: error: $T/db cannot be a volume: it contains the volume sub at $T/db/sub
    [exit 1]
    $ fsnap init db/sub
    ! fsnap: error: $T/db/sub cannot be a volume: it is the volume sub at $T/db/sub
    [exit 1]
    $ fsnap init db
    ! fsnap: error: $T/db cannot be a volume: it contains the volume sub at $T/db/sub
    [exit 1]
    $ fsnap init .
    ! fsnap: error: . cannot be a volume: fsnap's own state lies in it; set FSNAP_STATE to a directory elsewhere
    [exit 1]
    $ fsnap init /
    ! fsnap: error: / cannot be a volume: it is the root of everything, fsnap's own state included
    [exit 1]
    $ fsnap init --backend zfs db
    ! error: invalid value 'zfs' for '--backend <BACKEND>'
    !  [possible values: auto, btrfs, dm-thin, nilfs2, layers, rsync]
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap init --name ../x db
    ! error: invalid value '../x' for '--name <NAME>': "../x" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap init --name sub state
    ! fsnap: error: state cannot be a volume: fsnap's own state lies in it; set FSNAP_STATE to a directory elsewhere
    [exit 1]
    $ mkdir sub && fsnap init sub
    ! fsnap: error: the volume sub exists already: at $T/db/sub; choose another with --name
    [exit 1]
    $ fsnap init
    ! error: the following required arguments were not provided:
    !  <DIR>
    !
    ! Usage: fsnap init <DIR>
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap volumes
    NAME  PATH  BACKEND  CAPABILITIES
    sub  $T/db/sub  rsync  branches, xattrs, acls, owners, checksums
    "#);
}

#[test]
fn a_store_inside_the_volume_is_refused() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init --backend rsync --store db/store db
         fsnap volumes
         find db | sort
         touch file && fsnap init --backend rsync --store file db
         mkdir full && touch full/something && fsnap init --backend rsync --store full db
         ls full"
    ), @"
    $ fsnap init --backend rsync --store db/store db
    ! fsnap: error: $T/db cannot be a volume: the store $T/db/store would lie in it, and every snapshot would hold all others
    [exit 1]
    $ fsnap volumes
    $ find db | sort
    db
    db/a
    db/sub
    db/sub/b
    $ touch file && fsnap init --backend rsync --store file db
    ! fsnap: error: cannot list $T/file: Not a directory (os error 20)
    [exit 1]
    $ mkdir full && touch full/something && fsnap init --backend rsync --store full db
    ! fsnap: error: $T/full cannot hold a rsync store: it has no file fsnap-store
    [exit 1]
    $ ls full
    something
    ");
}

#[test]
fn without_privileges_a_directory_of_ones_own_is_enough() {
    let site = Site::unprivileged();
    assert_snapshot!(site.session(
        "fsnap init db
         fsnap checkpoint -m mine
         fsnap verify
         stat -c '%a %U %n' state .fsnap"
    ), @"
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    ! fsnap: note: its snapshots keep no owners and no device nodes
    $ fsnap checkpoint -m mine
    ID1
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    $ stat -c '%a %U %n' state .fsnap
    700 nobody state
    700 nobody .fsnap
    ");
}

#[test]
fn without_privileges_the_store_goes_where_the_user_may_write() {
    let site = Site::unprivileged();
    std::fs::create_dir(site.path("root")).unwrap();
    std::fs::create_dir(site.path("root/theirs")).unwrap();
    std::os::unix::fs::chown(site.path("root/theirs"), Some(crate::site::NOBODY), None).unwrap();
    assert_snapshot!(site.session(
        "id -u
         fsnap init root/theirs
         fsnap checkpoint
         fsnap verify
         fsnap init root"
    ), @"
    $ id -u
    65534
    $ fsnap init root/theirs
    volume theirs at $T/root/theirs: rsync snapshots in $T/state/stores/theirs
    ! fsnap: note: `fsnap doctor $T/root/theirs` tells why other backends cannot hold it
    ! fsnap: note: its snapshots keep no owners and no device nodes
    $ fsnap checkpoint
    ID1
    $ fsnap verify
    verified the catalog and 1 checkpoint: 0 damaged
    $ fsnap init root
    ! fsnap: error: $T/root cannot be a volume: it contains the volume theirs at $T/root/theirs
    [exit 1]
    ");
}

#[test]
fn a_volume_can_be_forgotten_and_registered_anew() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db
         fsnap checkpoint -m kept
         fsnap rm --volume db
         fsnap rm --volume db
         fsnap volumes
         fsnap checkpoint
         fsnap log
         mv db moved && mkdir db
         fsnap init db
         fsnap checkpoint -m new
         fsnap log --graph
         fsnap diff @latest~1 @latest
         fsnap verify"
    ), @r#"
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap checkpoint -m kept
    ID1
    $ fsnap rm --volume db
    $ fsnap rm --volume db
    ! fsnap: error: no volume "db" is registered
    ! fsnap: hint: `fsnap volumes` lists the volumes, `fsnap ps` the runs; `fsnap init DIR` registers a volume
    [exit 1]
    $ fsnap volumes
    $ fsnap checkpoint
    ! fsnap: error: there is no volume to take a snapshot of: register one with `fsnap init DIR`
    [exit 1]
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID1  TIME  db  kept
    $ mv db moved && mkdir db
    $ fsnap init db
    volume db at $T/db: rsync snapshots in $T/.fsnap
    ! fsnap: note: `fsnap doctor $T/db` tells why other backends cannot hold it
    $ fsnap checkpoint -m new
    ID2
    $ fsnap log --graph
    ○  ID2  TIME  new
    ○  ID1  TIME  kept
    $ fsnap diff @latest~1 @latest
    D db/a
    D db/sub
    D db/sub/b
    $ fsnap verify
    verified the catalog and 2 checkpoints: 0 damaged
    "#);
}

#[test]
fn another_tree_at_the_same_path_is_refused() {
    for site in [Site::plain(), Site::btrfs()] {
        let top = if site.path("fs").exists() { "fs" } else { "." };
        let shell = site.in_dir(top);
        shell.run("fsnap init db && fsnap checkpoint");
        match top {
            "fs" => shell.run("btrfs -q subvolume delete db && btrfs -q subvolume create db"),
            _ => shell.run("mv db moved && mkdir db"),
        };
        let said = shell.fail("fsnap checkpoint");
        assert!(said.contains("is not the tree that was registered: expected"), "{said}");
        assert!(said.contains("hint: mount the right file system there, or forget the volume"), "{said}");
        assert_eq!(shell.run("fsnap log --json | grep -c '\"id\"'"), "1");
    }
}

#[test]
fn no_store_lies_in_another_volume() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "mkdir web outer && fsnap init db 2>/dev/null
         fsnap init web --store db/store
         ln -s db link && fsnap init web --store link/sub/deep/store
         mkdir -p outer/inner && fsnap init web --store outer/inner/store 2>/dev/null
         fsnap init outer
         fsnap checkpoint | wc -l
         ls -A db outer
         fsnap volumes"
    ), @"
    $ mkdir web outer && fsnap init db 2>/dev/null
    volume db at $T/db: rsync snapshots in $T/.fsnap
    $ fsnap init web --store db/store
    ! fsnap: error: $T/db/store cannot hold a store: it lies inside the volume db at $T/db, whose snapshots would hold the store
    ! fsnap: hint: name a place outside every volume by --store
    [exit 1]
    $ ln -s db link && fsnap init web --store link/sub/deep/store
    ! fsnap: error: $T/link/sub/deep/store cannot hold a store: it lies inside the volume db at $T/db, whose snapshots would hold the store
    ! fsnap: hint: name a place outside every volume by --store
    [exit 1]
    $ mkdir -p outer/inner && fsnap init web --store outer/inner/store 2>/dev/null
    volume web at $T/web: rsync snapshots in $T/outer/inner/store
    $ fsnap init outer
    ! fsnap: error: $T/outer cannot be a volume: the store $T/outer/inner/store lies in it, and every snapshot would hold that, too
    [exit 1]
    $ fsnap checkpoint | wc -l
    1
    $ ls -A db outer
    db:
    a
    sub

    outer:
    inner
    $ fsnap volumes
    NAME  PATH  BACKEND  CAPABILITIES
    db  $T/db  rsync  branches, xattrs, acls, owners, checksums
    web  $T/web  rsync  branches, xattrs, acls, owners, checksums
    ");
}
