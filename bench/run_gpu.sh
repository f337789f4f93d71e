#!/usr/bin/env bash
# Times the operators and a Llama-3.1-8B-shaped model on this machine's GPU (40 GiB of memory free, a few minutes).
# Build the extension first: pip install --no-build-isolation -e .
#
#   bench/run_gpu.sh [FOLDER]     kernels.json, model_forward.json and demo.json go to FOLDER (default bench/results)
#
# Rows name the commit: TFB_EXT_COMMIT, or the content of a file .commit beside README.md, or git's.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "${1:-bench/results}"
out=$(cd "${1:-bench/results}" && pwd)
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no GPU on this machine")'

failed=0 # a kernel whose check fails has no row; the others, and the model, are timed all the same
python -m pytest bench/test_kernels.py -k cuda -p no:cacheprovider --tb=line --benchmark-json="$out/kernels.json" \
    --benchmark-columns=median,min,max,rounds --benchmark-sort=name || failed=1
python -m bench.model_forward --out "$out/model_forward.json" || failed=1
# Three adapters, five noise seeds, two depths: the figures of the README's first table.
python -m tfb_ext demo --adapter demo --adapter bench/adapters/seed1 --adapter bench/adapters/seed2 \
    --seed 0 --seed 1 --seed 2 --seed 3 --seed 4 --no-report --save "$out/demo.json" || failed=1
exit "$failed"
