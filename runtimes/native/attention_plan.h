// All heads of an attention operator, and how they are split into blocks of work. Knows nothing of ONNX Runtime.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace attn_deploy::native {

// Where a tensor's tokens lie, in elements; a head's elements lie side by side.
struct TokenStrides {
  int64_t sample = 0;
  int64_t token = 0;
  int64_t head = 0;
};

// softmax(scale * query key^T + bias, masked) value for every sample, window and head.
struct AttentionProblem {
  AttentionShape shape;
  int64_t batch = 1;
  int64_t windows = 1;
  int64_t heads = 1;
  int64_t kv_heads = 1;  // a divisor of heads: each serves heads / kv_heads query heads in a row
  float scale = 1.0f;

  const float* query = nullptr;
  const float* key = nullptr;
  const float* value = nullptr;
  float* output = nullptr;
  TokenStrides query_strides, key_strides, value_strides, output_strides;

  const int64_t* index = nullptr;     // [windows, query_len], or null: one window of all tokens
  const float* fill = nullptr;        // [3, heads, head_dim], where the index holds -1
  const float* head_scale = nullptr;  // [heads], multiplies the scale

  const float* bias = nullptr;
  int64_t bias_strides[4] = {};         // [sample or distinct window, head, row, key]; 0 where it repeats
  const int64_t* bias_index = nullptr;  // [windows], which distinct window; null: the sample counts
  const bool* mask = nullptr;
  int64_t mask_strides[4] = {};  // [sample, head, row, key]
};

// A unit is a part of the rows of one head; a block is a few units.
struct AttentionBlocks {
  int64_t parts = 1;            // units of a head
  int64_t units = 0;
  int64_t units_per_block = 1;
  int64_t count = 0;
  int64_t scratch_floats = 0;   // of each thread
};

// Blocks for the instruction set that runs here; each head's rows are split into `parts`, or into what is best where
// that is 0. Every dim but batch, windows, heads and query_len is at least 1.
AttentionBlocks SplitAttention(const AttentionProblem& problem, int64_t parts = 0);

// Runs block `block` of blocks.count. Blocks may run at the same time, each with scratch memory of its own.
void RunAttentionUnits(const AttentionProblem& problem, const AttentionBlocks& blocks, int64_t block, float* scratch);

}  // namespace attn_deploy::native
