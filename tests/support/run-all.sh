#!/usr/bin/env bash
# Runs everything that must pass, whatever fails on the way, and counts it: the last line is
# "N passed, M failed, K skipped". Exits with 1 if anything failed, or if nothing ran.
#
# A step that prints test results in libtest's format counts by them; any other counts as one test.
set -euo pipefail
cd "$(dirname "$0")/../.."

logs=target/run-all
mkdir -p "$logs"
rm -f "$logs"/*

passed=0 failed=0 skipped=0
failures=()

# Sums up the lines "test result: ok. 5 passed; 0 failed; 1 ignored; …" of a log.
results() {
    awk '/^test result: / {
        for (i = 1; i < NF; i++) {
            if ($(i + 1) == "passed;") passed += $i
            if ($(i + 1) == "failed;") failed += $i
            if ($(i + 1) == "ignored;") ignored += $i
        }
    }
    END { print passed + 0, failed + 0, ignored + 0 }' "$1"
}

# Shows why a step failed, once more and in short: whoever reads only the end of the output finds it there.
details() {
    local name=$1 log=$logs/${1// /-}.log
    printf '\n-- failed: %s\n' "$name"
    if ! grep -q '^test result: ' "$log"; then
        tail -n 40 "$log"
        return
    fi
    awk '
        function show(line) { if (++total <= 90) print substr(line, 1, 300) }
        / Running / { running = $0 }
        /^test result: / { inside = 0 }
        /^failures:$/ { if (!inside) show(running); inside = 1; lines = 0; next }
        /^---- / { lines = 0 }
        inside && ++lines <= 25 { show($0) }
        !inside && /^error: / { show($0) }' "$log"
}

# step NAME COMMAND…
step() {
    local name=$1 log status=0 p f s
    shift
    log=$logs/${name// /-}.log
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" 2>&1 </dev/null | tee "$log" || status=$?
    read -r p f s < <(results "$log")
    if [ "$status" != 0 ]; then
        # A program that dies without a result has failed all the same.
        [ "$f" != 0 ] || f=1
        failures+=("$name")
    elif [ $((p + f + s)) = 0 ]; then
        p=1
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

# The smallest build must get by without the C libraries of the other backends.
rsync_alone() {
    local options=(--locked --package fsnap --no-default-features --features rsync)
    if cargo tree "${options[@]}" --edges normal,build --prefix none | grep -E '^(btrfsutil|devicemapper|bindgen|clang-sys)'; then
        echo "error: the build with nothing but the rsync backend depends on a C library" >&2
        return 1
    fi
    # What only other backends use is noticed here.
    cargo clippy "${options[@]}" -- -D warnings
}

export RUSTDOCFLAGS="-D warnings"
step "format" cargo fmt --all --check
step "tests" cargo test --locked --workspace --no-fail-fast
step "vm tests" cargo run --quiet --locked --package vm-tests
step "lints" cargo clippy --locked --workspace --all-targets -- -D warnings
step "documentation" cargo doc --locked --workspace --no-deps
step "rsync alone" rsync_alone
step "demo" tests/demo/demo.sh

if [ "${#failures[@]}" -gt 0 ]; then
    for failure in "${failures[@]}"; do
        details "$failure"
    done
    printf '\nfailed:'
    printf ' %s;' "${failures[@]}"
    printf ' the logs are in %s\n' "$logs"
fi
printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
