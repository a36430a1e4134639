// Dot products of 8-bit integers for one instruction set: unsigned levels 0..255 times signed weights -127..127, added
// up in 32 bits. Included only by sources in kernels/.
//
// No product and no sum of products saturates, whatever the numbers, so that every instruction set has the same sums.
// Level is a level as it is stored, PackedWeight a weight; kGroup inputs lie in each 32-bit lane of what Dot() takes.
//   AVX512_VNNI, AVX_VNNI  vpdpbusd: 8 bits, 4 products a lane
//   AVX-512, AVX2          vpmaddwd on 16 bits, 2 products a lane: vpmaddubsw on 8 bits would saturate at 16
//   NEON                   smlal on 16 bits
//   NEON with dotprod      sdot: 8 bits, 4 products a lane, signed only: level - 128 is stored
#pragma once

#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// Of ints, which __m512i and __m256i are not: GCC 12 keeps each accumulator in two registers where the type changes in
// the loop, and spills half of them.
#if defined(__AVX512F__)

typedef int32_t IntVec __attribute__((vector_size(64)));
ATTN_DEPLOY_INLINE IntVec LoadInts(const int32_t* p) { return reinterpret_cast<IntVec>(_mm512_loadu_si512(p)); }
ATTN_DEPLOY_INLINE IntVec BroadcastInt(int32_t v) { return reinterpret_cast<IntVec>(_mm512_set1_epi32(v)); }
ATTN_DEPLOY_INLINE IntVec Multiply(IntVec a, IntVec b) {
  return reinterpret_cast<IntVec>(_mm512_mullo_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
ATTN_DEPLOY_INLINE Vec ToFloat(IntVec v) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(v)); }

#elif defined(__AVX2__)

typedef int32_t IntVec __attribute__((vector_size(32)));
ATTN_DEPLOY_INLINE IntVec LoadInts(const int32_t* p) {
  return reinterpret_cast<IntVec>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ATTN_DEPLOY_INLINE IntVec BroadcastInt(int32_t v) { return reinterpret_cast<IntVec>(_mm256_set1_epi32(v)); }
ATTN_DEPLOY_INLINE IntVec Multiply(IntVec a, IntVec b) {
  return reinterpret_cast<IntVec>(_mm256_mullo_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
ATTN_DEPLOY_INLINE Vec ToFloat(IntVec v) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(v)); }

#else

using IntVec = int32x4_t;
ATTN_DEPLOY_INLINE IntVec LoadInts(const int32_t* p) { return vld1q_s32(p); }
ATTN_DEPLOY_INLINE IntVec BroadcastInt(int32_t v) { return vdupq_n_s32(v); }
ATTN_DEPLOY_INLINE IntVec Multiply(IntVec a, IntVec b) { return vmulq_s32(a, b); }
ATTN_DEPLOY_INLINE Vec ToFloat(IntVec v) { return vcvtq_f32_s32(v); }

#endif

// Vectors of kLanes lanes of kGroup levels or weights. BroadcastLevels: kGroup levels, in every lane. LoadWeights: a
// lane a column. Dot: sum + the products of each lane.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

using Level = uint8_t;
using PackedWeight = int8_t;
constexpr int kGroup = 4;
constexpr int kLevelOffset = 0;  // what is taken from a level before it is stored

#if defined(__AVX512VNNI__)
ATTN_DEPLOY_INLINE IntVec Dot(IntVec sum, IntVec levels, IntVec weights) {
  return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                      reinterpret_cast<__m512i>(levels),
                                                      reinterpret_cast<__m512i>(weights)));
}
#else
ATTN_DEPLOY_INLINE IntVec Dot(IntVec sum, IntVec levels, IntVec weights) {
  return reinterpret_cast<IntVec>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum),
                                                          reinterpret_cast<__m256i>(levels),
                                                          reinterpret_cast<__m256i>(weights)));
}
#endif

#elif defined(__AVX2__)

using Level = int16_t;
using PackedWeight = int16_t;
constexpr int kGroup = 2;
constexpr int kLevelOffset = 0;

#if defined(__AVX512F__)
ATTN_DEPLOY_INLINE IntVec Dot(IntVec sum, IntVec levels, IntVec weights) {
  const __m512i products =
      _mm512_madd_epi16(reinterpret_cast<__m512i>(levels), reinterpret_cast<__m512i>(weights));
  // Written out, or GCC adds up the products of several steps first, and keeps them in memory till then.
  __asm__("vpaddd %1, %0, %0" : "+v"(sum) : "v"(products));
  return sum;
}
#else
ATTN_DEPLOY_INLINE IntVec Dot(IntVec sum, IntVec levels, IntVec weights) {
  const __m256i products =
      _mm256_madd_epi16(reinterpret_cast<__m256i>(levels), reinterpret_cast<__m256i>(weights));
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
  return sum;
}
#endif

#elif defined(__ARM_FEATURE_DOTPROD)

using Level = int8_t;
using PackedWeight = int8_t;
constexpr int kGroup = 4;
constexpr int kLevelOffset = 128;

using LevelVec = int8x16_t;
using WeightVec = int8x16_t;
ATTN_DEPLOY_INLINE LevelVec BroadcastLevels(const Level* p) {
  int32_t group;
  __builtin_memcpy(&group, p, sizeof group);
  return vreinterpretq_s8_s32(vdupq_n_s32(group));
}
ATTN_DEPLOY_INLINE WeightVec LoadWeights(const PackedWeight* p) { return vld1q_s8(p); }
ATTN_DEPLOY_INLINE IntVec Dot(IntVec sum, LevelVec levels, WeightVec weights) {
  return vdotq_s32(sum, levels, weights);
}

#else

using Level = int16_t;
using PackedWeight = int16_t;
constexpr int kGroup = 1;
constexpr int kLevelOffset = 0;

using LevelVec = int16x4_t;
using WeightVec = int16x4_t;
ATTN_DEPLOY_INLINE LevelVec BroadcastLevels(const Level* p) { return vld1_dup_s16(p); }
ATTN_DEPLOY_INLINE WeightVec LoadWeights(const PackedWeight* p) { return vld1_s16(p); }
ATTN_DEPLOY_INLINE IntVec Dot(IntVec sum, LevelVec levels, WeightVec weights) {
  return vmlal_s16(sum, levels, weights);
}

#endif

#if defined(__AVX2__)
using LevelVec = IntVec;
using WeightVec = IntVec;
ATTN_DEPLOY_INLINE LevelVec BroadcastLevels(const Level* p) {
  int32_t group;
  __builtin_memcpy(&group, p, sizeof group);
  return BroadcastInt(group);
}
ATTN_DEPLOY_INLINE WeightVec LoadWeights(const PackedWeight* p) {
  return LoadInts(reinterpret_cast<const int32_t*>(p));
}
#endif

ATTN_DEPLOY_INLINE int64_t LevelGroups(int64_t inputs) { return (inputs + kGroup - 1) / kGroup; }

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
