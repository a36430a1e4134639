// y = x + activation(norm(x) @ weight1 + bias1) @ weight2 + bias2, on rows, both products in 8-bit integers.
//
// The rows of norm(x) are quantized as kernels/quantize_rows.h says, and those of the hidden layer once for each of
// `groups` groups of its columns: a group of a few rows is made, activated and quantized while it is in L1, and its part
// of the second product is added to y in float32. The hidden layer as a whole is nowhere.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"
#include "quantized_weights.h"

namespace attn_deploy::native {

// How the work is split: `blocks` blocks of rows, each to be run once, in any order and by any thread.
struct QuantizedFeedForwardPlan {
  int64_t rows = 0;
  int64_t channels = 0;
  int64_t hidden = 0;
  int64_t groups = 1;  // divides hidden
  Activation activation = Activation::kNone;
  float epsilon = 0.0f;
  int64_t blocks = 1;
  int64_t scratch = 0;  // floats that RunQuantizedFeedForward needs, at a cache line
};

// x and y [rows, channels], strides in floats from row to row; y does not overlap x. norm_scale and norm_bias
// [channels]; weights1 [channels, hidden] in one group, weights2 [hidden, channels] in plan.groups.
struct QuantizedFeedForwardArrays {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* norm_scale = nullptr;
  const float* norm_bias = nullptr;
  QuantizedWeights weights1;
  QuantizedWeights weights2;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// Fills in the split and scratch of a plan whose other fields are set.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, PlanQuantizedFeedForward, QuantizedFeedForwardPlan* plan)

// One of plan.blocks blocks.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, RunQuantizedFeedForward, const QuantizedFeedForwardPlan& plan,
                                const QuantizedFeedForwardArrays& arrays, int64_t block, float* scratch)

}  // namespace attn_deploy::native
