// LayerNorm (Ba et al. 2016) of the rows of a block, into scratch memory. Included only by sources in kernels/.
#pragma once

#include "gemm.h"
#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// `floats` and what is missing to whole cache lines.
ATTN_DEPLOY_INLINE int64_t WholeLines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Floats from row to row of a block that a product reads: rows of a tile then lie in different sets of the L1 cache,
// which they do not where the stride is a multiple of 4 KB.
ATTN_DEPLOY_INLINE int64_t ScratchStride(int64_t columns) {
  const int64_t lines = (columns + 15) / 16;
  return 16 * (lines % 8 == 0 ? lines + 1 : lines);
}

// body(i, count) for the vectors of [0, columns): at i, `count` lanes of it, which is kLanes for all but the last.
template <typename Body>
ATTN_DEPLOY_INLINE void ForVectors(int64_t columns, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) body(i, int64_t{kLanes});
  if (i < columns) body(i, columns - i);
}

ATTN_DEPLOY_INLINE Vec LoadLanes(const float* p, int64_t count) {
  return count == kLanes ? Load(p) : LoadPartial(p, count);
}

// Lane r: what op makes of all lanes of v[r], for one row or four. In the same order for both, so that a row's results
// are the same bits whatever rows it stands beside.
template <int kRows, typename Op>
ATTN_DEPLOY_INLINE Vec ReduceRows(const Vec (&v)[kRows], const Op& op) {
  static_assert(kRows == 1 || kRows == 4, "lanes of a vector of any instruction set");
  if constexpr (kRows == 4) return ReduceFour(v, op);
  const Vec same[4] = {v[0], v[0], v[0], v[0]};
  return ReduceFour(same, op);
}

ATTN_DEPLOY_INLINE Vec AddRows(Vec a, Vec b) { return a + b; }

// One number a row: lanes of a vector, in memory.
struct PerRow {
  explicit PerRow(Vec v) { Store(lanes, v); }
  alignas(64) float lanes[kLanes];
};

// What rows are: their mean as `about` + `error`, and their variance.
struct RowSums {
  Vec error;
  Vec variance;
};

template <int kRows>
ATTN_DEPLOY_INLINE RowSums SumsAbout(const float* const* x, int64_t columns, const float* about) {
  Vec sum[kRows], square[kRows];
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) sum[r] = square[r] = Zero();
  ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Vec d = LoadLanes(x[r] + i, count) - Broadcast(about[r]);
      if (count < kLanes) d = FirstLanes(d, count);
      sum[r] = sum[r] + d;
      square[r] = Fma(d, d, square[r]);
    }
  });
  const Vec inverse = Broadcast(1.0f / static_cast<float>(columns));
  const Vec error = ReduceRows(sum, AddRows) * inverse;
  return {error, NegFma(error, error, ReduceRows(square, AddRows) * inverse)};
}

// What LayerNorm makes of rows: (x - about) * scale - shift. The scale is NaN where the row has NaN or an infinity.
template <int kRows>
struct RowMoments {
  // One pass over the rows, about the first number of each: the mean, and the variance about it, which loses digits as
  // the square of their distance grows against the variance. Where it does, and only for that row, another pass about
  // the mean, which then is so near that `error` tells how it was rounded.
  __attribute__((always_inline)) RowMoments(const float* const* x, int64_t columns, float epsilon) {
    for (int r = 0; r < kRows; ++r) about[r] = x[r][0];
    const RowSums sums = SumsAbout<kRows>(x, columns, about);
    PerRow error(sums.error), variance(sums.variance);
    for (int r = 0; r < kRows; ++r) {
      constexpr float kMost = 8.0f;
      if (!(error.lanes[r] * error.lanes[r] > kMost * variance.lanes[r])) continue;
      about[r] += error.lanes[r];
      const RowSums again = SumsAbout<1>(x + r, columns, about + r);
      error.lanes[r] = PerRow(again.error).lanes[0];
      variance.lanes[r] = PerRow(again.variance).lanes[0];
    }
    const Vec spread = Sqrt(Max(Zero(), Load(variance.lanes)) + Broadcast(epsilon));
    const Vec scales = Broadcast(1.0f) / spread;
    const PerRow scale_of(scales), shift_of(Load(error.lanes) * scales);
    for (int r = 0; r < kRows; ++r) {
      scale[r] = scale_of.lanes[r];
      shift[r] = shift_of.lanes[r];
    }
  }
  float about[kRows], scale[kRows], shift[kRows];
};

// y = (x - mean) / sqrt(variance + epsilon) for kRows rows at a time, so that the latency of one row's sums hides behind
// the others'.
template <int kRows>
void NormalizeTogether(const float* const* x, int64_t columns, float epsilon, float* y, int64_t y_stride) {
  const RowMoments<kRows> moments(x, columns, epsilon);
  ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec d = LoadLanes(x[r] + i, count) - Broadcast(moments.about[r]);
      const Vec result = d * Broadcast(moments.scale[r]) - Broadcast(moments.shift[r]);
      if (count == kLanes) Store(y + r * y_stride + i, result);
      if (count < kLanes) StorePartial(y + r * y_stride + i, result, count);
    }
  });
}

// Row r of y = (x - mean) / sqrt(variance + epsilon) of row r of x, r in [0, rows).
ATTN_DEPLOY_INLINE void NormalizeRows(const Rows& x, int64_t rows, int64_t columns, float epsilon, float* y,
                                      int64_t y_stride) {
  constexpr int kTogether = 4;
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) {
    const float* const together[kTogether] = {RowAt(x, r), RowAt(x, r + 1), RowAt(x, r + 2), RowAt(x, r + 3)};
    NormalizeTogether<kTogether>(together, columns, epsilon, y + r * y_stride, y_stride);
  }
  for (; r < rows; ++r) {
    const float* const one[] = {RowAt(x, r)};
    NormalizeTogether<1>(one, columns, epsilon, y + r * y_stride, y_stride);
  }
}

// Row r of y = row r of x.
ATTN_DEPLOY_INLINE void CopyRows(const Rows& x, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = RowAt(x, r);
    float* to = y + r * y_stride;
    ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      if (count == kLanes) Store(to + i, Load(from + i));
      if (count < kLanes) StorePartial(to + i, LoadPartial(from + i, count), count);
    });
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
