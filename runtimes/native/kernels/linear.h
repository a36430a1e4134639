// y = residual + activation(norm(x) @ weight + bias), on rows.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"
#include "packed_weights.h"

namespace attn_deploy::native {

// How the work is split: row_blocks x column_blocks blocks, each to be run once, in any order and by any thread. Made
// from the sizes alone, so that results do not depend on the number of threads.
struct LinearPlan {
  int64_t rows = 0;
  int64_t in = 0;
  int64_t out = 0;
  Activation activation = Activation::kNone;
  // LayerNorm of the rows of x first. Its scale and bias are part of the weights: scale[i] * weight[i, o], and
  // bias[o] + sum over i of norm_bias[i] * weight[i, o].
  bool normalizes = false;
  float epsilon = 0.0f;
  int64_t row_blocks = 1;
  int64_t column_blocks = 1;
  int64_t scratch = 0;  // floats that RunLinear needs, at a cache line

  int64_t blocks() const { return row_blocks * column_blocks; }
};

// x [rows, in], residual (or null) and y [rows, out]; strides in floats from row to row. y overlaps none of the others.
struct LinearArrays {
  const float* x = nullptr;
  int64_t x_stride = 0;
  PackedWeights weights;
  const float* residual = nullptr;
  int64_t residual_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// Fills in the split and scratch of a plan whose other fields are set.
ATTN_DEPLOY_DECLARE_KERNEL(void, PlanLinear, LinearPlan* plan)

// One of plan.blocks() blocks.
ATTN_DEPLOY_DECLARE_KERNEL(void, RunLinear, const LinearPlan& plan, const LinearArrays& arrays, int64_t block,
                           float* scratch)

}  // namespace attn_deploy::native
