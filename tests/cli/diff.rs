//! `fsnap diff`.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fsnap_backend::beneath;
use insta::{allow_duplicates, assert_snapshot};

use crate::site::Site;

/// Every kind of difference, on both backends, with the same result.
#[test]
fn every_kind_of_change_is_told() {
    for (site, dir) in [(Site::plain(), "."), (Site::btrfs(), "fs"), (Site::unprivileged(), ".")] {
        allow_duplicates!(assert_snapshot!(site.in_dir(dir).session(
            "cd db && mkdir gone kept && touch gone/x kept/y && ln -s a link && mkfifo pipe && cp a same && truncate -s 1M holes
             fsnap init db >/dev/null 2>&1
             fsnap checkpoint -t old >/dev/null
             fsnap diff old
             cd db && echo more >>a && rm -r gone && mkdir new && touch new/x && ln -sfn b link && chmod 700 kept
             cd db && rm sub/b && mkdir sub/b && touch sub/b/c && touch same && chmod 600 kept/y && rm pipe && touch pipe
             cd db && printf x | dd of=holes bs=1 seek=500000 conv=notrunc status=none
             fsnap diff old
             fsnap checkpoint -t new >/dev/null
             fsnap diff old new
             fsnap diff new old
             fsnap diff new
             fsnap diff new new
             fsnap diff new~1 new | wc -l"
        ), @"
        $ cd db && mkdir gone kept && touch gone/x kept/y && ln -s a link && mkfifo pipe && cp a same && truncate -s 1M holes
        $ fsnap init db >/dev/null 2>&1
        $ fsnap checkpoint -t old >/dev/null
        $ fsnap diff old
        $ cd db && echo more >>a && rm -r gone && mkdir new && touch new/x && ln -sfn b link && chmod 700 kept
        $ cd db && rm sub/b && mkdir sub/b && touch sub/b/c && touch same && chmod 600 kept/y && rm pipe && touch pipe
        $ cd db && printf x | dd of=holes bs=1 seek=500000 conv=notrunc status=none
        $ fsnap diff old
        M db/a
        D db/gone
        D db/gone/x
        M db/holes
        a db/kept
        a db/kept/y
        M db/link
        A db/new
        A db/new/x
        D db/pipe
        A db/pipe
        D db/sub/b
        A db/sub/b
        A db/sub/b/c
        $ fsnap checkpoint -t new >/dev/null
        $ fsnap diff old new
        M db/a
        D db/gone
        D db/gone/x
        M db/holes
        a db/kept
        a db/kept/y
        M db/link
        A db/new
        A db/new/x
        D db/pipe
        A db/pipe
        D db/sub/b
        A db/sub/b
        A db/sub/b/c
        $ fsnap diff new old
        M db/a
        A db/gone
        A db/gone/x
        M db/holes
        a db/kept
        a db/kept/y
        M db/link
        D db/new
        D db/new/x
        D db/pipe
        A db/pipe
        D db/sub/b
        D db/sub/b/c
        A db/sub/b
        $ fsnap diff new
        $ fsnap diff new new
        $ fsnap diff new~1 new | wc -l
        14
        "));
    }
}

#[test]
fn json_has_names_of_any_bytes() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        r#"fsnap init db >/dev/null 2>&1
         fsnap checkpoint >/dev/null
         cd db && touch "$(printf 'line\nend')" "$(printf 'esc\033[31m')" "$(printf 'latin1\351')" 'blank name'
         fsnap diff @latest --json
         cd db && touch "$(printf 'rtl\342\200\256txt')"
         fsnap diff @latest"#
    ), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint >/dev/null
    $ cd db && touch "$(printf 'line\nend')" "$(printf 'esc\033[31m')" "$(printf 'latin1\351')" 'blank name'
    $ fsnap diff @latest --json
    [
      {
        "change": "added",
        "path": "blank name",
        "volume": "db"
      },
      {
        "change": "added",
        "path": "esc\u001b[31m",
        "volume": "db"
      },
      {
        "change": "added",
        "path": "latin1�",
        "path_hex": "6c6174696e31e9",
        "volume": "db"
      },
      {
        "change": "added",
        "path": "line\nend",
        "volume": "db"
      }
    ]
    $ cd db && touch "$(printf 'rtl\342\200\256txt')"
    $ fsnap diff @latest
    A db/blank name
    A db/esc\u{1b}[31m
    A db/latin1\xe9
    A db/line\nend
    A db/rtl\u{202e}txt
    "#);
}

#[test]
fn a_volume_that_is_gone_is_said_so() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "mkdir web && fsnap init web >/dev/null 2>&1
         fsnap checkpoint -m web >/dev/null
         fsnap init db >/dev/null 2>&1
         fsnap checkpoint -m both >/dev/null
         fsnap diff @latest~1 @latest
         fsnap diff @latest @latest~1
         mv web away
         fsnap diff @latest
         fsnap rm --volume web
         fsnap diff @latest
         fsnap diff @latest~1 @latest
         fsnap diff @latest nope
         fsnap diff"
    ), @r#"
    $ mkdir web && fsnap init web >/dev/null 2>&1
    $ fsnap checkpoint -m web >/dev/null
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint -m both >/dev/null
    $ fsnap diff @latest~1 @latest
    ! fsnap: note: volume db is in only one of the two checkpoints
    $ fsnap diff @latest @latest~1
    ! fsnap: note: volume db is in only one of the two checkpoints
    $ mv web away
    $ fsnap diff @latest
    ! fsnap: error: the volume web is not there: cannot open the volume $T/web: No such file or directory (os error 2)
    ! fsnap: hint: move it back or mount it there again, after `fsnap pool start` if its pool was made by fsnap; or forget it with `fsnap rm --volume NAME`
    [exit 1]
    $ fsnap rm --volume web
    $ fsnap diff @latest
    ! fsnap: note: volume web is tracked no more
    $ fsnap diff @latest~1 @latest
    ! fsnap: note: volume db is in only one of the two checkpoints
    $ fsnap diff @latest nope
    ! fsnap: error: no checkpoint "nope": there is ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap diff
    ! error: the following required arguments were not provided:
    !  <A>
    !
    ! Usage: fsnap diff <A> [B]
    !
    ! For more information, try '--help'.
    [exit 2]
    "#);
}

/// Makes `levels` directories below one another, with a file in each 250th of them; returns what `fsnap` calls the files,
/// in the order of their paths.
fn write_deep(db: &Path, levels: usize, text: &[u8]) -> Vec<String> {
    let (mut dir, mut path, mut files) = (beneath::open_root(db).unwrap(), String::from("db"), Vec::new());
    for level in 1..=levels {
        let name = OsStr::new("d");
        dir = beneath::make_dir(&dir, name).or_else(|_| beneath::open_dir(&dir, name)).unwrap();
        path.push_str("/d");
        if level % 250 == 0 || level == levels {
            // Behind `d`: what is below comes first, and then the way leads back.
            let name = OsStr::new("z");
            let _ = rustix::fs::unlinkat(&dir, name, rustix::fs::AtFlags::empty());
            beneath::create_file(&dir, name, 0o600).unwrap().write_all_at(text, 0).unwrap();
            files.push(format!("{path}/z"));
        }
    }
    files.reverse();
    files
}

#[test]
fn a_tree_deeper_than_any_path_is_compared() {
    let site = Site::empty();
    let db = site.path("db");
    fs::create_dir(&db).unwrap();
    site.run("fsnap init db && fsnap checkpoint -t empty");
    write_deep(&db, 4096, b"one");
    site.run("fsnap checkpoint -t old && fsnap branch old one");
    let files = write_deep(&db, 4096, b"changed");
    let changed: String = files.iter().map(|path| format!("M {path}\n")).collect();
    assert!(site.run("fsnap diff old") == changed.trim_end(), "the files as they are now");
    site.run("fsnap checkpoint -t new");
    assert!(site.run("fsnap diff old new") == changed.trim_end(), "two checkpoints");
    for (line, letter) in [("fsnap diff empty new", "A"), ("fsnap diff new empty", "D")] {
        let all = site.run(line);
        let found: Vec<_> = all.lines().filter(|line| line.ends_with('z')).collect();
        assert_eq!(all.lines().filter(|line| line.starts_with(letter)).count(), 4096 + files.len(), "{line}");
        assert!(found.iter().zip(&files).all(|(found, file)| *found == format!("{letter} {file}")), "{line}");
    }
    site.run("fsnap verify && fsnap rm --branch one && fsnap rm old new empty");
    // Deeper than the directory of the test could be removed.
    beneath::remove_tree(beneath::open_root(&db).unwrap(), OsStr::new("d")).unwrap();
}

#[test]
fn what_a_mount_hides_is_not_compared() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "mkdir db/in && echo hidden >db/in/hidden && echo short >db/file && echo -n same! >db/bound
         fsnap init --store store --backend rsync db && fsnap checkpoint >/dev/null
         mount -t tmpfs above db/in && mkdir db/new && mount -t tmpfs above db/new && echo -n other >elsewhere && mount --bind elsewhere db/bound
         echo other >db/file
         fsnap diff @latest
         umount db/in db/new db/bound
         fsnap diff @latest"
    ), @"
    $ mkdir db/in && echo hidden >db/in/hidden && echo short >db/file && echo -n same! >db/bound
    $ fsnap init --store store --backend rsync db && fsnap checkpoint >/dev/null
    volume db at $T/db: rsync snapshots in $T/store
    $ mount -t tmpfs above db/in && mkdir db/new && mount -t tmpfs above db/new && echo -n other >elsewhere && mount --bind elsewhere db/bound
    $ echo other >db/file
    $ fsnap diff @latest
    M db/file
    A db/new
    ! fsnap: note: something else is mounted at db/bound: what it hides is not compared
    ! fsnap: note: something else is mounted at db/in: what it hides is not compared
    ! fsnap: note: something else is mounted at db/new: what it hides is not compared
    $ umount db/in db/new db/bound
    $ fsnap diff @latest
    M db/file
    A db/new
    ");
}
