#include "channel_pool.h"

#include "vector_sums.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

constexpr int kAccumulators = 4;
constexpr int64_t kStep = kAccumulators * kLanes;
// Pixels that are added plainly, eight by each lane of an accumulator, before they go to the compensated sum.
constexpr int64_t kChunk = 8 * kStep;

// What one pass over a plane collects. A plane of one chunk needs no compensated sum.
template <bool kMean, bool kMaximum>
struct Pool {
  CompensatedSum chunks;
  Vec sums[kAccumulators];
  Vec largest[kAccumulators];

  __attribute__((always_inline)) void Take(int accumulator, Vec v) {
    if constexpr (kMean) sums[accumulator] = sums[accumulator] + v;
    if constexpr (kMaximum) largest[accumulator] = MaxOrNan(largest[accumulator], v);
  }

  __attribute__((always_inline)) void ClearSums() {
    ATTN_DEPLOY_UNROLL
    for (int a = 0; a < kAccumulators; ++a) sums[a] = Zero();
  }

  __attribute__((always_inline)) void Run(const float* x, int64_t pixels) {
    ClearSums();
    ATTN_DEPLOY_UNROLL
    for (int a = 0; a < kAccumulators; ++a) largest[a] = Broadcast(-__builtin_inff());
    while (pixels >= kStep) {
      const int64_t end = Minimum(kChunk, pixels - pixels % kStep);
      for (int64_t i = 0; i < end; i += kStep) {
        ATTN_DEPLOY_UNROLL
        for (int a = 0; a < kAccumulators; ++a) Take(a, Load(x + i + a * kLanes));
      }
      x += end;
      pixels -= end;
      if (kMean && pixels >= kStep) {
        chunks.Add(AddFour(sums));
        ClearSums();
      }
    }
    ATTN_DEPLOY_UNROLL
    for (int a = 0; a < kAccumulators - 1; ++a) {
      if (pixels < kLanes) break;
      Take(a, Load(x));
      x += kLanes;
      pixels -= kLanes;
    }
    if (pixels > 0) TakePartial(x, pixels);
  }

  __attribute__((always_inline)) void TakePartial(const float* x, int64_t pixels) {
    const Vec v = LoadPartial(x, pixels);
    if constexpr (kMean) sums[kAccumulators - 1] = sums[kAccumulators - 1] + v;
    if constexpr (kMaximum) {  // the lanes beyond are 0, which may exceed every pixel
      const Vec only = IfLess(LaneNumbers(), Broadcast(static_cast<float>(pixels)), v, Broadcast(-__builtin_inff()));
      largest[kAccumulators - 1] = MaxOrNan(largest[kAccumulators - 1], only);
    }
  }

  __attribute__((always_inline)) float Mean(int64_t pixels) {
    if (pixels < kChunk + kStep) return ReduceAdd(AddFour(sums)) / static_cast<float>(pixels);
    chunks.Add(AddFour(sums));
    return ReduceAdd(chunks.Total()) / static_cast<float>(pixels);
  }

  __attribute__((always_inline)) float Maximum() const {
    const Vec v = MaxOrNan(MaxOrNan(largest[0], largest[1]), MaxOrNan(largest[2], largest[3]));
    return HasNan(v) ? __builtin_nanf("") : ReduceMax(v);
  }
};

template <bool kMean, bool kMaximum>
void Run(const float* x, int64_t planes, int64_t pixels, float* mean, float* maximum) {
  for (int64_t plane = 0; plane < planes; ++plane, x += pixels) {
    Pool<kMean, kMaximum> pool;
    pool.Run(x, pixels);
    if constexpr (kMean) mean[plane] = pool.Mean(pixels);
    if constexpr (kMaximum) maximum[plane] = pool.Maximum();
  }
}

}  // namespace

void ChannelPool(const float* x, int64_t planes, int64_t pixels, float* mean, float* maximum) {
  if (mean != nullptr && maximum != nullptr) return Run<true, true>(x, planes, pixels, mean, maximum);
  if (mean != nullptr) return Run<true, false>(x, planes, pixels, mean, nullptr);
  if (maximum != nullptr) return Run<false, true>(x, planes, pixels, nullptr, maximum);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
