#!/usr/bin/env bash
# Runs the OpenCL backend's tests on Intel's CPU runtime, which has subgroups of 64, fp16 and dot products, as an
# Adreno has them; the ordinary tests run on PoCL, which has none.  Where the PoCL of PyPI is older than the CPU and
# compiles nothing, they run here, on Debian's.  Needs an environment with pi2 and its test extra.
# usage: tests/opencl.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ "$(uname -m)" = x86_64 ] || { echo "Intel's runtime is for x86_64 only"; exit 0; }

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }

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
    if [ ! -e /etc/OpenCL/vendors/pocl.icd ]; then
        as_root apt-get update -q
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends pocl-opencl-icd
    fi
    run_on /etc/OpenCL/vendors Portable "$@"
fi
python3 -m pip install -q intel-opencl-rt intel-cmplr-lib-rt
run_on "$(python3 -c 'import sys; print(sys.prefix)')/lib/libintelocl.so" Intel "$@"
