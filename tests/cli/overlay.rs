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
