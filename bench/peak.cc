// How many FP32 operations a second the threads of this machine do at most: fused multiply-adds on registers, all
// threads at once. Compiled by bench/roofline.py with -O2 -march=native. peak THREADS SECONDS -> GFLOP/s on stdout.
#if defined(__AVX512F__)
#include <immintrin.h>
using Vec = __m512;
static Vec Broadcast(float v) { return _mm512_set1_ps(v); }
static inline Vec Operation(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
#include <immintrin.h>
using Vec = __m256;
static Vec Broadcast(float v) { return _mm256_set1_ps(v); }
static inline Vec Operation(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__aarch64__)
#include <arm_neon.h>
using Vec = float32x4_t;
static Vec Broadcast(float v) { return vdupq_n_f32(v); }
static inline Vec Operation(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
#else
#error "no fused multiply-add to measure"
#endif

constexpr int kProducts = sizeof(Vec) / sizeof(float);
constexpr float kFirst = 0.999f, kSecond = 0.001f;

#include "peak.h"
