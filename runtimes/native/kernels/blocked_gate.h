// Gates and activations on maps in ONNX Runtime's blocked layout: [planes, pixels, block], a plane for every `block`
// channels of a sample, block 8 or 16. Functions take pixels of one plane; calls on different ones may run at once.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace attn_deploy::native {

// `residual` is null where there is none. `output` overlaps no input.
struct BlockedGateArrays {
  const float* x;
  const float* gate;  // [block], or [pixels] where the gate is per pixel
  const float* residual;
  float* output;
};

// output = activation(x * gate + residual), all [pixels, block].
ATTN_DEPLOY_DECLARE_KERNEL(void, BlockedGate, Activation activation, bool per_pixel, int64_t block, int64_t pixels,
                           const BlockedGateArrays& arrays)

// y = activation(x), both [pixels, block]; 0 in all but the first `channels` of a block.
ATTN_DEPLOY_DECLARE_KERNEL(void, BlockedActivate, Activation activation, int64_t block, int64_t channels,
                           int64_t pixels, const float* x, float* y)

}  // namespace attn_deploy::native
