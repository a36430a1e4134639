// 1x1 convolution of maps in ONNX Runtime's blocked layout, with everything around it in its epilogue.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace attn_deploy::native {

// y = activation(output_gate * (weight @ (input_gate * x) + bias) + residual) for one sample. Channels come in blocks.
struct PointwiseParams {
  int64_t block;       // 8 or 16
  int64_t in_blocks;
  int64_t out_blocks;
  int64_t pixels;
  const float* x;      // [in_blocks, pixels, block]
  const float* weight;  // [out_blocks, in_blocks, block (in), block (out)], as ONNX Runtime reorders it
  const float* bias;    // [out_blocks, block]
  const float* input_gate;   // [in_blocks, block], or null
  const float* output_gate;  // [out_blocks, block], or null
  const float* residual;     // like y, or null
  Activation activation;
  float* y;  // [out_blocks, pixels, block]
};

// Output blocks that one call does well together; ranges should be multiples of it.
ATTN_DEPLOY_DECLARE_KERNEL(int64_t, PointwiseGroup, int64_t block)

// Floats of scratch that BlockedPointwise needs: 0 without an input gate.
ATTN_DEPLOY_DECLARE_KERNEL(int64_t, PointwiseScratch, const PointwiseParams& params)

// Output blocks [first_block, last_block) of pixels [first_pixel, last_pixel). A pixel's results are the same bits
// whatever the ranges are. NaN and infinity come through as in a plain sum.
ATTN_DEPLOY_DECLARE_KERNEL(void, BlockedPointwise, const PointwiseParams& params, int64_t first_block,
                           int64_t last_block, int64_t first_pixel, int64_t last_pixel, float* scratch)

}  // namespace attn_deploy::native
