// What the PackedAttention kernels with and without tensor cores share.
#pragma once

#include "device.cuh"
#include "packed_attention.h"

namespace attn_deploy::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// As in attn_deploy/ops/scores.py.
constexpr float kLeastLength = 1e-12f;

// Where in the batch, and in which window and head, a block works.
struct Place {
  int window;
  int head;
  int query_begin;  // of the block's rows, within the window
  int sample_begin;
  int sample_end;
};

// Query tiles of one window and head are neighbours in the grid, heads next: what blocks read twice is then in L2, and
// neighbouring blocks read neighbouring heads of the same tokens.
__device__ inline Place PlaceOfBlock(const PackedAttentionArguments& p, int rows_per_block) {
  const int tiles = (p.length + rows_per_block - 1) / rows_per_block;
  const int block = static_cast<int>(blockIdx.x);
  Place place;
  place.query_begin = block % tiles * rows_per_block;
  place.head = block / tiles % p.heads;
  place.window = block / tiles / p.heads;
  place.sample_begin = static_cast<int>(blockIdx.y) * p.samples_per_block;
  place.sample_end = min(place.sample_begin + p.samples_per_block, p.batch);
  return place;
}

// The token at `position` of the window, -1 for padding.
__device__ inline int TokenAt(const PackedAttentionArguments& p, int window, int position) {
  if (p.index == nullptr) return position;
  const int64_t token = p.index[static_cast<int64_t>(window) * p.length + position];
  return token >= 0 && token < p.tokens ? static_cast<int>(token) : -1;
}

enum Part { kQuery = 0, kKey = 1, kValue = 2 };

// The head_dim elements of a token's query, key or value, null where they are 0.
template <typename T>
__device__ const T* ElementsOf(const PackedAttentionArguments& p, int sample, int token, Part part, int head) {
  const int64_t inner = (static_cast<int64_t>(part) * p.heads + head) * p.head_dim;
  if (token < 0) return p.fill == nullptr ? nullptr : static_cast<const T*>(p.fill) + inner;
  const int64_t row = static_cast<int64_t>(sample) * p.tokens + token;
  return static_cast<const T*>(p.qkv) + row * 3 * p.heads * p.head_dim + inner;
}

template <typename T>
__device__ T* OutputOf(const PackedAttentionArguments& p, int sample, int token, int head) {
  const int64_t row = static_cast<int64_t>(sample) * p.tokens + token;
  return static_cast<T*>(p.output) + (row * p.heads + head) * p.head_dim;
}

// The bias of a window and head, [length, length] by bias_strides; null where the form has none.
template <typename T>
__device__ const T* BiasOf(const PackedAttentionArguments& p, const Place& place, int sample) {
  if (p.bias == nullptr) return nullptr;
  int64_t item = sample;
  if (p.bias_index != nullptr) {
    item = p.bias_index[place.window];
    if (item < 0) item += p.bias_items;
    item = item < 0 ? 0 : item >= p.bias_items ? p.bias_items - 1 : item;  // out of range reads no foreign memory
  }
  return static_cast<const T*>(p.bias) + item * p.bias_strides[0] + place.head * p.bias_strides[1];
}

__device__ inline const bool* MaskOf(const PackedAttentionArguments& p, const Place& place, int sample) {
  if (p.mask == nullptr) return nullptr;
  return p.mask + sample * p.mask_strides[0] + place.head * p.mask_strides[1];
}

// Whether a query of the window sees a key of it. `mask` is that of the window and head, or null. Kernels for kPlain
// forms, which have neither mask, causality, cap nor cosine, are spared the registers for them.
template <bool kPlain>
__device__ bool Sees(const PackedAttentionArguments& p, const bool* mask, int query, int key) {
  if (kPlain) return key < p.length;
  if (key >= p.length || (p.causal && key > query)) return false;
  return mask == nullptr || query >= p.length || mask[query * p.mask_strides[2] + key * p.mask_strides[3]];
}

// The scaled score before bias: `scale` holds the attribute, the head's scale and both inverse lengths, as far as the
// form has them.
template <bool kPlain>
__device__ float ScaledScore(const PackedAttentionArguments& p, float product, float scale) {
  const float score = product * scale;
  return kPlain || p.softcap == 0.0f ? score : p.softcap * tanhf(score / p.softcap);
}

__host__ __device__ inline bool IsPlain(const PackedAttentionArguments& p) {
  return p.mask == nullptr && !p.causal && p.softcap == 0.0f && p.head_scale == nullptr;
}

// Keys that some query of the block's rows may see: all of them, or those up to the last row.
__device__ inline int KeyCount(const PackedAttentionArguments& p, int query_begin, int rows) {
  return p.causal ? min(p.length, query_begin + rows) : p.length;
}

// The state of a row's softmax over the keys so far (Milakov and Gimelshein 2018, algorithm 3): largest score, sum of
// exp(score - largest).
struct RowState {
  float largest = kMinusInfinity;
  float sum = 0.0f;
};

// What scores are taken relative to: never -infinity, whose difference with itself is NaN where nothing is seen.
__device__ inline float Reference(float largest) { return largest == kMinusInfinity ? 0.0f : largest; }

// A row without keys has sum 0 and gives 0; NaN stays NaN.
__device__ inline float InverseSum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

}  // namespace attn_deploy::cuda
