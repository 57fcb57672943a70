//! What people do on a branch: programs that know whether their files are right.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::Case;
use crate::past::Past;
use crate::tree;

pub(crate) const CASES: &[Case] = &[
    ("work_on_a_branch_over_btrfs", || work_on_a_branch("btrfs")),
    ("work_on_a_branch_over_rsync", || work_on_a_branch("rsync")),
];

/// A repository with a C program that a Makefile builds, a Rust program, a database, and files of all kinds.
const PREPARE: &str = r#"
git init -q -b main repo
for number in $(seq 40); do echo "int f$number(void) { return $number; }" >repo/f$number.c; done
{
    for number in $(seq 40); do echo "int f$number(void);"; done
    echo '#include <stdio.h>'
    echo "int main(void) { printf(\"%d\\n\", 0"
    for number in $(seq 40); do echo " + f$number()"; done
    echo "); return 0; }"
} >repo/main.c
printf 'all: sum\nobjects = $(patsubst %%.c,%%.o,$(wildcard *.c))\nsum: $(objects)\n\tcc -o $@ $^\n' >repo/Makefile
git -C repo add . && git -C repo commit -q -m first
for number in $(seq 5); do
    echo "/* changed */" >>repo/f$number.c
    git -C repo commit -q -a -m "change $number"
done
mkdir -p crate/src
printf '[package]\nname = "greeting"\nversion = "0.1.0"\nedition = "2021"\n[workspace]\n' >crate/Cargo.toml
echo 'fn main() { println!("one"); }' >crate/src/main.rs
sqlite3 db "PRAGMA journal_mode = WAL; CREATE TABLE t (writer, number); WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL
    SELECT i + 1 FROM n WHERE i < 2000) INSERT INTO t SELECT 0, i FROM n;" >/dev/null
mkdir kinds
echo text >kinds/file; ln kinds/file kinds/second; ln -s file kinds/link; mkfifo kinds/fifo
setfattr -n user.note -v kept kinds/file; setfacl -m u:12345:r kinds/file; chown 1:2 kinds/second; chmod 4751 kinds/file
truncate -s 1M kinds/sparse; echo end >>kinds/sparse
touch -d 1969-07-20T20:17:40Z kinds/link kinds/fifo
"#;

const GIT: &str = r#"
git clone -q repo copy
git -C copy fsck --strict --no-progress
[ -z "$(git -C copy status --porcelain)" ]
make -s -C copy -j2
[ "$(copy/sum)" = 820 ]
echo 'int f1(void) { return 101; }' >copy/f1.c
make -s -C copy
[ "$(copy/sum)" = 920 ]
git -C copy commit -q -a -m "on the branch"
git -C copy checkout -q HEAD~3 && git -C copy checkout -q main
git -C copy push -q origin main:pushed
git -C copy gc -q --prune=now && git -C repo gc -q --prune=now
for repository in copy repo; do git -C $repository fsck --strict --no-progress; done
[ "$(git -C repo rev-list --count pushed)" = 7 ]
"#;

const CARGO: &str = r#"
cd crate
[ "$("$CARGO" run -q --offline)" = one ]
echo 'fn main() { println!("two"); }' >src/main.rs
[ "$("$CARGO" run -q --offline)" = two ]
"#;

/// Three processes write at once, each a transaction for each row.
const SQLITE: &str = r#"
writer() {
    for number in $(seq 60); do echo "BEGIN IMMEDIATE; INSERT INTO t VALUES ($1, $number); COMMIT;"; done |
        sqlite3 -bail -cmd '.timeout 300000' db
}
writer 1 & first=$!; writer 2 & second=$!; writer 3
wait $first; wait $second
[ "$(sqlite3 db 'PRAGMA integrity_check')" = ok ]
[ "$(sqlite3 db 'SELECT group_concat(n) FROM (SELECT count(*) AS n FROM t GROUP BY writer ORDER BY writer)')" = 2000,60,60,60 ]
"#;

/// Out of the checkpoint, and onto the branch.
const RSYNC: &str = r#"
rsync -aHAX "$PAST/" "$OUT/"
rsync -aHAX "$OUT/" round/
for copy in "$OUT/" round/; do
    [ -z "$(rsync -aHAXn --checksum --delete --itemize-changes "$PAST/" "$copy")" ]
done
diff <(cd "$PAST" && ls -AR) <(cd round && ls -AR)
"#;

fn work_on_a_branch(backend: &str) {
    let past = Past::new();
    let volume = past.volume("work", backend);
    let shell = |dir: &Path, script: &str| {
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", script]).current_dir(dir).stdin(Stdio::null());
        command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null").env("CARGO", env!("CARGO"));
        for name in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{name}_NAME"), "a").env(format!("GIT_{name}_EMAIL"), "a@b");
        }
        for name in ["RUSTFLAGS", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET"] {
            command.env_remove(name);
        }
        command.env("PAST", past.at("latest/work")).env("OUT", past.path("disk").join("out"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{script}\n{output:?}");
    };
    shell(&volume, PREPARE);
    past.checkpoint();
    past.mount();
    std::fs::create_dir(past.at("branches/try@latest")).unwrap();
    let branch = past.at("branches/try/work");
    let before = tree::of(&past.at("latest/work"));
    for script in [GIT, CARGO, SQLITE, RSYNC] {
        shell(&branch, script);
    }
    tree::assert_equal(&before, &tree::of(&branch.join("round")), "what came back is another tree");
    tree::assert_equal(&before, &tree::of(&past.at("latest/work")), "the checkpoint has changed");
    // The same on what another server finds.
    past.unmount();
    past.mount();
    shell(&branch, "git -C copy fsck --strict --no-progress; [ \"$(sqlite3 db 'PRAGMA integrity_check')\" = ok ]");
    past.unmount();
}
