//! What may be written for a checkpoint, and `fsnap tag`.

use insta::assert_snapshot;

use crate::site::Site;

#[test]
fn a_checkpoint_is_named_in_many_ways() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         fsnap checkpoint -m 1 -t one >/dev/null
         fsnap checkpoint -m 2 >/dev/null
         fsnap checkpoint -m 3 >/dev/null
         fsnap show @latest | grep message
         fsnap show @latest~ | grep message
         fsnap show @latest~2 | grep message
         fsnap show @latest~0 | grep message
         fsnap show one | grep message
         fsnap show one~0 | grep message
         fsnap show $(fsnap log --json | sed -n 's/ *\"id\": \"\\(.*\\)\",/\\1/p' | head -n 1) | grep message
         fsnap show $(fsnap log --json | sed -n 's/ *\"id\": \"\\(.*\\)\",/\\1/p' | head -n 1 | cut -c -4) | grep message
         fsnap show $(fsnap log --json | sed -n 's/ *\"id\": \"\\(.*\\)\",/\\1/p' | head -n 1 | tr a-f A-F) | grep message
         fsnap show $(fsnap log --json | sed -n 's/ *\"id\": \"\\(.*\\)\",/\\1/p' | head -n 1 | cut -c -20)~1 | grep message"
    ), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint -m 1 -t one >/dev/null
    $ fsnap checkpoint -m 2 >/dev/null
    $ fsnap checkpoint -m 3 >/dev/null
    $ fsnap show @latest | grep message
    message  3
    $ fsnap show @latest~ | grep message
    message  2
    $ fsnap show @latest~2 | grep message
    message  1
    $ fsnap show @latest~0 | grep message
    message  3
    $ fsnap show one | grep message
    message  1
    $ fsnap show one~0 | grep message
    message  1
    $ fsnap show $(fsnap log --json | sed -n 's/ *"id": "\(.*\)",/\1/p' | head -n 1) | grep message
    message  3
    $ fsnap show $(fsnap log --json | sed -n 's/ *"id": "\(.*\)",/\1/p' | head -n 1 | cut -c -4) | grep message
    message  3
    $ fsnap show $(fsnap log --json | sed -n 's/ *"id": "\(.*\)",/\1/p' | head -n 1 | tr a-f A-F) | grep message
    message  3
    $ fsnap show $(fsnap log --json | sed -n 's/ *"id": "\(.*\)",/\1/p' | head -n 1 | cut -c -20)~1 | grep message
    message  2
    "#);
}

#[test]
fn what_names_nothing_is_an_error_with_candidates() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         fsnap show @latest
         fsnap show anything
         fsnap checkpoint -m 1 -t one >/dev/null
         fsnap checkpoint -m 2 >/dev/null
         fsnap show nope
         fsnap show 00000000000000000000000000000000
         fsnap show zzzz
         fsnap show abc
         fsnap show ''
         fsnap show @
         fsnap show @newest
         fsnap show @latest~2
         fsnap show one~1
         fsnap show one~99999999999999999999
         fsnap show one~-1
         fsnap show one~x
         fsnap show '~1'
         fsnap show -- -x
         fsnap show 'one two'
         fsnap show \"$(printf 'a\\033[31m\\nb')\"
         fsnap show ../one
         fsnap show 000000000000000000000000000000000"
    ), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap show @latest
    ! fsnap: error: no checkpoint "@latest"
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show anything
    ! fsnap: error: no checkpoint "anything"
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap checkpoint -m 1 -t one >/dev/null
    $ fsnap checkpoint -m 2 >/dev/null
    $ fsnap show nope
    ! fsnap: error: no checkpoint "nope": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show 00000000000000000000000000000000
    ! fsnap: error: no checkpoint "ID2": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show zzzz
    ! fsnap: error: no checkpoint "zzzz": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show abc
    ! fsnap: error: "abc" is no reference to a checkpoint: no tag has this name, and a prefix of an id has at least 4 digits
    [exit 1]
    $ fsnap show ''
    ! fsnap: error: no checkpoint "": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show @
    ! fsnap: error: "@" is no reference to a checkpoint: of the @ names there is @latest
    [exit 1]
    $ fsnap show @newest
    ! fsnap: error: "@newest" is no reference to a checkpoint: of the @ names there is @latest
    [exit 1]
    $ fsnap show @latest~2
    ! fsnap: error: "@latest~2" does not exist: only one checkpoint comes before ID1
    [exit 1]
    $ fsnap show one~1
    ! fsnap: error: "one~1" does not exist: no checkpoint comes before ID3
    [exit 1]
    $ fsnap show one~99999999999999999999
    ! fsnap: error: "one~99999999999999999999" is no reference to a checkpoint: a number belongs after the ~
    [exit 1]
    $ fsnap show one~-1
    ! fsnap: error: "one~-1" is no reference to a checkpoint: a number belongs after the ~
    [exit 1]
    $ fsnap show one~x
    ! fsnap: error: "one~x" is no reference to a checkpoint: a number belongs after the ~
    [exit 1]
    $ fsnap show '~1'
    ! fsnap: error: no checkpoint "": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show -- -x
    ! fsnap: error: no checkpoint "-x": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show 'one two'
    ! fsnap: error: no checkpoint "one two": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show "$(printf 'a\033[31m\nb')"
    ! fsnap: error: no checkpoint "a\u{1b}[31m\nb": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show ../one
    ! fsnap: error: no checkpoint "../one": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap show 000000000000000000000000000000000
    ! fsnap: error: no checkpoint "000000000000000000000000000000000": there is one, ID1 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    "#);
}

#[test]
fn a_prefix_of_two_ids_is_ambiguous() {
    let site = Site::plain();
    site.run("fsnap init db && fsnap checkpoint -m one && fsnap checkpoint -m two");
    // Nobody can wait for two random ids that begin alike.
    let db = rusqlite::Connection::open(site.path("state/catalog.db")).unwrap();
    let ids: Vec<String> =
        site.run("fsnap log --json | sed -n 's/ *\"id\": \"\\(.*\\)\",/\\1/p'").lines().map(Into::into).collect();
    let alike = ["abcd".to_owned() + &"0".repeat(28), "abcd".to_owned() + &"1".repeat(28)];
    for (id, new) in ids.iter().zip(&alike) {
        let body: String = db.query_row("SELECT body FROM checkpoint WHERE id = ?1", [id], |row| row.get(0)).unwrap();
        let body = ids.iter().zip(&alike).fold(body, |text, (id, new)| text.replace(id, new));
        let digest = blake3::hash(body.as_bytes());
        let parent = serde_json::from_str::<serde_json::Value>(&body).unwrap()["parent"].as_str().map(str::to_owned);
        let change = "UPDATE checkpoint SET id = ?1, parent = ?2, body = ?3, digest = ?4 WHERE id = ?5";
        db.execute(change, rusqlite::params![new, parent, body, &digest.as_bytes()[..16], id]).unwrap();
        db.execute("UPDATE tip SET checkpoint = ?1 WHERE checkpoint = ?2", [new, id]).unwrap();
        db.execute("UPDATE hold SET holder = 'checkpoint ' || ?1 WHERE holder = 'checkpoint ' || ?2", [new, id])
            .unwrap();
    }
    drop(db);
    let said = site.fail("fsnap show abcd");
    assert!(said.contains("\"abcd\" is ambiguous: it begins"), "{said}");
    assert!(alike.iter().all(|id| said.contains(id)), "{said}");
    assert!(said.contains("hint: write more digits of the one you mean"), "{said}");
    assert!(site.fail("fsnap rm abcd").contains("is ambiguous"));
    assert!(site.fail("fsnap branch abcd~1 x").contains("is ambiguous"));
    assert_eq!(site.run("fsnap show abcd0 | grep message"), "message    two");
    assert_eq!(site.run("fsnap verify"), "verified the catalog and 2 checkpoints: 0 damaged");
    // A tag goes before an id.
    site.run("fsnap tag abcd1 abcd");
    assert_eq!(site.run("fsnap show abcd | grep message"), "message    one");
}

#[test]
fn tags_are_set_moved_and_removed() {
    let site = Site::plain();
    assert_snapshot!(site.session(
        "fsnap init db >/dev/null 2>&1
         fsnap checkpoint -m 1 -t one >/dev/null
         fsnap checkpoint -m 2 >/dev/null
         fsnap tag @latest two
         fsnap tag @latest two
         fsnap tag @latest one
         fsnap tag @latest one --force
         fsnap log
         fsnap tag --delete two
         fsnap tag --delete two
         fsnap tag two
         fsnap tag nope three
         fsnap tag @latest ../x
         fsnap tag @latest -- -x
         fsnap tag @latest @latest
         fsnap tag --delete one~1
         fsnap tag --delete one two
         fsnap log"
    ), @r#"
    $ fsnap init db >/dev/null 2>&1
    $ fsnap checkpoint -m 1 -t one >/dev/null
    $ fsnap checkpoint -m 2 >/dev/null
    $ fsnap tag @latest two
    $ fsnap tag @latest two
    $ fsnap tag @latest one
    ! fsnap: error: the tag one exists already: it names checkpoint ID1; move it with --force
    [exit 1]
    $ fsnap tag @latest one --force
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID2  TIME  ID1  db  (one,two) 2
    ID1  TIME  db  1
    $ fsnap tag --delete two
    $ fsnap tag --delete two
    ! fsnap: error: no tag "two": there is one
    ! fsnap: hint: `fsnap log` shows the tags
    [exit 1]
    $ fsnap tag two
    ! error: the following required arguments were not provided:
    !  <NAME>
    !
    ! Usage: fsnap tag <CKPT> <NAME>
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap tag nope three
    ! fsnap: error: no checkpoint "nope": there is one, ID2 (@latest)
    ! fsnap: hint: `fsnap log` lists the checkpoints
    [exit 1]
    $ fsnap tag @latest ../x
    ! error: invalid value '../x' for '[NAME]': "../x" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap tag @latest -- -x
    ! error: invalid value '-x' for '[NAME]': "-x" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap tag @latest @latest
    ! error: invalid value '@latest' for '[NAME]': "@latest" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap tag --delete one~1
    ! fsnap: error: "one~1" cannot be a name: use 1 to 64 of [A-Za-z0-9._-], not beginning with a dot or a dash
    [exit 1]
    $ fsnap tag --delete one two
    ! error: the argument '--delete' cannot be used with '[NAME]'
    !
    ! Usage: fsnap tag --delete <CKPT> [NAME]
    !
    ! For more information, try '--help'.
    [exit 2]
    $ fsnap log
    ID  TIME  PARENT  BRANCH  VOLUMES  MESSAGE
    ID2  TIME  ID1  db  (one) 2
    ID1  TIME  db  1
    "#);
}
