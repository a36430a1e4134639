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
  // r = v - floor(v), and 0 for -infinity; vscalefps takes the floor itself.
  const Vec r = _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  // 2^r = 1 + r * q(r), q the minimax fit of the relative error on [0, 1], which is 8.3e-8.
  Vec q = Broadcast(1.8671305e-3f);
  q = Fma(q, r, Broadcast(9.0170300e-3f));
  q = Fma(q, r, Broadcast(5.5799913e-2f));
  q = Fma(q, r, Broadcast(2.4016444e-1f));
  q = Fma(q, r, Broadcast(6.9315130e-1f));
  return ScaleByPowerOfTwo(Fma(q, r, Broadcast(1.0f)), v);
#else
  v = Max(Broadcast(-127.0f), v);  // ScaleByPowerOfTwo makes 0 of it
  const Vec n = RoundToNearest(v);
  const Vec r = v - n;
  // The same on [-1/2, 1/2]: 9.2e-8.
  Vec q = Broadcast(1.3264727e-3f);
  q = Fma(q, r, Broadcast(9.6715130e-3f));
  q = Fma(q, r, Broadcast(5.5507336e-2f));
  q = Fma(q, r, Broadcast(2.4022242e-1f));
  q = Fma(q, r, Broadcast(6.9314700e-1f));
  return ScaleByPowerOfTwo(Fma(q, r, Broadcast(1.0f)), n);
#endif
}

// What is subtracted from a row's scores: the largest one, or a number that turns -infinity, the largest of a row that
// sees no key, into weights of 0.
ATTN_DEPLOY_INLINE Vec ShiftFor(Vec largest) { return Max(Broadcast(-FLT_MAX), largest); }

// e^d for d <= 0. The product adds its rounding to that of the scores themselves: 0.65 |d| units in the last place,
// which is at most a quarter of a unit of the sum of the row's weights.
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

// A tile of rows and their scores against a block of keys.
struct ScoreTile {
  float* scores;  // [rows][stride]
  int64_t stride;
  int64_t rows;       // at most kTileRows
  int64_t row;        // the first one's number
  int64_t first_key;  // of the block
  int64_t keys;       // how many of the block the last row sees
  bool causal;

  // How many keys of the block row `row + r` sees.
  int64_t Seen(int64_t r) const { return causal ? Maximum(Minimum(keys, row + r + 1 - first_key), 0) : keys; }
};

// One number for each row of a tile; lanes behind the last row hold anything.
constexpr int kNumberVectors = (kTileRows + kLanes - 1) / kLanes;
struct RowNumbers {
  Vec v[kNumberVectors];
};

// In memory, where a row's own is read. Whole vectors are stored: reading what partial stores have written stalls.
using RowFloats = float[kNumberVectors * kLanes];
ATTN_DEPLOY_INLINE void StoreNumbers(const RowNumbers& numbers, RowFloats& to) {
  ATTN_DEPLOY_UNROLL for (int i = 0; i < kNumberVectors; ++i) Store(to + i * kLanes, numbers.v[i]);
}

struct MaxOf {
  ATTN_DEPLOY_INLINE Vec Apply(Vec a, Vec b) { return Max(a, b); }
};
struct SumOf {
  ATTN_DEPLOY_INLINE Vec Apply(Vec a, Vec b) { return a + b; }
};

// Four vectors, each reduced to one number; these four in every block of four lanes.
template <typename Op>
ATTN_DEPLOY_INLINE Vec ReduceFour(const Vec* vectors) {
  Vec v[4] = {vectors[0], vectors[1], vectors[2], vectors[3]};
  TransposeBlocks(v);
  Vec blocks = Op::Apply(Op::Apply(v[0], v[1]), Op::Apply(v[2], v[3]));
#if defined(__AVX512F__)
  blocks = Op::Apply(blocks, _mm512_shuffle_f32x4(blocks, blocks, 0x4e));
  blocks = Op::Apply(blocks, _mm512_shuffle_f32x4(blocks, blocks, 0xb1));
#elif defined(__AVX2__)
  blocks = Op::Apply(blocks, _mm256_permute2f128_ps(blocks, blocks, 1));
#endif
  return blocks;
}

// A vector of each row of a tile, in whole fours.
using RowVectors = Vec[8];
static_assert(kTileRows > 4 && kTileRows <= 8, "rows are reduced in two fours");

// Each row's lanes taken together.
template <typename Op>
ATTN_DEPLOY_INLINE RowNumbers ReduceRows(RowVectors& vectors, int64_t rows) {
  for (int64_t r = rows; r % 4 != 0; ++r) vectors[r] = Zero();
  RowNumbers numbers;
  numbers.v[0] = ReduceFour<Op>(vectors);
  const Vec others = rows > 4 ? ReduceFour<Op>(vectors + 4) : Zero();
#if defined(__AVX512F__)
  numbers.v[0] = _mm512_mask_blend_ps(0xf0, numbers.v[0], others);
#elif defined(__AVX2__)
  numbers.v[0] = _mm256_blend_ps(numbers.v[0], others, 0xf0);
#else
  numbers.v[1] = others;
#endif
  return numbers;
}

// What a row adds to its scores, from the first key of the block on.
struct RowTerms {
  const float* bias;
  int64_t bias_stride;
  const bool* mask;
  int64_t mask_stride;
};

ATTN_DEPLOY_INLINE RowTerms TermsOfRow(const AttentionHead& head, int64_t row, int64_t first_key) {
  RowTerms terms = {nullptr, head.bias_key_stride, nullptr, head.mask_key_stride};
  if (head.bias != nullptr) terms.bias = head.bias + row * head.bias_row_stride + first_key * head.bias_key_stride;
  if (head.mask != nullptr) terms.mask = head.mask + row * head.mask_row_stride + first_key * head.mask_key_stride;
  return terms;
}

// The bias of up to kLanes keys from `k` on.
ATTN_DEPLOY_INLINE Vec LoadBias(const RowTerms& terms, int64_t k, int64_t lanes) {
  if (terms.bias_stride == 0) return Broadcast(*terms.bias);
  return lanes >= kLanes ? Load(terms.bias + k) : LoadPartial(terms.bias + k, lanes);
}

// `s` where the row sees the key, else -infinity.
ATTN_DEPLOY_INLINE Vec Masked(const RowTerms& terms, int64_t k, int64_t lanes, Vec s) {
  const Vec sees = terms.mask_stride == 0 ? Broadcast(*terms.mask ? 1.0f : 0.0f) : LoadBools(terms.mask + k, lanes);
  return IfLess(Zero(), sees, s, Broadcast(kMinusInfinity));
}

// Scores of keys that are seen get softcap, bias and mask; lanes behind them become -infinity. The largest of each row.
template <bool kSoftcap, bool kBias, bool kMask>
static RowNumbers FinishScores(const AttentionShape& shape, const AttentionHead& head, const ScoreTile& tile) {
  RowVectors maxima;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* const scores = tile.scores + r * tile.stride;
    const RowTerms terms = TermsOfRow(head, tile.row + r, tile.first_key);
    const int64_t seen = tile.Seen(r);
    Vec row_max = Broadcast(kMinusInfinity);
    for (int64_t k = 0; k < seen; k += kLanes) {
      const int64_t lanes = seen - k;
      Vec s = Load(scores + k);
      if constexpr (kSoftcap) s = Capped(s, shape.softcap);
      if constexpr (kBias) s = s + LoadBias(terms, k, lanes);
      if constexpr (kMask) s = Masked(terms, k, lanes, s);
      if (lanes < kLanes) s = MaskBehind(s, lanes);
      if (kSoftcap || kBias || kMask || lanes < kLanes) Store(scores + k, s);
      row_max = Max(s, row_max);  // passes over NaN, which shows in the sum
    }
    maxima[r] = row_max;
  }
  return ReduceRows<MaxOf>(maxima, tile.rows);
}

using FinishScoresFn = RowNumbers (*)(const AttentionShape&, const AttentionHead&, const ScoreTile&);

ATTN_DEPLOY_INLINE FinishScoresFn ChooseFinishScores(const AttentionShape& shape, const AttentionHead& head) {
  static const FinishScoresFn kFunctions[8] = {
      FinishScores<false, false, false>, FinishScores<false, false, true>, FinishScores<false, true, false>,
      FinishScores<false, true, true>,   FinishScores<true, false, false>, FinishScores<true, false, true>,
      FinishScores<true, true, false>,   FinishScores<true, true, true>,
  };
  return kFunctions[(shape.softcap > 0.0f ? 4 : 0) + (head.bias != nullptr ? 2 : 0) + (head.mask != nullptr ? 1 : 0)];
}

// Scores become weights e^(score - largest), not yet divided by their sums, which are returned; 0 for keys that a row
// does not see, up to the tile's keys. A row that sees none has a largest score of -infinity and weights of 0.
static RowNumbers MakeWeights(const ScoreTile& tile, const RowNumbers& largest) {
  RowFloats shifts;
  StoreNumbers(largest, shifts);
  RowVectors sums;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* const scores = tile.scores + r * tile.stride;
    const Vec shift = ShiftFor(Broadcast(shifts[r]));
    const int64_t seen = tile.Seen(r);
    Vec sum = Zero();
    int64_t k = 0;
    for (; k < seen; k += kLanes) {
      const Vec weight = WeightOf(Load(scores + k) - shift);
      Store(scores + k, weight);
      sum = sum + weight;
    }
    for (; k < tile.keys; k += kLanes) Store(scores + k, Zero());
    sums[r] = sum;
  }
  return ReduceRows<SumOf>(sums, tile.rows);
}

// The key behind the last whole vector, where only one is there: 49, 197 or 257 keys would else cost a vector more than
// they fill. Its scores are products with each row's query, without softcap.
static RowNumbers LastScores(const AttentionShape& shape, const AttentionHead& head, const ScoreTile& tile,
                             const float* queries, const float* key) {
  const int64_t whole = shape.head_dim / kLanes * kLanes;
  const int64_t rest = shape.head_dim - whole;
  RowVectors products;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* const query = queries + r * shape.head_dim;
    Vec sum = rest > 0 ? LoadPartial(query + whole, rest) * LoadPartial(key + whole, rest) : Zero();
    for (int64_t i = 0; i < whole; i += kLanes) sum = Fma(Load(query + i), Load(key + i), sum);
    // Bias and mask ride in the first lane.
    const RowTerms terms = TermsOfRow(head, tile.row + r, tile.first_key);
    if (terms.bias != nullptr) sum = sum + LoadPartial(terms.bias + tile.keys * terms.bias_stride, 1);
    if (terms.mask != nullptr && !terms.mask[tile.keys * terms.mask_stride]) sum = LoadPartial(&kMinusInfinity, 1);
    products[r] = sum;
  }
  return ReduceRows<SumOf>(products, tile.rows);
}

ATTN_DEPLOY_INLINE RowNumbers Larger(const RowNumbers& a, const RowNumbers& b) {
  RowNumbers larger;
  ATTN_DEPLOY_UNROLL for (int i = 0; i < kNumberVectors; ++i) larger.v[i] = Max(a.v[i], b.v[i]);
  return larger;
}

// Weights of scores of which each row has one.
ATTN_DEPLOY_INLINE RowNumbers WeightsOf(const RowNumbers& scores, const RowNumbers& largest) {
  RowNumbers weights;
  ATTN_DEPLOY_UNROLL for (int i = 0; i < kNumberVectors; ++i) {
    weights.v[i] = WeightOf(scores.v[i] - ShiftFor(largest.v[i]));
  }
  return weights;
}

// 1 / sum, and 0 for a sum of no weights; any other sum holds the largest weight, which is 1. NaN stays.
ATTN_DEPLOY_INLINE Vec InverseOfSum(Vec sum) {
  return IfLess(sum, Broadcast(0.5f), Zero(), Broadcast(1.0f) / sum);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
