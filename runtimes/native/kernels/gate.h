// The Gate kernel: activation(x * gate + residual) in one pass over the tensors.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../gate_plan.h"
#include "../isa.h"

namespace attn_deploy::native {

// `residual` is null where the form has none. `output` overlaps no input.
struct GateArrays {
  const float* x;
  const float* gate;
  const float* residual;
  float* output;
};

// Writes output elements [begin, end) of the flat tensor; 0 <= begin <= end <= plan.size. Ranges that do not overlap
// may run at the same time; how a tensor is cut into ranges changes no bit.
ATTN_DEPLOY_DECLARE_KERNEL(void, RunGate, const GatePlan& plan, Activation activation, const GateArrays& arrays,
                           int64_t begin, int64_t end)

}  // namespace attn_deploy::native
