// Attention of one head: softmax(scale * query key^T + bias, masked) value, FP32. Knows nothing of ONNX Runtime.
//
// The score block of a few rows is held in cache: it is made, bent (softcap, bias, masks), turned into weights and
// multiplied with value before the next rows' is made; weights are divided by their sum last. Where there are more keys
// than fit the cache, they come in blocks, and running maxima and sums correct what is already there: Milakov and
// Gimelshein, Online normalizer calculation for softmax, 2018, algorithm 3; Dao et al., FlashAttention, 2022,
// algorithm 1. Scratch memory then does not depend on how many keys there are.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace attn_deploy::native {

// What the heads of a call have in common.
struct AttentionShape {
  int64_t query_len = 0;
  int64_t key_len = 0;
  int64_t head_dim = 0;   // of query and key, at least 1
  int64_t value_dim = 0;  // of value and output, at least 1
  bool causal = false;    // row i sees keys 0..i
  bool cosine = false;    // query and key are divided by their lengths, which count as kShortestLength at least
  float softcap = 0.0f;   // scores s become softcap * tanh(s / softcap); 0: they do not
};

constexpr float kShortestLength = 1e-12f;

// One head of one sample or window. Strides are in elements, from one token to the next; a token's head_dim or
// value_dim elements lie side by side. Nothing needs to be aligned.
struct AttentionHead {
  const float* query = nullptr;
  const float* key = nullptr;
  const float* value = nullptr;
  float* output = nullptr;
  int64_t query_stride = 0;
  int64_t key_stride = 0;
  int64_t value_stride = 0;
  int64_t output_stride = 0;
  float scale = 1.0f;

  // Null, or query_len = key_len token numbers: row and key i are token index[i]. -1 reads the fills, and is not
  // written.
  const int64_t* index = nullptr;
  const float* query_fill = nullptr;
  const float* key_fill = nullptr;
  const float* value_fill = nullptr;

  // bias[row * bias_row_stride + key * bias_key_stride], added to scores; the key's stride is 1 or 0. Null: none.
  const float* bias = nullptr;
  int64_t bias_row_stride = 0;
  int64_t bias_key_stride = 1;

  // As bias; true where a row sees a key. A row that sees none gives 0.
  const bool* mask = nullptr;
  int64_t mask_row_stride = 0;
  int64_t mask_key_stride = 1;
};

// How many floats of scratch memory AttendHead takes for as many rows; the memory starts at a multiple of 64 bytes.
ATTN_DEPLOY_DECLARE_KERNEL(int64_t, AttentionScratch, const AttentionShape& shape, int64_t rows)

// Writes rows [row_begin, row_end) of one head. Calls on different rows or heads may run at the same time, each with
// scratch memory of its own. What is not kept apart: every call reads and packs all keys that its rows see, which costs
// as much as four to eight rows do.
//
// NaN comes through, from keys that a row sees and from every value that it reads. Infinite bias of -infinity masks as
// `mask` does; a row whose scores hold +infinity is NaN. Denormals count as zero where the caller flushes them.
ATTN_DEPLOY_DECLARE_KERNEL(void, AttendHead, const AttentionShape& shape, const AttentionHead& head, int64_t row_begin,
                           int64_t row_end, float* scratch)

}  // namespace attn_deploy::native
