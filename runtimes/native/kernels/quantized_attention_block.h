// The attention block of a windowed transformer, as kernels/attention_block.h has it, with projections in 8-bit integers.
//
// The rows that a projection takes are quantized as kernels/quantize_rows.h says: those of LayerNorm, and what
// attention gives. Attention itself is in float32.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "attention_block.h"
#include "quantized_weights.h"

namespace attn_deploy::native {

struct QuantizedAttentionBlockPlan : WindowAttention {
  const float* norm_scale = nullptr;  // [channels]
  const float* norm_bias = nullptr;   // [channels]
  QuantizedWeights qkv;               // [channels, 3 * channels]
  QuantizedWeights out;               // [channels, channels]
};

// As those of kernels/attention_block.h.
ATTN_DEPLOY_DECLARE_INT8_KERNEL(AttentionBlockScratch, QuantizedAttentionBlockScratchOf,
                                const QuantizedAttentionBlockPlan& plan, int64_t windows)
ATTN_DEPLOY_DECLARE_INT8_KERNEL(void, RunQuantizedAttentionBlock, const QuantizedAttentionBlockPlan& plan,
                                const float* x, float* y, int64_t begin, int64_t end, float* floats, int64_t* ints)

}  // namespace attn_deploy::native
