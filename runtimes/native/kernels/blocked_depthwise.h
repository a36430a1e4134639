// Depthwise convolution of maps in ONNX Runtime's blocked layout, with its activation and the sums over its plane; and
// the same behind a 1x1 convolution whose result never leaves the cache: the front of an inverted bottleneck (Sandler et
// al. 2018, section 3.3).
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace attn_deploy::native {

// One block of channels of one sample.
struct DepthwiseParams {
  int64_t block;  // 8 or 16
  int64_t height, width;
  int64_t out_height, out_width;
  int64_t taps;  // of the kernel, in both directions
  int64_t stride;  // 1 or 2
  int64_t pad_top, pad_left;
  const float* x;       // [height, width, block]; without `expand`
  const float* weight;  // [taps, taps, block]
  const float* bias;    // [block]
  Activation activation;
  float* y;  // [out_height, out_width, block]

  // What the rows of x are made of, where x is null: activation(weight @ input + bias) for this block of channels.
  int64_t in_blocks;
  const float* input;          // [in_blocks, height * width, block]
  const float* expand_weight;  // [in_blocks, block (in), block (out)]
  const float* expand_bias;    // [block]
  Activation expand_activation;
};

// Floats of scratch that BlockedDepthwise needs.
ATTN_DEPLOY_DECLARE_KERNEL(int64_t, DepthwiseScratch, const DepthwiseParams& params)

// Rows [first, last) of y. sums [block]: of these rows, or null.
ATTN_DEPLOY_DECLARE_KERNEL(void, BlockedDepthwise, const DepthwiseParams& params, int64_t first, int64_t last,
                           float* scratch, float* sums)

}  // namespace attn_deploy::native
