#!/usr/bin/env bash
# Compiles every CUDA kernel with bare nvcc for the architectures that are shipped, prints the registers of each kernel and
# fails on an error, a spill or a stack frame; compiles the torch side of the CUDA operators against the installed torch.
# Neither step needs a GPU or a torch with CUDA. As many files are compiled at a time as there are cores.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
  echo "compile_cuda: nvcc is not on PATH, nothing compiled"
  exit 0
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
status=0
nvcc_dir=$(nvcc -v --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
include=$(python -c 'from torch.utils.cpp_extension import include_paths; print(" ".join("-isystem " + p for p in include_paths()))')
export out nvcc_dir include

compile() { # compile SOURCE: what the compiler says goes to a log of the source's name; $out/NAME.done is there if it compiled
  local name
  name=$(basename "$1")
  case $1 in
    *.cu)
      nvcc -O3 -std=c++20 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code='[sm_90,compute_90]' \
        -gencode arch=compute_90a,code=sm_90a -Xptxas -v,-warn-spills -c "$1" -o "$out/$name.o" ;;
    *)
      # shellcheck disable=SC2086
      ${CXX:-g++} -std=c++20 -O1 -fPIC -Wall -Werror -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE -isystem "$nvcc_dir/include" \
        $include -c "$1" -o "$out/$name.o" ;;
  esac >"$out/$name.log" 2>&1 && touch "$out/$name.done"
}
export -f compile

# The longest first; what failed is told below, in the order of the names.
printf '%s\0' csrc/cuda/ops.cpp csrc/cuda/*.cu | sort -zr | xargs -0 -n 1 -P "$(nproc)" bash -c 'compile "$1" || true' _

for source in csrc/cuda/*.cu csrc/cuda/ops.cpp; do
  log="$out/$(basename "$source").log"
  if [[ ! -e "${log%.log}.done" ]]; then
    cat "$log"
    echo "compile_cuda: $source does not compile"
    status=1
    continue
  fi
  [[ $source == *.cu ]] || continue
  c++filt <"$log" | awk -v source="$source" '
    /Compiling entry function/ { match($0, /\047.*\047 for/); name = substr($0, RSTART + 1, RLENGTH - 6)
                                 arch = $NF; gsub(/\047/, "", arch)
                                 gsub(/tfb::cuda::|\(anonymous namespace\)::|void /, "", name); sub(/\([^()]*\)$/, "", name) }
    /bytes stack frame/ && !/ 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads/ { bad = 1; print "SPILL " $0 }
    /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); print arch, substr($0, RSTART + 5, RLENGTH - 5), name }
    END { exit bad }' || { echo "compile_cuda: $source spills or uses a stack frame"; status=1; }
done

if [[ -e $out/ops.cpp.done ]]; then
  echo "compile_cuda: csrc/cuda/ops.cpp compiles against the installed torch"
fi
exit $status
