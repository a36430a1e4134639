// How many INT8 operations a second the threads of this machine do at most: dot products of 8 bit by 8 bit added up in
// 32 bit, on registers, all threads at once. Compiled by bench/roofline.py with -O2 -march=native.
// peak_int8 THREADS SECONDS -> GOP/s on stdout, a multiply-add counted as two.
#include <cstdint>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
using Vec = __m512i;
static Vec Broadcast(int8_t v) { return _mm512_set1_epi8(v); }
static inline Vec Operation(Vec sum, Vec a, Vec b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
#include <immintrin.h>
using Vec = __m256i;
static Vec Broadcast(int8_t v) { return _mm256_set1_epi8(v); }
static inline Vec Operation(Vec sum, Vec a, Vec b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
using Vec = int8x16_t;
static Vec Broadcast(int8_t v) { return vdupq_n_s8(v); }
static inline Vec Operation(Vec sum, Vec a, Vec b) {
  return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sum), a, b));
}
#else
#error "no dot product of bytes to measure"
#endif

constexpr int kProducts = sizeof(Vec);
constexpr int8_t kFirst = 11, kSecond = -13;

#include "peak.h"
