// From scores to the weights of softmax, row by row. Included only by sources in kernels/.
#pragma once

#include <cfloat>
#include <cmath>

#include "attention.h"
#include "attention_tiles.h"
#include "vector_math.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

constexpr float kMinusInfinity = -__builtin_inff();

// 2^v for v <= 0, relative error below 2 units in the last place where the result is normal; 2^0 is 1, and v below -126
// gives 0 (where subnormals are flushed), -infinity too. NaN gives NaN. Shorter than Exp: no second step of argument
// reduction, since v - n is exact, and a polynomial one degree lower.
ATTN_DEPLOY_INLINE Vec Exp2OfNonPositive(Vec v) {
#if defined(__AVX512F__)
  v = Max(Broadcast(-192.0f), v);  // below every subnormal
#else
  v = Max(Broadcast(-127.0f), v);  // ScaleByPowerOfTwo makes 0 of it
#endif
  const Vec n = RoundToNearest(v);
  const Vec r = v - n;
  // 2^r = 1 + r * q(r), q the minimax fit of the relative error on |r| <= 1/2, which is 9.2e-8.
  Vec q = Broadcast(1.3264727e-3f);
  q = Fma(q, r, Broadcast(9.6715130e-3f));
  q = Fma(q, r, Broadcast(5.5507336e-2f));
  q = Fma(q, r, Broadcast(2.4022242e-1f));
  q = Fma(q, r, Broadcast(6.9314700e-1f));
  q = Fma(q, r, Broadcast(1.0f));
  return ScaleByPowerOfTwo(q, n);
}

// What is subtracted from a row's scores: the largest one, or a number that turns -infinity, the largest of a row that
// sees no key, into weights of 0.
ATTN_DEPLOY_INLINE float ShiftFor(float largest) { return largest < -FLT_MAX ? -FLT_MAX : largest; }

// e^d for d <= 0. The product adds its rounding to that of the scores themselves: 0.65 |d| units in the last place, which
// is at most a quarter of a unit of the sum of the row's weights.
ATTN_DEPLOY_INLINE Vec WeightOf(Vec d) { return Exp2OfNonPositive(d * Broadcast(1.44269504f)); }

// `v` in the first `count` lanes, -infinity in the others.
ATTN_DEPLOY_INLINE Vec MaskBehind(Vec v, int64_t count) {
  static const float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return IfLess(Load(kLaneNumbers), Broadcast(static_cast<float>(count)), v, Broadcast(kMinusInfinity));
}

// 1 where true, 0 where false and behind `count`.
ATTN_DEPLOY_INLINE Vec LoadBools(const bool* p, int64_t count) {
  unsigned char bytes[kLanes] = {};
  const auto* from = reinterpret_cast<const unsigned char*>(p);
  if (count >= kLanes) {
    __builtin_memcpy(bytes, from, kLanes);
  } else {
    for (int64_t i = 0; i < count; ++i) bytes[i] = from[i];
  }
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#else
  uint32_t word;
  __builtin_memcpy(&word, bytes, sizeof word);
  const uint16x8_t halves = vmovl_u8(vcreate_u8(word));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(halves)));
#endif
}

// cap * tanh(s / cap), tanh(x) = sign(x) * (1 - t) / (1 + t) with t = exp(-2 |x|). Absolute error below 1e-7 * cap.
ATTN_DEPLOY_INLINE Vec Capped(Vec s, float cap) {
  const Vec t = Exp(Abs(s) * Broadcast(-2.0f / cap));
  const Vec size = Broadcast(cap) * (Broadcast(1.0f) - t) / (Broadcast(1.0f) + t);
  return IfLess(s, Zero(), Zero() - size, size);
}

// What a row adds to its scores, from the first key of the block on.
struct RowTerms {
  float softcap;
  const float* bias;  // null: none
  int64_t bias_stride;
  const bool* mask;  // null: none
  int64_t mask_stride;
};

// Scores of the first `seen` keys get softcap, bias and mask; the lanes behind them become -infinity. The largest.
template <bool kSoftcap, bool kBias, bool kMask>
static float FinishRow(const RowTerms& terms, int64_t seen, float* scores) {
  const Vec unseen = Broadcast(kMinusInfinity);
  Vec largest = unseen;
  for (int64_t k = 0; k < seen; k += kLanes) {
    const int64_t lanes = Minimum(seen - k, kLanes);
    Vec s = Load(scores + k);
    if constexpr (kSoftcap) s = Capped(s, terms.softcap);
    if constexpr (kBias) {
      s = s + (terms.bias_stride == 0 ? Broadcast(*terms.bias)
               : lanes == kLanes      ? Load(terms.bias + k)
                                      : LoadPartial(terms.bias + k, lanes));
    }
    if constexpr (kMask) {
      const Vec sees = terms.mask_stride == 0 ? Broadcast(*terms.mask ? 1.0f : 0.0f) : LoadBools(terms.mask + k, lanes);
      s = IfLess(Zero(), sees, s, unseen);
    }
    if (lanes < kLanes) s = MaskBehind(s, lanes);
    if (kSoftcap || kBias || kMask || lanes < kLanes) Store(scores + k, s);
    largest = Max(s, largest);  // passes over NaN, which shows in the sum
  }
  return ReduceMax(largest);
}

using FinishRowFn = float (*)(const RowTerms&, int64_t, float*);
static const FinishRowFn kFinishRow[8] = {
    FinishRow<false, false, false>, FinishRow<false, false, true>, FinishRow<false, true, false>,
    FinishRow<false, true, true>,   FinishRow<true, false, false>, FinishRow<true, false, true>,
    FinishRow<true, true, false>,   FinishRow<true, true, true>,
};

ATTN_DEPLOY_INLINE RowTerms TermsOfRow(const AttentionShape& shape, const AttentionHead& head, int64_t row,
                                       int64_t first_key) {
  RowTerms terms = {shape.softcap, nullptr, head.bias_key_stride, nullptr, head.mask_key_stride};
  if (head.bias != nullptr) terms.bias = head.bias + row * head.bias_row_stride + first_key * head.bias_key_stride;
  if (head.mask != nullptr) terms.mask = head.mask + row * head.mask_row_stride + first_key * head.mask_key_stride;
  return terms;
}

// Which of kFinishRow a head needs.
ATTN_DEPLOY_INLINE int FinishRowKind(const AttentionShape& shape, const AttentionHead& head) {
  return (shape.softcap > 0.0f ? 4 : 0) + (head.bias != nullptr ? 2 : 0) + (head.mask != nullptr ? 1 : 0);
}

// The scores of `seen` keys become weights, not yet divided by their sum, which is returned; 0 for the keys behind, up
// to `keys` rounded up to whole vectors.
ATTN_DEPLOY_INLINE float WeightRow(float shift_by, int64_t seen, int64_t keys, float* scores) {
  const Vec shift = Broadcast(shift_by);
  Vec sum = Zero();
  int64_t k = 0;
  for (; k < seen; k += kLanes) {
    const Vec weight = WeightOf(Load(scores + k) - shift);
    Store(scores + k, weight);
    sum = sum + weight;
  }
  for (; k < keys; k += kLanes) Store(scores + k, Zero());
  return ReduceAdd(sum);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
