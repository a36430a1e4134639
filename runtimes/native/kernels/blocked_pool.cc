#include "blocked_pool.h"

#include "blocked.h"
#include "vector_activations.h"
#include "vector_sums.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Pixels whose values are added plainly, by four accumulators, before they go to the compensated sum.
constexpr int64_t kAccumulators = 4;
constexpr int64_t kPixels = 8 * kAccumulators;

// One vector of channels; `kStride` floats from pixel to pixel.
template <Activation kActivation, bool kWrites, int64_t kStride>
Vec SumOf(int64_t pixels, const float* x, float* y) {
  const auto take = [&](int64_t pixel) __attribute__((always_inline)) {
    const Vec v = Activated<kActivation>(Load(x + pixel * kStride));
    if constexpr (kWrites) Store(y + pixel * kStride, v);
    return v;
  };
  const int64_t whole = pixels - pixels % kAccumulators;
  CompensatedSum total;
  int64_t pixel = 0;
  while (pixel < whole) {
    const int64_t end = Minimum(pixel + kPixels, whole);
    Vec a = Zero(), b = Zero(), c = Zero(), d = Zero();
    for (; pixel < end; pixel += kAccumulators) {
      a = a + take(pixel);
      b = b + take(pixel + 1);
      c = c + take(pixel + 2);
      d = d + take(pixel + 3);
    }
    total.Add((a + b) + (c + d));
  }
  for (; pixel < pixels; ++pixel) total.Add(take(pixel));
  return total.Total();
}

}  // namespace

void BlockedSum(Activation activation, int64_t block, int64_t pixels, const float* x, float* y, float* sums) {
  WithActivation(activation, [&](auto form) {
    constexpr Activation kActivation = decltype(form)::value;
    WithVectorsOf(block, [&](auto vectors) {
      constexpr int64_t kStride = decltype(vectors)::value * kLanes;
      for (int64_t at = 0; at < kStride; at += kLanes) {
        const Vec sum = y == nullptr ? SumOf<kActivation, false, kStride>(pixels, x + at, nullptr)
                                     : SumOf<kActivation, true, kStride>(pixels, x + at, y + at);
        Store(sums + at, sum);
      }
    });
  });
}

void BlockedMean(int64_t block, int64_t parts, int64_t pixels, const float* sums, float* mean) {
  for (int64_t at = 0; at < block; at += kLanes) {
    CompensatedSum total;
    for (int64_t part = 0; part < parts; ++part) total.Add(Load(sums + part * block + at));
    Store(mean + at, total.Total() / Broadcast(static_cast<float>(pixels)));
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
