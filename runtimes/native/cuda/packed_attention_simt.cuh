// PackedAttention on CUDA cores: FP32, and BF16 where there are no tensor cores for it.
//
// A block has one window, head and tile of query rows. Its 128 threads stand as 16 x 8: a thread has every 16th row
// and every 8th key of the scores, and every 8th group of 4 elements of the output. Keys pass in tiles.
#pragma once

#include "packed_attention_common.cuh"

namespace attn_deploy::cuda {

constexpr int kSimtThreads = 128;
constexpr int kSimtRowThreads = 16;
constexpr int kSimtLanes = 8;

// Tiles that fit into Turing's 64 KiB of shared memory. Rows are padded by 16 bytes: those that a warp reads at once
// then start in different banks.
template <int kHeadDim_>
struct SimtLayout {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kHeadDim <= 32 ? 64 : 32;
  static constexpr int kKeys = kHeadDim <= 64 ? 64 : 32;
  static constexpr int kStride = kHeadDim + 4;
  static constexpr int kWeightStride = kKeys + 4;
  static constexpr int kRowsPerThread = kRows / kSimtRowThreads;
  static constexpr int kKeysPerThread = kKeys / kSimtLanes;
  static constexpr int kGroupsPerThread = kHeadDim / 4 / kSimtLanes;
  static constexpr int kQueryFloats = kRows * kStride;
  static constexpr int kKeyFloats = kKeys * kStride;
  static constexpr int kBytes = 4 * (kQueryFloats + 2 * kKeyFloats + kRows * kWeightStride + kRows + kKeys);
};

// Reads `count` positions of the window from `begin` on into rows of floats; what is left of a tile of `rows` rows
// becomes 0.
template <typename T, typename Layout>
__device__ void ReadRows(const PackedAttentionArguments& p, const Place& place, int sample, Part part, int begin,
                         int count, int rows, float* tile) {
  constexpr int kGroups = Layout::kHeadDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kGroups; i += kSimtThreads) {
    const int row = i / kGroups;
    const int d = i % kGroups * 4;
    const T* source = nullptr;
    if (row < count) {
      source = ElementsOf<T>(p, sample, TokenAt(p, place.window, begin + row), part, place.head);
    }
    float4 group = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (source != nullptr && sizeof(T) == sizeof(float) && p.wide_copies && d < p.head_dim) {
      group = *reinterpret_cast<const float4*>(source + d);
    } else if (source != nullptr) {
      if (d < p.head_dim) group.x = ToFloat(source[d]);
      if (d + 1 < p.head_dim) group.y = ToFloat(source[d + 1]);
      if (d + 2 < p.head_dim) group.z = ToFloat(source[d + 2]);
      if (d + 3 < p.head_dim) group.w = ToFloat(source[d + 3]);
    }
    *reinterpret_cast<float4*>(tile + row * Layout::kStride + d) = group;
  }
}

// 1 / length of each of a tile's rows.
template <typename Layout>
__device__ void InverseRowLengths(const float* tile, int rows, float* inverse) {
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += kSimtThreads) {
    float squares = 0.0f;
    for (int d = 0; d < Layout::kHeadDim; ++d) {
      const float v = tile[row * Layout::kStride + d];
      squares += v * v;
    }
    inverse[row] = 1.0f / fmaxf(sqrtf(squares), kLeastLength);
  }
}

__device__ inline void AddDot(float& sum, const float4& a, const float4& b) {
  sum += a.x * b.x;
  sum += a.y * b.y;
  sum += a.z * b.z;
  sum += a.w * b.w;
}

__device__ inline void AddScaled(float4& sum, float factor, const float4& v) {
  sum.x += factor * v.x;
  sum.y += factor * v.y;
  sum.z += factor * v.z;
  sum.w += factor * v.w;
}

// One thread's scores: row r is kSimtRowThreads r + its own, key c is kSimtLanes c + its lane.
template <typename Layout>
using SimtScores = float[Layout::kRowsPerThread][Layout::kKeysPerThread];

template <typename Layout>
__device__ void MultiplyQueryKey(const float* query, const float* key, int row, int lane, SimtScores<Layout>& scores) {
#pragma unroll
  for (int r = 0; r < Layout::kRowsPerThread; ++r) {
#pragma unroll
    for (int c = 0; c < Layout::kKeysPerThread; ++c) scores[r][c] = 0.0f;
  }
#pragma unroll 2
  for (int d = 0; d < Layout::kHeadDim; d += 4) {
    float4 q[Layout::kRowsPerThread];
#pragma unroll
    for (int r = 0; r < Layout::kRowsPerThread; ++r) {
      q[r] = *reinterpret_cast<const float4*>(query + (kSimtRowThreads * r + row) * Layout::kStride + d);
    }
#pragma unroll
    for (int c = 0; c < Layout::kKeysPerThread; ++c) {
      const float4 k = *reinterpret_cast<const float4*>(key + (kSimtLanes * c + lane) * Layout::kStride + d);
#pragma unroll
      for (int r = 0; r < Layout::kRowsPerThread; ++r) AddDot(scores[r][c], q[r], k);
    }
  }
}

// From products to biased scores, -infinity where a query does not see a key.
template <typename T, typename Layout, bool kPlain>
__device__ void FinishScores(const PackedAttentionArguments& p, const Place& place, int sample, int key_begin, int row,
                             int lane, float scale, const float* inverse_queries, const float* inverse_keys,
                             SimtScores<Layout>& scores) {
  const T* bias = BiasOf<T>(p, place, sample);
  const bool* mask = kPlain ? nullptr : MaskOf(p, place, sample);
#pragma unroll
  for (int r = 0; r < Layout::kRowsPerThread; ++r) {
    const int tile_row = kSimtRowThreads * r + row;
    const int query = place.query_begin + tile_row;
#pragma unroll
    for (int c = 0; c < Layout::kKeysPerThread; ++c) {
      const int tile_key = kSimtLanes * c + lane;
      const int key = key_begin + tile_key;
      float factor = scale;
      if (!kPlain && p.head_scale != nullptr) factor *= inverse_queries[tile_row] * inverse_keys[tile_key];
      float score = ScaledScore<kPlain>(p, scores[r][c], factor);
      if (bias != nullptr && query < p.length && key < p.length) {
        score += ToFloat(bias[query * p.bias_strides[2] + key * p.bias_strides[3]]);
      }
      scores[r][c] = Sees<kPlain>(p, mask, query, key) ? score : kMinusInfinity;
    }
  }
}

// Turns scores into weights in shared memory, and folds them into the rows' states. RowState::sum is this lane's.
template <typename Layout>
__device__ void FoldScores(int row, int lane, const SimtScores<Layout>& scores,
                           RowState (&states)[Layout::kRowsPerThread],
                           float4 (&sums)[Layout::kRowsPerThread][Layout::kGroupsPerThread], float* weights) {
#pragma unroll
  for (int r = 0; r < Layout::kRowsPerThread; ++r) {
    float largest = states[r].largest;
#pragma unroll
    for (int c = 0; c < Layout::kKeysPerThread; ++c) largest = fmaxf(largest, scores[r][c]);
#pragma unroll
    for (int distance = 1; distance < kSimtLanes; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    const float reference = Reference(largest);
    const float shrink = Exp2((states[r].largest - reference) * kLog2E);
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < Layout::kKeysPerThread; ++c) {
      const float weight = Exp2((scores[r][c] - reference) * kLog2E);
      weights[(kSimtRowThreads * r + row) * Layout::kWeightStride + kSimtLanes * c + lane] = weight;
      sum += weight;
    }
    states[r].largest = largest;
    states[r].sum = states[r].sum * shrink + sum;
#pragma unroll
    for (int g = 0; g < Layout::kGroupsPerThread; ++g) {
      sums[r][g].x *= shrink;
      sums[r][g].y *= shrink;
      sums[r][g].z *= shrink;
      sums[r][g].w *= shrink;
    }
  }
}

template <typename Layout>
__device__ void MultiplyWeightsValue(const float* weights, const float* value, int keys, int row, int lane,
                                     float4 (&sums)[Layout::kRowsPerThread][Layout::kGroupsPerThread]) {
  for (int k = 0; k < keys; ++k) {
    float weight[Layout::kRowsPerThread];
#pragma unroll
    for (int r = 0; r < Layout::kRowsPerThread; ++r) {
      weight[r] = weights[(kSimtRowThreads * r + row) * Layout::kWeightStride + k];
    }
#pragma unroll
    for (int g = 0; g < Layout::kGroupsPerThread; ++g) {
      const float4 v = *reinterpret_cast<const float4*>(value + k * Layout::kStride + 4 * (kSimtLanes * g + lane));
#pragma unroll
      for (int r = 0; r < Layout::kRowsPerThread; ++r) AddScaled(sums[r][g], weight[r], v);
    }
  }
}

template <typename T, typename Layout>
__device__ void WriteRows(const PackedAttentionArguments& p, const Place& place, int sample, int row, int lane,
                          const RowState (&states)[Layout::kRowsPerThread],
                          const float4 (&sums)[Layout::kRowsPerThread][Layout::kGroupsPerThread]) {
#pragma unroll
  for (int r = 0; r < Layout::kRowsPerThread; ++r) {
    float sum = states[r].sum;
#pragma unroll
    for (int distance = 1; distance < kSimtLanes; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    const float inverse = InverseSum(sum);
    const int query = place.query_begin + kSimtRowThreads * r + row;
    const int token = query < p.length ? TokenAt(p, place.window, query) : -1;
    if (token < 0) continue;
    T* output = OutputOf<T>(p, sample, token, place.head);
#pragma unroll
    for (int g = 0; g < Layout::kGroupsPerThread; ++g) {
      const int d = 4 * (kSimtLanes * g + lane);
      const float4 v = make_float4(sums[r][g].x * inverse, sums[r][g].y * inverse, sums[r][g].z * inverse,
                                   sums[r][g].w * inverse);
      if (sizeof(T) == sizeof(float) && p.wide_copies && d < p.head_dim) {
        *reinterpret_cast<float4*>(output + d) = v;
      } else {
        if (d < p.head_dim) output[d] = FromFloat<T>(v.x);
        if (d + 1 < p.head_dim) output[d + 1] = FromFloat<T>(v.y);
        if (d + 2 < p.head_dim) output[d + 2] = FromFloat<T>(v.z);
        if (d + 3 < p.head_dim) output[d + 3] = FromFloat<T>(v.w);
      }
    }
  }
}

template <typename T, int kHeadDim, bool kPlain>
__global__ void __launch_bounds__(kSimtThreads, kHeadDim <= 32 ? 2 : 3)
    SimtAttention(const PackedAttentionArguments p) {
  using Layout = SimtLayout<kHeadDim>;
  const Place place = PlaceOfBlock(p, Layout::kRows);
  float* const query = reinterpret_cast<float*>(SharedMemory());
  float* const key = query + Layout::kQueryFloats;
  float* const value = key + Layout::kKeyFloats;
  float* const weights = value + Layout::kKeyFloats;
  float* const inverse_queries = weights + Layout::kRows * Layout::kWeightStride;
  float* const inverse_keys = inverse_queries + Layout::kRows;
  const int rows = min(Layout::kRows, p.length - place.query_begin);
  const int keys = KeyCount(p, place.query_begin, rows);
  const int lane = static_cast<int>(threadIdx.x) % kSimtLanes;
  const int row = static_cast<int>(threadIdx.x) / kSimtLanes;
  const bool cosine = !kPlain && p.head_scale != nullptr;
  const float scale = cosine ? p.scale * ToFloat(static_cast<const T*>(p.head_scale)[place.head]) : p.scale;

  for (int sample = place.sample_begin; sample < place.sample_end; ++sample) {
    RowState states[Layout::kRowsPerThread];
    float4 sums[Layout::kRowsPerThread][Layout::kGroupsPerThread] = {};
    ReadRows<T, Layout>(p, place, sample, kQuery, place.query_begin, rows, Layout::kRows, query);
    for (int key_begin = 0; key_begin < keys; key_begin += Layout::kKeys) {
      const int tile_keys = min(Layout::kKeys, keys - key_begin);
      ReadRows<T, Layout>(p, place, sample, kKey, key_begin, tile_keys, Layout::kKeys, key);
      ReadRows<T, Layout>(p, place, sample, kValue, key_begin, tile_keys, Layout::kKeys, value);
      __syncthreads();
      if (cosine) {
        InverseRowLengths<Layout>(query, Layout::kRows, inverse_queries);
        InverseRowLengths<Layout>(key, Layout::kKeys, inverse_keys);
        __syncthreads();
      }
      SimtScores<Layout> scores;
      MultiplyQueryKey<Layout>(query, key, row, lane, scores);
      FinishScores<T, Layout, kPlain>(p, place, sample, key_begin, row, lane, scale, inverse_queries, inverse_keys,
                                      scores);
      FoldScores<Layout>(row, lane, scores, states, sums, weights);
      __syncwarp();  // a row's weights are written and read by the same 8 lanes
      MultiplyWeightsValue<Layout>(weights, value, tile_keys, row, lane, sums);
      __syncthreads();  // everybody is done with the tiles
    }
    WriteRows<T, Layout>(p, place, sample, row, lane, states, sums);
  }
}

}  // namespace attn_deploy::cuda
