# What the scripts under ops/ share. Source it; it sets $repo and $target and turns on strict mode.
#
# Whatever a script makes lives under $target and is made once, by `cached`: built beside its place, moved there when
# whole, and stamped with a fingerprint of what it was made from. A second run only compares the fingerprint, and a run
# that was cut off leaves nothing that a later one takes for whole.
#
# Nothing here waits without a limit, kills a process it did not start, or leaves a mount behind.
# shellcheck shell=bash

set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
target=${CARGO_TARGET_DIR:-$repo/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
readonly repo target
export LC_ALL=C.UTF-8

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "$1 needs root (it makes chroots and mounts); run it as root"
}

# Steps to undo, last one first, whatever ends the script.
exit_steps=()
on_exit() { exit_steps+=("$(printf '%q ' "$@")"); }
run_exit_steps() {
    local status=$? i
    trap '' INT TERM HUP
    for ((i = ${#exit_steps[@]} - 1; i >= 0; i--)); do
        eval "${exit_steps[i]}" || true
    done
    exit "$status"
}
trap run_exit_steps EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# scratch VARIABLE: a directory under $target/tmp that goes when the script ends. Under $target rather than /tmp, since
# /tmp may be small or in memory, and since an overlay's upper layer must not itself lie on an overlay.
scratch() {
    mkdir -p "$target/tmp"
    local dir
    dir=$(mktemp -d "$target/tmp/${0##*/}.XXXXXX")
    on_exit discard "$dir"
    printf -v "$1" '%s' "$dir"
}

# discard DIR: remove a tree, but never reach through a mount into something that is not ours.
discard() { rm -rf --one-file-system -- "$1"; }

# stop PID [SECONDS]: ask a process that we started to end, and end it when it does not.
stop() {
    local pid=$1 tries=$((${2:-10} * 10))
    kill -TERM "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do
        if ((tries-- == 0)); then
            kill -KILL "$pid" 2>/dev/null || true
            break
        fi
        sleep 0.1
    done
    wait "$pid" 2>/dev/null || true
}

# locked NAME SECONDS COMMAND..: one of these at a time over all scripts of this target directory.
locked() {
    local name=$1 wait=$2
    shift 2
    mkdir -p "$target/locks"
    (
        exit_steps=()
        trap run_exit_steps EXIT # a subshell does not inherit it
        flock -w "$wait" 9 || die "another run has held $target/locks/$name for $wait seconds; wait for it, or end it"
        "$@" 9>&-
    ) 9>"$target/locks/$name"
}

# fingerprint WORD-OR-FILE..: one digest over words and file contents, for `cached`.
fingerprint() {
    local thing
    for thing; do
        if [ -f "$thing" ]; then sha256sum <"$thing"; else printf '%s\n' "$thing"; fi
    done | sha256sum | cut -c1-16
}

# cached DIR FINGERPRINT MAKER [ARGUMENT..]: MAKER fills the empty directory it is given as its first argument.
# DIR/.ready says that DIR is whole, and from what it was made.
cached() {
    local dir=$1 print=$2
    [ "$(cat "$dir/.ready" 2>/dev/null)" = "$print" ] && return
    locked "$(tr / _ <<<"${dir#"$target"/}")" 1800 make_cached "$@"
}

make_cached() {
    local dir=$1 print=$2 maker=$3 new
    shift 3
    [ "$(cat "$dir/.ready" 2>/dev/null)" = "$print" ] && return   # made while we waited for the lock
    new=$(dirname "$dir")/.new-$(basename "$dir")
    discard "$new"
    mkdir -p "$new"
    local begun=$SECONDS
    say "making ${dir#"$repo"/}"
    "$maker" "$new" "$@"
    discard "$dir"
    echo "$print" >"$new/.ready"
    mv -T "$new" "$dir"
    say "made ${dir#"$repo"/} in $((SECONDS - begun)) s"
}
