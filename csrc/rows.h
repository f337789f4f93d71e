// Where the rows of a call's groups lie in x. Items lie one after the other; an item is first `lead` rows of the mean
// and then `each` rows of every group in turn. Without items x is one group after the other: one item without a lead.
#pragma once

#include <cstdint>

#include "types.h"

namespace tfb {

struct RowMap {
  int64_t first = 0;    // the first group's first row in x
  int64_t each = 1;     // rows of a group that lie together: of one item
  int64_t skip = 0;     // rows of others between a group's rows in one item and in the next
  uint32_t factor = 0;  // a row's item without a division, see item_of; 0 for one item
  int32_t shift = 0;

  RowMap() = default;
  // Groups of items * each rows.
  RowMap(int64_t first, int64_t each, int64_t pitch, int64_t items) : first(first), each(each), skip(pitch - each) {
    if (items <= 1) return;
    for (shift = 31; int64_t{1} << (shift - 31) < each;) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + static_cast<uint64_t>(each) - 1) / each);
  }
};

// The item of a group's row `number`: number / each for numbers below 2^31, as 2^shift <= factor * each < 2^shift +
// each and each <= 2^(shift - 31) (Granlund and Montgomery, "Division by invariant integers using multiplication",
// PLDI'94).
TFB_HOST_DEVICE int64_t item_of(const RowMap& map, int64_t number) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(number)) * map.factor >> map.shift);
}

// The row of x of a group's row `number`.
TFB_HOST_DEVICE int64_t row_of(const RowMap& map, int64_t group, int64_t number) {
  return map.first + group * map.each + number + item_of(map, number) * map.skip;
}

// A call's rows: those of the samples, a group each, and those of the mean, one group. Partial sums stand in the order
// of the groups, the rows of the mean behind them.
struct CallRows {
  int64_t groups = 0, group_rows = 0, lead_rows = 0;
  RowMap samples, lead;

  CallRows(int64_t rows, int64_t groups, int64_t lead_each, int64_t each) : groups(groups) {
    if (each == 0) {
      group_rows = groups == 0 ? 0 : rows / groups;
      samples = RowMap(0, group_rows, group_rows, 1);
      return;
    }
    const int64_t pitch = lead_each + groups * each;
    const int64_t items = pitch == 0 ? 0 : rows / pitch;
    group_rows = items * each;
    lead_rows = items * lead_each;
    samples = RowMap(lead_each, each, pitch, items);
    if (lead_rows > 0) lead = RowMap(0, lead_each, pitch, items);
  }
  int64_t sample_rows() const { return groups * group_rows; }
  // The row of x of a place in the order of the groups.
  int64_t row_of_place(int64_t place) const {
    if (place >= sample_rows()) return row_of(lead, 0, place - sample_rows());
    if (samples.each == group_rows) return samples.first + place;
    const int64_t group = place / group_rows;
    return row_of(samples, group, place - group * group_rows);
  }
};

}  // namespace tfb
