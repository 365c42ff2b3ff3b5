#!/usr/bin/env bash
# Runs the QNN backend's tests on Qualcomm's emulator of the NPU, which comes with the extra pi2-backend-qnn[qnn].
# Needs an environment with pi2, its plugins and its test extra.
# usage: tests/qnn.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ "$(uname -m)" = x86_64 ] || { echo "the emulator is for x86_64 only"; exit 0; }
python3 -m pip install -q onnx==1.23.2 onnxruntime==1.31.1 onnxruntime-qnn==2.7.0
OPENBLAS_NUM_THREADS=1 PI2_EXPECT_QNN=1 \
    python3 -m pytest -q --hypothesis-profile qnn plugins/backend_qnn "$@"
