#!/usr/bin/env bash
# Runs the OpenCL backend's tests on Intel's CPU runtime, which has subgroups of 64, fp16 and dot products, as an
# Adreno has them; the ordinary tests run on PoCL, which has none.  Where the PoCL of PyPI is older than the CPU and
# compiles nothing, they run here, on Debian's.  Then every kernel on tiny sizes under oclgrind, which finds data races
# and what is read or written out of bounds.  Needs an environment with pi2 and its test extra.
# usage: tests/opencl.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ "$(uname -m)" = x86_64 ] || { echo "Intel's runtime is for x86_64 only"; exit 0; }

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }

install() {
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
}

# run_on DRIVER NAME [pytest arguments]: DRIVER is an .so, or a folder of .icd files
run_on() {
    local driver=$1 name=$2
    shift 2
    printf '\n== %s\n' "$name"
    OCL_ICD_VENDORS=$driver OPENBLAS_NUM_THREADS=1 PI2_EXPECT_OPENCL=$name \
        python3 -m pytest -q plugins/backend_opencl "$@"
}

site=$(python3 -c 'import pyopencl, pathlib; print(pathlib.Path(pyopencl.__file__).parent)')
compiles='from pi2_backend_opencl.backend import OpenclBackend as B; raise SystemExit(not B.probe())'
if ! OCL_ICD_VENDORS=$site/.libs python3 -c "$compiles"; then
    [ -e /etc/OpenCL/vendors/pocl.icd ] || install pocl-opencl-icd
    run_on /etc/OpenCL/vendors Portable "$@"
fi
python3 -m pip install -q intel-opencl-rt intel-cmplr-lib-rt
run_on "$(python3 -c 'import sys; print(sys.prefix)')/lib/libintelocl.so" Intel "$@"

printf '\n== oclgrind\n'
command -v oclgrind >/dev/null || install oclgrind
races=$(mktemp)
trap 'rm -f "$races"' EXIT
PI2_EXPECT_OPENCL=Oclgrind OPENBLAS_NUM_THREADS=1 oclgrind --data-races --log "$races" \
    python3 -m pytest -q -p no:cacheprovider plugins/backend_opencl/tests/test_opencl_tiny.py \
    plugins/backend_opencl/tests/test_opencl_plugin.py::test_the_driver_is_the_expected_one
if [ -s "$races" ]; then
    head -40 "$races" >&2
    exit 1
fi
echo "no races"
