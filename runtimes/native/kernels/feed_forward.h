// y = x + activation(norm(x) @ weight1 + bias1) @ weight2 + bias2, on rows, the hidden layer never leaving the cache.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"
#include "packed_weights.h"

namespace attn_deploy::native {

// How the work is split: `blocks` blocks of rows, each to be run once, in any order and by any thread.
struct FeedForwardPlan {
  int64_t rows = 0;
  int64_t channels = 0;
  int64_t hidden = 0;
  Activation activation = Activation::kNone;
  float epsilon = 0.0f;
  int64_t blocks = 1;
  int64_t scratch = 0;  // floats that RunFeedForward needs, at a cache line
};

// x and y [rows, channels], strides in floats from row to row; y does not overlap x. weights1 [channels, hidden] with
// the norm's scale and bias in them, as LinearPlan has it; weights2 [hidden, channels].
struct FeedForwardArrays {
  const float* x = nullptr;
  int64_t x_stride = 0;
  PackedWeights weights1;
  PackedWeights weights2;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// Fills in the split and scratch of a plan whose other fields are set.
ATTN_DEPLOY_DECLARE_KERNEL(void, PlanFeedForward, FeedForwardPlan* plan)

// One of plan.blocks blocks.
ATTN_DEPLOY_DECLARE_KERNEL(void, RunFeedForward, const FeedForwardPlan& plan, const FeedForwardArrays& arrays,
                           int64_t block, float* scratch)

}  // namespace attn_deploy::native
