#!/usr/bin/env bash
# Builds the extension in place for this machine's GPU and runs every test on it, then each operator once more under
# compute-sanitizer. Needs nvcc and compute-sanitizer (both in the CUDA toolkit), pytest, and no network.
#
#   tests/run_gpu.sh [FOLDER]     logs, junit.xml and summary.json go to FOLDER (default build/gpu)
#
# Exits with 0 only if everything ran and passed. SANITIZER_LIMIT: seconds each sanitizer may take (default 240).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
mkdir -p "${1:-build/gpu}" || exit 2
out=$(cd "${1:-build/gpu}" && pwd)
rm -f "$out"/{build,pytest,noise_parity,memcheck,racecheck}.log "$out"/{junit.xml,noise_parity.json,summary.json}

capability=$(python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
    echo "torch sees no GPU on this machine; without one, run: python -m pytest" >&2
    exit 2
}
# One architecture builds in a fraction of the time of the default list.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}

status=()
step() { # step NAME COMMAND...: run it, keep its output and its exit status, show the end
    local name=$1 code
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -n 12 "$out/$name.log"
    status+=("$name=$code")
    return "$code"
}
sanitize() { # sanitize TOOL: torch's caching allocator would hide accesses between allocations, so it is off
    step "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZER_LIMIT:-240}" \
        compute-sanitizer --tool "$1" --error-exitcode 9 python tests/gpu/sanitize.py
}

if step build env TFB_EXT_BUILD=cuda python setup.py build_ext --inplace; then
    # With pytest-xdist the tests share the GPU and the run takes a fraction of the time. The kernels run for real here, so
    # their emulation on the CPU can be left out.
    jobs=$(python -c 'import xdist; print("-n 8")' 2>/dev/null)
    # shellcheck disable=SC2086
    step pytest env TFB_EXT_REQUIRE_GPU=1 python -m pytest tests $jobs --ignore=tests/test_emulated.py --junitxml="$out/junit.xml"
    step noise_parity python tests/gpu/noise_parity.py "$out/noise_parity.json"
    sanitize memcheck
    sanitize racecheck
fi
python tests/gpu/summary.py "$out" "${status[@]}"
