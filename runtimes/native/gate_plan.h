// How a gate lies along the tensor that it multiplies: what the Gate kernels of every device start from.
#pragma once

#include <cstdint>

#include "shape.h"

namespace attn_deploy::native {

// What is left of the shapes once neighbouring dims along which the gate behaves alike are merged:
// [N, C, H, W] with a gate [N, C, 1, 1] becomes extents {N * C, H * W} and gate strides {1, 0}.
struct GatePlan {
  int rank = 1;                         // 1 to kMaxRank
  int64_t extents[kMaxRank] = {};       // of x, residual and output, all dense
  int64_t gate_strides[kMaxRank] = {};  // in elements; 0 where the gate repeats. The innermost is 1 or 0.
  int64_t size = 0;                     // elements of x
};

// Whether the gate has x's rank and every dim is x's or 1.
bool GateBroadcasts(const Shape& x, const Shape& gate);

// x of rank 1 to kMaxRank; GateBroadcasts(x, gate) holds.
GatePlan PlanGate(const Shape& x, const Shape& gate);

}  // namespace attn_deploy::native
