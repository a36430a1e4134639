// The PackedAttention kernels: attention within windows of a packed query, key and value, read and written through an
// index map, so that windows are never copied. They know nothing of ONNX Runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace attn_deploy::cuda {

constexpr int kMaxHeadDim = 128;

// Shapes are as attn_deploy/ops/packed_attention.py has them; every pointer is device memory, dense and row-major.
// Without an index map there is one window, which holds all tokens in their order.
struct PackedAttentionArguments {
  const void* qkv = nullptr;             // [batch, tokens, 3, heads, head_dim]
  const int64_t* index = nullptr;        // [windows, length] or null; what is not 0 to tokens - 1 is padding
  const void* fill = nullptr;            // [3, heads, head_dim] or null: padding is 0
  const void* head_scale = nullptr;      // [heads] or null: cosine attention where given
  const void* bias = nullptr;            // finite; where it lies follows from bias_strides
  const int64_t* bias_index = nullptr;   // [windows] or null: the window's item of bias; null: the sample's
  const bool* mask = nullptr;            // true where a query sees a key
  void* output = nullptr;                // [batch, tokens, heads * head_dim]; tokens of no window are left alone
  int64_t bias_strides[4] = {};          // in elements over item, head, query, key; 0 where bias repeats
  int64_t mask_strides[4] = {};          // in elements over sample, head, query, key; 0 where mask repeats
  int batch = 0;
  int tokens = 0;
  int heads = 0;
  int head_dim = 0;                      // 1 to kMaxHeadDim; a multiple of 8 is copied 16 bytes at a time
  int windows = 1;
  int length = 0;                        // tokens of a window
  int bias_items = 0;                    // of bias, for bias_index
  float scale = 1.0f;
  float softcap = 0.0f;                  // 0: none
  bool causal = false;

  // Set by LaunchPackedAttention.
  bool wide_copies = false;              // every row of qkv, fill and output is a multiple of 16 bytes, aligned to it
  bool paired_bias = false;              // neighbouring keys' values of bias are aligned pairs
  int samples_per_block = 1;
};

// Computes output on `stream`. Scores, softmax and sums are FP32. A query that sees no key gives 0. Returns what the
// launch returned; cudaErrorInvalidValue where head_dim or a size is out of range.
cudaError_t LaunchPackedAttention(const PackedAttentionArguments& arguments, Element element, const Device& device,
                                  cudaStream_t stream);

}  // namespace attn_deploy::cuda
