// How many INT8 operations a second the threads of this machine do at most: dot products of 8 bit by 8 bit added up in
// 32 bit, on registers, all threads at once. Compiled by bench/roofline.py with -O2 -march=native.
// peak_int8 THREADS SECONDS -> GOP/s on stdout, a multiply-add counted as two.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
using Vec = __m512i;
static Vec Broadcast(int8_t v) { return _mm512_set1_epi8(v); }
static inline Vec Dot(Vec sum, Vec a, Vec b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
#include <immintrin.h>
using Vec = __m256i;
static Vec Broadcast(int8_t v) { return _mm256_set1_epi8(v); }
static inline Vec Dot(Vec sum, Vec a, Vec b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
using Vec = int8x16_t;
static Vec Broadcast(int8_t v) { return vdupq_n_s8(v); }
static inline Vec Dot(Vec sum, Vec a, Vec b) {
  return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sum), a, b));
}
#else
#error "no dot product of bytes to measure"
#endif

using Clock = std::chrono::steady_clock;

static double Seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

static volatile int32_t sink;  // what is computed has to go somewhere, or the compiler leaves the work out

// Ten chains, as in peak.cc: more than two units of latency 5 are busy with.
static double RunThread(double seconds) {
  constexpr int kSteps = 20000;
  // Each from a number of its own, or the compiler sees that all are one.
  Vec a = Broadcast(0), b = Broadcast(1), c = Broadcast(2), d = Broadcast(3), e = Broadcast(4);
  Vec f = Broadcast(5), g = Broadcast(6), h = Broadcast(7), i = Broadcast(8), j = Broadcast(9);
  const Vec x = Broadcast(11), y = Broadcast(-13);
  int64_t rounds = 0;
  const auto start = Clock::now();
  while (Seconds(start) < seconds) {
    for (int step = 0; step < kSteps; ++step) {
      a = Dot(a, x, y), b = Dot(b, x, y), c = Dot(c, x, y), d = Dot(d, x, y), e = Dot(e, x, y);
      f = Dot(f, x, y), g = Dot(g, x, y), h = Dot(h, x, y), i = Dot(i, x, y), j = Dot(j, x, y);
    }
    ++rounds;
  }
  const double elapsed = Seconds(start);
  for (const Vec& v : {a, b, c, d, e, f, g, h, i, j}) {
    int32_t lane;
    std::memcpy(&lane, &v, sizeof lane);
    sink = lane;
  }
  return 2.0 * 10 * sizeof(Vec) * kSteps * static_cast<double>(rounds) / elapsed / 1e9;
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
