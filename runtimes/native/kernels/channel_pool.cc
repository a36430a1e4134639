#include "channel_pool.h"

#include "vector_sums.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

constexpr int kAccumulators = 4;
// Terms that an accumulator takes before it goes to the compensated sum.
constexpr int64_t kTerms = 8;
constexpr int64_t kStep = kAccumulators * kLanes;

// What one pass over a plane collects.
template <bool kMean, bool kMaximum>
struct Pool {
  CompensatedSum sum;
  Vec largest[kAccumulators];

  void Run(const float* x, int64_t pixels) {
    for (Vec& v : largest) v = Broadcast(-__builtin_inff());
    const int64_t whole_steps = pixels - pixels % kStep;
    int64_t i = 0;
    while (i < whole_steps) {
      const int64_t end = Minimum(i + kTerms * kStep, whole_steps);
      Vec sums[kAccumulators] = {Zero(), Zero(), Zero(), Zero()};
      for (; i < end; i += kStep) {
        ATTN_DEPLOY_UNROLL
        for (int a = 0; a < kAccumulators; ++a) {
          const Vec v = Load(x + i + a * kLanes);
          if constexpr (kMean) sums[a] = sums[a] + v;
          if constexpr (kMaximum) largest[a] = MaxOrNan(largest[a], v);
        }
      }
      if constexpr (kMean) sum.Add(AddFour(sums));
    }
    RunRest(x + i, pixels - i);
  }

  void RunRest(const float* x, int64_t pixels) {
    Vec rest = Zero();
    for (; pixels >= kLanes; pixels -= kLanes, x += kLanes) {
      rest = rest + Load(x);
      if constexpr (kMaximum) largest[0] = MaxOrNan(largest[0], Load(x));
    }
    if (pixels > 0) {
      rest = rest + LoadPartial(x, pixels);
      if constexpr (kMaximum) {
        float lanes[kLanes];
        Store(lanes, Broadcast(-__builtin_inff()));
        StorePartial(lanes, LoadPartial(x, pixels), pixels);
        largest[0] = MaxOrNan(largest[0], Load(lanes));
      }
    }
    if constexpr (kMean) sum.Add(rest);
  }

  float Mean(int64_t pixels) const { return ReduceAdd(sum.Total()) / static_cast<float>(pixels); }

  float Maximum() const {
    float lanes[kLanes];
    Store(lanes, MaxOrNan(MaxOrNan(largest[0], largest[1]), MaxOrNan(largest[2], largest[3])));
    float maximum = lanes[0];
    for (const float v : lanes) {
      if (!(v <= maximum)) maximum = v;  // also where v is NaN
      if (maximum != maximum) break;
    }
    return maximum;
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
