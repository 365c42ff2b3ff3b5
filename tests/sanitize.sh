#!/usr/bin/env bash
# Runs the CPU backend's kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and its threads under
# ThreadSanitizer: random calls of the C interface, by plugins/backend_cpu/tests/native.
# usage: tests/sanitize.sh [DIRECTORY]; DIRECTORY (default: a temporary one) keeps the builds.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# ThreadSanitizer maps its shadow where address randomisation may have put the program; some containers forbid to ask.
fixed=(setarch "$(uname -m)" -R)
"${fixed[@]}" true 2>/dev/null || fixed=()

if ! { command -v cmake && command -v ninja; } >/dev/null; then
    python3 -m venv "$work/tools"
    "$work/tools/bin/pip" install -q cmake ninja
    PATH=$work/tools/bin:$PATH
fi

# stress SANITIZERS MODE COUNT
stress() {
    local build=$work/${1//,/-}
    printf '\n== %s: stress %s %s (after %d s)\n' "$1" "$2" "$3" "$SECONDS"
    cmake -G Ninja -S "$repo/plugins/backend_cpu" -B "$build" -DPI2_SANITIZE="$1" >"$work/cmake.log" ||
        { cat "$work/cmake.log" && exit 1; }
    nice -n 5 cmake --build "$build" --target stress >"$work/build.log" || { cat "$work/build.log" && exit 1; }
    nice -n 5 "${fixed[@]}" "$build/stress" "$2" "$3"
}

stress address,undefined,float-cast-overflow kernels 1000
stress thread pool 250
printf '\n== passed (after %d s)\n' "$SECONDS"
