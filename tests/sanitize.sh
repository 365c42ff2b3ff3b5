#!/usr/bin/env bash
# Runs the CPU backend's kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and its threads under
# ThreadSanitizer: random calls of the C interface, by plugins/backend_cpu/tests/native.
# usage: tests/sanitize.sh [native|aarch64] [DIRECTORY]
# aarch64: the NEON kernels, cross-built, under qemu-user.  DIRECTORY (default: a temporary one) keeps the builds.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
machine=${1:-native}
if [ $# -gt 1 ]; then
    mkdir -p "$2"
    work=$(cd "$2" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
configure=()
launch=()

find_tools() {
    { command -v cmake && command -v ninja; } >/dev/null && return
    python3 -m venv "$work/tools"
    "$work/tools/bin/pip" install -q cmake ninja
    PATH=$work/tools/bin:$PATH
}

# stress SANITIZERS MODE COUNT
stress() {
    local build=$work/$machine-${1//,/-}
    printf '\n== %s, %s: stress %s %s (after %d s)\n' "$machine" "$1" "$2" "$3" "$SECONDS"
    rm -f "$build/CMakeCache.txt" # it may be another checkout's
    cmake -G Ninja -S "$repo/plugins/backend_cpu" -B "$build" -DPI2_SANITIZE="$1" "${configure[@]}" \
        >"$work/cmake.log" || { cat "$work/cmake.log" && exit 1; }
    nice -n 5 cmake --build "$build" --target stress >"$work/build.log" || { cat "$work/build.log" && exit 1; }
    nice -n 5 "${launch[@]}" "$build/stress" "$2" "$3"
}

# read_files SANITIZERS: the flash reader's threads and buffers, on every way to read
read_files() {
    local build=$work/storage-${1//,/-}
    printf '\n== storage_ufs, %s (after %d s)\n' "$1" "$SECONDS"
    rm -f "$build/CMakeCache.txt" # it may be another checkout's
    cmake -G Ninja -S "$repo/plugins/storage_ufs" -B "$build" -DPI2_SANITIZE="$1" \
        >"$work/cmake.log" || { cat "$work/cmake.log" && exit 1; }
    nice -n 5 cmake --build "$build" --target stress >"$work/build.log" || { cat "$work/build.log" && exit 1; }
    nice -n 5 "${launch[@]}" "$build/stress" "$build" 150
}

find_tools
case $machine in
native)
    # ThreadSanitizer needs its shadow's place, where randomised addresses may have put the program.
    launch=(setarch "$(uname -m)" -R)
    "${launch[@]}" true 2>/dev/null || launch=() # some containers forbid it, and some kernels do not need it
    read_files address,undefined
    read_files thread
    stress address,undefined,float-cast-overflow kernels 500
    stress thread kernels 30
    stress thread pool 250
    stress address,undefined,float-cast-overflow streams 300
    stress thread streams 100
    ;;
aarch64)
    configure=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++)
    launch=(env ASAN_OPTIONS=detect_leaks=0 # the leak detector traces, which qemu cannot
        qemu-aarch64 -cpu "max,sve=off" -L /usr/aarch64-linux-gnu)
    stress address,undefined,float-cast-overflow kernels 150
    ;;
*)
    echo "there is no machine $machine: native or aarch64" >&2
    exit 2
    ;;
esac
printf '\n== passed (after %d s)\n' "$SECONDS"
