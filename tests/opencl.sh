#!/usr/bin/env bash
# Runs the OpenCL backend's tests on Intel's CPU runtime, which has subgroups of 64, fp16 and dot products, as an
# Adreno has them; the ordinary tests run on PoCL, which has none.  Needs an environment with pi2 and its test extra.
# usage: tests/opencl.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ "$(uname -m)" = x86_64 ] || { echo "Intel's runtime is for x86_64 only"; exit 0; }
python3 -m pip install -q intel-opencl-rt intel-cmplr-lib-rt
runtime=$(python3 -c 'import sys; print(sys.prefix)')/lib/libintelocl.so
OCL_ICD_VENDORS=$runtime OPENBLAS_NUM_THREADS=1 PI2_EXPECT_OPENCL=Intel \
    python3 -m pytest -q plugins/backend_opencl "$@"
