#!/usr/bin/env bash
# Compiles every CUDA kernel with bare nvcc for the architectures that are shipped, prints the registers of each kernel and
# fails on an error, a spill or a stack frame; then compiles the torch side of the CUDA operators against the installed torch.
# Neither step needs a GPU or a torch with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
  echo "compile_cuda: nvcc is not on PATH, nothing compiled"
  exit 0
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
status=0

for source in csrc/cuda/*.cu; do
  log="$out/$(basename "$source").log"
  if ! nvcc -O3 -std=c++20 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code='[sm_90,compute_90]' \
    -gencode arch=compute_90a,code=sm_90a -Xptxas -v,-warn-spills -c "$source" -o "$out/kernel.o" >"$log" 2>&1; then
    cat "$log"
    exit 1
  fi
  c++filt <"$log" | awk -v source="$source" '
    /Compiling entry function/ { match($0, /\047.*\047 for/); name = substr($0, RSTART + 1, RLENGTH - 6)
                                 arch = $NF; gsub(/\047/, "", arch)
                                 gsub(/tfb::cuda::|\(anonymous namespace\)::|void /, "", name); sub(/\([^()]*\)$/, "", name) }
    /bytes stack frame/ && !/ 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads/ { bad = 1; print "SPILL " $0 }
    /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); print arch, substr($0, RSTART + 5, RLENGTH - 5), name }
    END { exit bad }' || { echo "compile_cuda: $source spills or uses a stack frame"; status=1; }
done

nvcc_dir=$(nvcc -v --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
include=$(python -c 'from torch.utils.cpp_extension import include_paths; print(" ".join("-I" + p for p in include_paths()))')
# shellcheck disable=SC2086
${CXX:-g++} -std=c++20 -O1 -fPIC -Wall -Werror -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE -isystem "$nvcc_dir/include" \
  ${include//-I/-isystem } -c csrc/cuda/ops.cpp -o "$out/ops.o"
echo "compile_cuda: csrc/cuda/ops.cpp compiles against the installed torch"
exit $status
