#!/usr/bin/env bash
# Cross-builds pi2 and its CPU backend for 64-bit ARM, and runs the backend's tests under qemu-user on three CPU
# models.
# usage: tests/aarch64.sh [DIRECTORY] [pytest arguments]
# DIRECTORY (default ~/.cache/pi2-aarch64) keeps an arm64 Python of this Debian release: no root, no chroot, no binfmt.
# A kernel whose instructions are too new for a model dies there with SIGILL.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/pi2-aarch64}
shift $(($# > 0))
mkdir -p "$work"
work=$(cd "$work" && pwd)
root=$work/root
site=$work/site
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }
say() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

install_tools() {
    if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null; then
        as_root apt-get update -q
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
            g++-aarch64-linux-gnu qemu-user
    fi
    [ -e "$work/tools/bin/pip" ] || python3 -m venv "$work/tools"
    PATH=$work/tools/bin:$PATH
    pip install -q hatchling scikit-build-core cmake ninja
}

# An arm64 Python with all that it needs, unpacked by an apt that keeps its state apart from the machine's own.
make_root() {
    [ -e "$root/complete" ] && return
    local apt=$work/apt mirror release package
    rm -rf "$root" "$apt"
    mkdir -p "$root" "$apt/lists/partial" "$apt/archives/partial"
    : >"$apt/status"
    mirror=$(grep -hoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        head -n 1 || true)
    [ -n "$mirror" ] || { echo "no Debian mirror in /etc/apt: this needs a Debian machine" >&2; exit 1; }
    release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
        "$mirror $release main" >"$apt/sources.list"
    cat >"$apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
Dir::Cache::archives "$apt/archives";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
CONF
    APT_CONFIG=$apt/apt.conf apt-get -qq update
    APT_CONFIG=$apt/apt.conf apt-get -qqy --download-only --no-install-recommends install python3 libstdc++6 >/dev/null
    for package in "$apt"/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    [ -e "$root/lib" ] || ln -s usr/lib "$root/lib" # a merged /usr: where the loader is looked for
    rm -rf "$apt"
    touch "$root/complete"
}

# The wheels of core and of the backend, and aarch64 wheels of all that they depend on.
make_site() {
    local wheels=$work/wheels version
    rm -rf "$wheels" "$site"
    cat >"$work/aarch64.cmake" <<'CMAKE'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
CMAKE
    # No isolation: it would fetch an aarch64 cmake, too.
    _PYTHON_HOST_PLATFORM=linux-aarch64 CMAKE_TOOLCHAIN_FILE=$work/aarch64.cmake \
        pip wheel -q --no-build-isolation --no-deps -w "$wheels" "$repo" "$repo/plugins/backend_cpu"
    version=$(basename "$root"/usr/bin/python3.?*)
    pip install -q --target "$site" --only-binary=:all: --implementation cp \
        --python-version "${version#python}" --abi "cp${version//[a-z.]/}" --abi abi3 --abi none \
        --platform linux_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 \
        "$(echo "$wheels"/pi2-*-any.whl)[testing]" "$wheels"/pi2_backend_cpu-*_aarch64.whl
}

# run_tests CPU_MODEL INSTRUCTION_SET [pytest arguments]: INSTRUCTION_SET must be the best that is found there.
# Becomes qemu: run it in the background. Each has temporary files of its own: side by side, they would sweep each other's.
run_tests() {
    local model=$1 expected=$2
    shift 2
    exec env PYTHONHOME="$root/usr" PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1 \
        PI2_EXPECT_ISA="$expected" nice -n 5 qemu-aarch64 -cpu "$model" -L "$root" "$root"/usr/bin/python3 \
        -m pytest -q -p no:cacheprovider --basetemp "$work/tmp-$model" --hypothesis-profile emulated \
        "$repo/plugins/backend_cpu/tests" "$@"
}

install_tools
make_root
say "arm64 Python in $root"
make_site
say "wheels: $(cd "$work/wheels" && echo ./*)"
cd "$repo"
failed=0
models=(cortex-a53:neon cortex-a76:neon_dotprod "max,sve=off:neon_i8mm")
running=()
trap '[ ${#running[@]} = 0 ] || kill "${running[@]}" 2>/dev/null || true' EXIT
for pair in "${models[@]}"; do
    run_tests "${pair%:*}" "${pair#*:}" "$@" >"$work/${pair%:*}.log" 2>&1 &
    running+=($!)
done
for i in "${!models[@]}"; do
    wait "${running[i]}" || failed=1
    unset "running[i]"
    say "cpu ${models[i]%:*}, which should run ${models[i]#*:}"
    cat "$work/${models[i]%:*}.log"
done
say "$([ $failed = 0 ] && echo passed || echo FAILED)"
exit $failed
