// Vectors of floats for one instruction set: what kernels are written in. Included only by sources in kernels/, which
// are compiled once per instruction set with ATTN_DEPLOY_ISA as their namespace.
//
// Nothing here or in a kernel source may be an inline function outside that namespace (templates of the standard
// library included): the linker keeps one copy of such a function, which may be the one compiled for AVX-512, and
// would then run everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "kernels need AVX2 and FMA, AVX-512 or NEON"
#endif

#ifndef ATTN_DEPLOY_ISA
#error "ATTN_DEPLOY_ISA names the namespace of this instruction set"
#endif

#define ATTN_DEPLOY_INLINE static inline __attribute__((always_inline))

// Before a loop over registers, which -O2 alone would leave a loop over memory.
#if defined(__clang__)
#define ATTN_DEPLOY_UNROLL _Pragma("unroll")
#else
#define ATTN_DEPLOY_UNROLL _Pragma("GCC unroll 16")
#endif

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

ATTN_DEPLOY_INLINE Vec Zero() { return _mm512_setzero_ps(); }
ATTN_DEPLOY_INLINE Vec Broadcast(float v) { return _mm512_set1_ps(v); }
ATTN_DEPLOY_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
ATTN_DEPLOY_INLINE void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
// The first `count` lanes, 0 <= count <= kLanes; the others are 0 and their memory is not touched.
ATTN_DEPLOY_INLINE Vec LoadPartial(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
ATTN_DEPLOY_INLINE void StorePartial(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
// v with 0 in all lanes but the first `count`.
ATTN_DEPLOY_INLINE Vec FirstLanes(Vec v, int64_t count) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << count) - 1), v);
}
// a * b + c, and c - a * b, with one rounding.
ATTN_DEPLOY_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
ATTN_DEPLOY_INLINE Vec NegFma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
// As the instruction has it: the second operand where one is NaN.
ATTN_DEPLOY_INLINE Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
ATTN_DEPLOY_INLINE Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
ATTN_DEPLOY_INLINE Vec Abs(Vec v) { return _mm512_abs_ps(v); }
ATTN_DEPLOY_INLINE Vec Sqrt(Vec v) { return _mm512_sqrt_ps(v); }
ATTN_DEPLOY_INLINE float ReduceAdd(Vec v) { return _mm512_reduce_add_ps(v); }
ATTN_DEPLOY_INLINE float ReduceMax(Vec v) { return _mm512_reduce_max_ps(v); }
// v * 2^n for n the nearest integers to `power`, at most 127 in size; subnormal results are 0 where flushed.
ATTN_DEPLOY_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec power) { return _mm512_scalef_ps(v, power); }
ATTN_DEPLOY_INLINE Vec RoundToNearest(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Lanes of `yes` where a < b, else of `no`; `no` where one is NaN.
ATTN_DEPLOY_INLINE Vec IfLess(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// The larger; NaN where one is NaN.
ATTN_DEPLOY_INLINE Vec MaxOrNan(Vec a, Vec b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(b, a), _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), b);
}
ATTN_DEPLOY_INLINE bool HasNan(Vec v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
// What op(Vec, Vec) makes of all lanes of v[0], of v[1], of v[2] and of v[3], in lanes 0 to 3.
template <typename Op>
ATTN_DEPLOY_INLINE Vec ReduceFour(const Vec (&v)[4], const Op& op) {
  const Vec a = op(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const Vec b = op(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const Vec four = op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const Vec halves = op(four, _mm512_shuffle_f32x4(four, four, 0x4e));
  return op(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

ATTN_DEPLOY_INLINE __m256i LaneMask(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
}
ATTN_DEPLOY_INLINE Vec Zero() { return _mm256_setzero_ps(); }
ATTN_DEPLOY_INLINE Vec Broadcast(float v) { return _mm256_set1_ps(v); }
ATTN_DEPLOY_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
ATTN_DEPLOY_INLINE void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
ATTN_DEPLOY_INLINE Vec LoadPartial(const float* p, int64_t count) { return _mm256_maskload_ps(p, LaneMask(count)); }
ATTN_DEPLOY_INLINE void StorePartial(float* p, Vec v, int64_t count) { _mm256_maskstore_ps(p, LaneMask(count), v); }
ATTN_DEPLOY_INLINE Vec FirstLanes(Vec v, int64_t count) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(LaneMask(count)));
}
ATTN_DEPLOY_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
ATTN_DEPLOY_INLINE Vec NegFma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
ATTN_DEPLOY_INLINE Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
ATTN_DEPLOY_INLINE Vec Min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
ATTN_DEPLOY_INLINE Vec Abs(Vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
ATTN_DEPLOY_INLINE Vec Sqrt(Vec v) { return _mm256_sqrt_ps(v); }
ATTN_DEPLOY_INLINE float ReduceAdd(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
ATTN_DEPLOY_INLINE float ReduceMax(Vec v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
ATTN_DEPLOY_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec power) {
  // The exponent's bits; -127 gives 0.
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
}
ATTN_DEPLOY_INLINE Vec RoundToNearest(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ATTN_DEPLOY_INLINE Vec IfLess(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
ATTN_DEPLOY_INLINE Vec MaxOrNan(Vec a, Vec b) {
  return _mm256_blendv_ps(_mm256_max_ps(b, a), b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
}
ATTN_DEPLOY_INLINE bool HasNan(Vec v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
template <typename Op>
ATTN_DEPLOY_INLINE Vec ReduceFour(const Vec (&v)[4], const Op& op) {
  const Vec a = op(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
  const Vec b = op(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
  const Vec four = op(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  return op(four, _mm256_permute2f128_ps(four, four, 0x01));
}

#else

using Vec = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;

ATTN_DEPLOY_INLINE Vec Zero() { return vdupq_n_f32(0.0f); }
ATTN_DEPLOY_INLINE Vec Broadcast(float v) { return vdupq_n_f32(v); }
ATTN_DEPLOY_INLINE Vec Load(const float* p) { return vld1q_f32(p); }
ATTN_DEPLOY_INLINE void Store(float* p, Vec v) { vst1q_f32(p, v); }
ATTN_DEPLOY_INLINE Vec LoadPartial(const float* p, int64_t count) {
  float lanes[4] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
ATTN_DEPLOY_INLINE void StorePartial(float* p, Vec v, int64_t count) {
  float lanes[4];
  vst1q_f32(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
ATTN_DEPLOY_INLINE Vec FirstLanes(Vec v, int64_t count) {
  float lanes[4];
  vst1q_f32(lanes, v);
  return LoadPartial(lanes, count);
}
ATTN_DEPLOY_INLINE Vec Fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
ATTN_DEPLOY_INLINE Vec NegFma(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
// Written out, since NEON's own give NaN where one operand is NaN and x86's give the second operand.
ATTN_DEPLOY_INLINE Vec Max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
ATTN_DEPLOY_INLINE Vec Min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
ATTN_DEPLOY_INLINE Vec Abs(Vec v) { return vabsq_f32(v); }
ATTN_DEPLOY_INLINE Vec Sqrt(Vec v) { return vsqrtq_f32(v); }
ATTN_DEPLOY_INLINE float ReduceAdd(Vec v) { return vaddvq_f32(v); }
ATTN_DEPLOY_INLINE float ReduceMax(Vec v) { return vmaxvq_f32(v); }
ATTN_DEPLOY_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec power) {
  const int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(power), vdupq_n_s32(127)), 23);
  return vmulq_f32(v, vreinterpretq_f32_s32(bits));
}
ATTN_DEPLOY_INLINE Vec RoundToNearest(Vec v) { return vrndnq_f32(v); }
ATTN_DEPLOY_INLINE Vec IfLess(Vec a, Vec b, Vec yes, Vec no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
ATTN_DEPLOY_INLINE Vec MaxOrNan(Vec a, Vec b) { return vmaxq_f32(a, b); }
ATTN_DEPLOY_INLINE bool HasNan(Vec v) { return vminvq_u32(vceqq_f32(v, v)) == 0; }
template <typename Op>
ATTN_DEPLOY_INLINE Vec ReduceFour(const Vec (&v)[4], const Op& op) {
  const float64x2_t a = vreinterpretq_f64_f32(op(vtrn1q_f32(v[0], v[1]), vtrn2q_f32(v[0], v[1])));
  const float64x2_t b = vreinterpretq_f64_f32(op(vtrn1q_f32(v[2], v[3]), vtrn2q_f32(v[2], v[3])));
  return op(vreinterpretq_f32_f64(vtrn1q_f64(a, b)), vreinterpretq_f32_f64(vtrn2q_f64(a, b)));
}

#endif

// 0, 1, 2 and so on.
ATTN_DEPLOY_INLINE Vec LaneNumbers() {
  static const float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Load(numbers);
}

// Sums, differences, products and quotients of vectors: the compiler's own operators on these types.

ATTN_DEPLOY_INLINE int64_t Minimum(int64_t a, int64_t b) { return a < b ? a : b; }
ATTN_DEPLOY_INLINE int64_t Maximum(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
