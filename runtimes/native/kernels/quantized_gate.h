// Gates on 8-bit maps [pixels, channels]: y = level(activation(x * gate + residual)); and the mean of each channel.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../isa.h"

namespace attn_deploy::native {

// gate and x_scale are [channels], residual (or null) like x; residual_scale is [channels]. inverse [channels] is 1 / the
// scale of y.
struct QuantizedGateArrays {
  const uint8_t* x = nullptr;
  const float* x_scale = nullptr;
  uint8_t x_zero = 0;
  const float* gate = nullptr;
  const uint8_t* residual = nullptr;
  const float* residual_scale = nullptr;
  uint8_t residual_zero = 0;
  uint8_t* y = nullptr;
  const float* inverse = nullptr;
  uint8_t y_zero = 0;
  int64_t channels = 0;
};

// Floats of scratch, at a cache line.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(int64_t, QuantizedGateScratch, int64_t channels)

// Pixels [begin, end) of one sample. activation: kNone, kRelu, kSilu or kHardswish.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, RunQuantizedGate, const QuantizedGateArrays& arrays, Activation activation,
                                int64_t begin, int64_t end, float* scratch)

// mean[c] = scale[c] * (mean over pixels of x[pixel, c] - zero) for channels [begin, end); x [pixels, channels], fewer
// than 2^23 pixels.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, RunQuantizedPool, const uint8_t* x, int64_t pixels, int64_t channels,
                                const float* scale, uint8_t zero, int64_t begin, int64_t end, float* mean)

}  // namespace attn_deploy::native
