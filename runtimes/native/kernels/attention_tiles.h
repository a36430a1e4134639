// The two products of attention on register tiles: a few rows by a few vectors. Included only by sources in kernels/.
#pragma once

#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// Accumulators, the vectors that they take in and one broadcast fit the registers; 12 to 24 accumulators keep two
// pipes of four cycles' latency full.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;

// scores[r][k] = sum over i of query[r][i] * key[i][k]; `key` is packed as [head_dim][kVectors * kLanes].
template <int kRows, int kVectors>
static void QueryKeyTile(const float* query, const float* key, int64_t head_dim, float* scores, int64_t score_stride) {
  Vec sums[kRows][kVectors];
  ATTN_DEPLOY_UNROLL for (int r = 0; r < kRows; ++r) {
    ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) sums[r][c] = Zero();
  }
  for (int64_t i = 0; i < head_dim; ++i) {
    Vec keys[kVectors];
    ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) keys[c] = Load(key + c * kLanes);
    ATTN_DEPLOY_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec q = Broadcast(query[r * head_dim + i]);
      ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) sums[r][c] = Fma(q, keys[c], sums[r][c]);
    }
    key += kVectors * kLanes;
  }
  ATTN_DEPLOY_UNROLL for (int r = 0; r < kRows; ++r) {
    ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) Store(scores + r * score_stride + c * kLanes, sums[r][c]);
  }
}

// The 4 x 4 blocks of four vectors, each 128 bits wide, transposed in place.
ATTN_DEPLOY_INLINE void TransposeBlocks(Vec (&v)[4]) {
#if defined(__AVX512F__)
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
#elif defined(__AVX2__)
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
  v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
  v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
  v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
  v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
#else
  const float32x4x2_t pairs01 = vtrnq_f32(v[0], v[1]);
  const float32x4x2_t pairs23 = vtrnq_f32(v[2], v[3]);
  v[0] = vcombine_f32(vget_low_f32(pairs01.val[0]), vget_low_f32(pairs23.val[0]));
  v[1] = vcombine_f32(vget_low_f32(pairs01.val[1]), vget_low_f32(pairs23.val[1]));
  v[2] = vcombine_f32(vget_high_f32(pairs01.val[0]), vget_high_f32(pairs23.val[0]));
  v[3] = vcombine_f32(vget_high_f32(pairs01.val[1]), vget_high_f32(pairs23.val[1]));
#endif
}

// Where a tile of weights * value goes: to outputs, times `factors`, or added to what `sums` holds times `factors`.
struct ValueTarget {
  float* const* outputs = nullptr;  // of each row, null where it is not written
  int64_t last_lanes = 0;           // how many elements of the last vector are written to outputs
  float* sums = nullptr;            // used where outputs is null: [rows][sums_stride]
  int64_t sums_stride = 0;
  const float* factors = nullptr;
};

// `value` is [keys][value_stride], whole vectors of it; `weights` is [rows][weight_stride].
template <int kRows, int kVectors>
static void WeightValueTile(const float* weights, int64_t weight_stride, const float* value, int64_t value_stride,
                            int64_t keys, const ValueTarget& to) {
  Vec sums[kRows][kVectors];
  if (to.outputs != nullptr) {
    ATTN_DEPLOY_UNROLL for (int r = 0; r < kRows; ++r) {
      ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) sums[r][c] = Zero();
    }
  } else {
    ATTN_DEPLOY_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec factor = Broadcast(to.factors[r]);
      ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) {
        sums[r][c] = Load(to.sums + r * to.sums_stride + c * kLanes) * factor;
      }
    }
  }
  for (int64_t k = 0; k < keys; ++k) {
    Vec values[kVectors];
    ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) values[c] = Load(value + c * kLanes);
    ATTN_DEPLOY_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec weight = Broadcast(weights[r * weight_stride + k]);
      ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) sums[r][c] = Fma(weight, values[c], sums[r][c]);
    }
    value += value_stride;
  }
  ATTN_DEPLOY_UNROLL for (int r = 0; r < kRows; ++r) {
    if (to.outputs == nullptr) {
      ATTN_DEPLOY_UNROLL for (int c = 0; c < kVectors; ++c) {
        Store(to.sums + r * to.sums_stride + c * kLanes, sums[r][c]);
      }
      continue;
    }
    float* const output = to.outputs[r];
    if (output == nullptr) continue;
    const Vec factor = Broadcast(to.factors[r]);
    ATTN_DEPLOY_UNROLL for (int c = 0; c + 1 < kVectors; ++c) Store(output + c * kLanes, sums[r][c] * factor);
    StorePartial(output + (kVectors - 1) * kLanes, sums[r][kVectors - 1] * factor, to.last_lanes);
  }
}

using QueryKeyFn = void (*)(const float*, const float*, int64_t, float*, int64_t);
using WeightValueFn = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const ValueTarget&);

// By rows and vectors, both from 1.
#define ATTN_DEPLOY_TILES_2(name, rows) {name<rows, 1>, name<rows, 2>}
#define ATTN_DEPLOY_TILES_4(name, rows) {name<rows, 1>, name<rows, 2>, name<rows, 3>, name<rows, 4>}
#if defined(__AVX2__) && !defined(__AVX512F__)
#define ATTN_DEPLOY_TILES(name, rows) ATTN_DEPLOY_TILES_2(name, rows)
#else
#define ATTN_DEPLOY_TILES(name, rows) ATTN_DEPLOY_TILES_4(name, rows)
#endif
#define ATTN_DEPLOY_ALL_TILES(name)                                                                        \
  {                                                                                                        \
    ATTN_DEPLOY_TILES(name, 1), ATTN_DEPLOY_TILES(name, 2), ATTN_DEPLOY_TILES(name, 3),                    \
        ATTN_DEPLOY_TILES(name, 4), ATTN_DEPLOY_TILES(name, 5), ATTN_DEPLOY_TILES(name, 6)                 \
  }

static const QueryKeyFn kQueryKeyTiles[kTileRows][kTileVectors] = ATTN_DEPLOY_ALL_TILES(QueryKeyTile);
static const WeightValueFn kWeightValueTiles[kTileRows][kTileVectors] = ATTN_DEPLOY_ALL_TILES(WeightValueTile);

// `total` split into the fewest parts of at most `most`, as equal as can be: part `part` starts at its begin.
struct Parts {
  int64_t total;
  int64_t count;
};
ATTN_DEPLOY_INLINE Parts SplitEvenly(int64_t total, int64_t most) { return {total, (total + most - 1) / most}; }
ATTN_DEPLOY_INLINE int64_t PartBegin(const Parts& parts, int64_t part) { return part * parts.total / parts.count; }

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
