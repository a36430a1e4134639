#include "gate_plan.h"

#include <algorithm>

namespace attn_deploy::native {

bool GateBroadcasts(const Shape& x, const Shape& gate) {
  if (gate.rank != x.rank) return false;
  for (int64_t d = 0; d < x.rank; ++d) {
    if (gate.dims[d] != x.dims[d] && gate.dims[d] != 1) return false;
  }
  return true;
}

GatePlan PlanGate(const Shape& x, const Shape& gate) {
  // From the innermost dim outwards, so `reversed` has its dims the other way round. A dim of 1 belongs to any
  // neighbour and is dropped.
  GatePlan reversed;
  reversed.rank = 0;
  reversed.size = 1;
  int64_t gate_size = 1;
  for (int64_t d = x.rank - 1; d >= 0; --d) {
    const int64_t extent = x.dims[d];
    reversed.size *= extent;
    if (extent == 1) continue;
    const bool repeats = gate.dims[d] == 1;
    const int last = reversed.rank - 1;
    if (last >= 0 && repeats == (reversed.gate_strides[last] == 0)) {
      reversed.extents[last] *= extent;
    } else {
      reversed.extents[reversed.rank] = extent;
      reversed.gate_strides[reversed.rank] = repeats ? 0 : gate_size;
      ++reversed.rank;
    }
    if (!repeats) gate_size *= extent;
  }
  if (reversed.rank == 0) {  // one element
    reversed.rank = 1;
    reversed.extents[0] = 1;
    reversed.gate_strides[0] = 0;
  }
  GatePlan plan = reversed;
  std::reverse(plan.extents, plan.extents + plan.rank);
  std::reverse(plan.gate_strides, plan.gate_strides + plan.rank);
  return plan;
}

}  // namespace attn_deploy::native
