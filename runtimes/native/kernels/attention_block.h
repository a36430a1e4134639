// The attention block of a windowed transformer, window by window: y = x + attention(norm(x) Wqkv + bqkv) Wout + bout.
//
// Query, key and value of a window never leave the cache: its tokens are gathered and normalized, projected, attended
// to, projected back and added to x where they came from. LayerNorm: Ba et al. 2016, equation 4; the block: Liu et al.
// 2021 (Swin), equation 3.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "attention.h"
#include "packed_weights.h"

namespace attn_deploy::native {

// The block but for its projections.
struct WindowAttention {
  int64_t tokens = 0;    // of x
  int64_t channels = 0;  // heads * head_dim
  int64_t heads = 0;
  int64_t windows = 0;
  int64_t length = 0;                // tokens of a window
  const int64_t* index = nullptr;    // [windows, length], of tokens; -1 is padding: it reads `fill`, and writes nothing
  float epsilon = 0.0f;
  AttentionShape shape;
  float scale = 1.0f;
  const float* fill = nullptr;           // [3, heads, head_dim], where the index has padding
  const float* head_scale = nullptr;     // [heads], multiplies scale; null: none
  const float* bias = nullptr;           // [distinct, heads, length, length]; null: none
  const int64_t* bias_index = nullptr;   // [windows] -> distinct
};

struct AttentionBlockPlan : WindowAttention {
  PackedWeights qkv;  // [channels, 3 * channels]; LayerNorm's scale and bias are part of it
  PackedWeights out;  // [channels, channels]
};

struct AttentionBlockScratch {
  int64_t floats = 0;
  int64_t ints = 0;
};

// What RunAttentionBlock takes for `windows` windows at once; the floats start at a multiple of 64 bytes.
ATTN_DEPLOY_DECLARE_KERNEL(AttentionBlockScratch, AttentionBlockScratchOf, const AttentionBlockPlan& plan,
                           int64_t windows)

// The tokens of windows [begin, end) of one sample, x and y [tokens, channels]. y overlaps no other array. Calls on
// different windows or samples may run at the same time, each with scratch memory of its own.
ATTN_DEPLOY_DECLARE_KERNEL(void, RunAttentionBlock, const AttentionBlockPlan& plan, const float* x, float* y,
                           int64_t begin, int64_t end, float* floats, int64_t* ints)

// y = x + bias_out for the given tokens: those of no window, whose attention is 0.
ATTN_DEPLOY_DECLARE_KERNEL(void, RunOutsideWindows, const WindowAttention& attention, const float* x, float* y,
                           const float* bias_out, const int64_t* tokens, int64_t count)

}  // namespace attn_deploy::native
