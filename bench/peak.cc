// How many FP32 operations a second the threads of this machine do at most: fused multiply-adds on registers, all
// threads at once. Compiled by bench/roofline.py with -O2 -march=native. peak THREADS SECONDS -> GFLOP/s on stdout.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
using Vec = __m512;
static Vec Broadcast(float v) { return _mm512_set1_ps(v); }
static inline Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
#include <immintrin.h>
using Vec = __m256;
static Vec Broadcast(float v) { return _mm256_set1_ps(v); }
static inline Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__aarch64__)
#include <arm_neon.h>
using Vec = float32x4_t;
static Vec Broadcast(float v) { return vdupq_n_f32(v); }
static inline Vec Fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
#else
#error "no fused multiply-add to measure"
#endif

using Clock = std::chrono::steady_clock;

static double Seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

static volatile float sink;  // what is computed has to go somewhere, or the compiler leaves the work out

// Ten chains: two units of latency 5 are busy with as many, and 16 registers hold them.
static double RunThread(double seconds) {
  constexpr int kSteps = 20000;
  // Each from a number of its own, or the compiler sees that all are one.
  Vec a = Broadcast(0), b = Broadcast(1), c = Broadcast(2), d = Broadcast(3), e = Broadcast(4);
  Vec f = Broadcast(5), g = Broadcast(6), h = Broadcast(7), i = Broadcast(8), j = Broadcast(9);
  const Vec x = Broadcast(0.999f), y = Broadcast(0.001f);
  int64_t rounds = 0;
  const auto start = Clock::now();
  while (Seconds(start) < seconds) {
    for (int step = 0; step < kSteps; ++step) {
      a = Fma(a, x, y), b = Fma(b, x, y), c = Fma(c, x, y), d = Fma(d, x, y), e = Fma(e, x, y);
      f = Fma(f, x, y), g = Fma(g, x, y), h = Fma(h, x, y), i = Fma(i, x, y), j = Fma(j, x, y);
    }
    ++rounds;
  }
  const double elapsed = Seconds(start);
  for (const Vec& v : {a, b, c, d, e, f, g, h, i, j}) sink = reinterpret_cast<const float&>(v);
  return 2.0 * 10 * (sizeof(Vec) / sizeof(float)) * kSteps * static_cast<double>(rounds) / elapsed / 1e9;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[2]);
  std::vector<double> rates(threads);
  std::vector<std::thread> running;
  for (double& rate : rates) running.emplace_back([&rate, seconds] { rate = RunThread(seconds); });
  for (std::thread& thread : running) thread.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  std::printf("%.1f\n", sum);
  return 0;
}
