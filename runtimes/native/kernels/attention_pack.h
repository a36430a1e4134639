// Query, key and value as the tiles of attention_tiles.h read them. Included only by sources in kernels/.
#pragma once

#include "attention.h"
#include "attention_tiles.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

ATTN_DEPLOY_INLINE int64_t RoundUp(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Where token i of a window, or of all tokens, lies.
ATTN_DEPLOY_INLINE const float* TokenAddress(const float* first, int64_t stride, const float* fill,
                                             const int64_t* index, int64_t i) {
  if (index == nullptr) return first + i * stride;
  return index[i] < 0 ? fill : first + index[i] * stride;
}

// to[j * stride + lane] = rows[lane][j] for j in 0..3.
ATTN_DEPLOY_INLINE void StoreTransposed4(const float* const* rows, int64_t at, float* to, int64_t stride) {
#if defined(__AVX512F__)
  Vec v[4];
  ATTN_DEPLOY_UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + at));
    v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(rows[4 + i] + at), 1);
    v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(rows[8 + i] + at), 2);
    v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(rows[12 + i] + at), 3);
  }
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  Store(to, _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)));
  Store(to + stride, _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23)));
  Store(to + 2 * stride, _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)));
  Store(to + 3 * stride, _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23)));
#elif defined(__AVX2__)
  Vec v[4];
  ATTN_DEPLOY_UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_castps128_ps256(_mm_loadu_ps(rows[i] + at));
    v[i] = _mm256_insertf128_ps(v[i], _mm_loadu_ps(rows[4 + i] + at), 1);
  }
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
  Store(to, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
  Store(to + stride, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
  Store(to + 2 * stride, _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)));
  Store(to + 3 * stride, _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)));
#else
  const float32x4x2_t pairs01 = vtrnq_f32(vld1q_f32(rows[0] + at), vld1q_f32(rows[1] + at));
  const float32x4x2_t pairs23 = vtrnq_f32(vld1q_f32(rows[2] + at), vld1q_f32(rows[3] + at));
  Store(to, vcombine_f32(vget_low_f32(pairs01.val[0]), vget_low_f32(pairs23.val[0])));
  Store(to + stride, vcombine_f32(vget_low_f32(pairs01.val[1]), vget_low_f32(pairs23.val[1])));
  Store(to + 2 * stride, vcombine_f32(vget_high_f32(pairs01.val[0]), vget_high_f32(pairs23.val[0])));
  Store(to + 3 * stride, vcombine_f32(vget_high_f32(pairs01.val[1]), vget_high_f32(pairs23.val[1])));
#endif
}

// 1 / length of each of kLanes columns of [head_dim][stride].
ATTN_DEPLOY_INLINE Vec InverseLengths(const float* columns, int64_t stride, int64_t head_dim) {
  Vec squares = Zero();
  for (int64_t i = 0; i < head_dim; ++i) {
    const Vec v = Load(columns + i * stride);
    squares = Fma(v, v, squares);
  }
  return Broadcast(1.0f) / Max(Sqrt(squares), Broadcast(kShortestLength));
}

// Keys [begin, end) as panels of at most kTileVectors vectors, each [head_dim][vectors * kLanes]. Lanes beyond `end`
// repeat the last key.
static void PackKeys(const AttentionShape& shape, const AttentionHead& head, int64_t begin, int64_t end, float* to) {
  const int64_t head_dim = shape.head_dim;
  const Parts panels = SplitEvenly((end - begin + kLanes - 1) / kLanes, kTileVectors);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = PartBegin(panels, panel);
    const int64_t stride = (PartBegin(panels, panel + 1) - first) * kLanes;
    float* const panel_to = to + first * kLanes * head_dim;
    for (int64_t column = 0; column < stride; column += kLanes) {
      const float* rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t key = Minimum(begin + first * kLanes + column + lane, end - 1);
        rows[lane] = TokenAddress(head.key, head.key_stride, head.key_fill, head.index, key);
      }
      float* const column_to = panel_to + column;
      int64_t i = 0;
      for (; i + 4 <= head_dim; i += 4) StoreTransposed4(rows, i, column_to + i * stride, stride);
      for (; i < head_dim; ++i) {
        for (int lane = 0; lane < kLanes; ++lane) column_to[i * stride + lane] = rows[lane][i];
      }
      if (!shape.cosine) continue;
      const Vec factor = InverseLengths(column_to, stride, head_dim);
      for (i = 0; i < head_dim; ++i) Store(column_to + i * stride, Load(column_to + i * stride) * factor);
    }
  }
}

// Values [begin, end) as [keys][padded value_dim], zeros behind value_dim.
static void PackValues(const AttentionShape& shape, const AttentionHead& head, int64_t begin, int64_t end, float* to) {
  const int64_t whole = shape.value_dim / kLanes * kLanes;
  const int64_t rest = shape.value_dim - whole;
  for (int64_t key = begin; key < end; ++key) {
    const float* from = TokenAddress(head.value, head.value_stride, head.value_fill, head.index, key);
    for (int64_t i = 0; i < whole; i += kLanes) Store(to + i, Load(from + i));
    if (rest > 0) Store(to + whole, LoadPartial(from + whole, rest));
    to += whole + (rest > 0 ? kLanes : 0);
  }
}

// Rows [begin, end) as [rows][head_dim], times the scale, and divided by their lengths where scores are cosines.
static void PackQueries(const AttentionShape& shape, const AttentionHead& head, int64_t begin, int64_t end, float* to) {
  const int64_t whole = shape.head_dim / kLanes * kLanes;
  const int64_t rest = shape.head_dim - whole;
  for (int64_t row = begin; row < end; ++row) {
    const float* from = TokenAddress(head.query, head.query_stride, head.query_fill, head.index, row);
    Vec factor = Broadcast(head.scale);
    if (shape.cosine) {
      Vec squares = rest > 0 ? LoadPartial(from + whole, rest) : Zero();
      squares = squares * squares;
      for (int64_t i = 0; i < whole; i += kLanes) squares = Fma(Load(from + i), Load(from + i), squares);
      factor = factor / Max(Sqrt(Broadcast(ReduceAdd(squares))), Broadcast(kShortestLength));
    }
    for (int64_t i = 0; i < whole; i += kLanes) Store(to + i, Load(from + i) * factor);
    if (rest > 0) StorePartial(to + whole, LoadPartial(from + whole, rest) * factor, rest);
    to += shape.head_dim;
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
