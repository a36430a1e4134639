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

// What LayerNorm makes of a row: (x - mean) * scale - shift.
struct RowMoments {
  float mean;
  float scale;  // NaN where the row has NaN or an infinity
  float shift;
};

// kRows rows at a time, so that the latency of one row's sums hides behind the others'. Two passes over rows that stand
// in L1: the mean; the variance about it, and by how much rounding left the mean wrong, which matters where it is large
// against the spread.
template <int kRows>
ATTN_DEPLOY_INLINE void MomentsTogether(const float* const* x, int64_t columns, float epsilon,
                                        RowMoments (&moments)[kRows]) {
  const float inverse = 1.0f / static_cast<float>(columns);
  Vec sum[kRows], square[kRows], mean[kRows];
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) sum[r] = Zero();
  ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = sum[r] + LoadLanes(x[r] + i, count);
  });
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    moments[r].mean = ReduceAdd(sum[r]) * inverse;
    mean[r] = Broadcast(moments[r].mean);
    sum[r] = square[r] = Zero();
  }
  ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Vec d = LoadLanes(x[r] + i, count) - mean[r];
      if (count < kLanes) d = FirstLanes(d, count);
      sum[r] = sum[r] + d;
      square[r] = Fma(d, d, square[r]);
    }
  });
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float error = ReduceAdd(sum[r]) * inverse;
    const float variance = ReduceAdd(square[r]) * inverse - error * error;
    moments[r].scale = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + epsilon);
    moments[r].shift = error * moments[r].scale;
  }
}

// y = (x - mean) / sqrt(variance + epsilon) for kRows rows at a time.
template <int kRows>
void NormalizeTogether(const float* const* x, int64_t columns, float epsilon, float* y, int64_t y_stride) {
  RowMoments moments[kRows];
  MomentsTogether<kRows>(x, columns, epsilon, moments);
  Vec mean[kRows], scale[kRows], shift[kRows];
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    mean[r] = Broadcast(moments[r].mean);
    scale[r] = Broadcast(moments[r].scale);
    shift[r] = Broadcast(moments[r].shift);
  }
  ForVectors(columns, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec d = LoadLanes(x[r] + i, count) - mean[r];
      const Vec result = d * scale[r] - shift[r];
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
