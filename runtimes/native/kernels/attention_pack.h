// Query, key and value as the tiles of attention_tiles.h read them. Included only by sources in kernels/.
#pragma once

#include "attention.h"
#include "attention_tiles.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

ATTN_DEPLOY_INLINE int64_t RoundUp(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Where token i of a window, or of all tokens, lies.
ATTN_DEPLOY_INLINE const float* TokenAddress(const float* first, int64_t stride, const float* fill,
                                             const int64_t* index, int64_t i) {
  if (index == nullptr) return first + i * stride;
  return index[i] < 0 ? fill : first + index[i] * stride;
}

// to[j * stride + lane] = rows[lane][at + j] for j in 0..3.
ATTN_DEPLOY_INLINE void StoreTransposed4(const float* const* rows, int64_t at, float* to, int64_t stride) {
  Vec v[4];
  ATTN_DEPLOY_UNROLL for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    v[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + at));
    v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(rows[4 + i] + at), 1);
    v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(rows[8 + i] + at), 2);
    v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(rows[12 + i] + at), 3);
#elif defined(__AVX2__)
    v[i] = _mm256_castps128_ps256(_mm_loadu_ps(rows[i] + at));
    v[i] = _mm256_insertf128_ps(v[i], _mm_loadu_ps(rows[4 + i] + at), 1);
#else
    v[i] = Load(rows[i] + at);
#endif
  }
  TransposeBlocks(v);
  ATTN_DEPLOY_UNROLL for (int i = 0; i < 4; ++i) Store(to + i * stride, v[i]);
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

// to = from * factor, divided by its length where scores are cosines.
ATTN_DEPLOY_INLINE void PackVector(const AttentionShape& shape, const float* from, float factor, float* to) {
  const int64_t whole = shape.head_dim / kLanes * kLanes;
  const int64_t rest = shape.head_dim - whole;
  Vec factors = Broadcast(factor);
  if (shape.cosine) {
    Vec squares = rest > 0 ? LoadPartial(from + whole, rest) : Zero();
    squares = squares * squares;
    for (int64_t i = 0; i < whole; i += kLanes) squares = Fma(Load(from + i), Load(from + i), squares);
    factors = factors / Max(Sqrt(Broadcast(ReduceAdd(squares))), Broadcast(kShortestLength));
  }
  for (int64_t i = 0; i < whole; i += kLanes) Store(to + i, Load(from + i) * factors);
  if (rest > 0) StorePartial(to + whole, LoadPartial(from + whole, rest) * factors, rest);
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

// Key `key` as [head_dim].
static void PackOneKey(const AttentionShape& shape, const AttentionHead& head, int64_t key, float* to) {
  const float* const from = TokenAddress(head.key, head.key_stride, head.key_fill, head.index, key);
  PackVector(shape, from, 1.0f, to);
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
  for (int64_t row = begin; row < end; ++row) {
    const float* from = TokenAddress(head.query, head.query_stride, head.query_fill, head.index, row);
    PackVector(shape, from, head.scale, to);
    to += shape.head_dim;
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
