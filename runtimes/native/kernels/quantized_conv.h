// Convolution of 8-bit maps [height, width, channels] with 8-bit weights, and what stands behind it, to 8-bit maps:
//
//   y = level(activation(scale * sum(weight * (x - x_zero)) + bias + residual_scale * (residual - residual_zero)))
//
// Scales are static, per output channel; level(v) is v / y_scale + y_zero, rounded and clamped to 0..255.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace attn_deploy::native {

// What becomes of a sum. All [channels]. Where the activation is none or ReLU these are in units of levels:
//   y = clamp(sum * multiplier + bias + residual * residual_multiplier, low, 255)
// with zeros in the bias; else
//   y = clamp(activation(sum * multiplier + bias + residual * residual_multiplier) * inverse + zero, low, 255)
struct Requantization {
  const float* multiplier = nullptr;
  const float* bias = nullptr;
  const float* residual_multiplier = nullptr;
  const float* inverse = nullptr;
};

// Fields up to `has_residual` describe one sample; PlanQuantizedConv fills in the rest from them alone, so that
// results do not depend on the number of threads. `scratch` is in floats, at a cache line.
struct QuantizedConvPlan {
  int64_t height = 0;
  int64_t width = 0;
  int64_t in = 0;
  int64_t out_height = 0;
  int64_t out_width = 0;
  int64_t out = 0;
  int64_t kernel_height = 1;
  int64_t kernel_width = 1;
  int64_t stride = 1;
  int64_t pad_top = 0;
  int64_t pad_left = 0;
  uint8_t x_zero = 0;
  uint8_t y_zero = 0;
  Activation activation = Activation::kNone;  // kNone, kRelu, kSilu or kHardswish
  bool has_residual = false;

  int64_t row_blocks = 1;
  int64_t column_blocks = 1;
  int64_t scratch = 0;

  int64_t blocks() const { return row_blocks * column_blocks; }
};

// x [height, width, in], residual (or null) and y [out_height, out_width, out].
struct QuantizedConvArrays {
  const uint8_t* x = nullptr;
  const void* weights = nullptr;
  const uint8_t* residual = nullptr;
  uint8_t* y = nullptr;
};

// How many bytes PackQuantizedConv writes, at a cache line.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(int64_t, QuantizedConvSize, int64_t depth, int64_t out)

// Packs weight [out, depth] (depth = kernel_height * kernel_width * in, in this order; 128 is the weight 0) and what
// becomes of the sums.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, PackQuantizedConv, const uint8_t* weight, const Requantization& requantization,
                                uint8_t x_zero, int64_t depth, int64_t out, void* packed)

ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, PlanQuantizedConv, QuantizedConvPlan* plan)

// One of plan.blocks() blocks, in any order and by any thread.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, RunQuantizedConv, const QuantizedConvPlan& plan,
                                const QuantizedConvArrays& arrays, int64_t block, float* scratch)

}  // namespace attn_deploy::native
