// The Gate kernel: activation(x * gate + residual) in one pass over the tensors. Knows nothing of ONNX Runtime.
#pragma once

#include <cstdint>

#include "activation.h"
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

// `residual` is null where the form has none. `output` overlaps no input.
struct GateArrays {
  const float* x;
  const float* gate;
  const float* residual;
  float* output;
};

// Whether the gate has x's rank and every dim is x's or 1.
bool GateBroadcasts(const Shape& x, const Shape& gate);

// x of rank 1 to kMaxRank; GateBroadcasts(x, gate) holds.
GatePlan PlanGate(const Shape& x, const Shape& gate);

// Writes output elements [begin, end) of the flat tensor; 0 <= begin <= end <= plan.size. Ranges that do not overlap
// may run at the same time.
void RunGate(const GatePlan& plan, Activation activation, const GateArrays& arrays, int64_t begin, int64_t end);

}  // namespace attn_deploy::native
