// Depthwise convolution of 8-bit maps, as quantized_conv.h has it: each channel with a square window of its own.
#pragma once

#include <cstdint>

#include "quantized_conv.h"

namespace attn_deploy::native {

// Uses plan.row_blocks only: column_blocks stays 1. plan.in and plan.out are the channels, kernel_width is
// kernel_height, at most kMostDepthwiseTaps.
constexpr int64_t kMostDepthwiseTaps = 15;

// Floats that PackQuantizedDepthwise writes, at a cache line.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(int64_t, QuantizedDepthwiseSize, int64_t taps, int64_t channels)

// weight [channels, taps * taps]; 128 is the weight 0.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, PackQuantizedDepthwise, const uint8_t* weight,
                                const Requantization& requantization, int64_t taps, int64_t channels, float* packed)

ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, PlanQuantizedDepthwise, QuantizedConvPlan* plan)

// One of plan.row_blocks blocks; arrays.weights are the packed floats.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, RunQuantizedDepthwise, const QuantizedConvPlan& plan,
                                const QuantizedConvArrays& arrays, int64_t block, float* scratch)

}  // namespace attn_deploy::native
