#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "../../csrc/cuda/machine.h"

namespace emulator {

namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;

  void release_if_complete() {
    if (arrived == expected && arrived > 0) arrived = 0, ++generation;
  }
};

struct Warp {
  Barrier barrier;
  void* operand[32] = {};
};

struct Copy {
  void* target;
  const void* source;
};

struct Block {
  std::vector<unsigned char> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Place place;
  Block* block;
  Warp* warp;
  const Barrier* waiting = nullptr;
  uint64_t generation = 0;
  bool done = false;
  uint64_t cohort_generation = 0;
  std::deque<std::vector<Copy>> groups{{}};

  bool blocked() const { return waiting != nullptr && waiting->generation == generation; }
};

struct Cohort {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

ucontext_t scheduler;
Fiber* current = nullptr;
Cohort* cohort = nullptr;
const std::function<void()>* body = nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

void wait(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_complete();
  if (barrier.generation != generation) return;
  current->waiting = &barrier;
  current->generation = generation;
  swapcontext(&current->context, &scheduler);
  current->waiting = nullptr;
}

void leave(Barrier& barrier) {
  --barrier.expected;
  barrier.release_if_complete();
}

void complete(const Copy& copy) { std::memcpy(copy.target, copy.source, 16); }

void enter() {
  (*body)();
  current->done = true;
  leave(current->warp->barrier);
  leave(current->block->barrier);
  leave(cohort->barrier);
  current->warp->operand[current->place.lane] = nullptr;
  swapcontext(&current->context, &scheduler);
}

// Runs the fibers of one block until each has ended or waits for another block. True if any of them moved.
bool run_block(std::vector<Fiber*>& fibers) {
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (Fiber* fiber : fibers) {
      if (fiber->done || fiber->blocked()) continue;
      current = fiber;
      swapcontext(&scheduler, &fiber->context);
      again = moved = true;
    }
  }
  return moved;
}

void run_cohort(const std::vector<dim3>& blocks, dim3 grid, unsigned threads, size_t shared) {
  Cohort own;
  cohort = &own;
  std::vector<std::unique_ptr<Fiber>> all;
  std::vector<std::vector<Fiber*>> of_block(blocks.size());
  own.barrier.expected = static_cast<int>(blocks.size() * threads);
  for (size_t b = 0; b < blocks.size(); ++b) {
    auto block = std::make_unique<Block>();
    block->shared.assign(shared + 128, 0xFF);
    block->barrier.expected = static_cast<int>(threads);
    block->warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      Warp& warp = block->warps[t / 32];
      ++warp.barrier.expected;
      fiber->stack = std::make_unique<char[]>(kStackBytes);
      fiber->place = {dim3(t, 0, 0), blocks[b], grid, static_cast<int>(t % 32), static_cast<uint32_t>(b)};
      fiber->block = block.get();
      fiber->warp = &warp;
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber->context, enter, 0);
      of_block[b].push_back(fiber.get());
      all.push_back(std::move(fiber));
    }
    own.blocks.push_back(std::move(block));
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (auto& fibers : of_block) moved = run_block(fibers) || moved;
  }
  for (auto& fiber : all) {
    if (!fiber->done) fail("deadlock: threads wait for others that have left or wait elsewhere");
    for (auto& group : fiber->groups) {
      if (!group.empty()) fail("a thread left with copies under way");
    }
  }
}

}  // namespace

const Place& place() { return current->place; }

unsigned char* shared_memory(int64_t rank) {
  Block* block = rank < 0 ? current->block : cohort->blocks.at(rank).get();
  const auto start = reinterpret_cast<uintptr_t>(block->shared.data());
  return block->shared.data() + (128 - start % 128) % 128;
}

void block_barrier() { wait(current->block->barrier); }
void warp_barrier() { wait(current->warp->barrier); }

void cohort_arrive() {
  current->cohort_generation = cohort->barrier.generation;
  ++cohort->barrier.arrived;
  cohort->barrier.release_if_complete();
}

void cohort_wait() {
  if (cohort->barrier.generation != current->cohort_generation) return;
  current->waiting = &cohort->barrier;
  current->generation = current->cohort_generation;
  swapcontext(&current->context, &scheduler);
  current->waiting = nullptr;
}

void collective(void* operand, const std::function<void(void* (&)[32])>& compute) {
  Warp& warp = *current->warp;
  warp.operand[current->place.lane] = operand;
  if (warp.barrier.arrived + 1 == warp.barrier.expected) compute(warp.operand);
  wait(warp.barrier);
}

void copy_async(void* target, const void* source) {
  if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) % 16 != 0) {
    fail("an asynchronous copy does not lie on 16 bytes");
  }
  std::memset(target, 0xFF, 16);
  current->groups.back().push_back({target, source});
}

void commit_copies() { current->groups.emplace_back(); }

void wait_copies(int pending) {
  // The last group is the one that is still being filled.
  while (current->groups.size() > static_cast<size_t>(pending) + 1) {
    for (const Copy& copy : current->groups.front()) complete(copy);
    current->groups.pop_front();
  }
}

cudaError_t run(const std::function<void()>& kernel, dim3 grid, unsigned threads, size_t shared, int cluster,
                bool cooperative) {
  if (grid.x % cluster != 0) return cudaErrorInvalidConfiguration;
  tfb::cuda::Machine machine;
  const cudaError_t status = tfb::cuda::current_machine(machine);
  if (status != cudaSuccess) return status;
  if (shared > static_cast<size_t>(machine.shared_bytes) || cluster > machine.cluster_blocks) {
    return cudaErrorLaunchOutOfResources;
  }
  body = &kernel;
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blocks.emplace_back(x, y, 0);
      if (!cooperative && static_cast<int>(blocks.size()) == cluster) {
        run_cohort(blocks, grid, threads, shared);
        blocks.clear();
      }
    }
  }
  if (cooperative) run_cohort(blocks, grid, threads, shared);
  return cudaSuccess;
}

}  // namespace emulator

// The device that machine.cu asks about.
extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 3
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
                                                                  : 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
}
