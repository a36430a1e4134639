// y = residual + activation(norm(x) @ weight + bias), on rows, in 8 bits: the rows of norm(x) as quantize_rows.h has
// them, the weights as quantized_weights.h.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"
#include "quantized_weights.h"

namespace attn_deploy::native {

// How the work is split: row_blocks x column_blocks blocks, each to be run once, in any order and by any thread. Made
// from the sizes alone, so that results do not depend on the number of threads.
struct QuantizedLinearPlan {
  int64_t rows = 0;
  int64_t in = 0;
  int64_t out = 0;
  Activation activation = Activation::kNone;
  bool normalizes = false;  // LayerNorm of the rows of x first
  float epsilon = 0.0f;
  int64_t row_blocks = 1;
  int64_t column_blocks = 1;
  int64_t scratch = 0;  // floats that RunQuantizedLinear needs, at a cache line

  int64_t blocks() const { return row_blocks * column_blocks; }
};

// x [rows, in], residual (or null) and y [rows, out]; strides in floats from row to row. y overlaps none of the others.
// Weights of one group. norm_scale and norm_bias [in], finite, where the plan normalizes.
struct QuantizedLinearArrays {
  const float* x = nullptr;
  int64_t x_stride = 0;
  QuantizedWeights weights;
  const float* norm_scale = nullptr;
  const float* norm_bias = nullptr;
  const float* residual = nullptr;
  int64_t residual_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// Fills in the split and scratch of a plan whose other fields are set.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, PlanQuantizedLinear, QuantizedLinearPlan* plan)

// One of plan.blocks() blocks.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, RunQuantizedLinear, const QuantizedLinearPlan& plan,
                                const QuantizedLinearArrays& arrays, int64_t block, float* scratch)

}  // namespace attn_deploy::native
