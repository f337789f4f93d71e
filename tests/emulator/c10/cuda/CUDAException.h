// Stands in for c10's header: the emulated operators run on CPU tensors.
#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#define C10_CUDA_CHECK(status) TORCH_CHECK((status) == cudaSuccess, "emulator: a launch was refused")
