//! Where `fsnap overlay` and `fsnap mount` refuse to mount, before anything is made or mounted.

use insta::assert_snapshot;

use crate::site::Site;

#[test]
fn a_store_that_is_part_of_what_is_shown_or_hidden_is_refused() {
    let site = Site::empty();
    assert_snapshot!(site.session(
        "mkdir -p lower/in dir
         fsnap overlay lower lower/new dir
         fsnap overlay lower/in lower dir
         timeout 60 fsnap overlay lower store store
         mkdir store
         timeout 60 fsnap overlay lower store store
         timeout 60 fsnap overlay lower dir/store dir
         timeout 60 fsnap overlay lower store lower
         find . | sort"
    ), @r#"
    $ mkdir -p lower/in dir
    $ fsnap overlay lower lower/new dir
    ! fsnap: error: "$T/lower/new" cannot keep the changes of "$T/lower": one lies in the other; name another directory
    [exit 1]
    $ fsnap overlay lower/in lower dir
    ! fsnap: error: "$T/lower" cannot keep the changes of "$T/lower/in": one lies in the other; name another directory
    [exit 1]
    $ timeout 60 fsnap overlay lower store store
    ! fsnap: error: "$T/store" cannot be mounted on: that would hide "$T/store", which fsnap needs; name another directory
    [exit 1]
    $ mkdir store
    $ timeout 60 fsnap overlay lower store store
    ! fsnap: error: "$T/store" cannot be mounted on: that would hide "$T/store", which fsnap needs; name another directory
    [exit 1]
    $ timeout 60 fsnap overlay lower dir/store dir
    ! fsnap: error: "$T/dir" cannot be mounted on: that would hide "$T/dir/store", which fsnap needs; name another directory
    [exit 1]
    $ timeout 60 fsnap overlay lower store lower
    ! fsnap: error: "$T/lower" cannot be mounted on: that would hide "$T/lower", which fsnap needs; name another directory
    [exit 1]
    $ find . | sort
    .
    ./dir
    ./lower
    ./lower/in
    ./store
    "#);
}

#[test]
fn what_fsnap_needs_is_not_hidden() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "mkdir stores
         fsnap init --store stores/db --backend rsync db
         timeout 60 fsnap mount stores
         timeout 60 fsnap mount db
         timeout 60 fsnap mount state
         for dir in stores db state; do if mountpoint -q $dir; then echo $dir; fi; done"
    ), @r#"
    $ mkdir stores
    $ fsnap init --store stores/db --backend rsync db
    volume db at $T/db: rsync snapshots in $T/stores/db
    $ timeout 60 fsnap mount stores
    ! fsnap: error: "$T/stores" cannot be mounted on: that would hide "$T/stores/db", which fsnap needs; name another directory
    [exit 1]
    $ timeout 60 fsnap mount db
    ! fsnap: error: "$T/db" cannot be mounted on: that would hide "$T/db", which fsnap needs; name another directory
    [exit 1]
    $ timeout 60 fsnap mount state
    ! fsnap: error: "$T/state" cannot be mounted on: that would hide "$T/state", which fsnap needs; name another directory
    [exit 1]
    $ for dir in stores db state; do if mountpoint -q $dir; then echo $dir; fi; done
    "#);
}

#[test]
fn a_tree_that_is_served_is_a_volume() {
    let site = Site::empty();
    assert_snapshot!(site.session(
        "mkdir lower dir && echo one >lower/file
         fsnap overlay lower store dir
         fsnap init dir
         fsnap checkpoint -t base >/dev/null
         echo two >dir/file && rm -f dir/none && mkdir dir/new
         fsnap diff base
         fsnap branch base try
         fsnap branches
         fsnap umount dir
         cat lower/file
         fsnap checkpoint
         fsnap diff base"
    ), @"
    $ mkdir lower dir && echo one >lower/file
    $ fsnap overlay lower store dir
    $ fsnap init dir
    volume dir at $T/dir: layers snapshots in $T/store
    ! fsnap: note: its branches are seen where `fsnap mount` shows them
    $ fsnap checkpoint -t base >/dev/null
    $ echo two >dir/file && rm -f dir/none && mkdir dir/new
    $ fsnap diff base
    M dir/file
    A dir/new
    $ fsnap branch base try
    (not mounted: `fsnap mount DIR` shows it)
    $ fsnap branches
    NAME  CHECKPOINT  MADE  VOLUME  PATH
    try  ID1  TIME  dir  (not mounted)
    $ fsnap umount dir
    $ cat lower/file
    one
    $ fsnap checkpoint
    ! fsnap: error: the volume dir is not there: $T/dir cannot be a volume of layers: it is not the root of a tree that `fsnap overlay` or `fsnap mount` serves
    ! fsnap: hint: move it back or mount it there again, after `fsnap pool start` if its pool was made by fsnap; or forget it with `fsnap rm --volume NAME`
    [exit 1]
    $ fsnap diff base
    ! fsnap: error: the volume dir is not there: $T/dir cannot be a volume of layers: it is not the root of a tree that `fsnap overlay` or `fsnap mount` serves
    ! fsnap: hint: move it back or mount it there again, after `fsnap pool start` if its pool was made by fsnap; or forget it with `fsnap rm --volume NAME`
    [exit 1]
    ");
}

#[test]
fn a_branch_of_a_mount_is_compared_with_now() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init --store store --backend rsync db && fsnap checkpoint -t base >/dev/null
         mkdir seen && fsnap mount seen && mkdir seen/branches/try@base
         echo more >seen/branches/try/db/more
         fsnap checkpoint --branch try -t tried >/dev/null
         echo again >seen/branches/try/db/again
         fsnap diff base tried
         fsnap diff tried
         fsnap diff base
         fsnap umount seen
         fsnap diff tried
         fsnap diff base tried"
    ), @"
    $ fsnap init --store store --backend rsync db && fsnap checkpoint -t base >/dev/null
    volume db at $T/db: rsync snapshots in $T/store
    $ mkdir seen && fsnap mount seen && mkdir seen/branches/try@base
    $ echo more >seen/branches/try/db/more
    $ fsnap checkpoint --branch try -t tried >/dev/null
    $ echo again >seen/branches/try/db/again
    $ fsnap diff base tried
    A db/more
    $ fsnap diff tried
    A db/again
    $ fsnap diff base
    $ fsnap umount seen
    $ fsnap diff tried
    ! fsnap: error: branch try is not shown anywhere: `fsnap mount DIR` shows it
    [exit 1]
    $ fsnap diff base tried
    A db/more
    ");
}
