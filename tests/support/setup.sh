#!/usr/bin/env bash
# Makes a Debian 12 or 13 machine ready to build, test and demonstrate fsnap; quick when nothing is to do.
#
#   setup.sh build    what a build needs
#   setup.sh suites   what the POSIX suites of others need: they are built from their sources
#   setup.sh          that, and what tests, benchmarks and the demonstration need: tools and a CRIU that works here
#
# Needs root only if something is missing. What the called programs say goes to target/setup.log.
set -euo pipefail

top=$(cd "$(dirname "$0")/../.." && pwd)
log=$top/target/setup.log
criu_dir=$top/target/criu
PATH=$PATH:/usr/sbin:/sbin:${HOME:-/root}/.cargo/bin

to_build=(make gcc libc6-dev pkg-config libclang-dev libbtrfsutil-dev libdevmapper-dev)
to_test=(btrfs-progs e2fsprogs xfsprogs rsync restic attr acl libcap2-bin strace faketime fuse3)
# A kernel to test on, and the tools of what only it has.
to_test+=(user-mode-linux dmsetup lvm2 nilfs-tools thin-provisioning-tools kmod util-linux mount)
to_test+=(qemu-system-x86 iproute2)
# What benchmarks compare with, and what suites run.
to_test+=(fuse-overlayfs unionfs-fuse)
# What a tour on real programs shows, and what is done on a branch.
to_test+=(git postgresql sqlite3 python3 runc crun podman busybox-static)
to_unpack=(mmdebstrap)
# The suites of others: programs of Debian, and crates.
to_suite=(stress-ng)
suites=(pjdfstest@0.2.2 fsx@0.3.2)
# The release whose kernel the machine of QEMU has, with the CRIU that knows it.
machine_release=bookworm
machine_dir=$top/target/vm/debian
# The release whose CRIU knows kernels of this age, and the oldest version that does.
criu_release=trixie
criu_good=4.0

say() { echo "setup: $*" | tee -a "$log" >&2; }

die() {
    say "$*"
    exit 1
}

# Runs a command with its output in the log; when it fails, shows the end of the log.
logged() {
    echo "+ $*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null && return
    local status=$?
    tail -n 20 "$log" | sed 's/^/  | /' >&2
    return "$status"
}

# Prints those of the given packages that are not installed.
missing() {
    local installed
    # It fails for packages that it has never heard of, which are missing as well.
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
    installed=$(sed -n 's/^installed //p' <<<"$installed")
    comm -23 <(printf '%s\n' "$@" | sort) <(sort <<<"$installed")
}

updated=
update() {
    [ -z "$updated" ] || return 0
    say "reading the package lists"
    logged apt-get -q update || die "apt-get update failed; see $log"
    updated=yes
}

lists_are_there() { [ -n "$(apt-cache policy "${1:-libc6}" 2>/dev/null)" ] && compgen -G '/var/lib/apt/lists/*Packages*' >/dev/null; }

install() {
    local packages
    packages=$(missing "$@" | xargs)
    [ -n "$packages" ] || return 0
    [ "$(id -u)" = 0 ] || die "missing Debian packages: $packages; run this as root, or install them"
    lists_are_there || update
    say "installing $packages"
    # shellcheck disable=SC2206  # names of packages have no blanks
    local get=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $packages)
    # Lists that are too old name packages that the mirror no longer has.
    [ -z "$updated" ] && logged "${get[@]}" && return
    update
    logged "${get[@]}" || die "cannot install $packages; see $log"
}

rust_is_there() {
    command -v cargo >/dev/null || die "no cargo in PATH or ~/.cargo/bin: install Rust first"
    local part wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$top/Cargo.toml")
    found=$(cargo --version | cut -d ' ' -f 2)
    # The older one comes first.
    [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] ||
        die "fsnap needs Rust $wanted or later, and cargo is $found: update it, such as by rustup update stable"
    for part in clippy fmt; do
        cargo "$part" --version >/dev/null 2>&1 && continue
        [ "$part" = fmt ] && part=rustfmt
        say "adding $part to the Rust toolchain"
        logged rustup component add "$part" || die "cargo has no $part, and rustup cannot add it"
    done
}

# Whether the given CRIU dumps a process here, leaves it running, and restores it beside itself.
criu_works() {
    local dir pid init result=1
    dir=$(mktemp -d)
    # Nothing is left open that a dump would have to carry. The substitution ends when the standard output is let go.
    pid=$(setsid bash -c 'for fd in "/proc/$$/fd/"*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done
        echo $$; exec sleep 600 >/dev/null' </dev/null 2>/dev/null &)
    if logged "$1" dump -R -t "$pid" -D "$dir" -o "$dir/dump.log" && kill -0 "$pid"; then
        # The init process of the namespace ends with the script, and the restored process with it.
        logged unshare --mount --pid --fork sh -c 'mount -t proc proc /proc && exec "$@"' sh \
            sh -c '"$1" restore -d -D "$2" -o "$2/restore.log" && kill -0 "$3"' sh "$1" "$dir" "$pid" && result=0
    fi
    [ "$result" = 0 ] || cat "$dir"/*.log >>"$log" 2>/dev/null || true
    kill "$pid"
    rm -rf "$dir"
    return "$result"
}

# The mirror of Debian's main archive in this machine's own apt configuration.
mirror() {
    local codename
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    apt-get indextargets --format '$(CREATED_BY) $(ORIGIN) $(LABEL) $(CODENAME) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
        awk -v codename="$codename" '$1 == "Packages" && $2 == "Debian" && $3 == "Debian" && $4 == codename && $5 == "main" { print $6; exit }'
}

# Unpacks packages of a release of Debian, with all that they need, beside the system: unpack RELEASE PACKAGES DIRECTORY
unpack() {
    install "${to_unpack[@]}"
    lists_are_there || update
    local from proxies
    from=$(mirror)
    [ -n "$from" ] || { update; from=$(mirror); }
    [ -n "$from" ] || die "no mirror of Debian's main archive in the apt configuration, from which to take $2"
    rm -rf "$3"
    mapfile -t proxies < <(apt-config dump --no-empty --format '%F "%v";%n' | grep -i '^Acquire::http.*::Proxy' | sed 's/^/--aptopt=/')
    logged mmdebstrap --variant=extract --include="$2" "${proxies[@]}" "$1" "$3" "$from" ||
        die "cannot unpack $2 of Debian $1; see $log"
}

# Leaves a script DIRECTORY/criu that runs the CRIU in DIRECTORY/tree with the libraries in there: the system's may be older.
wrap_criu() {
    local tree=$1/tree loader libraries
    loader=$(find "$tree" -path '*/lib*/ld-linux*.so.*' | head -n 1)
    libraries=$(find "$tree" \( -path '*/lib/*/libprotobuf-c.so.*' -o -path '*/lib/*/libc.so.6' \) -printf '%h\n' | sort -u | paste -sd:)
    printf '#!/bin/sh\nexec %q --library-path %q %q "$@"\n' "$loader" "$libraries" "$tree/usr/sbin/criu" >"$1/criu"
    chmod +x "$1/criu"
}

# Unpacks a newer Debian's CRIU.
unpack_criu() {
    say "unpacking CRIU of Debian $criu_release, because this machine's own does not work with kernel $(uname -r)"
    unpack "$criu_release" criu "$criu_dir/tree"
    wrap_criu "$criu_dir"
}

# Leaves at target/vm/debian what the machine of QEMU is started with: a kernel, its modules and a CRIU.
prepare_machine() {
    local done=$machine_dir/done tree=$machine_dir/tree release
    [ "$(cat "$done" 2>/dev/null)" = "$machine_dir" ] && return
    [ "$(id -u)" = 0 ] || die "the kernel for the machine of QEMU is not prepared yet: run this as root"
    say "unpacking the kernel and CRIU of Debian $machine_release for a virtual machine"
    mkdir -p "$machine_dir"
    unpack "$machine_release" linux-image-amd64,criu "$tree"
    for release in "$tree"/lib/modules/*; do
        logged depmod -b "$tree" "${release##*/}" || die "cannot list the modules of $release; see $log"
    done
    wrap_criu "$machine_dir"
    logged "$machine_dir/criu" --version || die "the CRIU of Debian $machine_release does not start; see $log"
    rm -rf "$tree"/usr/share/{doc,man,locale,info}
    echo "$machine_dir" >"$done"
}

# Leaves a CRIU that works with this kernel at target/criu/criu.
prepare_criu() {
    local works=$criu_dir/works-with now
    now="$(uname -r) $criu_dir $(command -v criu || true)"
    [ -x "$criu_dir/criu" ] && [ "$(cat "$works" 2>/dev/null)" = "$now" ] && return
    [ "$(id -u)" = 0 ] || die "CRIU is not prepared yet: run this as root"
    mkdir -p "$criu_dir"
    if ! command -v criu >/dev/null; then
        lists_are_there || update
        local version
        version=$(apt-cache policy criu | sed -n 's/^ *Candidate: //p')
        if [ "${version:-(none)}" != "(none)" ] && dpkg --compare-versions "$version" ge "$criu_good"; then
            install criu
        fi
    fi
    local system
    if system=$(command -v criu) && criu_works "$system"; then
        ln -sfn "$system" "$criu_dir/criu"
    else
        unpack_criu
        criu_works "$criu_dir/criu" || { tail -n 30 "$log" >&2; die "CRIU of Debian $criu_release does not work with kernel $(uname -r) either; see $log"; }
    fi
    echo "$(uname -r) $criu_dir $(command -v criu || true)" >"$works"
    say "CRIU works: $("$criu_dir/criu" --version | tr '\n' ' ')"
}

# Leaves the suites at target/suites/bin.
prepare_suites() {
    local done=$top/target/suites/done
    [ "$(cat "$done" 2>/dev/null)" = "${suites[*]}" ] && return
    say "building ${suites[*]}"
    logged cargo install --locked --root "$top/target/suites" "${suites[@]}" || die "cannot build ${suites[*]}; see $log"
    echo "${suites[*]}" >"$done"
}

mkdir -p "$top/target"
exec 9>"$top/target/setup.lock"
flock 9
: >"$log"

command -v dpkg-query >/dev/null || die "this is no Debian: install by hand what this script lists, and CRIU 4"
case ${1:-all} in
build)
    install "${to_build[@]}"
    rust_is_there
    ;;
suites)
    install "${to_build[@]}" "${to_suite[@]}"
    rust_is_there
    prepare_suites
    ;;
all)
    install "${to_build[@]}" "${to_test[@]}"
    rust_is_there
    prepare_criu
    prepare_machine
    ;;
*) die "usage: setup.sh [build|suites]" ;;
esac
