#!/usr/bin/env bash
# Shows what fsnap does, on real parts: a btrfs on a loop device, a process, CRIU; then without privileges.
#
# Needs root, and what `make demo` builds and prepares: target/debug/fsnap, target/debug/fsnap-oracle, target/criu/criu.
# Leaves nothing behind, however it ends.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
[ "$(id -u)" = 0 ] || { echo "demo: mounting and CRIU need root" >&2; exit 1; }
PATH=$PATH:/usr/sbin:/sbin

# It all happens in namespaces of its own. When their first process ends, however it does, the kernel ends all others in
# there, and unmounts what they mounted; what is left is a directory.
if [ "${1-}" != --inside ]; then
    demo='' story=

    cleanup() {
        local status=$? first
        trap '' INT TERM HUP
        trap - EXIT
        # Only the first process in there is killed: the kernel lets it end after all others in there, and unshare waits for it.
        # Until unshare has started it, there is nobody to kill.
        for _ in {1..100}; do
            [ -n "$story" ] && first=$(cat "/proc/$story/task/$story/children" 2>/dev/null) || break
            # shellcheck disable=SC2086 # one word, or none
            [ -n "$first" ] && kill -KILL $first 2>/dev/null && break
            sleep 0.05
        done
        wait || true
        [ -z "$demo" ] || rm -rf --one-file-system "$demo"
        [ "$status" = 0 ] || echo "demo: ended with status $status; what it made is removed" >&2
        exit "$status"
    }
    trap cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM

    # Nobody else has this name. It is made inside: here, an interrupt that comes while the shell waits for a program is taken
    # for that program's alone, and is lost.
    demo=${TMPDIR:-/tmp}/fsnap-demo.$SRANDOM$SRANDOM
    setpriv --pdeathsig KILL -- unshare --mount --pid --fork --kill-child --mount-proc -- "$0" --inside "$demo" &
    story=$!
    wait "$story"
    exit
fi
demo=$2
mkdir --mode 711 "$demo"

bold= plain=
if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; fi

# say TEXT: tells the story.
say() { printf '\n'; fold -s -w 88 <<<"$*" | sed 's/ *$//'; }

# show COMMAND…: shows a command and runs it.
show() {
    local word line='$'
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9@%+=:,./~_-]+$ ]] || word="'$word'"
        line+=" $word"
    done
    printf '\n%s%s%s\n' "$bold" "$line" "$plain"
    "$@"
}

# path BRANCH: where the branch's files are; these branches have one volume each.
path() { fsnap branches | awk -v branch="$1" '$1 == branch { print $NF }'; }

# What this machine's administrator, or its user, has set is meant for other checkpoints than these.
for settings in /etc/fsnap /usr/lib/fsnap; do
    [ ! -d "$settings" ] || mount -t tmpfs demo "$settings"
done
unset FSNAP_CONFIG XDG_CONFIG_HOME

# The programs, where an unprivileged user can run them too.
mkdir "$demo/bin" "$demo/reports"
cp "$top/target/debug/fsnap" "$top/target/debug/fsnap-oracle" "$demo/bin"
ln -s fsnap "$demo/bin/fsnap-criu-hook"
ln -s "$top/target/criu/criu" "$demo/bin/criu"
PATH=$demo/bin:$PATH
export FSNAP_STATE=$demo/state
cd "$demo"

say "PART ONE: a process, its files on btrfs, and CRIU."
truncate --size 1G disk.img
mkfs.btrfs --quiet disk.img >mkfs.log 2>&1 || { cat mkfs.log; exit 1; }
mkdir disk
mount -o loop disk.img disk
show btrfs subvolume create disk/job

say "fsnap begins to track the subvolume as a volume. Nothing in it changes."
show fsnap init disk/job
show fsnap volumes

say "A process starts. Its threads count in memory and write their counts to files of the volume in different ways." \
    "Asked, it compares memory with every byte of its files."
show fsnap-oracle start --reports reports --kinds append,overwrite,mmap,rename,order,sparse disk/job | tee pid
job=$(tail -n 1 pid)
show fsnap-oracle ask --brief --reports reports "$job"

for number in 1 2 3; do
    [ "$number" = 1 ] && say "CRIU dumps the process while it works, and leaves it running. Its action script is fsnap under" \
        "another name: while the process stands frozen, fsnap takes the snapshot of its files. Three times:"
    sleep 0.5
    mkdir -p "images/$number"
    show criu dump --tree "$job" --leave-running --images-dir "images/$number" --log-file dump.log \
        --action-script "$demo/bin/fsnap-criu-hook" || { cat "images/$number/dump.log"; exit 1; }
done
show fsnap log --graph
show fsnap diff @latest~1 @latest

say "The process never noticed, and goes on."
sleep 0.5
show fsnap-oracle ask --brief --reports reports "$job"

say "Now back to the second checkpoint: a branch grows from it, and the process is restored onto the branch, beside the" \
    "original. Both see their files at the same path, each its own."
show fsnap restore @latest~1 --branch second | tee restored
second=$(sed -n 's|.*: process \([0-9]*\), under.*|\1|p' restored)
branch=$(path second)
show fsnap branches

say "Side by side: the process on the branch has the counts of the second checkpoint and counts on from there."
show cat disk/job/order-first "$branch/order-first"
if cmp --silent disk/job/order-first "$branch/order-first"; then
    echo "demo: the branch has the files of the original" >&2
    exit 1
fi
show fsnap-oracle ask --brief --reports reports "$second"
show fsnap-oracle ask --brief --reports reports "$job"

say "A branch is a volume as well. Here fsnap freezes the restored process by itself and takes a checkpoint of it, so that" \
    "history has a fork; and a second branch, for looking only, from the very first checkpoint."
show fsnap checkpoint --pid "$second" --message "on the branch"
show fsnap branch "$(fsnap log --json | sed -n 's/^    "id": "\(.*\)",$/\1/p' | tail -n 1)" first
show fsnap-oracle examine --brief "$(path first)"
show fsnap log --graph
show fsnap verify

say "PART TWO: without privileges, in a plain directory on whatever file system there is."
unset FSNAP_STATE
mkdir --mode 700 home
chown nobody: home
export HOME=$demo/home XDG_STATE_HOME=$demo/home/state
group=$(id -g nobody)
as_nobody() { setpriv --reuid=nobody --regid="$group" --clear-groups --no-new-privs -- "$@"; }
for program in fsnap fsnap-oracle id mkdir cat cmp touch; do
    eval "$program() { as_nobody \$(type -P $program) \"\$@\"; }"
done
cd home
show id -un
show mkdir work reports
show fsnap init --backend rsync work
show fsnap-oracle start --reports reports --kinds append,overwrite,mmap,rename,order,sparse work/job | tee ../pid
job=$(tail -n 1 ../pid)

say "No engine this time: fsnap stops the process, takes the snapshot, and sets it running again. Three checkpoints:"
for tag in one two three; do
    sleep 0.5
    show fsnap checkpoint --pid "$job" --tag "$tag" --message "a plain directory"
done
show fsnap log
show fsnap diff two three

say "The process goes on. A branch grows from the second checkpoint: its files are those of that instant, and can be" \
    "changed without the process noticing."
show fsnap branch two try
branch=$(path try)
show fsnap-oracle examine --brief "$branch/job"
show cat work/job/order-first "$branch/job/order-first"
if cmp --silent work/job/order-first "$branch/job/order-first"; then
    echo "demo: the branch has the files of the original" >&2
    exit 1
fi
show touch "$branch/only-here"
show fsnap checkpoint --branch try --message "on the branch"
show fsnap diff two @latest
show fsnap-oracle ask --brief --reports reports "$job"
show fsnap log --graph
show fsnap verify

say "That is all. Everything made here is removed now."
