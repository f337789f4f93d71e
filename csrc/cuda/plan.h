// How a call of shrink in half precision is cut up: a pure function of its sizes and of what the machine has, so that
// machines that are not at hand can be planned for.
#pragma once

#include <cstdint>

#include "../mode.h"
#include "tuning.h"

namespace tfb::cuda {

struct Machine {
  int multiprocessors = 0;
  int shared_bytes = 0;    // that a block may ask for
  int cluster_blocks = 1;  // blocks of the largest cluster in which each may have that much; 1 where there are none
};

// A row of a stage has 16 chunks of 16 bytes. Four of nothing lie in the middle of a pair of rows, so that the two,
// which are read together, lie in different banks.
constexpr int kRowChunks = kStageColumns / 8;
constexpr int kPairChunks = 2 * kRowChunks + 4;
constexpr int kStageChunks = kTileRows / 2 * kPairChunks;

// What a block keeps in shared memory: its warps' queues of x; the sums of the tiles of rows that its warps have in
// hand; the weights of its panel's columns. flipout sums M x and E (s o x) apart.
constexpr int shrink_planes(Mode mode) { return mode == Mode::kFlipout ? 2 : 1; }
constexpr int queue_bytes(int warps) { return warps * kShrinkStages * kStageChunks * 16; }
// Floats between rows of the sums: the planes and, in token mode, |x|^2; even, and not a multiple of 32 banks.
constexpr int sum_pitch(Mode mode, int tiles) { return shrink_planes(mode) * kTileRanks * tiles + 2; }
constexpr int tile_sum_bytes(Mode mode, int tiles) { return kTileRows * sum_pitch(mode, tiles) * 4; }
constexpr int column_weight_bytes(Mode mode, int tiles) { return shrink_planes(mode) * kTileRanks * tiles * 2; }

// Rank tiles and warps of a block: where its weights leave a multiprocessor to one block, it has more warps to share
// them.
struct Choice {
  int tiles, warps;
};
constexpr Choice kClusterChoices[] = {{1, 8}, {2, 8}, {3, 8}, {4, 12}, {8, 8}};
constexpr Choice kPortableChoices[] = {{1, 4}, {2, 4}, {4, 4}};
constexpr Choice kRareChoices[] = {{1, 4}, {2, 4}};  // rows off 16 bytes, and flipout
constexpr Choice kTokenChoices[] = {{2, 4}};

// The narrowest choice, by which the panels are measured: it fits every machine.
constexpr Choice least_choice(Mode mode) { return mode == Mode::kToken ? kTokenChoices[0] : kRareChoices[0]; }

constexpr int64_t shared_bytes(Mode mode, const Choice& choice, int64_t columns) {
  return queue_bytes(choice.warps) + choice.warps * tile_sum_bytes(mode, choice.tiles) +
         columns * column_weight_bytes(mode, choice.tiles);
}

// The most columns of a panel.
constexpr int64_t most_panel_columns(Mode mode) {
  const Choice least = least_choice(mode);
  const int64_t room = kLeastSharedBytes - shared_bytes(mode, least, 0);
  return room / column_weight_bytes(mode, least.tiles) / kStageColumns * kStageColumns;
}

// The panels add up in their order, so their number, on which a row's last bit depends, is a function of n and the mode
// alone: not of the batch, the layers beside, the alignment or the machine. (Other bits differ between machines only
// where their instructions do.)
constexpr int64_t shrink_panels(Mode mode, int64_t n) {
  if (n < kPanelMinColumns) return 1;
  if (n <= kPanelManyColumns) return 8;
  const int64_t needed = (n + most_panel_columns(mode) - 1) / most_panel_columns(mode);
  return needed < kMaxCluster ? kMaxCluster : needed;
}

struct ShrinkPlan {
  Choice choice;          // no tiles where the machine has less than kLeastSharedBytes
  int64_t panels;         // of columns, one a block
  int64_t panel_columns;  // a multiple of a stage
  bool clustered;         // the panels of a range of rows are a cluster; otherwise they meet in global memory
  int round_tiles;        // tiles of rows between two meetings of a cluster: as many as the sums have room for
  int64_t shared;         // bytes of a block
};

// The first choice with room for all the tiles, else the last that shared memory holds.
template <int kCount>
constexpr Choice choose(const Choice (&choices)[kCount], Mode mode, int64_t columns, int64_t tiles, int64_t room) {
  Choice best{0, 0};
  for (const Choice& choice : choices) {
    if (shared_bytes(mode, choice, columns) > room) continue;
    best = choice;
    if (choice.tiles >= tiles) break;
  }
  return best;
}

// Tiles of a warp in a round: as many as leave room for two blocks on a multiprocessor of compute capability 9.0, up to
// four; at least one.
constexpr int warp_tiles(int64_t fixed_bytes, int64_t sum_bytes, int64_t room) {
  constexpr int64_t kHalf = 112 * 1024;
  const int64_t fit = ((room < kHalf ? room : kHalf) - fixed_bytes) / sum_bytes;
  return fit < 1 ? 1 : fit > 4 ? 4 : static_cast<int>(fit);
}

// `tiles` of eight ranks are asked for; `aligned`: the rows of x start and end on 16 bytes. Whether the blocks meet in
// clusters does not depend on `tiles`.
constexpr ShrinkPlan plan_shrink(Mode mode, int64_t n, int64_t tiles, bool aligned, const Machine& machine) {
  ShrinkPlan plan{};
  plan.panels = shrink_panels(mode, n);
  plan.panel_columns = ((n + plan.panels - 1) / plan.panels + kStageColumns - 1) / kStageColumns * kStageColumns;
  plan.clustered = plan.panels <= machine.cluster_blocks;
  const int64_t columns = plan.panel_columns;
  const int64_t room = machine.shared_bytes;
  if (mode == Mode::kToken) {
    plan.choice = choose(kTokenChoices, mode, columns, tiles, room);
  } else if (!aligned || mode == Mode::kFlipout) {
    plan.choice = choose(kRareChoices, mode, columns, tiles, room);
  } else {
    if (plan.clustered && machine.cluster_blocks > 1) plan.choice = choose(kClusterChoices, mode, columns, tiles, room);
    if (plan.choice.tiles == 0) {
      plan.clustered = plan.panels == 1;
      plan.choice = choose(kPortableChoices, mode, columns, tiles, room);
    }
  }
  if (plan.choice.tiles == 0) return plan;
  const int64_t sums = plan.choice.warps * tile_sum_bytes(mode, plan.choice.tiles);
  const int64_t fixed = shared_bytes(mode, plan.choice, columns) - sums;
  const int own = warp_tiles(fixed, sums, room);
  plan.round_tiles = plan.choice.warps * own;
  plan.shared = fixed + own * sums;
  return plan;
}

}  // namespace tfb::cuda
