#!/usr/bin/env bash
# Runs the AVX-512 kernels on any x86 machine, through SIMDe's portable definitions of the intrinsics, and looks
# into the objects that are really built: which instructions they hold, and no symbol that a linker could share.
# usage: tests/avx512.sh [DIRECTORY]
# DIRECTORY (default: a temporary one) keeps the builds.  Installs SIMDe where it is missing.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case $(uname -m) in
x86_64 | amd64) ;;
*) echo "AVX-512 is x86's: nothing to test on $(uname -m)" && exit 0 ;;
esac
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }
fail() { echo "$1" >&2 && exit 1; }

find_tools() {
    if [ ! -e /usr/include/simde/x86/avx512.h ]; then
        as_root apt-get update -q
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends libsimde-dev
    fi
    { command -v cmake && command -v ninja; } >/dev/null && return
    python3 -m venv "$work/tools"
    "$work/tools/bin/pip" install -q cmake ninja
    PATH=$work/tools/bin:$PATH
}

# build NAME TARGET [cmake arguments]
build() {
    local name=$1 target=$2
    shift 2
    printf '\n== %s (after %d s)\n' "$name" "$SECONDS"
    rm -f "$work/$name/CMakeCache.txt" # it may be another checkout's
    cmake -G Ninja -S "$repo/plugins/backend_cpu" -B "$work/$name" "$@" >"$work/cmake.log" ||
        { cat "$work/cmake.log" && exit 1; }
    nice -n 5 cmake --build "$work/$name" --target "$target" >"$work/build.log" ||
        { cat "$work/build.log" && exit 1; }
}

# instructions PATTERN OBJECT: how many of its instructions match
instructions() { objdump -d --no-show-raw-insn "$2" | grep -cE "$1" || true; }

# Every object of the library: wide registers only where the CPU was asked for them, and nothing weak in a unit
# that is built for one instruction set: the linker could keep that copy for all.
check_objects() {
    local object name zmm ymm vnni
    for object in "$work"/objects/CMakeFiles/pi2_cpu.dir/src/*.o; do
        name=$(basename "$object" .cpp.o)
        zmm=$(instructions '%(zmm|k[1-7]|[xy]mm(1[6-9]|2[0-9]|3[01]))' "$object")
        vnni=$(instructions 'vpdp' "$object")
        ymm=$(instructions '%ymm' "$object")
        case $name in
        kernels_avx512_vnni) [ "$vnni" -gt 0 ] || fail "$name has no VNNI instruction" ;;
        kernels_avx512) [ "$zmm" -gt 0 ] && [ "$vnni" = 0 ] || fail "$name: $zmm AVX-512, $vnni VNNI instructions" ;;
        kernels_avx2) [ "$zmm" = 0 ] && [ "$ymm" -gt 0 ] || fail "$name: $zmm AVX-512, $ymm AVX instructions" ;;
        *) [ "$zmm" = 0 ] && [ "$ymm" = 0 ] || fail "$name has $zmm AVX-512 and $ymm AVX instructions" ;;
        esac
        [[ $name != kernels_avx* ]] || ! nm "$object" | grep -E ' [WwVvu] ' || fail "$name has symbols that are shared"
        printf '%-24s %6d AVX-512, %6d AVX\n' "$name" "$zmm" "$ymm"
    done
}

find_tools
build objects pi2_cpu
check_objects
if grep -q avx2 /proc/cpuinfo; then
    build emulated stress -DPI2_EMULATE_AVX512=ON -DPI2_SANITIZE=address
    nice -n 5 "$work/emulated/stress" kernels 60 avx512
else
    echo "without AVX2 there is nothing to emulate AVX-512 with" # SIMDe's floats would be rounded twice
    exit 1
fi
printf '\n== passed (after %d s)\n' "$SECONDS"
