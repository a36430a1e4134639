// Vectors of 8-bit levels as floats, and floats as levels. Included only by sources in kernels/.
#pragma once

#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// kLanes levels as floats; the first `count` of them, the other lanes 0 and their memory not touched.
// StoreLevels rounds to the nearest, ties to even; v lies in [0, 255].
#if defined(__AVX512F__)

ATTN_DEPLOY_INLINE Vec LevelsOf(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
ATTN_DEPLOY_INLINE Vec LoadLevels(const uint8_t* p) {
  return LevelsOf(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ATTN_DEPLOY_INLINE Vec LoadLevels(const uint8_t* p, int64_t count) {
  return LevelsOf(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), p));
}
ATTN_DEPLOY_INLINE void StoreLevels(uint8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
ATTN_DEPLOY_INLINE void StoreLevels(uint8_t* p, Vec v, int64_t count) {
  _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << count) - 1), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

#else

#if defined(__AVX2__)

ATTN_DEPLOY_INLINE Vec LoadLevels(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
ATTN_DEPLOY_INLINE void StoreLevels(uint8_t* p, Vec v) {
  const __m256i levels = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(levels), _mm256_extracti128_si256(levels, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

#else

ATTN_DEPLOY_INLINE Vec LoadLevels(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
ATTN_DEPLOY_INLINE void StoreLevels(uint8_t* p, Vec v) {
  const uint16x4_t words = vmovn_u32(vcvtnq_u32_f32(v));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
  __builtin_memcpy(p, &four, sizeof four);
}

#endif

ATTN_DEPLOY_INLINE Vec LoadLevels(const uint8_t* p, int64_t count) {
  uint8_t lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return LoadLevels(lanes);
}
ATTN_DEPLOY_INLINE void StoreLevels(uint8_t* p, Vec v, int64_t count) {
  uint8_t lanes[kLanes];
  StoreLevels(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

#endif

// v as a level not below `low`, still a float.
ATTN_DEPLOY_INLINE Vec ClampLevel(Vec v, float low) { return Min(Broadcast(255.0f), Max(Broadcast(low), v)); }

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
