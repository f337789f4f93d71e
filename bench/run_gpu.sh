#!/usr/bin/env bash
# Times the operators and a Llama-3.1-8B-shaped model on this machine's GPU (60 GiB of memory free, under eight minutes).
# Build the extension first: pip install --no-build-isolation -e .
#
#   bench/run_gpu.sh [FOLDER]           kernels.json, models.json and summary.json go to FOLDER (default bench/results)
#   bench/run_gpu.sh [FOLDER] --demo    and demo.json, the figures of the README's first table (three minutes more)
#   bench/run_gpu.sh [FOLDER] --search  search.json alone, the whole search against the authors', into summary.json (nine minutes)
#   bench/run_gpu.sh [FOLDER] --generate  generate.json and adaptive.json alone, into summary.json (ten minutes)
#   bench/run_gpu.sh [FOLDER] --linear  linear.json alone, the predictive in closed form, into summary.json (three minutes)
#   bench/run_gpu.sh [FOLDER] --quantised  quantised.json alone, quantised base models, into summary.json (four minutes)
#   bench/run_gpu.sh [FOLDER] --span    span.json alone, samples that differ on the answer alone, into summary.json (seven minutes)
#
# Rows name the commit: TFB_EXT_COMMIT, or the content of a file .commit beside README.md, or git's.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
demo=0 search=0 generate=0 span=0 linear=0 quantised=0 folder=bench/results
for argument; do
    case $argument in
    --demo) demo=1 ;;
    --search) search=1 ;;
    --generate) generate=1 ;;
    --span) span=1 ;;
    --linear) linear=1 ;;
    --quantised) quantised=1 ;;
    *) folder=$argument ;;
    esac
done
mkdir -p "$folder"
out=$(cd "$folder" && pwd)
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no GPU on this machine")'

failed=0 # a case whose check fails has no row; the others are timed all the same, and kept where the time is up
suite() { # suite NAME LIMIT FILE OPTIONS...
    local name=$1 limit=$2
    shift 2
    timeout -s INT -k 20 "$limit" python -m pytest "$@" -p no:cacheprovider -q -s --tb=short --benchmark-json="$out/$name.json" \
        >"$out/$name.log" 2>&1 || failed=1
    grep -E ' of |passed|failed' "$out/$name.log" || tail -n 20 "$out/$name.log"
}
train() { # the demonstration's adapter from two other training seeds, a minute each
    for seed in 1 2; do
        [ -d "build/adapters/seed$seed" ] || python -m examples.headlines.train --seed "$seed" --out "build/adapters/seed$seed"
    done
}
alone() { # alone NAME LIMIT FILE OPTIONS...: that suite, into the summary, and nothing else
    suite "$@"
    python -m bench.summary "$out/$1.json" --out "$out/summary.json" || failed=1
    exit "$failed"
}
[ "$search" = 0 ] || alone search 570 bench/test_search.py -k "not span and not linear"
[ "$linear" = 0 ] || alone linear 400 bench/test_linear.py bench/test_search.py -k linear
[ "$quantised" = 0 ] || alone quantised 500 bench/test_quantised.py
# The cases of spans in the other two files as well.
[ "$span" = 0 ] || alone span 580 bench/test_span.py bench/test_generate.py bench/test_search.py -k span
if [ "$generate" = 1 ]; then
    suite generate 560 bench/test_generate.py -k "not span"
    python -m bench.summary "$out/generate.json" --out "$out/summary.json" || failed=1
    train && python -m bench.adaptive --sigma 0.04 --out "$out/adaptive.json" || failed=1
    python -m bench.summary "$out/adaptive.json" --out "$out/summary.json" || failed=1
    exit "$failed"
fi
suite models 330 bench/test_models.py
suite kernels 120 bench/test_kernels.py -k cuda
python -m bench.summary "$out"/models.json "$out"/kernels.json --out "$out/summary.json" || failed=1
if [ "$demo" = 1 ]; then
    # Three adapters, five noise seeds, two depths.
    train && python -m tfb_ext demo --adapter demo --adapter build/adapters/seed1 --adapter build/adapters/seed2 \
        --seed 0 --seed 1 --seed 2 --seed 3 --seed 4 --no-report --save "$out/demo.json" || failed=1
fi
exit "$failed"
