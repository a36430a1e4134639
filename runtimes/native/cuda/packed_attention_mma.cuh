// PackedAttention in FP16 and BF16 on tensor cores.
//
// A block has one window, head and 64 query rows; each of its 4 warps has 16 of them and keeps their scores, weights
// and sums in registers, as FlashAttention-2 does (Dao 2023, section 3.3). Keys pass in tiles of 64. Shared memory
// holds query, key and value tiles; while one is worked on, the next one, of this sample or the next, is copied.
#pragma once

#include "packed_attention_common.cuh"

namespace attn_deploy::cuda {

constexpr int kMmaWarps = 4;
constexpr int kMmaThreads = 32 * kMmaWarps;
constexpr int kMmaRows = 16 * kMmaWarps;
constexpr int kMmaKeys = 64;

// Shared memory of a block, in the order in which it lies there.
template <int kHeadDim, int kStages>
struct MmaLayout {
  // 8 elements of padding: 8 successive rows start in different banks, so that ldmatrix has no conflicts.
  static constexpr int kStride = kHeadDim + 8;
  static constexpr int kTileElements = kMmaKeys * kStride;
  static constexpr int kElements = 3 * kStages * kTileElements;
  static constexpr int kBytes = 2 * kElements + 4 * (kMmaRows + kMmaKeys);
};

__host__ __device__ constexpr int RoundUp(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Copies `count` rows, positions `begin` and on of the window, to a tile of shared memory, 8 elements at a time. Rows
// up to the next multiple of 16 and elements up to the next multiple of 16 become 0.
template <typename T, int kHeadDim, int kStride>
__device__ void CopyRows(const PackedAttentionArguments& p, const Place& place, int sample, Part part, int begin,
                         int count, T* tile) {
  constexpr int kChunks = kHeadDim / 8;
  const int chunks_used = RoundUp(p.head_dim, 16) / 8;
  const int rows = RoundUp(count, 16);
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks; i += kMmaThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    if (chunk >= chunks_used) continue;
    const T* source = nullptr;
    if (row < count) {
      source = ElementsOf<T>(p, sample, TokenAt(p, place.window, begin + row), part, place.head);
    }
    T* target = tile + row * kStride + 8 * chunk;
    if (source != nullptr && p.wide_copies && 8 * chunk < p.head_dim) {
      CopyAsync(target, source + 8 * chunk);
    } else if (source == nullptr || 8 * chunk >= p.head_dim) {
      *reinterpret_cast<uint4*>(target) = make_uint4(0, 0, 0, 0);
    } else {
      for (int d = 8 * chunk; d < 8 * chunk + 8; ++d) {
        tile[row * kStride + d] = d < p.head_dim ? source[d] : FromFloat<T>(0.0f);
      }
    }
  }
}

// 1 / length of each of a tile's `count` rows, by the threads from `first_thread` on.
template <typename T, int kStride>
__device__ void InverseLengths(const T* tile, int count, int head_dim, int first_thread, float* inverse) {
  const int row = static_cast<int>(threadIdx.x) - first_thread;
  if (row < 0 || row >= count) return;
  float squares = 0.0f;
  for (int d = 0; d < head_dim; ++d) {
    const float v = ToFloat(tile[row * kStride + d]);
    squares += v * v;
  }
  inverse[row] = 1.0f / fmaxf(sqrtf(squares), kLeastLength);
}

// One lane's part of its warp's 16 x 64 scores: of tile n of 8 keys, rows g and g + 8 at keys 8 n + t and 8 n + t + 1,
// where g = lane / 4 and t = 2 (lane % 4).
using Scores = float[kMmaKeys / 8][4];

// query (16 rows of the warp) times key tile transposed. `keys` of the tile are in use.
template <typename T, int kHeadDim, int kStride>
__device__ void MultiplyQueryKey(const T* query, const T* key, int head_dim, int keys, int lane, Scores& scores) {
#pragma unroll
  for (int n = 0; n < kMmaKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[n][e] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    if (d >= head_dim) break;
    uint32_t a[4];
    LoadMatrices(a, query + lane % 16 * kStride + d + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kMmaKeys / 8; n += 2) {
      if (8 * n >= keys) break;
      uint32_t b[4];
      LoadMatrices(b, key + (8 * n + lane % 8 + lane / 16 * 8) * kStride + d + lane / 8 % 2 * 8);
      MultiplyAdd<T>(scores[n], a, b[0], b[1]);
      MultiplyAdd<T>(scores[n + 1], a, b[2], b[3]);
    }
  }
}

// weights (16 rows of the warp) times value tile, added to `sums`.
template <typename T, int kHeadDim, int kStride>
__device__ void MultiplyWeightsValue(const Scores& weights, const T* value, int head_dim, int keys, int lane,
                                     float (&sums)[kHeadDim / 8][4]) {
#pragma unroll
  for (int k = 0; k < kMmaKeys; k += 16) {
    if (k >= keys) break;
    const float(&low)[4] = weights[k / 8];
    const float(&high)[4] = weights[k / 8 + 1];
    const uint32_t a[4] = {Pack<T>(low[0], low[1]), Pack<T>(low[2], low[3]), Pack<T>(high[0], high[1]),
                           Pack<T>(high[2], high[3])};
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      if (d >= head_dim) break;
      uint32_t b[4];
      LoadMatricesTransposed(b, value + (k + lane % 16) * kStride + d + lane / 16 * 8);
      MultiplyAdd<T>(sums[d / 8], a, b[0], b[1]);
      MultiplyAdd<T>(sums[d / 8 + 1], a, b[2], b[3]);
    }
  }
}

// The bias of a lane's scores, two keys to a register; 0 outside the window.
using BiasPairs = uint32_t[kMmaKeys / 8][2];

// The bias of keys `key` and `key` + 1 for one query.
template <typename T>
__device__ uint32_t BiasPair(const PackedAttentionArguments& p, const T* bias, int query, int key) {
  if (query >= p.length || key >= p.length) return 0;
  const T* at = bias + query * p.bias_strides[2] + key * p.bias_strides[3];
  if (p.paired_bias) return *reinterpret_cast<const uint32_t*>(at);
  return Pack<T>(ToFloat(at[0]), key + 1 < p.length ? ToFloat(at[p.bias_strides[3]]) : 0.0f);
}

template <typename T>
__device__ void LoadBias(const PackedAttentionArguments& p, const T* bias, int query, int key, BiasPairs& pairs) {
#pragma unroll
  for (int n = 0; n < kMmaKeys / 8; ++n) {
    pairs[n][0] = BiasPair<T>(p, bias, query, key + 8 * n);
    pairs[n][1] = BiasPair<T>(p, bias, query + 8, key + 8 * n);
  }
}

// From products to biased scores, -infinity where a query does not see a key. `query` and `key` are the lane's first;
// `bias` is read where the form has one, `inverse_keys` where it is not null.
template <typename T, bool kPlain>
__device__ void FinishScores(const PackedAttentionArguments& p, const bool* mask, const BiasPairs& bias, int query,
                             int key, int keys, const float (&row_scale)[2], const float* inverse_keys,
                             Scores& scores) {
#pragma unroll
  for (int n = 0; n < kMmaKeys / 8; ++n) {
    if (8 * n >= keys) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = key + 8 * n + e % 2;
      float scale = row_scale[e / 2];
      if (!kPlain && inverse_keys != nullptr) scale *= inverse_keys[k % kMmaKeys];
      float score = ScaledScore<kPlain>(p, scores[n][e], scale);
      if (p.bias != nullptr) {
        const float2 pair = Unpack<T>(bias[n][e / 2]);
        score += e % 2 == 0 ? pair.x : pair.y;
      }
      scores[n][e] = Sees<kPlain>(p, mask, query + e / 2 * 8, k) ? score : kMinusInfinity;
    }
  }
}

// Turns a tile's scores into weights and folds them into the two rows' states; `sums` of the tiles before are scaled
// to the new largest score. RowState::sum is of this lane's keys alone.
template <int kTiles>
__device__ void FoldScores(int keys, RowState (&rows)[2], Scores& scores, float (&sums)[kTiles][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = rows[r].largest;
#pragma unroll
    for (int n = 0; n < kMmaKeys / 8; ++n) {
      if (8 * n >= keys) break;
      largest = fmaxf(largest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float reference = Reference(largest) * kLog2E;
    const float shrink = Exp2(rows[r].largest * kLog2E - reference);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kMmaKeys / 8; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        const float weight = 8 * n < keys ? Exp2(scores[n][e] * kLog2E - reference) : 0.0f;
        scores[n][e] = weight;
        sum += weight;
      }
    }
    rows[r].largest = largest;
    rows[r].sum = rows[r].sum * shrink + sum;
#pragma unroll
    for (int d = 0; d < kTiles; ++d) {
      sums[d][2 * r] *= shrink;
      sums[d][2 * r + 1] *= shrink;
    }
  }
}

// Divides by the rows' sums and writes the warp's 16 rows to the output, by way of `staging`, the shared memory that
// held their queries: stores are then 16 bytes wide. `query` is the first row.
template <typename T, int kHeadDim, int kStride>
__device__ void WriteRows(const PackedAttentionArguments& p, const Place& place, int sample, int query, int lane,
                          const RowState (&rows)[2], const float (&sums)[kHeadDim / 8][4], T* staging) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows[r].sum;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = InverseSum(sum);
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
      T* target = staging + (lane / 4 + 8 * r) * kStride + 8 * d + 2 * (lane % 4);
      *reinterpret_cast<uint32_t*>(target) = Pack<T>(sums[d][2 * r] * inverse, sums[d][2 * r + 1] * inverse);
    }
  }
  __syncwarp();
  constexpr int kChunks = kHeadDim / 8;
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks;
    const int begin = i % kChunks * 8;
    if (query + row >= p.length || begin >= p.head_dim) continue;
    const int token = TokenAt(p, place.window, query + row);
    if (token < 0) continue;
    const T* source = staging + row * kStride + begin;
    T* target = OutputOf<T>(p, sample, token, place.head) + begin;
    if (p.wide_copies) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int d = 0; d < 8 && begin + d < p.head_dim; ++d) target[d] = source[d];
    }
  }
}

// The (sample, key tile) pairs of a block one after the other, and the shared memory that each is copied to.
template <typename T, int kHeadDim, int kStages>
struct MmaPipeline {
  using Layout = MmaLayout<kHeadDim, kStages>;

  const PackedAttentionArguments& p;
  const Place& place;
  int rows;       // queries of the block
  int keys;       // that the block's queries see
  int key_tiles;
  T* memory;

  __device__ int Sample(int step) const { return place.sample_begin + step / key_tiles; }
  __device__ int KeyBegin(int step) const { return step % key_tiles * kMmaKeys; }
  __device__ int KeysOf(int step) const { return min(kMmaKeys, keys - KeyBegin(step)); }
  __device__ bool IsFirst(int step) const { return step % key_tiles == 0; }
  __device__ bool IsLast(int step) const { return step % key_tiles == key_tiles - 1; }

  __device__ T* Query(int step) const { return memory + step / key_tiles % kStages * Layout::kTileElements; }
  __device__ T* Key(int step) const { return memory + (kStages + 2 * (step % kStages)) * Layout::kTileElements; }
  __device__ T* Value(int step) const { return Key(step) + Layout::kTileElements; }

  // Starts the copies of a step as one group.
  __device__ void Copy(int step) const {
    const int sample = Sample(step);
    if (IsFirst(step)) {
      CopyRows<T, kHeadDim, Layout::kStride>(p, place, sample, kQuery, place.query_begin, rows, Query(step));
    }
    CopyRows<T, kHeadDim, Layout::kStride>(p, place, sample, kKey, KeyBegin(step), KeysOf(step), Key(step));
    CopyRows<T, kHeadDim, Layout::kStride>(p, place, sample, kValue, KeyBegin(step), KeysOf(step), Value(step));
    CommitCopies();
  }
};

// Blocks of a multiprocessor that registers must suffice for: as many as there can be without spills, which differs by
// architecture (ptxas 13.0).
constexpr int MmaBlocks(int head_dim, bool plain, [[maybe_unused]] bool bias_in_registers) {
  if (head_dim > 64) return 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return head_dim <= 32 && plain ? 3 : 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (head_dim <= 32) return plain && bias_in_registers ? 4 : 3;
  return plain && !bias_in_registers ? 3 : 2;
#else
  return (head_dim <= 32 ? 3 : 2) + (plain ? 1 : 0);
#endif
}

// kBiasInRegisters: the window has one tile of keys and a bias that is every sample's, which is then read only once.
template <typename T, int kHeadDim, int kStages, bool kPlain, bool kBiasInRegisters>
__global__ void __launch_bounds__(kMmaThreads, MmaBlocks(kHeadDim, kPlain, kBiasInRegisters))
    MmaAttention(const PackedAttentionArguments p) {
  using Pipeline = MmaPipeline<T, kHeadDim, kStages>;
  constexpr int kStride = Pipeline::Layout::kStride;
  const Place place = PlaceOfBlock(p, kMmaRows);
  T* const memory = reinterpret_cast<T*>(SharedMemory());
  float* const inverse_queries = reinterpret_cast<float*>(memory + Pipeline::Layout::kElements);
  float* const inverse_keys = inverse_queries + kMmaRows;
  const int rows = min(kMmaRows, p.length - place.query_begin);
  const int keys = KeyCount(p, place.query_begin, rows);
  const Pipeline pipeline{p, place, rows, keys, (keys + kMmaKeys - 1) / kMmaKeys, memory};
  const int steps = (place.sample_end - place.sample_begin) * pipeline.key_tiles;

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const bool active = warp_row < rows;  // the same for the whole warp
  const int query = place.query_begin + warp_row + lane / 4;
  const bool cosine = !kPlain && p.head_scale != nullptr;
  const float scale = cosine ? p.scale * ToFloat(static_cast<const T*>(p.head_scale)[place.head]) : p.scale;

  RowState states[2];
  float sums[kHeadDim / 8][4];
  BiasPairs bias;
  pipeline.Copy(0);
  if (kBiasInRegisters) LoadBias<T>(p, BiasOf<T>(p, place, 0), query, 2 * (lane % 4), bias);

  for (int step = 0; step < steps; ++step) {
    if (kStages > 1 && step + 1 < steps) {
      pipeline.Copy(step + 1);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
    if (cosine) {
      if (pipeline.IsFirst(step)) {
        InverseLengths<T, kStride>(pipeline.Query(step), rows, p.head_dim, 0, inverse_queries);
      }
      InverseLengths<T, kStride>(pipeline.Key(step), pipeline.KeysOf(step), p.head_dim, kMmaThreads / 2, inverse_keys);
      __syncthreads();
    }
    if (active) {
      const int sample = pipeline.Sample(step);
      const int tile_keys = pipeline.KeysOf(step);
      const int key = pipeline.KeyBegin(step) + 2 * (lane % 4);
      T* const warp_query = pipeline.Query(step) + warp_row * kStride;
      if (pipeline.IsFirst(step)) {
        states[0] = states[1] = RowState{};
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d) sums[d][0] = sums[d][1] = sums[d][2] = sums[d][3] = 0.0f;
      }
      if (!kBiasInRegisters && p.bias != nullptr) LoadBias<T>(p, BiasOf<T>(p, place, sample), query, key, bias);
      Scores scores;
      MultiplyQueryKey<T, kHeadDim, kStride>(warp_query, pipeline.Key(step), p.head_dim, tile_keys, lane, scores);
      const int row = warp_row + lane / 4;
      const float row_scale[2] = {cosine ? scale * inverse_queries[row] : scale,
                                  cosine ? scale * inverse_queries[row + 8] : scale};
      FinishScores<T, kPlain>(p, kPlain ? nullptr : MaskOf(p, place, sample), bias, query, key, tile_keys,
                              row_scale, cosine ? inverse_keys : nullptr, scores);
      FoldScores(tile_keys, states, scores, sums);
      MultiplyWeightsValue<T, kHeadDim, kStride>(scores, pipeline.Value(step), p.head_dim, tile_keys, lane, sums);
      if (pipeline.IsLast(step)) {
        WriteRows<T, kHeadDim, kStride>(p, place, sample, place.query_begin + warp_row, lane, states, sums, warp_query);
      }
    }
    __syncthreads();  // everybody is done with the step's shared memory
    if (kStages == 1 && step + 1 < steps) pipeline.Copy(step + 1);
  }
}

}  // namespace attn_deploy::cuda
