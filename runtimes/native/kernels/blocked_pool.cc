#include "blocked_pool.h"

#include "blocked.h"
#include "vector_sums.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Pixels whose values are added plainly, by four accumulators, before they go to the compensated sum.
constexpr int kAccumulators = 4;
constexpr int64_t kPixels = 8 * kAccumulators;

// One vector of channels; `kStride` floats from pixel to pixel.
template <int64_t kStride>
Vec SumOf(int64_t pixels, const float* x) {
  const int64_t whole = pixels - pixels % kAccumulators;
  CompensatedSum total;
  int64_t pixel = 0;
  while (pixel < whole) {
    const int64_t end = Minimum(pixel + kPixels, whole);
    Vec sums[kAccumulators] = {Zero(), Zero(), Zero(), Zero()};
    for (; pixel < end; pixel += kAccumulators) {
      ATTN_DEPLOY_UNROLL
      for (int a = 0; a < kAccumulators; ++a) sums[a] = sums[a] + Load(x + (pixel + a) * kStride);
    }
    total.Add(AddFour(sums));
  }
  for (; pixel < pixels; ++pixel) total.Add(Load(x + pixel * kStride));
  return total.Total();
}

}  // namespace

void BlockedSum(int64_t block, int64_t pixels, const float* x, float* sums) {
  WithVectorsOf(block, [&](auto vectors) {
    constexpr int64_t kStride = decltype(vectors)::value * kLanes;
    for (int64_t at = 0; at < kStride; at += kLanes) Store(sums + at, SumOf<kStride>(pixels, x + at));
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
