// Rows of floats as 8-bit levels, each row with a scale of its own. Included only by sources in kernels/.
//
//   low = min(0, min x), high = max(0, max x), scale = (high - low) / 255, zero = round(-low / scale),
//   level = min(round(x / scale) + zero, 255),  x ~ scale * (level - zero)
//
// A row of zeros has scale 0. A row with NaN or an infinity has scale NaN, which makes all that it is multiplied with
// NaN. Rounding is to the nearest, ties to even.
#pragma once

#include "dot.h"
#include "gemm.h"
#include "layer_norm.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// Quantized rows: row r's levels stand at levels + r * stride, each less kLevelOffset, up to a whole group of kGroup
// (beyond the row's columns there is any level: the packed weights are 0 there).
struct QuantizedRows {
  Level* levels = nullptr;
  int64_t stride = 0;       // in levels
  float* scale = nullptr;   // [rows]
  int32_t* zero = nullptr;  // [rows]: the stored level (less kLevelOffset, too) of 0.0
};

// Levels from row to row: whole cache lines, an odd number of them, so that rows of a tile lie in different sets of L1.
ATTN_DEPLOY_INLINE int64_t LevelStride(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(Level);
  return kLine * ((columns + kLine - 1) / kLine | 1);
}

// Floats of memory that QuantizedRowsAt takes: whole cache lines.
ATTN_DEPLOY_INLINE int64_t QuantizedRowsFloats(int64_t rows, int64_t columns) {
  const auto levels = static_cast<int64_t>(rows * LevelStride(columns) * sizeof(Level) / sizeof(float));
  return levels + (2 * rows + 15) / 16 * 16;
}

// Room for quantized rows in memory that starts at a cache line.
ATTN_DEPLOY_INLINE QuantizedRows QuantizedRowsAt(float* memory, int64_t rows, int64_t columns) {
  const int64_t stride = LevelStride(columns);
  auto* const levels = reinterpret_cast<Level*>(memory);
  auto* const scale = reinterpret_cast<float*>(levels + rows * stride);
  return {levels, stride, scale, reinterpret_cast<int32_t*>(scale + rows)};
}

// Levels are made a full register at a time, of as many vectors of floats.
constexpr int kVectorsPerStore = 4 / sizeof(Level);
constexpr int64_t kLevelsPerStore = kVectorsPerStore * kLanes;

// min(round(v * inverse) + zero, 255) less kLevelOffset, which is in `zero` already. v * inverse rounds to -zero at
// least, so that nothing is below 0, and to 256 - zero at most.
#if defined(__AVX512F__)
ATTN_DEPLOY_INLINE __m512i RoundedPair(Vec a, Vec b, Vec inverse) {
  return _mm512_packs_epi32(_mm512_cvtps_epi32(a * inverse), _mm512_cvtps_epi32(b * inverse));
}
#if defined(__AVX512VNNI__)
ATTN_DEPLOY_INLINE void StoreLevels(Level* to, const Vec (&v)[4], Vec inverse, int32_t zero) {
  const __m512i zeros = _mm512_set1_epi16(static_cast<int16_t>(zero));
  const __m512i first = _mm512_add_epi16(RoundedPair(v[0], v[1], inverse), zeros);
  const __m512i second = _mm512_add_epi16(RoundedPair(v[2], v[3], inverse), zeros);
  // Packing works within 128 bits: 4 levels of each vector lie there.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, second)));
}
#else
ATTN_DEPLOY_INLINE void StoreLevels(Level* to, const Vec (&v)[2], Vec inverse, int32_t zero) {
  const __m512i zeros = _mm512_set1_epi16(static_cast<int16_t>(zero));
  const __m512i levels = _mm512_add_epi16(RoundedPair(v[0], v[1], inverse), zeros);
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, _mm512_min_epi16(levels, _mm512_set1_epi16(255))));
}
#endif
#elif defined(__AVX2__)
ATTN_DEPLOY_INLINE __m256i RoundedPair(Vec a, Vec b, Vec inverse) {
  return _mm256_packs_epi32(_mm256_cvtps_epi32(a * inverse), _mm256_cvtps_epi32(b * inverse));
}
#if defined(__AVXVNNI__)
ATTN_DEPLOY_INLINE void StoreLevels(Level* to, const Vec (&v)[4], Vec inverse, int32_t zero) {
  const __m256i zeros = _mm256_set1_epi16(static_cast<int16_t>(zero));
  const __m256i first = _mm256_add_epi16(RoundedPair(v[0], v[1], inverse), zeros);
  const __m256i second = _mm256_add_epi16(RoundedPair(v[2], v[3], inverse), zeros);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order));
}
#else
ATTN_DEPLOY_INLINE void StoreLevels(Level* to, const Vec (&v)[2], Vec inverse, int32_t zero) {
  const __m256i zeros = _mm256_set1_epi16(static_cast<int16_t>(zero));
  const __m256i levels = _mm256_add_epi16(RoundedPair(v[0], v[1], inverse), zeros);
  const __m256i clipped = _mm256_min_epi16(levels, _mm256_set1_epi16(255));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(clipped, 0xd8));  // 0, 2, 1, 3
}
#endif
#else
ATTN_DEPLOY_INLINE int16x8_t RoundedPair(Vec a, Vec b, Vec inverse) {
  return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a * inverse)), vqmovn_s32(vcvtnq_s32_f32(b * inverse)));
}
#if defined(__ARM_FEATURE_DOTPROD)
ATTN_DEPLOY_INLINE void StoreLevels(Level* to, const Vec (&v)[4], Vec inverse, int32_t zero) {
  const int16x8_t zeros = vdupq_n_s16(static_cast<int16_t>(zero));
  const int16x8_t first = vaddq_s16(RoundedPair(v[0], v[1], inverse), zeros);
  const int16x8_t second = vaddq_s16(RoundedPair(v[2], v[3], inverse), zeros);
  vst1q_s8(to, vcombine_s8(vqmovn_s16(first), vqmovn_s16(second)));
}
#else
ATTN_DEPLOY_INLINE void StoreLevels(Level* to, const Vec (&v)[2], Vec inverse, int32_t zero) {
  const int16x8_t levels = vaddq_s16(RoundedPair(v[0], v[1], inverse), vdupq_n_s16(static_cast<int16_t>(zero)));
  vst1q_s16(to, vminq_s16(levels, vdupq_n_s16(255)));
}
#endif
#endif

// The scales of kRows rows.
template <int kRows>
struct RowScales {
  // From each row's numbers: their smallest and largest lanes, 0 included; `poison` is NaN in a lane of a row that is not
  // finite, which minima lose. Ranges below 1e-36, whose inverse may be infinite, count as 0.
  RowScales(const Vec (&low)[kRows], const Vec (&high)[kRows], const Vec (&poison)[kRows]) {
    const Vec least = ReduceRows(low, [](Vec a, Vec b) __attribute__((always_inline)) { return Min(a, b); });
    const Vec most = ReduceRows(high, [](Vec a, Vec b) __attribute__((always_inline)) { return Max(a, b); });
    const Vec range = (most - least) + ReduceRows(poison, AddRows);
    const Vec small = Broadcast(1e-36f);
    const Vec inverses = IfLess(range, small, Zero(), Broadcast(255.0f) / range);
    const Vec scales = IfLess(range, small, Zero(), range / Broadcast(255.0f));
    const Vec zeros = Max(RoundToNearest((Zero() - least) * inverses), Zero());  // 0 where it would be NaN
    const PerRow inverse_of(inverses), scale_of(scales), zero_of(zeros);
    for (int r = 0; r < kRows; ++r) {
      inverse[r] = inverse_of.lanes[r];
      scale[r] = scale_of.lanes[r];
      zero[r] = static_cast<int32_t>(zero_of.lanes[r]) - kLevelOffset;
    }
  }
  float inverse[kRows], scale[kRows];
  int32_t zero[kRows];
};

ATTN_DEPLOY_INLINE void QuantizeRow(const float* x, int64_t columns, float inverse_scale, int32_t zero, Level* levels) {
  const Vec inverse = Broadcast(inverse_scale);
  Vec v[kVectorsPerStore];
  if (columns < kLevelsPerStore) {
    for (int j = 0; j < kVectorsPerStore; ++j) {
      const int64_t count = Maximum(0, Minimum(kLanes, columns - j * kLanes));
      v[j] = count == 0 ? Zero() : LoadLanes(x + j * kLanes, count);
    }
    return StoreLevels(levels, v, inverse, zero);
  }
  for (int64_t i = 0; i < columns; i += kLevelsPerStore) {
    const int64_t at = Minimum(i, columns - kLevelsPerStore);  // the last ones once more, where some are left
    ATTN_DEPLOY_UNROLL
    for (int j = 0; j < kVectorsPerStore; ++j) v[j] = Load(x + at + j * kLanes);
    StoreLevels(levels + at, v, inverse, zero);
  }
}

template <int kRows>
ATTN_DEPLOY_INLINE void QuantizeScaled(const float* const* x, int64_t columns, const RowScales<kRows>& scales,
                                       int64_t row, const QuantizedRows& to) {
  for (int r = 0; r < kRows; ++r) {
    to.scale[row + r] = scales.scale[r];
    to.zero[row + r] = scales.zero[r];
    QuantizeRow(x[r], columns, scales.inverse[r], scales.zero[r], to.levels + (row + r) * to.stride);
  }
}

// kRows rows at a time, so that the latency of one row's minimum hides behind the others'.
template <int kRows>
void QuantizeTogether(const float* const* x, int64_t columns, int64_t row, const QuantizedRows& to) {
  Vec low[kRows], high[kRows], poison[kRows];
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = poison[r] = Zero();
  ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec v = LoadLanes(x[r] + i, count);
      low[r] = Min(v, low[r]);
      high[r] = Max(v, high[r]);
      poison[r] = Fma(v, Zero(), poison[r]);
    }
  });
  QuantizeScaled(x, columns, RowScales<kRows>(low, high, poison), row, to);
}

// Rows r in [0, rows) of x, which may have a map, `columns` each.
ATTN_DEPLOY_INLINE void QuantizeRows(const Rows& x, int64_t rows, int64_t columns, const QuantizedRows& to) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* const together[] = {RowAt(x, r), RowAt(x, r + 1), RowAt(x, r + 2), RowAt(x, r + 3)};
    QuantizeTogether<4>(together, columns, r, to);
  }
  for (; r < rows; ++r) {
    const float* const one[] = {RowAt(x, r)};
    QuantizeTogether<1>(one, columns, r, to);
  }
}

// Floats of scratch memory that NormalizeAndQuantizeRows needs, at a cache line.
ATTN_DEPLOY_INLINE int64_t NormalizeScratch(int64_t columns) { return 4 * ScratchStride(columns); }

// LayerNorm of kRows rows into `y`, with each row's smallest and largest number, quantized from there while it is in L1.
template <int kRows>
void NormalizeAndQuantizeTogether(const float* const* x, int64_t columns, float epsilon, const float* norm_scale,
                                  const float* norm_bias, float* y, int64_t row, const QuantizedRows& to) {
  const int64_t y_stride = ScratchStride(columns);
  const RowMoments<kRows> moments(x, columns, epsilon);
  Vec low[kRows], high[kRows], poison[kRows];
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    low[r] = high[r] = Zero();
    poison[r] = Broadcast(0.0f * moments.scale[r]);
  }
  ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Vec scale = LoadLanes(norm_scale + i, count);
    const Vec bias = LoadLanes(norm_bias + i, count);
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec d = LoadLanes(x[r] + i, count) - Broadcast(moments.about[r]);
      const Vec v = Fma(d * Broadcast(moments.scale[r]) - Broadcast(moments.shift[r]), scale, bias);
      Store(y + r * y_stride + i, v);  // beyond the last column 0, and there is room
      low[r] = Min(v, low[r]);
      high[r] = Max(v, high[r]);
    }
  });
  const float* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = y + r * y_stride;
  QuantizeScaled(rows, columns, RowScales<kRows>(low, high, poison), row, to);
}

// The same of LayerNorm(x) * norm_scale + norm_bias, both [columns] and finite.
ATTN_DEPLOY_INLINE void NormalizeAndQuantizeRows(const Rows& x, int64_t rows, int64_t columns, float epsilon,
                                                 const float* norm_scale, const float* norm_bias, float* scratch,
                                                 const QuantizedRows& to) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* const together[] = {RowAt(x, r), RowAt(x, r + 1), RowAt(x, r + 2), RowAt(x, r + 3)};
    NormalizeAndQuantizeTogether<4>(together, columns, epsilon, norm_scale, norm_bias, scratch, r, to);
  }
  for (; r < rows; ++r) {
    const float* const one[] = {RowAt(x, r)};
    NormalizeAndQuantizeTogether<1>(one, columns, epsilon, norm_scale, norm_bias, scratch, r, to);
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
